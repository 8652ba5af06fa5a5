"""CUDA graphs of whole decoding steps: one launch instead of some hundred (never run on a GPU by its authors).

A graph replays kernels on fixed addresses, so a step's inputs are copied into tensors that stay, one set for each shape
of step. The path checks itself: the first replay of a graph is compared with the step done directly, and after any
difference or failure everything is done directly. LLAMAGEN_GRAPHS=0 in the environment turns graphs off.
"""
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from autoregressive.models.batch import Batch

MOST = 64  # graphs kept; the one that was not used for longest goes first
Results = tuple[Tensor, ...]


class StepGraphs:
    """The graphs of one decoder, by the shapes of its steps."""

    broken = False  # for all decoders of this process: said once

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, tuple[Sequence[Tensor], Callable[[], Results]] | None] = OrderedDict()

    def run(self, batch: Batch, step: Callable[..., Results], *, bucket: int, rounding: float) -> Results:
        """The results of step(batch, fused=…), which writes the same when it is repeated. A shape's first step is done
        directly, the second is captured as well, later ones are replayed; ragged steps are always done directly.
        bucket: the cache is read in multiples of it; rounding: the relative error that logits may have."""
        shape = batch.shape(bucket) if possible(batch.fed.device) else None
        if shape is None:
            return step(batch, fused=False)
        if self.kept.get(shape) is not None:
            self.kept.move_to_end(shape)
            held, replay = self.kept[shape]
            for own, given in zip(held, batch.tensors, strict=True):
                own.copy_(given)
            return replay()
        results = step(batch, fused=False)
        if shape not in self.kept:
            self.kept[shape] = None
        else:
            try:
                expected, held = ([tensor.clone() for tensor in tensors] for tensors in (results, batch.tensors))
                step(batch.over(held), fused=True)  # loads and compiles kernels, which is not allowed during capture
                replay = capture(lambda: step(batch.over(held), fused=True), batch.fed.device)
                check_replay(replay(), expected, rounding=rounding)
                self.kept[shape] = held, replay
            except Exception as error:  # whatever it is, the step can be done directly
                StepGraphs.broken = True
                self.kept.clear()
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"note: CUDA graphs are not used, which makes sampling slower: {said}", file=sys.stderr)
                return step(batch, fused=False)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return results


def possible(device: torch.device) -> bool:
    """Whether steps on `device` may be captured now."""
    return (device.type == "cuda" and not StepGraphs.broken and os.environ.get("LLAMAGEN_GRAPHS") != "0"
            and not torch.is_autocast_enabled("cuda"))  # autocast keeps copies of weights for a while


def capture(step: Callable[[], Results], device: torch.device) -> Callable[[], Results]:
    """A function that replays what `step` launches on a GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device),
                                                     capture_error_mode="thread_local"):  # other threads may use it
        results = step()

    def replay() -> Results:
        graph.replay()
        return results

    return replay


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
