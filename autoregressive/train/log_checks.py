"""Is a training where it should be? Checks of its log: against published losses, and for what any sound training shows.

Losses are cross-entropies per code in nats.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from autoregressive.models.arpg import PRESETS
from autoregressive.train.published_losses import IMAGENET, PUBLISHED, TOLERANCE, Curve

FIRST_LOSS = 1e-3  # the head starts at zero, so the first loss is ln V up to rounding
ENOUGH_STEPS = 5000  # an epoch of ImageNet at batch 256: by then a loss is below the entropy of single codes
RULE = 1e-4 / 256  # learning rate per image of the batch, in LlamaGen and in ARPG
RULE_SOURCES = {"GPT": "LlamaGen's rule (1e-4 per 256 images, its GitHub thread 14)",
                "ARPG": "ARPG's rule (1e-4 per 256 images, arXiv 2503.10568)"}
SMALL = ("GPT-S", "ARPG-S")  # for small data sets, of no paper
RECITING = 0.25  # below this share of the entropy of single codes the model may know the training set by heart
SPIKE = 0.3  # nats above the median of the ten rows before
MANY_SKIPPED = 0.01  # of all steps

Grade = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """A line of the report; `text` says what was found and, unless it is ok, what to do."""

    topic: str
    grade: Grade
    text: str


class Run:
    """A training's log and settings."""

    def __init__(self, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        if "vocab_size" not in config.get("model", {}):
            raise ValueError("the run's config.json describes no GPT or ARPG: which run of "
                             "autoregressive/train/train.py?")
        self.rows = [row for row in rows if "loss" in row]  # other rows hold evaluations
        if not self.rows:
            raise ValueError("the run's metrics.jsonl has no loss yet: wait for the first row")
        self.config, self.model = config, config["model"]
        self.steps = np.array([row["step"] for row in self.rows])
        self.losses = np.array([row["loss"] for row in self.rows], dtype=float)
        self.batch, self.images = config["global_batch_size"], config["images"]

    @property
    def epochs(self) -> float:
        """Passes over the data at the last row."""
        return float(self.steps[-1] * self.batch / self.images)

    @property
    def family(self) -> str:
        """GPT or ARPG."""
        return family(self.model["gpt_model"])

    @property
    def warmup_steps(self) -> float:
        """Optimizer steps of the warm-up."""
        epochs = self.config.get("warmup_epochs") or 0
        return self.config.get("warmup_steps") or epochs * self.images / self.batch

    @property
    def full_steps(self) -> float:
        """The steps so far, those of the warm-up counted by the share of the learning rate that they had."""
        steps, warmup = float(self.steps[-1]), self.warmup_steps
        return steps**2 / (2 * warmup) if steps < warmup else steps - warmup / 2

    @property
    def warm_started(self) -> bool:
        """Whether it began with trained weights."""
        return any(self.config.get(name) for name in ("gpt_ckpt", "init_from"))

    def series(self, name: str) -> np.ndarray:
        """The finite values of a column."""
        values = np.array([row.get(name, np.nan) for row in self.rows], dtype=float)
        return values[np.isfinite(values)]

    def loss_at(self, step: float) -> float | None:
        """The loss around a step, between rows; None where there are none."""
        windows = np.diff(self.steps, prepend=0)  # rows are means since the last, published ones over 100 steps
        centres = self.steps - np.maximum(windows - 100, 0) / 2
        return float(np.interp(step, centres, self.losses)) if centres[0] <= step <= 1.01 * centres[-1] else None


def family(gpt_model: str) -> str:
    """GPT or ARPG: what a preset's name begins with."""
    return gpt_model.partition("-")[0]


def objections(curve: Curve, run: Run) -> list[str]:
    """Why a published curve does not apply to a run; empty when it does."""
    config, model, side = run.config, run.model, curve.side
    wanted = [(run.family == curve.family, f"{model['gpt_model']}, no {curve.family}"),
              (model["vocab_size"] == 16384, f"{model['vocab_size']} codes, not 16384"),
              (model["num_classes"] == 1000, f"{model['num_classes']} classes, not 1000"),
              (abs(run.images / IMAGENET - 1) < 0.02, f"{run.images} images, not ImageNet's {IMAGENET}"),
              (tuple(model["grid"]) == (side, side), f"{'x'.join(map(str, model['grid']))} tokens, not {side}x{side}"),
              (model["gpt_model"] not in SMALL, f"{model['gpt_model']}, which is no model of the paper"),
              (curve.model in (None, model["gpt_model"]) or model["gpt_model"] in SMALL,
               f"{model['gpt_model']}, not {curve.model}"),
              (config.get("query_layers") in (None, PRESETS.get(curve.model, {}).get("n_layer")),
               f"{config.get('query_layers')} layers of queries"),
              (curve.batch in (None, run.batch), f"batch {run.batch}, not {curve.batch}"),
              (curve.lr is None or math.isclose(curve.lr, config["lr"], rel_tol=0.01),
               f"lr {config['lr']:g}, not {curve.lr or 0:g}"),
              (curve.unit == "epoch" or not run.warmup_steps, "a warm-up"),
              (curve.epochs in (None, config.get("epochs")), f"{config.get('epochs')} epochs, not {curve.epochs}"),
              (curve.epochs is None or config.get("lr_schedule") == "cosine", "no cosine schedule"),
              (config.get("optimizer", "adamw") == "adamw", "another optimizer"),
              (not config.get("token_noise"), "token noise"), (not run.warm_started, "a start from trained weights")]
    return [text for fits, text in wanted if not fits]


def against(curve: Curve, run: Run) -> list[tuple[float, float, float]]:
    """(step, the run's loss, the published one) at the points that the run has reached; none if it does not apply."""
    if objections(curve, run):
        return []
    scale = run.images / run.batch if curve.unit == "epoch" else 1
    found = [(point * scale, run.loss_at(point * scale), loss) for point, loss in curve.points.items()]
    return [(step, mine, theirs) for step, mine, theirs in found if mine is not None]


def check_published(run: Run) -> Iterator[Finding]:
    """One finding for each curve of the run's kind of model; one for all when all fail for the same reasons."""
    published = [curve for curve in PUBLISHED if curve.family == run.family]
    reasons = {curve.name: objections(curve, run) for curve in published}
    shared = [text for text in reasons[published[0].name] if all(text in texts for texts in reasons.values())]
    if shared:
        yield Finding("published", "ok", f"none applies ({'; '.join(reasons)}): the run has {', '.join(shared)}")
        return
    for curve in published:
        points = against(curve, run)
        if reasons[curve.name]:
            text = f"{curve.name}: does not apply, the run has {', '.join(reasons[curve.name])}"
            yield Finding("published", "ok", text)
        elif not points:
            yield Finding("published", "ok", f"{curve.name}: applies, from {curve.unit} {min(curve.points)} on")
        else:
            yield compared(curve, points)


def compared(curve: Curve, points: list[tuple[float, float, float]]) -> Finding:
    """The point that is farthest off decides."""
    step, mine, theirs = max(points, key=lambda point: abs(point[1] - point[2]))
    text = (f"{curve.name}: {len(points)} points compared, farthest at step {step:.0f} with {mine:.3f} where "
            f"{theirs:.3f} was published ({curve.source}), tolerance {TOLERANCE}")
    if mine > theirs + TOLERANCE:
        return Finding("published", "problem", f"{text}: too slow. Look at the decoded codes and the lr; train without "
                                               "--compile")
    if mine < theirs - TOLERANCE:
        return Finding("published", "warning", f"{text}: too good. Are these ImageNet's images, each under its class?")
    return Finding("published", "ok", text)


def check_start(run: Run) -> Finding:
    """ln V before the first update."""
    step, loss, expected = run.steps[0], run.losses[0], math.log(run.model["vocab_size"])
    if run.warm_started:
        return Finding("first loss", "ok", f"{loss:.4f} at step {step}: the run began with trained weights, so it need "
                                           f"not be ln V = {expected:.4f}")
    if step != 1:
        return Finding("first loss", "warning", f"the log begins at step {step}: whether the first loss was ln V = "
                                                f"{expected:.4f} cannot be seen")
    if abs(loss - expected) < FIRST_LOSS:
        return Finding("first loss", "ok", f"{loss:.4f} = ln {run.model['vocab_size']}")
    return Finding("first loss", "problem", f"{loss:.4f}, expected ln {run.model['vocab_size']} = {expected:.4f}: the "
                                            "head did not start at zero, or the vocabulary is another one")


def check_level(run: Run, unigram: float | None) -> Finding:
    """Against the entropy of single codes: above it nothing is learned, far below it perhaps too much."""
    loss, step = float(np.median(run.losses[-5:])), int(run.steps[-1])
    if unigram is None:
        return Finding("level", "ok", f"{loss:.3f} at step {step}")
    text = f"{loss:.3f} at step {step}, entropy of single codes {unigram:.3f}"
    if loss < RECITING * unigram:
        return Finding("level", "warning", f"{text}: after {run.epochs:.0f} passes over {run.images} images the model "
                                           "may recite them. Compare samples with the images; try fewer epochs, "
                                           "dropout, --token-noise")
    if loss < unigram:
        return Finding("level", "ok", f"{text}: it has learned which codes go together")
    if run.full_steps >= ENOUGH_STEPS:
        return Finding("level", "problem", f"{text}: it knows no more than how frequent each code is. Look at the "
                                           "decoded codes and at --lr")
    return Finding("level", "ok", f"{text}: not below it yet, a sound run is after {ENOUGH_STEPS} steps of the full lr")


def check_trend(run: Run) -> Finding:
    """The slope of the last quarter by Theil and Sen, which outliers do not move."""
    start = len(run.losses) * 3 // 4
    steps, losses = run.steps[start:].astype(float), run.losses[start:]
    if len(losses) < 5:
        return Finding("trend", "ok", f"{len(losses)} rows in the last quarter: too few to tell")
    keep = np.unique(np.linspace(0, len(losses) - 1, 200).astype(int))
    x, y = steps[keep], losses[keep]
    first, second = np.triu_indices(len(x), 1)
    slope = np.median((y[second] - y[first]) / (x[second] - x[first]))
    change, noise = slope * (x[-1] - x[0]), 1.4826 * np.median(np.abs(y - slope * x - np.median(y - slope * x)))
    text = f"{change:+.3f} over the last quarter, rows scatter by {noise:.3f}"
    if change > max(noise, 0.01):
        return Finding("trend", "problem", f"{text}: the loss rises. Lower --lr, or go back to an earlier checkpoint")
    if change >= -min(noise, 0.01):
        return Finding("trend", "warning", f"{text}: the loss stands still. Near the end of training that is well, "
                                           "else try another --lr")
    return Finding("trend", "ok", f"{text}: it falls")


def check_spikes(run: Run) -> Finding:
    """Rows far above the ten before them; of the gradient norm too."""
    before = [float(np.median(run.losses[max(0, i - 10):i])) for i in range(1, len(run.losses))]
    high = [int(run.steps[i + 1]) for i, level in enumerate(before) if run.losses[i + 1] > level + SPIKE]
    norms = run.series("grad_norm")
    half = len(norms) // 2
    growth = float(np.median(norms[-(half // 2):]) / max(np.median(norms[:half]), 1e-12)) if half >= 5 else 1.0
    text = f"{len(high)} rows more than {SPIKE} above those before" + (f", the last at step {high[-1]}" if high else "")
    text += f"; gradient norm x{growth:.1f} since the first half" if half >= 5 else ""
    if growth > 10 or (high and high[-1] == run.steps[-1]):
        return Finding("stability", "problem", f"{text}: it diverges. Go back to an earlier checkpoint and "
                                               "lower --lr")
    if high:
        return Finding("stability", "warning", f"{text}: it recovered; if that repeats, lower --lr")
    return Finding("stability", "ok", text)


def check_skipped(run: Run) -> Finding:
    """Steps left out because the loss or a gradient was not finite."""
    broken = [int(step) for step, loss in zip(run.steps, run.losses, strict=True) if not math.isfinite(loss)]
    if broken:
        return Finding("finite", "problem", f"the loss is not finite at step {broken[0]}: lower --lr, or bf16 in place "
                                            "of fp16")
    skipped = int(run.series("skipped_steps").sum())
    grade: Grade = "ok" if not skipped else "problem" if skipped > MANY_SKIPPED * run.steps[-1] else "warning"
    more = ": a lower --lr, or bf16 in place of fp16, may help" if skipped else ""
    return Finding("finite", grade, f"every loss is finite, {skipped} steps were skipped{more}")


def check_speed(run: Run) -> Finding:
    """Images per second now, against the faster quarter of the run."""
    speeds = run.series("images_per_second")
    if len(speeds) < 8:
        return Finding("speed", "ok", f"{speeds[-1]:.1f} images/s" if len(speeds) else "not in the log")
    now, usual = float(np.median(speeds[-max(3, len(speeds) // 8):])), float(np.percentile(speeds, 75))
    text = f"{now:.1f} images/s now, {usual:.1f} in the better quarter of the run"
    if now < usual / 2:
        return Finding("speed", "warning", f"{text}: look for another job on this machine, a full disk or a slow store")
    return Finding("speed", "ok", text)


def check_rate(config: dict[str, Any], gpt_model: str) -> Finding:
    """The learning rate against the rule of the model's paper."""
    lr, batch, rule = config["lr"], config["global_batch_size"], RULE * config["global_batch_size"]
    text = f"lr {lr:g} at batch {batch}"
    trained_before = any(config.get(name) for name in ("init_from", "gpt_ckpt"))
    if gpt_model in SMALL or config.get("optimizer", "adamw") != "adamw" or trained_before:
        return Finding("lr", "ok", f"{text}: there is no rule for this model, optimizer and start")
    text += f", {RULE_SOURCES[family(gpt_model)]} gives {rule:g}"
    return Finding("lr", "ok" if 0.49 < lr / rule < 2.01 else "warning", text)


def check_run(run: Run, unigram: float | None) -> list[Finding]:
    """All checks of a log. `unigram`: the entropy of single codes in nats."""
    finite = check_skipped(run)
    if not np.isfinite(run.losses).all():
        return [check_start(run), finite]
    return [check_start(run), finite, check_level(run, unigram), check_trend(run), check_spikes(run),
            check_speed(run), check_rate(run.config, run.model["gpt_model"]), *check_published(run)]


def conclusion(run: Run, findings: list[Finding], unigram: float | None) -> str:
    """The verdict on a run in one line."""
    problems = [finding.topic for finding in findings if finding.grade == "problem"]
    if problems:
        return f"not on track: {', '.join(dict.fromkeys(problems))}"
    names = [curve.name for curve in PUBLISHED if against(curve, run)]
    if names:
        return f"on track: no slower than {' and '.join(names)}, within {TOLERANCE}"
    if unigram is not None and np.median(run.losses[-5:]) < unigram:
        return "on track, as far as one can tell without a published loss for these settings"
    return (f"cannot tell: no published loss applies at step {run.steps[-1]}, and the loss is not below the entropy of "
            "single codes yet")
