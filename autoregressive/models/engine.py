"""Engines run one decoding step: tokens of many sequences in, logits out; keys and values are cached.

A step takes T tokens for each of R rows: one token, a window of drafts, or a group of arbitrary positions (the rotary
rows tell a token's position; with `causal=False` all of a group see each other). Each row has its own length.
`NativeEngine` (native_engine.py) runs C++ kernels on a CPU, `TorchEngine` the model's own modules on any device.
"""
import weakref
from typing import Protocol

import torch
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.kv_cache import KVCache

BUCKET = 64  # on a GPU the cache is read up to a multiple of it: few graphs to capture, few positions read for nothing


class Engine(Protocol):
    """What runs the steps of one model. Only one thread at a time may use it. It does not keep the model alive."""

    weights: int | None  # which C++ kernels run (see `weight_type`); None: the model's modules
    row_multiple: int  # with a multiple of so many rows, the bits of a row do not depend on their number
    picks_rows: bool  # a step may take any rows of the caches, not only the first
    graphs: StepGraphs

    def reserve(self, rows: int, tokens: int) -> None:
        """Provide caches for `rows` rows of `tokens` tokens. When they have to grow, what they held is lost."""

    def step(self, x: Tensor, rope: Tensor, lengths: Tensor, *, rows: Tensor | slice, wanted: Tensor | None = None,
             causal: bool = True, longest: int, uniform: bool) -> Tensor:
        """Run embeddings x (R, T, D) with rotary rows `rope` (R or 1, T, K/2, 2), after `lengths` (R,) int64 cached
        tokens, on `rows` of the caches; each token sees the cached ones and those of the step up to itself, or all.

        Returns fp32 logits (n, V) of the tokens with index `wanted` (n,) among the R*T; None: of every token. `longest`
        is the largest length, or more; `uniform` says that all lengths are that. x may be overwritten by the step, and
        the logits by the next one.
        """

    def read_up_to(self, tokens: int) -> int:
        """How many cache positions attention reads when `tokens` are in use; this and the batch fix a step's shapes."""

    def copy_row(self, source: int, target: int, *, length: int) -> None:
        """Let row `target` begin with the `length` first tokens of row `source`."""


class TorchEngine:
    """The model's modules over a `KVCache`, on any device."""

    weights = None
    picks_rows = False

    def __init__(self, model: Transformer) -> None:
        self.model = weakref.proxy(model)
        self.cache: KVCache | None = None
        self.graphs = StepGraphs()

    @property
    def row_multiple(self) -> int:
        """8 on a CPU: with fewer rows the last bits of its products depend on their number."""
        return 8 if self.model.output.weight.device.type == "cpu" else 1

    def reserve(self, rows: int, tokens: int) -> None:
        """Have caches for so many rows of so many tokens."""
        cache, weight, config = self.cache, self.model.tok_embeddings.weight, self.model.config
        kind = (weight.device, weight.dtype)
        if weight.device.type == "cuda":  # graphs are bound to addresses
            kind += tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers()))
        if cache is None or cache.rows < rows or cache.capacity < tokens or self.kind != kind:
            self.cache = None  # free the memory before the new one is made
            self.graphs = StepGraphs()
            self.cache = KVCache(config.n_layer, rows, config.n_kv_head, -(-tokens // BUCKET) * BUCKET,
                                 config.dim // config.n_head, device=weight.device, dtype=weight.dtype)
            self.kind = kind
        for values in self.cache.values:  # a NaN left by an earlier call would spread, though its weight is 0
            values.zero_()

    def step(self, x: Tensor, rope: Tensor, lengths: Tensor, *, rows: slice, wanted: Tensor | None = None,
             causal: bool = True, longest: int, uniform: bool) -> Tensor:
        """See `Engine.step`."""
        count, new = x.shape[:2]
        if uniform and x.device.type == "cpu":
            end = longest + new
            self.cache.place(longest, rows=rows, end=end)
        else:
            end = self.read_up_to(longest + new)
            self.cache.place(lengths[:, None] + torch.arange(new, device=x.device), rows=rows, end=end)
        mask = None
        if (new > 1 and causal) or not isinstance(self.cache.slots, int):
            last = lengths[:, None] + (torch.arange(new, device=x.device) if causal else new - 1)  # (R, T or 1)
            mask = torch.arange(end, device=x.device) <= last[..., None]  # (R, T or 1, end)
            mask = mask.expand(count, new, end)[:, None]
        hidden = self.model.hidden_states(x, mask=mask, cache=self.cache, rope=rope)
        hidden = hidden.flatten(0, 1)
        return self.model.output(hidden if wanted is None else hidden[wanted]).float()

    def read_up_to(self, tokens: int) -> int:
        """Cache positions that attention reads when `tokens` are in use."""
        return min(-(-tokens // BUCKET) * BUCKET, self.cache.capacity)

    def copy_row(self, source: int, target: int, *, length: int) -> None:
        """Let row `target` begin with the `length` first tokens of row `source`."""
        self.cache.copy_row(source, target, length=length)
