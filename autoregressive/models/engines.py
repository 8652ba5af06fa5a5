"""Engines run one decoding step: what is fed in, the logits of what is asked for out; keys and values are cached.

`NativeEngine` (native_engine.py) runs C++ kernels on a CPU, `TorchEngine` the model's own modules on any device.
"""
import ctypes
from typing import Protocol

import torch
from torch import Tensor, nn

from autoregressive.models.attend import KVCache
from autoregressive.models.batch import Batch
from autoregressive.models.native_engine import NativeEngine, fitting_kernels


class Decodable(Protocol):
    """What a decoder needs of a model. `config` has block_size, cls_token_num, vocab_size and the widths."""

    def rope(self, device: torch.device) -> Tensor:
        """The rotary table (prefix + L, K/2, 2) fp32."""

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (n,) → (n, D)."""

    def check(self, condition: int | Tensor, visible: Tensor | None) -> None:
        """Raise ValueError for a condition that the model does not take."""

    def prefix(self, conditions: list) -> tuple[Tensor, Tensor]:
        """Labels, or text features (N, caption_dim) each → prefixes (n, N, D), and the one of no condition (N, D)."""

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """Empty caches."""

    def decode(self, x: Tensor, batch: Batch, cache: KVCache, control: Tensor | None = None) -> Tensor:
        """Run embeddings x (n, D), n >= the tokens fed, through the layers → logits (a, V) of the asks. control: see
        `Engine.forward`."""


class Engine(Protocol):
    """What runs the steps of one model. Only one thread at a time may use it. It does not keep the model alive."""

    weights: int | None  # for which weights C++ kernels run (see `weight_type`); None: the model's modules do
    kernels: ctypes.CDLL | None

    def reserve(self, rows: int, tokens: int) -> bool:
        """Provide caches for `rows` rows of `tokens` tokens; whether they are other tensors than before. What rows held
        is lost then."""

    def forward(self, x: Tensor, batch: Batch, control: Tensor | None = None) -> Tensor:
        """Run embeddings x (n, D) of the fed tokens → fp32 logits (a, V) of the asks, which the next step may
        overwrite. x may be overwritten. control: what control pictures add, to the queries (1, a, D), or where there
        are none to the tokens (places, n, D), before the model's `control_layers`."""

    def copy(self, source: int, targets: Tensor, *, length: int) -> None:
        """Let the rows `targets` (n,) begin with the `length` first tokens of row `source`."""


class TorchEngine:
    """The model's modules over a `KVCache`, on any device."""

    weights = kernels = None

    def __init__(self, model: Decodable) -> None:
        self.model = model
        self.cache: KVCache | None = None

    def reserve(self, rows: int, tokens: int) -> bool:
        """See `Engine.reserve`."""
        cache, weight = self.cache, next(self.model.parameters())
        kind = (weight.device, weight.dtype)
        if weight.device.type == "cuda":  # graphs are bound to addresses; the rotary table's changes with the grid
            kind += tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers(),
                                                           self.model.rope(weight.device)))
        if cache is not None and cache.rows >= rows and cache.capacity >= tokens and self.kind == kind:
            return False
        self.cache = None  # free the memory before the new one is made
        self.cache, self.kind = self.model.new_cache(rows, tokens), kind
        return True

    def forward(self, x: Tensor, batch: Batch, control: Tensor | None = None) -> Tensor:
        """See `Engine.forward`."""
        self.cache.place(batch)
        added = () if control is None else (control,)
        return self.model.decode(self.cache.filled(x), batch, self.cache, *added).float()

    def copy(self, source: int, targets: Tensor, *, length: int) -> None:
        """See `Engine.copy`."""
        for cache in (*self.cache.keys, *self.cache.values):
            cache[targets] = 0  # as where rows begin: see `KVCache.place`
            cache[targets, :, :length] = cache[source, :, :length].clone()


def engine_for(model: nn.Module, engine: Engine | None = None) -> Engine:
    """The engine that fits the model as it is now: `engine`, or a new one."""
    weights, kernels = fitting_kernels(model)
    if engine is not None and engine.weights == weights and engine.kernels is kernels:
        return engine
    return TorchEngine(model) if kernels is None else NativeEngine(model, weights, kernels)
