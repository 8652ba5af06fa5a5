"""Does everything work on this machine's GPU? Tries it and writes a report.

    bash scripts/gpu_check.sh                         # on a GPU up to ten minutes; makes .venv first
    python3 benchmarks/gpu_check.py --checks parity,graphs --report parity.md

Each check (sampling_checks.py, training_checks.py) runs in a process of its own, so that an error, a crash or a lack of
memory ends that check alone. The report is rewritten after each. Exit status: 0 nothing failed, 1 something did, 2 a
user's mistake. On a CPU the checks take small models. All of it was run on CPUs only so far, never on a GPU.
"""
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sampling_checks, training_checks
from benchmarks.check_report import CheckResult, NotTriedError, Outcome, written
from benchmarks.machine import nvidia_cards, versions
from benchmarks.training_checks import STDERR_KEPT
from utils import cli, dist
from utils.cli import flag
from utils.files import first_line, replacing
from utils.options import DeviceFlags

Check = Callable[[torch.device], Iterator[CheckResult]]
CHECKS: dict[str, Check] = {
    "device": sampling_checks.check_device, "parity": sampling_checks.check_parity,
    "graphs": sampling_checks.check_graphs, "half": sampling_checks.check_half,
    "batches": sampling_checks.check_batches, "training": training_checks.check_training,
    "compile": training_checks.check_compile, "speed": training_checks.check_benchmarks}


@dataclass(kw_only=True)
class GPUCheckFlags(DeviceFlags):
    """What is checked, and where the report goes."""

    checks: str = flag(",".join(CHECKS), "which checks, comma-separated")
    report: str = flag("runs/gpu_check/report.md", "the file to write")
    check_limit: float = flag(300.0, "seconds after which a check is stopped")
    one_check: str | None = flag(None, "make this check in this process and print JSON (for the command itself)",
                                 choices=tuple(CHECKS))


def json_parts(check: Check, device: torch.device) -> Iterator[dict[str, Any]]:
    """What a check finds, as soon as it is found, ready for JSON; at last why it ended early, if it did."""
    try:
        for finding in check(device):
            yield asdict(finding)
    except NotTriedError as error:
        yield {"missing": str(error)}
    except Exception as error:  # whatever it is, it belongs into the report
        yield {"error": f"{type(error).__name__}: {first_line(error)}", "traceback": traceback.format_exc()}


def run_apart(name: str, config: GPUCheckFlags) -> Outcome:
    """What a check tells in a fresh process, which is ended with all that it started when its time is over."""
    words = [sys.executable, __file__, "--one-check", name, "--device", config.device]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    died = ""
    try:
        stdout, stderr = process.communicate(timeout=config.check_limit)
        if code := process.returncode:
            died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        died = f"was stopped after {config.check_limit:g} seconds (--check-limit)"
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
    finally:
        if process.poll() is None:  # Ctrl-C and the signals of `main`
            os.killpg(process.pid, signal.SIGKILL)
    return outcome_of(stdout, stderr, died=died)


def outcome_of(stdout: str, stderr: str, *, died: str) -> Outcome:
    """A check's lines of JSON as an outcome; what it found before it died is kept."""
    outcome = Outcome(error=died and f"the check's process {died}", traceback=stderr[-STDERR_KEPT:] if died else "")
    for line in stdout.splitlines():
        if line.startswith('{"') and line.endswith("}"):
            part = json.loads(line)
            if "held" in part:
                outcome.findings.append(CheckResult(**part))
            else:
                vars(outcome).update(part)
    return outcome


def chosen_device(wanted: str) -> str:
    """cuda or cpu. Raises ValueError where a GPU is there or asked for that torch cannot use."""
    if wanted == "cpu" or torch.cuda.is_available():
        return "cpu" if wanted == "cpu" else "cuda"
    cards = nvidia_cards()
    if not cards and wanted == "auto":
        return "cpu"
    try:
        torch.cuda.init()
        reason = "it sees no card"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    raise ValueError(f"torch {torch.__version__} cannot use a GPU here ({reason}; the driver has {cards or 'no cards'}"
                     "): take a torch for this driver (TORCH=2.8 bash scripts/gpu_check.sh takes an older one, "
                     "pytorch.org lists them), or --device cpu for the CPU form")


def main(config: GPUCheckFlags) -> None:
    if config.one_check:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions would be 1e-3 off
        for part in json_parts(CHECKS[config.one_check], dist.setup(config.device).device):
            print(json.dumps(part), flush=True)
        return
    names = list(dict.fromkeys(config.checks.split(",")))
    if wrong := [name for name in names if name not in CHECKS]:
        raise ValueError(f"--checks has {wrong[0]!r}, expected some of {','.join(CHECKS)}")
    if not 0 < config.check_limit < 1e6:
        raise ValueError(f"--check-limit is {config.check_limit:g}, expected seconds, from 1 to a million")
    device, outcomes, report = chosen_device(config.device), {}, Path(config.report)
    form = "On a GPU" if device == "cuda" else "The CPU form: small models, no GPU was used"
    about = {"device": form, **versions()}
    if report.is_dir():
        raise ValueError(f"--report {report} is a folder, expected a file such as {report / 'report.md'}")
    purposes = {name: " ".join(CHECKS[name].__doc__.split()) for name in names}

    def write() -> None:
        with replacing(report) as temporary:
            temporary.write_text(written(outcomes, about, purposes=purposes, left=names[len(outcomes):]))

    for number in (signal.SIGTERM, signal.SIGHUP):  # an end in good order, so that the running check ends too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    write()  # what cannot be written is known at once
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        start = time.perf_counter()
        outcomes[name] = run_apart(name, config)
        outcomes[name].seconds = time.perf_counter() - start
        cli.say(f"{name}: {outcomes[name].verdict} ({outcomes[name].line})")
        write()
    cli.say(f"report: {report}")
    if any(outcome.bad for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, GPUCheckFlags)
