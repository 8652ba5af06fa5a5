"""CUDA graphs of whole decoding steps: one launch instead of some hundred (not verified on a GPU).

A graph replays kernels on fixed addresses, so everything that a step reads and writes lives in buffers that outlast the
call of `generate`: the next call of the same kind fills the same buffers and replays the same graphs. On a CPU the same
code runs without graphs.
"""
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class StepGraphs:
    """The buffers of one kind of call, and the graphs captured over them."""

    def __init__(self) -> None:
        self.kind: Hashable = None
        self.buffers: dict[str, Tensor] = {}
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def adopt(self, kind: Hashable, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Buffers that hold `values`: those of the last call, if it was of the same kind."""
        if kind == self.kind:
            for name, value in values.items():
                self.buffers[name].copy_(value)
        else:
            self.kind, self.graphs = kind, {}
            self.buffers = {name: value.clone() for name, value in values.items()}
        return self.buffers

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Do a step that depends on `shape` and the buffers only: first directly, then captured, then replayed."""
        device = next(iter(self.buffers.values())).device
        if device.type != "cuda" or torch.is_autocast_enabled("cuda"):  # autocast keeps copies of weights for a while
            step()
        elif shape not in self.graphs:  # the first run loads and selects kernels, which is not allowed during capture
            step()
            self.graphs[shape] = None
        else:
            with torch.cuda.device(device):
                if self.graphs[shape] is None:
                    graph = torch.cuda.CUDAGraph()
                    pool = next((other.pool() for other in self.graphs.values() if other is not None), None)
                    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(),
                                          capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
                        step()
                    self.graphs[shape] = graph
                self.graphs[shape].replay()
