"""What can go wrong within a step, seen on the device: non-finite losses and gradients, a request to stop, a checkpoint
that could not be written.

One small tensor of flags is reduced over the processes at each step, so that all decide alike. A GPU's flags are looked
at some steps later, when they have long been copied, so the host never waits for the device.
"""
import contextlib
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import dist
from utils.checkpoints.containers import save

BAD, STOP, UNSAVED = range(3)  # the flags
GPU_LAG = 4  # steps after which a GPU's flags are read


class StopRequestedError(Exception):
    """SIGTERM has come while nothing would be lost by leaving at once."""


class GivenUpError(ValueError):
    """Training stops because going on makes no sense; the message says all there is to say."""


@dataclass
class Verdict:
    """What the flags of a step say."""

    step: int
    bad: bool
    stop: bool
    unsaved: bool


class StepGuard:
    """Judges steps; keeps the latest batches, so that the one that made trouble can be saved."""

    def __init__(self, process: dist.Process) -> None:
        self.process = process
        self.lag = GPU_LAG if process.device.type == "cuda" else 0
        self.pending: deque[tuple[int, Tensor, Any]] = deque()
        self.batches: deque[tuple[int, list]] = deque(maxlen=self.lag + 1)
        self.stop_asked = self.leave_at_once = False

    def flags(self, losses: list[Tensor], *, unsaved: bool) -> Tensor:
        """This process's flags of the step, (3,) of 0 and 1: is a loss not finite, is it asked to stop, …"""
        flags = torch.zeros(3, device=self.process.device)
        flags[BAD] = (~torch.stack([loss.float().isfinite() for loss in losses])).any()
        if self.stop_asked:
            flags[STOP] = 1
        if unsaved:
            flags[UNSAVED] = 1
        return flags

    def watch(self, step: int, flags: Tensor, batches: list) -> None:
        """Hand over the flags and micro-batches of a step."""
        event = None
        if self.lag:
            flags = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, flags, event))
        self.batches.append((step, batches))

    def verdicts(self, *, drain: bool) -> Iterator[Verdict]:
        """Those that are due, of older steps first; all with `drain`."""
        while len(self.pending) > (0 if drain else self.lag):
            step, flags, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            bad, stop, unsaved = (flags > 0).tolist()
            yield Verdict(step, bad, stop, unsaved)

    def save_batch(self, folder: Path, step: int) -> Path:
        """Write the micro-batches of a step, this process's share, and say where."""
        path = folder / f"bad-batch-{step:07d}-rank{self.process.rank}.pt"
        kept = next((batches for known, batches in self.batches if known == step), [])
        save({"step": step, "micro_batches": [{name: value.cpu() if isinstance(value, Tensor) else value
                                               for name, value in batch.items()} for batch in kept]}, path)
        return path

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Within the block SIGTERM asks to stop instead of ending the process."""
        def ask(number: int, frame: Any) -> None:
            self.stop_asked = True
            if self.leave_at_once:
                raise StopRequestedError

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not in the main thread: the signal is somebody else's
            yield
            return
        try:
            yield
        finally:  # when asked to stop we are on the way out: a second request is no reason to end otherwise
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self.stop_asked else before)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block all is saved, and SIGTERM raises StopRequestedError at once, in every process."""
        if self.stop_asked:
            raise StopRequestedError
        self.leave_at_once = True
        try:
            yield
        except RuntimeError as error:  # waiting for another process, which has left already
            if dist.lost_contact(error) and self.stop_asked:
                raise StopRequestedError from None
            raise
        finally:
            self.leave_at_once = False
