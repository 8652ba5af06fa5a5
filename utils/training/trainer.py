"""The training loop: one for tokenizers and GPTs, one process or many, whole models or sharded ones.

A `Task` says what a micro-batch contributes; the loop does the rest: accumulation, clipping, schedules, EMA, logging,
previews, checkpoints, resume. It lives on the lowest floor because the tokenizer may not import the GPT's rooms.

Every step reseeds torch from (seed, step, rank), and the data order is a function of (seed, step), so a resumed run
needs no saved random state and repeats the uninterrupted run bit for bit on a CPU. A step whose loss or gradient is not
finite changes no weight; the device decides that, the host reads of it later (utils/training/stop.py).
"""
import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from utils import cli, dist, images
from utils.finite import NotFiniteError
from utils.seeding import derive_seed
from utils.training import allocator, parallel
from utils.training.ema import EMA
from utils.training.flags import TrainFlags, total_steps, warmup_steps
from utils.training.logger import MetricsLogger
from utils.training.loss_scale import LossScale, step_unless
from utils.training.meter import Meter
from utils.training.optim import build_optimizer, learning_rate
from utils.training.resume import RunCheckpoints
from utils.training.run_folder import RunFolder
from utils.training.state import TrainingState
from utils.training.stop import BAD, GivenUpError, StepGuard, StopRequestedError
from utils.training.writer import UnwrittenError

Backward = Callable[[str, Tensor, Tensor | float], None]
Evaluate = Callable[[nn.Module], dict[str, float]]


