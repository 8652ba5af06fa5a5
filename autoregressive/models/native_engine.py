"""The engine of CPUs: native/decode.cpp on the model's own weights, fp32 or bfloat16 (or quantised), read in place.

Arithmetic is fp32 whatever the weights are; beside bfloat16 weights the cache is bfloat16. A row's bits depend neither
on the other rows, nor on how many tokens a step holds, nor on the number of threads.
"""
import ctypes
import weakref

import torch
from torch import Tensor, nn

from autoregressive.models.blocks import Attention, FeedForward, RMSNorm, TransformerBlock
from autoregressive.models.gpt import Transformer
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.quantized import QuantizedLinear
from native.build import load, pointer

SIDE = 16  # positions side by side in the cache of keys: the constant of the same name in native/decode.cpp
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}
MULTIPLE = {torch.float32: 8, torch.bfloat16: 16, 8: 32, 4: 64}  # layer widths must be multiples
PROJECTIONS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")


class _Linear(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [("attention_norm", ctypes.c_void_p), ("qkv", _Linear), ("out", _Linear), ("ffn_norm", ctypes.c_void_p),
                ("gate", _Linear), ("up", _Linear), ("down", _Linear), ("keys", ctypes.c_void_p),
                ("values", ctypes.c_void_p)]


class _Model(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in (
                    "layers", "dim", "heads", "kv_heads", "head_dim", "hidden", "vocab", "capacity")),
                ("eps", ctypes.c_float), ("layer", ctypes.POINTER(_Layer)), ("norm", ctypes.c_void_p),
                ("output", _Linear)]


class _Step(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("rope", ctypes.c_void_p), ("rows", ctypes.c_void_p),
                ("lengths", ctypes.c_void_p), ("R", ctypes.c_int64), ("T", ctypes.c_int64), ("causal", ctypes.c_int64),
                ("wanted", ctypes.c_void_p), ("wishes", ctypes.c_int64), ("logits", ctypes.c_void_p),
                ("stride", ctypes.c_int64), ("scratch", ctypes.c_void_p), ("threads", ctypes.c_int64)]


def weight_type(model: Transformer) -> int | None:
    """Which kernels fit the model: the value of WEIGHTS, or None if none do (a GPU, LoRA, hooks, odd sizes, …)."""
    parts = [model.norm, *(module for layer in model.layers for module in (
        layer, layer.attention, layer.feed_forward, layer.attention_norm, layer.ffn_norm))]
    if {type(part) for part in parts} != {RMSNorm, TransformerBlock, Attention, FeedForward}:
        return None
    linears = [model.output, *(layer.get_submodule(name) for layer in model.layers for name in PROJECTIONS)]
    kinds = {linear.bits if type(linear) is QuantizedLinear else linear.weight.dtype if type(linear) is nn.Linear
             and linear.bias is None and type(linear.weight) in (Tensor, nn.Parameter) else None for linear in linears}
    kind = kinds.pop()
    config = model.config
    if (kinds or kind not in WEIGHTS or model.output.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu")
            or any(width % MULTIPLE[kind] for width in (config.dim, config.hidden))
            or any(module._compiled_call_impl is not None for module in model.modules())
            or any(module._forward_hooks or module._forward_pre_hooks for module in (*parts, *linears))
            or not all(linear.weight.is_contiguous() for linear in linears)):
        return None
    return WEIGHTS[kind]


