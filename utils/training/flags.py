"""The flags of every training command, and what follows from them before a step is done."""
import argparse
import importlib.util
import math
from dataclasses import dataclass
from typing import ClassVar

from utils import dist
from utils.checkpoints import containers
from utils.cli import flag
from utils.options import CompileFlags, RecipeFlags, SeedFlags, WorkerFlags
from utils.training.optim import Kind, Schedule


def seconds(text: str) -> float:
    """Parse a time from 1 second to about a month."""
    value = float(text)
    if not 1 <= value <= 2.5e6:
        raise ValueError("expected seconds, from 1 to 2500000")
    return value


@dataclass(kw_only=True)
class RunFlags:
    """The run's folder and its checkpoints."""

    shapes_run: ClassVar[bool] = False  # changing one does not make it another run
    results_dir: str = flag("results", "runs go to <results-dir>/<number>-<model>/")
    cloud_save_path: str | None = flag(None, "second folder (a mounted bucket, say) that each checkpoint also goes to")
    local_save: bool = flag(True, "keep checkpoints in the run's own folder; --no-local-save needs --cloud-save-path")
    resume: str = flag("none", "auto: go on with the newest run of the same model, data and settings in --results-dir, "
                               "or begin it; or a checkpoint, or a run's folder, whatever its settings")
    keep: int = flag(0, "checkpoints to keep, the newest; 0: all")
    log_every: int = flag(100, "steps between log rows")
    ckpt_every: int = flag(5000, "steps between checkpoints and previews; one is always made at the end")
    max_skipped_steps: int = flag(10, "stop after so many steps in a row with a loss or gradient that is not finite")
    dist_timeout: float = flag(1800.0, "seconds after which a process that hears nothing of another gives up; a "
                                       "preview must fit in", parse=seconds)
    wandb_project: str | None = flag(None, "log to this Weights & Biases project too")
    wandb: bool = flag(True, "--no-wandb: not even if --wandb-project is given")


@dataclass(kw_only=True)
class StepFlags(CompileFlags):
    """How a step is computed."""

    shapes_run: ClassVar[bool] = False
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    mixed_precision: dist.Precision | None = flag(
        None, "type to compute in, weights stay fp32. Left out: bf16, but fp32 on a CPU without instructions for bf16, "
        "and on any CPU for less than 500,000 weights (VQ-4-S), where bf16 is slower. none is fp32; on a CPU fp16 is "
        "fp32 too, and so is bf16 without instructions for it; tf32: fp32 with TF32 products",
        choices=("none", "fp32", "tf32", "fp16", "bf16"))


@dataclass(kw_only=True)
class RateFlags:
    """Optimizer, learning rate and batch size."""

    optimizer: Kind = flag("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest; --lr means the same",
                           choices=("adamw", "muon"))
    lr: float = flag(1e-4, "peak learning rate")
    global_batch_size: int = flag(256, "samples per optimizer step over all processes and accumulation steps")


@dataclass(kw_only=True)
class TrainFlags(RunFlags, RateFlags, StepFlags, SeedFlags, WorkerFlags, RecipeFlags):
    """How it is trained."""

    epochs: int = flag(300, "passes over the data")
    lr_schedule: Schedule = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    min_lr: float | None = flag(None, "learning rate at the end of a cosine; None: 2 % of --lr")
    warmup_steps: int = flag(0, "steps of linear warm-up")
    warmup_epochs: float = flag(0.0, "the same in passes over the data")
    weight_decay: float = flag(0.05, "on matrices, embeddings and convolutions only")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.95, "AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 switches it off")
    dropout_p: float = flag(0.0, "dropout inside the network's blocks (GPT: off with --drop-path-rate)")
    ema: bool = flag(False, "keep an exponential moving average of the weights (used by sampling when present)")

    @staticmethod
    def give_way(config: argparse.Namespace, stronger: set[str]) -> None:
        """Take back a recipe's or script's warm-up and end of a cosine where `stronger` flags leave no place for it."""
        for name, other in (("warmup_steps", "warmup_epochs"), ("warmup_epochs", "warmup_steps")):
            if name in stronger and other not in stronger:
                setattr(config, other, 0)
        if "lr_schedule" in stronger and config.lr_schedule != "cosine" and "min_lr" not in stronger:
            config.min_lr = None


def check_flags(flags: TrainFlags, *, world_size: int) -> None:
    """Raise ValueError for settings that cannot work together."""
    parts = world_size * flags.gradient_accumulation_steps
    if flags.gradient_accumulation_steps < 1 or flags.global_batch_size < 1 or flags.global_batch_size % parts:
        raise ValueError(f"--global-batch-size {flags.global_batch_size} is not divisible by {world_size} processes x "
                         f"--gradient-accumulation-steps {flags.gradient_accumulation_steps}")
    if not flags.local_save and not flags.cloud_save_path:
        raise ValueError("--no-local-save without --cloud-save-path would lose the training: give one of the two up")
    if min(flags.epochs, flags.log_every, flags.ckpt_every) < 1:
        raise ValueError("--epochs, --log-every and --ckpt-every must be at least 1")
    if min(flags.keep, flags.max_grad_norm) < 0 or flags.max_skipped_steps < 1:
        raise ValueError("--keep and --max-grad-norm must be at least 0, --max-skipped-steps at least 1")
    for name in ("lr", "weight_decay", "beta1", "beta2", "max_grad_norm"):
        if not math.isfinite(getattr(flags, name)):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, expected a number")
    if not 0 <= flags.dropout_p < 1 or not flags.warmup_steps >= 0 or not 0 <= flags.warmup_epochs < math.inf:
        raise ValueError("--dropout-p must be at least 0 and below 1, --warmup-steps and --warmup-epochs at least 0")
    if flags.warmup_steps and flags.warmup_epochs:
        raise ValueError("--warmup-steps and --warmup-epochs say the same thing: give one of them")
    if flags.min_lr is not None and (flags.lr_schedule != "cosine" or not 0 <= flags.min_lr <= flags.lr):
        raise ValueError(f"--min-lr {flags.min_lr} is for --lr-schedule cosine, and from 0 to --lr")
    if flags.wandb_project and flags.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb-project needs `pip install wandb`")
    if flags.resume not in ("auto", "none") and not containers.resolve(flags.resume).exists():
        raise FileNotFoundError(f"--resume {flags.resume}: no such checkpoint (or use auto)")


def total_steps(flags: TrainFlags, count: int) -> int:
    """Optimizer steps in --epochs passes over `count` samples."""
    return max(1, flags.epochs * count // flags.global_batch_size)


def warmup_steps(flags: TrainFlags, count: int) -> int:
    """Optimizer steps of the warm-up, for `count` samples."""
    return flags.warmup_steps or round(flags.warmup_epochs * count / flags.global_batch_size)