class Task(Protocol):
    """What the loop trains. Keys of `modules` are "model" and, if adversarial, "discriminator"."""

    modules: dict[str, nn.Module]
    sample_weight: float  # what a sample of a micro-batch weighs as a rule: its tokens, or 1

    def micro_step(self, batch: Any, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Forward one micro-batch, call backward(module name, sum of its losses, their weight), return means to log.

        A step's loss is the sum over all micro-batches and processes divided by the sum of their weights. What is
        returned are means over the weight that went with "model".
        """

    def check(self, facts: dict[str, Any], path: Path) -> None:
        """Raise ValueError if the training checkpoint that `facts` describe cannot be gone on from."""

    def report(self) -> dict[str, float]:
        """Slower numbers, asked for at each log row."""

    def preview(self, model: nn.Module) -> np.ndarray | None:
        """A uint8 (H, W, 3) picture of what the model does now."""


class Trainer:
    """Runs a task's steps. What a checkpoint holds is in `state`; the step and the meter are the loop's own."""

    def __init__(self, task: Task, flags: TrainFlags, process: dist.Process, run: RunFolder, *, samples: int,
                 saved_config: dict[str, Any]) -> None:
        """`samples` are those of a pass over the data; `saved_config` describes the model in each checkpoint."""
        self.task, self.flags, self.process, self.run = task, flags, process, run
        self.samples, self.saved_config = samples, saved_config
        self.steps, self.warmup_steps = total_steps(flags, samples), warmup_steps(flags, samples)
        self.plain = {name: parallel.unwrap(module) for name, module in task.modules.items()}
        betas = (flags.beta1, flags.beta2)
        self.optimizers = {name: build_optimizer(module, kind=flags.optimizer, lr=flags.lr, betas=betas,
                                                 weight_decay=flags.weight_decay)
                           for name, module in self.plain.items()}
        fp16 = dist.compute_dtype(flags.mixed_precision, process.device) == torch.float16
        self.scale = LossScale(process.device, enabled=fp16)
        self.ema = EMA(self.plain["model"]) if flags.ema else None
        self.state = TrainingState(self.plain, self.optimizers, ema=self.ema, scale=self.scale, rank=process.rank)
        self.checkpoints = RunCheckpoints(run, flags, process, self.state)
        self.guard = StepGuard(process)
        self.meter = Meter(process.device, samples_per_step=flags.global_batch_size)
        self.losses: list[Tensor] = []  # of the step that is being made
        self.weights: dict[str, Tensor] = {}  # per module, in micro-batches of ordinary samples
        self.step = self.skipped_in_a_row = 0
        if process.device.type == "cpu":  # weights and moments are allocated by now, apart from the memory of steps
            allocator.keep_freed_memory()
        if flags.mixed_precision == "tf32":
            torch.set_float32_matmul_precision("high")

    # ---- the run, and where it stands

    @property
    def folder(self) -> Path:
        """Where the run works."""
        return self.run.path

    def begin(self) -> None:
        """Claim the folder, and say in it what this run is."""
        self.checkpoints.claim()
        if self.run.reason:
            cli.say(self.run.reason)
        if self.step < self.steps <= self.warmup_steps:
            cli.warn(f"the warm-up of {self.warmup_steps} steps is not shorter than the training of {self.steps}, so "
                     "that --lr is hardly reached: give fewer --warmup-epochs or --warmup-steps")
        if self.process.is_main and self.step < self.steps:
            cli.save_config(self.folder / "config.json", self.flags, steps=self.steps, images=self.samples,
                            model=self.saved_config, identity=self.run.identity)

    def resume(self) -> None:
        """With --resume, go on from the checkpoint it names, or from the newest one of this run that is whole."""
        path = self.checkpoints.to_resume()
        if path is not None:
            self.restore(path)
            self.checkpoints.complete_copies(path)

    def restore(self, path: Path) -> None:
        """Go on from a training checkpoint, saying which flags are others now. Errors are those of all processes."""
        facts = self.checkpoints.load(path, check=self.task.check)
        self.step = int(facts["steps"])
        self.skipped_in_a_row = facts.get("skipped_in_a_row", 0)
        self.meter.restore(facts.get("meter", {}), self.process.rank)
        before, now = facts.get("flags", {}), cli.as_dict(self.flags)
        changed = [f"--{name.replace('_', '-')} {now[name]} (was {value})" for name, value in before.items()
                   if name in now and now[name] != value and name not in ("resume", "results_dir", "num_workers")]
        cli.say(f"continuing from {path} at step {self.step}" + (f", with {', '.join(changed)}" if changed else ""))
        if "note" in facts:
            cli.say(facts["note"])

    def save(self) -> None:
        """Begin to write the checkpoint of this step; it is there after `checkpoints.writer.wait`."""
        facts = {"steps": self.step, "config": self.saved_config, "flags": cli.as_dict(self.flags),
                 "identity": self.run.identity, "meter": self.meter.state(),
                 "skipped_in_a_row": self.skipped_in_a_row}
        self.checkpoints.writer.save(self.step, self.state.to_save(), facts)

    def keep_traceback(self, error: Exception) -> None:
        """Write where an error came from into the run's folder, for `cli.run` to tell."""
        path = self.folder / f"traceback-rank{self.process.rank}.txt"
        with contextlib.suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)))
            error.traceback_file = path

    # ---- the loop

    def train(self, make_batches: Callable[[int], Iterable[Any]], *, evaluate: Evaluate | None = None,
              eval_every: int = 0) -> None:
        """Train to the last step. make_batches(step) yields this rank's micro-batches from that step on.

        evaluate(model in eval mode, averaged weights if there are) → numbers to log, on all processes at once. SIGTERM
        saves and returns; so does the end. Raises GivenUpError after --max-skipped-steps, UnwrittenError when nothing
        can be saved; any other error leaves its traceback in the run's folder.
        """
        self.checkpoints.claim()
        logger = MetricsLogger(self.folder, enabled=self.process.is_main, start_step=self.step,
                               wandb_project=self.flags.wandb_project if self.flags.wandb else None,
                               config=cli.as_dict(self.flags))
        patience = 60.0

        def evaluates(step: int) -> bool:
            return evaluate is not None and (step == self.steps or step % eval_every == 0)

        try:
            with self.guard.on_sigterm():
                if self.step > 0:  # what a kill after the checkpoint has left undone
                    drawn, rows = dist.broadcast_object((self.preview_path().is_file(), logger.rows_of(self.step)))
                    self.preview_and_evaluate(logger, evaluate if evaluates(self.step) and rows < 2 else None,
                                              preview=self.is_checkpoint_step(self.step) and not drawn)
                if self.step >= self.steps:
                    cli.say(f"already trained to step {self.step} of {self.steps}: nothing to do")
                    return
                self.run_steps(make_batches, logger, lambda step: evaluate if evaluates(step) else None)
        except StopRequestedError:
            cli.say(f"stopped by SIGTERM at step {self.step} of {self.steps}, all is saved: to continue run it again "
                     "with --resume auto")
        except Exception as error:
            if isinstance(error, RuntimeError):  # other processes may be gone, and what they were to write
                patience = 0.0
            if not isinstance(error, GivenUpError | UnwrittenError) and not dist.lost_contact(error):
                self.keep_traceback(error)
            raise
        finally:
            if self.checkpoints.writer.close(patience=patience):
                self.run.lock.release()  # else when the process ends
            logger.close()

    def run_steps(self, make_batches: Callable[[int], Iterable[Any]], logger: MetricsLogger,
                  evaluation: Callable[[int], Evaluate | None]) -> None:
        """The steps that are left. Raises StopRequestedError when asked to stop, everything saved."""
        flags, meter = self.flags, self.meter
        self.checkpoints.writer.sweep(self.step)
        logger.open()
        meter.restart_clock()
        with tqdm(total=self.steps, initial=self.step, desc=self.folder.name, unit="step", mininterval=1.0,
                  disable=not self.process.is_main, dynamic_ncols=True) as bar:
            batches = iter(make_batches(self.step))
            while self.step < self.steps:
                self.optimizer_step(batches)
                self.step += 1
                bar.update()
                saves = self.is_checkpoint_step(self.step)
                evaluate = evaluation(self.step)
                stop = self.handle_step_flags(drain=bool(saves or evaluate))
                if saves or evaluate or self.step == 1 or self.step % flags.log_every == 0:
                    row = {**meter.read(), **self.task.report(), "lr": self.lr(self.step - 1)}
                    clock = meter.read_clock()
                    logger.log(self.step, row, clock=clock)
                    bar.set_postfix_str(" ".join([f"loss={row.get('loss', float('nan')):.4f}",
                                                  f"{clock.get('images_per_second', 0):.1f} images/s",
                                                  f"{clock['memory_gib']:.1f} GiB"]))
                if stop:
                    self.handle_step_flags(drain=True)  # a GPU's last steps
                if saves or evaluate or stop:  # an evaluation is long, and may fail: nothing is to be lost then
                    self.save()
                if stop:
                    self.checkpoints.writer.wait()  # nothing may interrupt this
                    raise StopRequestedError
                if saves or evaluate:
                    self.preview_and_evaluate(logger, evaluate, preview=saves)
                    meter.restart_clock()
        self.checkpoints.writer.wait()

    def handle_step_flags(self, *, drain: bool) -> bool:
        """Act on the flags of the steps that are due. Whether to stop now."""
        stop = False
        for verdict in self.guard.verdicts(drain=drain):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if verdict.bad else 0
            if verdict.bad:
                cli.say(f"step {verdict.step} skipped: its loss or gradient is not finite "
                         f"({self.skipped_in_a_row} in a row)")
            if self.skipped_in_a_row >= self.flags.max_skipped_steps:
                with dist.failing_together():
                    path = self.guard.save_batch(self.folder, verdict.step)
                raise GivenUpError(
                    f"stopped at step {verdict.step}: {self.skipped_in_a_row} steps in a row had a loss or gradient "
                    f"that is not finite; the batch is in {path}, the weights are as before: look at the batch, or "
                    f"continue by --resume {self.folder} with a lower --lr or --mixed-precision none")
            if verdict.unsaved:
                self.checkpoints.writer.wait()
            stop = stop or verdict.stop
        return stop

    def lr(self, step: int) -> float:
        """Learning rate of 0-based step `step`."""
        return learning_rate(step, peak=self.flags.lr, total_steps=self.steps, warmup_steps=self.warmup_steps,
                             schedule=self.flags.lr_schedule, lowest=self.flags.min_lr)

    def optimizer_step(self, batches: Iterator[Any]) -> None:
        """Accumulate the micro-batches of one step and update; its scalars go to the meter."""
        flags, accumulation = self.flags, self.flags.gradient_accumulation_steps
        torch.manual_seed(derive_seed(flags.global_seed, self.step, self.process.rank))
        self.set_train_mode()
        self.losses.clear()
        self.weights = {name: torch.zeros((), device=self.process.device) for name in self.plain}
        before = [buffer.clone() for buffer in self.buffers()]
        sums: dict[str, Tensor] = {}
        weight = self.weights["model"]
        seen = []
        for i in range(accumulation):
            batch = to_device(next(batches), self.process.device)
            with parallel.gradient_sync(self.task.modules.values(), enabled=i == accumulation - 1):
                means = self.task.micro_step(batch, step=self.step, backward=self.backward)
            weight, earlier = self.weights["model"], weight
            for name, value in means.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * (weight - earlier)
            seen.append(batch)
        mine = self.guard.flags(self.losses, unsaved=self.checkpoints.writer.failed())
        everyones = dist.total(torch.cat([mine, torch.stack(list(self.weights.values()))]))
        raised, totals = everyones[:len(mine)], dict(zip(self.weights, everyones[len(mine):], strict=True))
        gradients = {name: [p.grad for p in module.parameters() if p.grad is not None]
                     for name, module in self.plain.items()}
        # The processes' gradients are means over processes of sums in which an ordinary micro-batch weighs 1 / parts.
        factors = {name: dist.world_size() * accumulation / totals[name] / self.scale.scale for name in self.plain}
        norms = {name: parallel.full_tensor(get_total_norm(grads)) * factors[name]
                 for name, grads in gradients.items() if grads}
        raised[BAD] = torch.maximum(raised[BAD], (~torch.stack(list(norms.values())).isfinite()).any().float())
        bad = raised[BAD] > 0
        for name, norm in norms.items():
            self.update(name, gradients[name], norm, factor=factors[name], bad=bad)
            sums["grad_norm" if name == "model" else f"grad_norm_{name}"] = norm * weight
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(torch.where(bad, value, buffer))
        if self.ema is not None and (self.guard.lag or not bool(bad)):  # a GPU's averages move towards the same weights
            self.ema.update(self.step)
        self.scale.update(bad)
        self.meter.add(sums, weight=weight, bad=bad)
        self.guard.watch(self.step + 1, raised, seen)

    def buffers(self) -> list[Tensor]:
        """What forward passes change: running statistics, which codes were used."""
        return [buffer for module in self.plain.values() for buffer in module.buffers()]

    def set_train_mode(self) -> None:
        """Previews leave modules in eval mode; training wants the other."""
        for module in self.plain.values():
            if not module.training:
                module.train()

    def backward(self, name: str, loss: Tensor, weight: Tensor | float) -> None:
        """Backward of a micro-batch's share of the step's loss: a sum of losses, and the sum of their weights.

        It is divided by what a micro-batch weighs as a rule, so that gradients neither overflow nor vanish in fp16.
        """
        flags = self.flags
        parts = flags.gradient_accumulation_steps
        ordinary = flags.global_batch_size // (self.process.world_size * parts) * self.task.sample_weight
        self.losses.append(loss.detach())
        self.weights[name] = self.weights[name] + weight / ordinary
        (loss / ordinary * self.scale.scale / parts).backward()

    def update(self, name: str, gradients: list[Tensor], norm: Tensor, *, factor: Tensor, bad: Tensor) -> None:
        """Clip and step one optimizer, unless the step is `bad`. Gradients times `factor` have the norm `norm`."""
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        if self.flags.max_grad_norm:
            factor = factor * (self.flags.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_ has it
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # offloaded gradients are on the CPU
        step_unless(optimizer, bad)
        optimizer.zero_grad(set_to_none=True)

    # ---- looking at the model

    @contextlib.contextmanager
    def shown_model(self) -> Iterator[nn.Module]:
        """The model as a sampler would take it: averaged weights if there are, in eval mode, whole on every process."""
        model = self.plain["model"].eval()
        with self.ema.shown() if self.ema is not None else contextlib.nullcontext(), parallel.gathered(model):
            yield model

    def preview_and_evaluate(self, logger: MetricsLogger, evaluate: Evaluate | None, *, preview: bool) -> None:
        """Preview and evaluation of this step, whose checkpoint is on its way."""
        if not preview and evaluate is None:
            return
        with self.shown_model() as model:
            if preview and self.process.is_main:
                with self.going_on_without("preview"):
                    picture = self.task.preview(model)
                    if picture is not None:
                        images.save_png(self.preview_path(), picture)
                        logger.image(self.step, "preview", picture)
            dist.barrier()
            if evaluate is not None:
                self.checkpoints.writer.wait()
                with self.going_on_without("evaluation"), self.guard.interruptible():
                    logger.log(self.step, evaluate(model))

    @contextlib.contextmanager
    def going_on_without(self, what: str) -> Iterator[None]:
        """Within the block, a model that gives NaN costs a line, not the training: its next steps may mend it."""
        try:
            yield
        except NotFiniteError as error:
            cli.say(f"warning: no {what} of step {self.step}: {error}")

    def preview_path(self) -> Path:
        """Where the preview of this step goes."""
        return self.folder / "previews" / f"{self.step:07d}.png"

    def is_checkpoint_step(self, step: int) -> bool:
        """Whether a checkpoint is due after step number `step` (from 1 on)."""
        return step == self.steps or step % self.flags.ckpt_every == 0


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
