"""The engine of CPUs: native/decode.cpp on the model's own weights, fp32 or bfloat16 (or quantised), read in place.

Arithmetic is fp32 whatever the weights are; beside bfloat16 weights the cache is bfloat16, and on CPUs with
instructions for it so are the inputs of products. A row's bits depend neither on the other rows, nor on how many tokens
a step holds, nor on the number of threads.
"""
import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor, nn

from autoregressive.models.batch import Batch
from autoregressive.models.blocks import (
    Attention,
    AttentionParts,
    FeedForward,
    FeedForwardParts,
    RMSNorm,
    SplitAttention,
    SplitBlock,
    TransformerBlock,
)
from autoregressive.models.quantized import QuantizedLinear
from native.build import load, pointer

SIDE = 16  # positions side by side in the cache of keys: the constant of the same name in native/decode.cpp
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}
MULTIPLE = {torch.float32: 8, torch.bfloat16: 16, 8: 32, 4: 64}  # layer widths must be multiples
KNOWN = (RMSNorm, Attention, FeedForward, TransformerBlock, SplitAttention, SplitBlock)  # what the kernels compute; a
# subclass may not


class _Linear(ctypes.Structure):  # this and the following: the structs of native/decode.cpp
    _fields_ = [("weight", c_void_p), ("scale", c_void_p)]


class _Attention(ctypes.Structure):
    _fields_ = [("norm", c_void_p), *((name, _Linear) for name in ("q", "k", "v", "out")), ("keys", c_void_p),
                ("values", c_void_p)]


class _FeedForward(ctypes.Structure):
    _fields_ = [("norm", c_void_p), *((name, _Linear) for name in ("gate", "up", "down"))]


class _Layer(ctypes.Structure):
    _fields_ = [("attention", _Attention), ("feed_forward", _FeedForward)]


class _Model(ctypes.Structure):
    _fields_ = [*((name, c_int64) for name in ("dim", "heads", "kv_heads", "head_dim", "hidden", "vocab", "capacity")),
                ("eps", c_float), ("layers", c_int64), ("layer", ctypes.POINTER(_Layer)), ("queries", c_int64),
                ("query", ctypes.POINTER(_Layer)), ("shared", _Attention), ("norm", c_void_p), ("output", _Linear)]


class _Tokens(ctypes.Structure):
    _fields_ = [("count", c_int64), *((name, c_void_p) for name in ("rope", "row", "slot", "sees"))]


class _Step(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("fed", _Tokens), ("token", c_void_p), ("y", c_void_p), ("query", c_void_p),
                ("asked", _Tokens), ("table", c_void_p), ("logits", c_void_p), ("stride", c_int64),
                ("scratch", c_void_p), ("threads", c_int64), ("added", ctypes.POINTER(c_void_p))]


def fitting_kernels(model: nn.Module) -> tuple[int, ctypes.CDLL] | tuple[None, None]:
    """The kernels for this model here, and their type of weights, if there are any."""
    weights = weight_type(model)
    kernels = None if weights is None else load("decode", f"WEIGHTS={weights}")
    return (None, None) if kernels is None else (weights, kernels)


def weight_type(model: nn.Module) -> int | None:
    """Which kernels fit the model: the value of WEIGHTS, or None if none do (a GPU, LoRA, hooks, odd sizes, …)."""
    modules, config = list(model.modules())[1:], model.config
    if any(isinstance(module, KNOWN) and type(module) not in KNOWN for module in modules):
        return None
    parts = model.parts()
    linears = [parts.output, *(linear for layer in (*parts.layers, *parts.queries) for part in layer
                               for linear in matrices(part)), *matrices(parts.shared)]
    kinds = {linear.bits if type(linear) is QuantizedLinear else linear.weight.dtype if type(linear) is nn.Linear
             and linear.bias is None and type(linear.weight) in (Tensor, nn.Parameter) else None for linear in linears}
    kind = kinds.pop()
    if (kinds or kind not in WEIGHTS or parts.output.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu")
            or any(width % MULTIPLE[kind] for width in (config.dim, config.hidden))
            or any(module._compiled_call_impl is not None for module in modules)
            or any(module._forward_hooks or module._forward_pre_hooks for module in modules)
            or not all(linear.weight.is_contiguous() for linear in linears)):
        return None
    return WEIGHTS[kind]


def matrices(part: AttentionParts | FeedForwardParts | None) -> list[nn.Module]:
    """The linear layers of a part."""
    found = [one[0] if isinstance(one, tuple) else one for one in (part or ())[1:]]
    return [linear for linear in found if linear is not None]


