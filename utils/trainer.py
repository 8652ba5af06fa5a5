"""The training loop: one for tokenizers and GPTs, one process or many.

A `Task` says what a micro-batch contributes; the loop does the rest: accumulation, clipping, schedules, EMA, logging,
previews, checkpoints, resume. It lives on the lowest floor because the tokenizer may not import the GPT's rooms.

Every step reseeds torch from (seed, step, rank), and the data order is a function of (seed, step), so a resumed run
needs no saved random state and repeats the uninterrupted run bit for bit on a CPU.
"""
import contextlib
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint, dist, images, parallel
from utils.cli import flag
from utils.ema import EMA
from utils.logger import MetricsLogger
from utils.optim import Schedule, adamw, learning_rate
from utils.options import CompileFlags, SeedFlags, WorkerFlags
from utils.seeding import derive_seed

Backward = Callable[[str, Tensor], None]
OPTIMIZER_KEYS = {"model": "optimizer", "discriminator": "optimizer_disc"}  # names in the checkpoint file


@dataclass(kw_only=True)
class TrainFlags(SeedFlags, WorkerFlags, CompileFlags):
    """Flags of every training command."""

    results_dir: str = flag("results", "runs go to <results-dir>/<number>-<model>/")
    cloud_save_path: str | None = flag(None, "second folder (a mounted bucket, say) that each checkpoint also goes to")
    local_save: bool = flag(True, "keep checkpoints in the run's own folder; --no-local-save needs --cloud-save-path")
    resume: str = flag("none", "auto: go on with the newest run of this model in --results-dir; or a checkpoint file")
    epochs: int = flag(300, "passes over the data")
    lr: float = flag(1e-4, "peak learning rate")
    lr_schedule: Schedule = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup_steps: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(0.05, "on matrices, embeddings and convolutions only")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.95, "AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 switches it off")
    global_batch_size: int = flag(256, "samples per optimizer step over all processes and accumulation steps")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    mixed_precision: dist.Precision = flag("bf16", "autocast type; none is fp32, as is anything on a CPU without bf16",
                                           choices=("none", "fp16", "bf16"))
    dropout_p: float = flag(0.0, "dropout inside the network's blocks (GPT: off with --drop-path-rate)")
    ema: bool = flag(False, "keep an exponential moving average of the weights (used by sampling when present)")
    log_every: int = flag(100, "steps between log rows")
    ckpt_every: int = flag(5000, "steps between checkpoints and previews; one is always made at the end")