class NativeEngine:
    """C++ kernels over their own caches."""

    row_multiple = 1
    picks_rows = True

    def __init__(self, model: Transformer, weights: int, kernels: ctypes.CDLL) -> None:
        self.model, self.weights, self.kernels = weakref.proxy(model), weights, kernels
        kernels.scratch_size.restype = ctypes.c_int64
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = self.capacity = 0
        self.scratch = self.logits = torch.empty(0)
        self.graphs = StepGraphs()

    def reserve(self, rows: int, tokens: int) -> None:
        """Provide caches for `rows` rows of `tokens` tokens, and look up the addresses of the weights."""
        config = self.model.config
        K = config.dim // config.n_head
        if rows > self.rows or tokens > self.capacity:
            self.keys, self.values = [], []  # free the memory before the new ones are made
            self.rows, self.capacity = rows, -(-tokens // SIDE) * SIDE
            dtype = torch.float32 if self.weights == 0 else torch.bfloat16
            shape = (rows, config.n_kv_head)
            blocks, width = self.capacity // SIDE, -(-K // SIDE) * SIDE
            self.keys = [torch.empty(*shape, blocks, K, SIDE, dtype=dtype) for _ in range(config.n_layer)]
            self.values = [torch.empty(*shape, self.capacity, width, dtype=dtype) for _ in range(config.n_layer)]
        self.kept = [tensor.float().contiguous() for layer in self.model.layers
                     for tensor in (layer.attention_norm.weight, layer.ffn_norm.weight)]
        self.kept.append(self.model.norm.weight.float().contiguous())
        layers = (_Layer * config.n_layer)()
        for i, layer in enumerate(self.model.layers):
            qkv, out, gate, up, down = (_linear(layer.get_submodule(name)) for name in PROJECTIONS)
            layers[i] = _Layer(pointer(self.kept[2 * i]), qkv, out, pointer(self.kept[2 * i + 1]), gate, up, down,
                               pointer(self.keys[i]), pointer(self.values[i]))
        self.layers = layers
        self.described = _Model(config.n_layer, config.dim, config.n_head, config.n_kv_head, K, config.hidden,
                                config.vocab_size, self.capacity, config.norm_eps, layers, pointer(self.kept[-1]),
                                _linear(self.model.output))

    def step(self, x: Tensor, rope: Tensor, lengths: Tensor, *, rows: Tensor | slice, wanted: Tensor | None = None,
             causal: bool = True, longest: int, uniform: bool) -> Tensor:
        """See `Engine.step`."""
        count, new = x.shape[:2]
        x = x.float().contiguous()
        rope = rope.expand(count, *rope.shape[1:]).contiguous()
        rows = torch.arange(rows.start, rows.stop, dtype=torch.int32) if isinstance(rows, slice) else rows.int()
        wanted = torch.arange(count * new, dtype=torch.int32) if wanted is None else wanted.int()
        lengths, threads = lengths.int(), torch.get_num_threads()
        assert len(rows) == len(lengths) == count and 0 <= int(rows.min()) <= int(rows.max()) < self.rows, (rows, count)
        assert 0 < len(wanted) <= count * new and 0 <= int(wanted.min()) <= int(wanted.max()) < count * new, wanted
        assert int(lengths.max()) <= longest <= self.capacity - new, (lengths, longest, new, self.capacity)
        size = self.kernels.scratch_size(ctypes.byref(self.described), ctypes.c_int64(count * new),
                                         ctypes.c_int64(threads))
        if len(self.scratch) < size:
            self.scratch = torch.empty(size)
        vocab = self.model.config.vocab_size
        if len(self.logits) < len(wanted):
            self.logits = torch.empty(len(wanted), vocab + SIDE)  # not a power of two: rows would share cache sets
        self.kernels.step(ctypes.byref(self.described), ctypes.byref(_Step(
            pointer(x), pointer(rope), pointer(rows), pointer(lengths), count, new, causal, pointer(wanted),
            len(wanted), pointer(self.logits), self.logits.shape[1], pointer(self.scratch), threads)))
        return self.logits[:len(wanted), :vocab]

    def read_up_to(self, tokens: int) -> int:
        """As many as there are tokens in use."""
        return tokens

    def copy_row(self, source: int, target: int, *, length: int) -> None:
        """Let row `target` begin with the `length` first tokens of row `source`."""
        side = self.keys[0].shape[-2] * SIDE  # floats of SIDE neighbouring keys
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[target].flatten(1)[:, :-(-length // SIDE) * side] = \
                keys[source].flatten(1)[:, :-(-length // SIDE) * side]
            values[target, :, :length] = values[source, :, :length]


def fitting_kernels(model: Transformer) -> tuple[int, ctypes.CDLL] | tuple[None, None]:
    """The kernels for this model here, and their type of weights, if there are any."""
    weights = weight_type(model)
    kernels = None if weights is None else load("decode", f"WEIGHTS={weights}")
    return (None, None) if kernels is None else (weights, kernels)


def _linear(linear: nn.Linear | QuantizedLinear) -> _Linear:
    return _Linear(pointer(linear.weight), pointer(getattr(linear, "scale", None)))