class NativeEngine:
    """C++ kernels over their own caches. See `Engine` (engines.py)."""

    def __init__(self, model: nn.Module, weights: int, kernels: ctypes.CDLL) -> None:
        self.model, self.weights, self.kernels = model, weights, kernels
        kernels.scratch_size.restype = c_int64
        kernels.first_query.argtypes = (c_void_p,) * 4
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = self.capacity = 0
        self.logits = torch.empty(0)

    def reserve(self, rows: int, tokens: int) -> bool:
        """Also looks up the addresses of the weights, and computes what all queries begin with."""
        config, parts = self.model.config, self.model.parts()
        K, grows = config.dim // config.n_head, rows > self.rows or tokens > self.capacity
        if grows:
            self.keys, self.values = [], []  # free the memory before the new ones are made
            self.rows, self.capacity = 0, -(-tokens // SIDE) * SIDE
            caches = len(parts.layers) + (parts.shared is not None)
            dtype = torch.float32 if self.weights == 0 else torch.bfloat16
            shape, width = (rows, config.n_kv_head), -(-K // SIDE) * SIDE
            self.keys = [torch.empty(*shape, self.capacity // SIDE, K, SIDE, dtype=dtype) for _ in range(caches)]
            self.values = [torch.empty(*shape, self.capacity, width, dtype=dtype) for _ in range(caches)]
            self.rows = rows  # only now: there may have been no memory
        self.scratch, self.fits = torch.empty(0), (0, 0)  # tokens and threads for which the scratch is large enough
        self.kept = []  # fp32 copies of the norms' weights
        last = len(parts.layers)  # number of the cache that all queries share
        layers = self._layers([(layer, i) for i, layer in enumerate(parts.layers)])
        queries = self._layers([(layer, last) for layer in parts.queries])
        shared = _Attention() if parts.shared is None else self._attention(parts.shared, last)
        self.table = self.model.rope(torch.device("cpu"))
        self.described = _Model(config.dim, config.n_head, config.n_kv_head, K, config.hidden, config.vocab_size,
                                self.capacity, config.norm_eps, len(layers), layers, len(queries), queries, shared,
                                self._norm(parts.norm), _linear(parts.output))
        self.query = None if parts.query is None else parts.query.float()
        self.first_query = None if self.query is None else self._first_query(self.query)
        return grows

    def forward(self, x: Tensor, batch: Batch, control: Tensor | None = None) -> Tensor:
        """See `Engine.forward`."""
        (_, tokens), (_, asks), vocab = batch.fed.shape, batch.asks.shape, self.described.vocab
        x, threads = x.float().contiguous(), torch.get_num_threads()
        y = None if self.query is None else self.query.repeat(asks, 1)
        first_query, added = self.first_query, None
        if control is not None and y is not None:
            y += control[0]
            first_query = None  # queries no longer start alike
        elif control is not None:
            control, added = control.float().contiguous(), (c_void_p * self.described.layers)()
            for layer, terms in zip(self.model.control_layers, control, strict=True):
                added[layer] = terms.data_ptr()
        need = max(tokens, asks), threads
        if need[0] > self.fits[0] or threads > self.fits[1]:
            self.fits = tuple(map(max, need, self.fits))
            size = self.kernels.scratch_size(ctypes.byref(self.described), *map(c_int64, self.fits))
            self.scratch = torch.zeros(size)  # rows that only fill a group up are computed too: no slow subnormals
        if len(self.logits) < asks:
            self.logits = torch.empty(asks, vocab + SIDE)  # not a power of two: rows would share cache sets
        fed, asked = (block.data_ptr() + 8 * block.shape[1] for block in (batch.fed, batch.asks))  # past the first row
        step = _Step(x.data_ptr(), _Tokens(tokens, *(fed + 8 * tokens * i for i in range(4))), batch.asks.data_ptr(),
                     pointer(y), pointer(first_query),
                     _Tokens(asks, asked, asked + 8 * asks, None, asked + 16 * asks), self.table.data_ptr(),
                     self.logits.data_ptr(), self.logits.shape[1], self.scratch.data_ptr(), threads, added)
        assert x.shape == (tokens, self.described.dim) and batch.fed.is_contiguous() and batch.asks.is_contiguous()
        assert batch.longest <= self.capacity and batch.rows.max() < self.rows, (batch.longest, batch.rows)
        self.kernels.step(ctypes.byref(self.described), ctypes.byref(step))
        return self.logits[:asks, :vocab]

    def copy(self, source: int, targets: Tensor, *, length: int) -> None:
        """See `Engine.copy`. Whole blocks of SIDE keys are copied."""
        blocks = -(-length // SIDE)
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[targets, :, :blocks] = keys[source, :, :blocks].clone()
            values[targets, :, :length] = values[source, :, :length].clone()

    def _first_query(self, start: Tensor) -> Tensor:
        """What the first layer of queries makes of their common start (D,), before the rotation: (H K,)."""
        found = torch.empty(self.described.heads * self.described.head_dim)
        scratch = torch.zeros(self.kernels.scratch_size(ctypes.byref(self.described), c_int64(1), c_int64(1)))
        self.kernels.first_query(ctypes.byref(self.described), *map(pointer, (start.contiguous(), found, scratch)))
        return found

    def _layers(self, layers: list[tuple[tuple[AttentionParts, FeedForwardParts], int]]) -> ctypes.Array:
        return (_Layer * len(layers))(*(
            _Layer(self._attention(attention, cache), _FeedForward(self._norm(ffn.norm), *map(_linear, ffn[1:])))
            for (attention, ffn), cache in layers))

    def _attention(self, part: AttentionParts, cache: int) -> _Attention:
        return _Attention(self._norm(part.norm), *map(_linear, part[1:]), self.keys[cache].data_ptr(),
                          self.values[cache].data_ptr())

    def _norm(self, norm: RMSNorm) -> int:
        self.kept.append(norm.weight.float().contiguous())
        return pointer(self.kept[-1])


def _linear(given: nn.Module | tuple[nn.Module, int] | None) -> _Linear:
    """Where a linear layer's weights begin, or those of its rows from a number on."""
    linear, first = given if isinstance(given, tuple) else (given, 0)
    if linear is None:
        return _Linear()
    weight, scale = linear.weight, getattr(linear, "scale", None)
    return _Linear(weight[first:].data_ptr(), None if scale is None else scale[first:].data_ptr())