class Task(Protocol):
    """What the loop trains. Keys of `modules` are "model" and, if adversarial, "discriminator"."""

    modules: dict[str, nn.Module]

    def micro_step(self, batch: Any, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Forward one micro-batch, call backward(module name, loss), return scalars to log."""

    def report(self) -> dict[str, float]:
        """Slower numbers, asked for at each log row."""

    def preview(self, model: nn.Module) -> np.ndarray | None:
        """A uint8 (H, W, 3) picture of what the model does now."""


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
    if flags.resume not in ("auto", "none") and not Path(flags.resume).is_file():
        raise FileNotFoundError(f"--resume {flags.resume}: no such checkpoint (or use auto)")


def total_steps(flags: TrainFlags, count: int) -> int:
    """Optimizer steps in --epochs passes over `count` samples."""
    return max(1, flags.epochs * count // flags.global_batch_size)


def run_folder(flags: TrainFlags, model_name: str) -> Path:
    """The run's folder: the newest one of this model with --resume auto, else the next free number.

    A number is taken if --results-dir or --cloud-save-path has it. Nothing is created yet.
    """
    roots = [Path(root) for root in (flags.results_dir, flags.cloud_save_path) if root]
    taken = sorted({path.name for root in roots for path in root.glob("[0-9][0-9][0-9]-*")})
    mine = [name for name in taken if name[4:] == model_name]
    name = mine[-1] if flags.resume == "auto" and mine else \
        f"{int(taken[-1][:3]) + 1 if taken else 0:03d}-{model_name}"
    return Path(flags.results_dir) / dist.broadcast_object(name)


class Trainer:
    """Holds what a checkpoint holds: modules, optimizers, EMA and the step."""

    def __init__(self, task: Task, flags: TrainFlags, process: dist.Process, folder: Path, *, steps: int,
                 saved_config: dict[str, Any]) -> None:
        self.task, self.flags, self.process, self.folder, self.steps = task, flags, process, folder, steps
        self.saved_config = saved_config
        self.plain = {name: parallel.unwrap(module) for name, module in task.modules.items()}
        betas = (flags.beta1, flags.beta2)
        self.optimizers = {name: adamw(module, lr=flags.lr, weight_decay=flags.weight_decay, betas=betas)
                           for name, module in self.plain.items()}
        fp16 = dist.compute_dtype(flags.mixed_precision, process.device) == torch.float16
        self.scalers = {name: torch.amp.GradScaler(process.device.type, enabled=fp16) for name in self.plain}
        self.ema = EMA(self.plain["model"]) if flags.ema else None
        self.step = 0

    def resume(self) -> None:
        """With --resume, go on from the checkpoint it names or finds."""
        if self.flags.resume == "none":
            return
        if self.flags.resume != "auto":
            self.restore(Path(self.flags.resume))
            return
        for root in self.checkpoint_folders():
            path = checkpoint.newest(root)
            if path is not None:
                self.restore(path)
                return

    def checkpoint_folders(self) -> list[Path]:
        """Where checkpoints go; the first is written, the others get copies."""
        local = [self.folder / "checkpoints"] if self.flags.local_save else []
        cloud = self.flags.cloud_save_path
        return local + ([Path(cloud) / self.folder.name / "checkpoints"] if cloud else [])

    def restore(self, path: Path, content: dict[str, Any] | None = None) -> None:
        """Load modules, optimizers, EMA and step from a training checkpoint (`content`, if it has been read)."""
        content = checkpoint.read(path) if content is None else content
        for name, module in self.plain.items():
            if not {name, OPTIMIZER_KEYS[name], "steps"} <= content.keys():
                raise ValueError(f"{path} has no {name} with its optimizer: it is no training checkpoint of this kind "
                                 "(to start from its weights alone, see --finetune and --gpt-ckpt)")
            checkpoint.load_strict(module, checkpoint.weights(content, path, prefer=(name,)), path)
            load_optimizer(self.optimizers[name], content[OPTIMIZER_KEYS[name]], path)
        if self.ema is not None:
            prefer = ("ema", "model")  # a run that switches EMA on starts it at the weights
            checkpoint.load_strict(self.ema.model, checkpoint.weights(content, path, prefer=prefer), path)
        for name, state in content.get("scalers", {}).items():
            self.scalers[name].load_state_dict(state)
        self.step = int(content["steps"])
        self.say(f"continuing from {path} at step {self.step}")

    def save(self) -> None:
        """Write <step>.pt to every checkpoint folder (rank 0), then meet the others."""
        if self.process.is_main:
            content: dict[str, Any] = {"steps": self.step, "config": self.saved_config}
            for name, module in self.plain.items():
                content[name] = module.state_dict()
                content[OPTIMIZER_KEYS[name]] = self.optimizers[name].state_dict()
            if self.ema is not None:
                content["ema"] = self.ema.model.state_dict()
            if any(scaler.is_enabled() for scaler in self.scalers.values()):
                content["scalers"] = {name: scaler.state_dict() for name, scaler in self.scalers.items()}
            first, *others = [root / f"{self.step:07d}.pt" for root in self.checkpoint_folders()]
            checkpoint.save(content, first)
            for other in others:
                checkpoint.copy(first, other)
        dist.barrier()

    def fit(self, make_batches: Callable[[int], Iterable[Any]], *,
            evaluate: Callable[[nn.Module], dict[str, float]] | None = None, eval_every: int = 0) -> None:
        """Train to the last step. make_batches(step) yields this rank's micro-batches from that step on.

        evaluate(model in eval mode, averaged weights if there are) → numbers to log, on all processes at once.
        """
        flags = self.flags
        if self.step >= self.steps:
            self.say(f"already trained to step {self.step} of {self.steps}: nothing to do")
            return
        for root in self.checkpoint_folders() if self.process.is_main else []:
            checkpoint.sweep(root)
        logger = MetricsLogger(self.folder, enabled=self.process.is_main, start_step=self.step)
        meter = Meter(self.process.device, samples_per_step=flags.global_batch_size)
        bar = tqdm(total=self.steps, initial=self.step, desc=self.folder.name, unit="step", mininterval=1.0,
                   disable=not self.process.is_main, dynamic_ncols=True)
        batches = iter(make_batches(self.step))
        while self.step < self.steps:
            meter.add(self.optimizer_step(batches))
            self.step += 1
            bar.update()
            last = self.step == self.steps
            saves = last or self.step % flags.ckpt_every == 0
            evaluates = evaluate is not None and (last or self.step % eval_every == 0)
            if not (saves or evaluates or self.step == 1 or self.step % flags.log_every == 0):
                continue
            row = {**meter.read(), **self.task.report(), "lr": self.lr(self.step - 1)}  # a resumed meter starts empty
            logger.log(self.step, row)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            if saves:
                self.save()
                self.preview(logger)
            if evaluates:  # long, and may fail: nothing is to be lost then
                logger.log(self.step, evaluate(self.shown_model()))
            meter.restart_clock()
        bar.close()
        logger.close()

    def lr(self, step: int) -> float:
        """Learning rate of 0-based step `step`."""
        flags = self.flags
        return learning_rate(step, peak=flags.lr, total_steps=self.steps, warmup_steps=flags.warmup_steps,
                             schedule=flags.lr_schedule)

    def optimizer_step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """Accumulate the micro-batches of one step and update. Returns the mean of their scalars, on the device."""
        flags, accumulation = self.flags, self.flags.gradient_accumulation_steps
        torch.manual_seed(derive_seed(flags.global_seed, self.step, self.process.rank))
        self.set_train_mode()
        parts: list[dict[str, Tensor]] = []
        for i in range(accumulation):
            batch = to_device(next(batches), self.process.device)
            with parallel.gradient_sync(self.task.modules.values(), enabled=i == accumulation - 1):
                parts.append(self.task.micro_step(batch, step=self.step, backward=self.backward))
        means = {name: torch.stack([part[name].detach().float() for part in parts]).mean() for name in parts[0]}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.lr(self.step)
            means.update(self.update(name, optimizer))
        if self.ema is not None:
            self.ema.update(self.plain["model"], self.step)
        return means

    def set_train_mode(self) -> None:
        """Previews leave modules in eval mode; training wants the other."""
        for module in self.plain.values():
            if not module.training:
                module.train()

    def backward(self, name: str, loss: Tensor) -> None:
        """Backward of a micro-batch's share of the step's mean loss."""
        self.scalers[name].scale(loss / self.flags.gradient_accumulation_steps).backward()

    def update(self, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Clip and step one optimizer, if its module took part in this step."""
        parameters = [p for p in self.plain[name].parameters() if p.grad is not None]
        if not parameters:
            return {}
        self.scalers[name].unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.flags.max_grad_norm or float("inf"))
        self.scalers[name].step(optimizer)
        self.scalers[name].update()
        optimizer.zero_grad(set_to_none=True)
        return {"grad_norm" if name == "model" else f"grad_norm_{name}": norm.detach()}

    def shown_model(self) -> nn.Module:
        """The model as a sampler would take it: averaged weights if there are, in eval mode."""
        return (self.ema.model if self.ema is not None else self.plain["model"]).eval()

    def preview(self, logger: MetricsLogger) -> None:
        """Show what the model does now: previews/<step>.png and TensorBoard."""
        if self.process.is_main:
            picture = self.task.preview(self.shown_model())
            if picture is not None:
                images.save_png(self.folder / "previews" / f"{self.step:07d}.png", picture)
                logger.image(self.step, "preview", picture)
        dist.barrier()

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.process.is_main:
            print(text, flush=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str | Path) -> None:
    """Take over an optimizer's moments; its settings (decay, betas) stay those of the flags."""
    own = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group["params"]) for group in own]:
        raise ValueError(f"{source} holds an optimizer of other parameter groups: to start from its weights alone, "
                         "see --finetune and --gpt-ckpt")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


class Meter:
    """Sums scalars on the device and looks at them only when read, so that steps do not wait for the host."""

    def __init__(self, device: torch.device, *, samples_per_step: int) -> None:
        self.device, self.samples_per_step = device, samples_per_step
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.clocked, self.start = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step's scalars."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.clocked += 1

    def restart_clock(self) -> None:
        """Leave out of the speed what has just happened (a checkpoint)."""
        self.clocked, self.start = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """Means over the steps and processes since the last read, speed and peak memory."""
        names = sorted(self.sums)
        means = dist.mean(torch.stack([self.sums[name] / self.counts[name] for name in names]))
        row = dict(zip(names, means.tolist(), strict=True))
        if self.clocked:
            row["images_per_second"] = self.clocked * self.samples_per_step / (time.perf_counter() - self.start)
        row["memory_gib"] = peak_memory(self.device)
        self.sums, self.counts = {}, {}
        self.restart_clock()
        return row


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on the GPU if it uses one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a dict to the device."""
    return {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block, gradients flow through the module but not into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
