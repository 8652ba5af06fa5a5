"""CUDA graphs of whole decoding steps: one launch instead of some hundred (never run on a GPU by its authors).

A graph replays kernels on fixed addresses, so a step's inputs are copied into tensors that stay, one set for each shape
of step. The path checks itself: the first replay of a graph is compared with the step done directly, and after any
difference or failure everything is done directly. LLAMAGEN_GRAPHS=0 in the environment turns graphs off.
"""
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from autoregressive.models.attend import BUCKET
from autoregressive.models.batch import Batch

MOST = 64  # graphs kept; the one that was not used for longest goes first
Results = tuple[Tensor, ...]


class StepGraphs:
    """The graphs of one decoder, by the shapes of its steps."""

    broken = False  # for all decoders of this process, as is the next: each is said once
    compiles = True  # the choice of codes

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, tuple[Sequence[Tensor], Callable[[], Results]] | None] = OrderedDict()
        self.pool = None  # graphs never run at the same time, so they share the memory of their intermediate results

    def run(self, batch: Batch, step: Callable[..., Results], *, kind: Hashable, rounding: float) -> Results:
        """The results of step(batch, fused=…), which writes the same when it is repeated. A shape's first step is done
        directly, the second is captured as well, later ones are replayed; ragged steps are always done directly.
        kind: whatever else decides which kernels run; rounding: the relative error that logits may have."""
        shape = batch.shape(BUCKET["cuda"]) if possible(batch.fed.device) else None
        if shape is None:
            return step(batch, fused=False)
        shape = shape, kind
        if self.kept.get(shape) is not None:
            self.kept.move_to_end(shape)
            held, replay = self.kept[shape]
            for own, given in zip(held, batch.tensors, strict=True):
                own.copy_(given)
            return replay()
        results = step(batch, fused=False)
        if shape in self.kept:
            expected = [tensor.clone() for tensor in results]
            self.kept[shape] = self.captured(batch, step, expected, rounding=rounding)
            if StepGraphs.broken:  # what a wrong replay wrote is written again
                self.kept.clear()
                return step(batch, fused=False)
        else:
            self.kept[shape] = None
        self.kept.move_to_end(shape)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return results

    def captured(self, batch: Batch, step: Callable[..., Results], expected: Sequence[Tensor], *,
                 rounding: float) -> tuple[Sequence[Tensor], Callable[[], Results]] | None:
        """(The tensors of the batch that a replay reads, the replay): with a compiled choice of codes if that works,
        else with a plain one; None if neither does."""
        said = ""
        for fused in (True, False) if StepGraphs.compiles else (False,):
            try:
                held = [tensor.clone() for tensor in batch.tensors]
                step(batch.over(held), fused=fused)  # loads and compiles kernels, which is not allowed during capture
                replay, self.pool = capture(partial(step, batch.over(held), fused=fused), batch.fed.device, self.pool)
                check_replay(replay(), expected, rounding=rounding)
                if said:
                    StepGraphs.compiles = False
                    print(f"note: the choice of codes is not compiled, which makes sampling slower: {said}",
                          file=sys.stderr)
                return held, replay
            except Exception as error:  # whatever it is, the step can be done directly
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
        StepGraphs.broken = True
        print(f"note: CUDA graphs are not used, which makes sampling slower: {said}", file=sys.stderr)
        return None


def possible(device: torch.device) -> bool:
    """Whether steps on `device` may be captured now."""
    return (device.type == "cuda" and not StepGraphs.broken and os.environ.get("LLAMAGEN_GRAPHS") != "0"
            and not torch.is_autocast_enabled("cuda"))  # autocast keeps copies of weights for a while


def capture(step: Callable[[], Results], device: torch.device, pool: object) -> tuple[Callable[[], Results], object]:
    """(A function that replays what `step` launches on a GPU, the pool of memory that it uses: `pool` or a new one)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device),
                                                     capture_error_mode="thread_local"):  # other threads may use it
        results = step()

    def replay() -> Results:
        graph.replay()
        return results

    return replay, graph.pool()


def check_replay(found: Sequence[Tensor], expected: Sequence[Tensor], *, rounding: float) -> None:
    """Raise ValueError unless whole numbers are equal and the others within `rounding` of the largest."""
    for ours, reference in zip(found, expected, strict=True):
        if ours.is_floating_point():
            room = rounding * reference.nan_to_num().abs().max().item()
            if not torch.allclose(ours, reference, rtol=0, atol=room, equal_nan=True):
                raise ValueError(f"a replayed step gave other logits than the step done directly, by up to "
                                 f"{(ours - reference).abs().max().item():.2g}")
        elif not torch.equal(ours, reference):
            raise ValueError("a replayed step gave other codes than the step done directly")
