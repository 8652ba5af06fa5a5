"""What the checks of benchmarks/gpu_check.py found, and the report that is made of it."""
from dataclasses import dataclass, field
from typing import Literal

from utils import cli
from utils.files import few

Verdict = Literal["held", "did not hold", "error", "not tried", "measured"]
WORDS: dict[bool | None, Verdict] = {False: "did not hold", True: "held", None: "measured"}  # the worst first
LINE = 300  # characters of a verdict's reason at most


@dataclass(frozen=True)
class CheckResult:
    """One comparison: whether it came out as promised (None: nothing was promised), its numbers, and what more there is
    to say in the report, such as what a command that failed wrote."""

    held: bool | None
    text: str
    detail: str = ""


class NotTriedError(Exception):
    """A check that this machine cannot do; the message says what is missing."""


def within(name: str, value: float, bound: float) -> CheckResult:
    """A difference and what it may be at most; NaN is too much."""
    return CheckResult(value <= bound, f"{name}: {value:.2g}, allowed {bound:.2g}")


@dataclass(kw_only=True)
class Outcome:
    """What a check found, and what ended it before its time."""

    findings: list[CheckResult] = field(default_factory=list)
    missing: str = ""  # what the machine lacks
    error: str = ""  # one line
    traceback: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """In one word or a few."""
        held = {finding.held for finding in self.findings}
        if self.error or self.missing:
            return "error" if self.error else "did not hold" if False in held else "not tried"
        return next(word for value, word in WORDS.items() if value in held or value is None)

    @property
    def bad(self) -> bool:
        """Whether somebody has to look into it."""
        return self.verdict in ("did not hold", "error")

    @property
    def line(self) -> str:
        """The verdict's reason in one line."""
        wrong = [finding.text for finding in self.findings if finding.held is False]
        promised = sum(finding.held is not None for finding in self.findings)
        count = f"{promised - len(wrong)} of {promised} comparisons held" if promised else "nothing was promised"
        parts = [count if self.findings else "", self.error or self.missing, few(wrong, most=1)]
        return cli.one_line("; ".join(filter(None, parts)))[:LINE]


def written(outcomes: dict[str, Outcome], about: dict[str, str], *, purposes: dict[str, str], left: list[str]) -> str:
    """The report in Markdown. `about`: versions and the like; `purposes`: what each check is for; `left`: to come."""
    bad = [name for name, outcome in outcomes.items() if outcome.bad]
    result = f"Did not hold: {', '.join(bad)}." if bad else "Nothing failed."
    parts = ["# GPU check\n", f"{result} {about['device']}.{f' Not finished, to come: {few(left)}.' if left else ''}\n",
             "| check | verdict | why | seconds |\n|---|---|---|---|"]
    for name, outcome in outcomes.items():
        why = outcome.line.replace("|", "\\|")
        parts.append(f"| {name} | {outcome.verdict} | {why} | {outcome.seconds:.0f} |")
    parts += ["\n## Versions\n", *(f"- {name}: {value}" for name, value in about.items())]
    for name, outcome in outcomes.items():
        parts.append(f"\n## {name}: {outcome.verdict}\n\n{purposes[name]}\n")
        parts += [f"- {WORDS[finding.held]}: {cli.one_line(finding.text)}" for finding in outcome.findings]
        parts += [f"- {outcome.verdict}: {text}" for text in (outcome.error, outcome.missing) if text]
        texts = [*(finding.detail for finding in outcome.findings), outcome.traceback]
        parts += [f"\n```\n{text.strip()}\n```" for text in texts if text.strip()]
    return "\n".join(parts) + "\n"
