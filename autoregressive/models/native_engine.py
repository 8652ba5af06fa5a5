"""The engine of CPUs: native/decode.cpp on the model's own weights, fp32 or bfloat16 (or quantised), read in place.

Arithmetic is fp32 whatever the weights are; beside bfloat16 weights the cache is bfloat16. A row's bits depend neither
on the other rows, nor on how many tokens a step holds, nor on the number of threads.
"""
import ctypes

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.quantized import QuantizedLinear
from native.build import load, pointer

SIDE = 16  # positions side by side in the cache of keys: the constant of the same name in native/decode.cpp
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}
MULTIPLE = {torch.float32: 8, torch.bfloat16: 16, 8: 32, 4: 64}  # of inputs, that one load of a kernel takes
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
    linears = [model.output, *(layer.get_submodule(name) for layer in model.layers for name in PROJECTIONS)]
    kinds = {linear.bits if type(linear) is QuantizedLinear else linear.weight.dtype if type(linear) is nn.Linear
             and linear.bias is None and type(linear.weight) in (Tensor, nn.Parameter) else None for linear in linears}
    kind = kinds.pop()
    config = model.config
    if (kinds or kind not in WEIGHTS or model.output.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu")
            or any(width % MULTIPLE[kind] for width in (config.dim, config.hidden)) or model.training
            or any(module._compiled_call_impl is not None for module in model.modules())
            or any(linear._forward_hooks or linear._forward_pre_hooks or not linear.weight.is_contiguous()
                   for linear in linears)):
        return None
    return WEIGHTS[kind]


class NativeEngine:
    """C++ kernels over their own caches."""

    row_multiple = 1

    def __init__(self, model: Transformer, weights: int, kernels: ctypes.CDLL) -> None:
        self.model, self.weights, self.kernels = model, weights, kernels
        kernels.scratch_size.restype = ctypes.c_int64
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = self.capacity = 0
        self.scratch = self.logits = torch.empty(0)
        self.graphs = StepGraphs()

    def reserve(self, rows: int, tokens: int) -> None:
        """Have caches for so many rows of so many tokens, and look where the weights lie now."""
        config = self.model.config
        K = config.dim // config.n_head
        if rows > self.rows or tokens > self.capacity:
            self.keys, self.values = [], []  # before the new ones are made
            self.rows, self.capacity = max(rows, self.rows), -(-max(tokens, self.capacity) // SIDE) * SIDE
            dtype = torch.float32 if self.weights == 0 else torch.bfloat16
            shape = (self.rows, config.n_kv_head, self.capacity)
            self.keys = [torch.empty(*shape, K, dtype=dtype) for _ in range(config.n_layer)]
            self.values = [torch.empty(*shape, -(-K // SIDE) * SIDE, dtype=dtype) for _ in range(config.n_layer)]
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
        """See `Engine.step`. The logits are overwritten by the next step."""
        count, new = x.shape[:2]
        x = x.float().contiguous()
        x = x.clone() if x.data_ptr() == self.model.tok_embeddings.weight.data_ptr() else x
        rope = rope.expand(count, *rope.shape[1:]).contiguous()
        rows = torch.arange(rows.start, rows.stop, dtype=torch.int32) if isinstance(rows, slice) else rows.int()
        wanted = torch.arange(count * new, dtype=torch.int32) if wanted is None else wanted.int()
        lengths, threads = lengths.int(), torch.get_num_threads()
        assert len(rows) == len(lengths) == count and int(rows.max()) < self.rows, (rows, lengths, x.shape)
        assert int(lengths.max()) <= longest <= self.capacity - new, (lengths, longest, new, self.capacity)
        size = self.kernels.scratch_size(ctypes.byref(self.described), ctypes.c_int64(count * new),
                                         ctypes.c_int64(threads))
        if len(self.scratch) < size:
            self.scratch = torch.empty(size)
        vocab = self.model.config.vocab_size
        if len(self.logits) < len(wanted):
            self.logits = torch.empty(len(wanted), vocab + SIDE)  # no power of two: rows would share cache lines
        self.kernels.step(ctypes.byref(self.described), ctypes.byref(_Step(
            pointer(x), pointer(rope), pointer(rows), pointer(lengths), count, new, causal, pointer(wanted),
            len(wanted), pointer(self.logits), self.logits.shape[1], pointer(self.scratch), threads)))
        return self.logits[:len(wanted), :vocab]

    def copy_row(self, source: int, target: int, *, length: int) -> None:
        """Let row `target` begin with the `length` first tokens of row `source`."""
        for cache in (*self.keys, *self.values):
            cache[target] = cache[source]


def fitting_kernels(model: Transformer) -> tuple[int, ctypes.CDLL] | tuple[None, None]:
    """The kernels for this model here, and their type of weights, if there are any."""
    weights = weight_type(model)
    kernels = None if weights is None else load("decode", f"WEIGHTS={weights}")
    return (None, None) if kernels is None else (weights, kernels)


def _linear(linear: nn.Linear | QuantizedLinear) -> _Linear:
    return _Linear(pointer(linear.weight), pointer(getattr(linear, "scale", None)))
