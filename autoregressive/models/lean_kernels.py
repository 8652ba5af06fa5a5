"""What native/train.cpp computes for `lean`: parts of the backward, and of the forward, that are no matrix products.

Each function is for CPU tensors in fp32 or bfloat16 whose memory is contiguous; `applicable` says whether it may run.
"""
import ctypes
import functools

import torch
from torch import Tensor, nn

from native import build
from native.build import pointer

TYPES = torch.float32, torch.bfloat16


def applicable(*tensors: Tensor, wide: tuple[Tensor, ...] = ()) -> bool:
    """Whether there are kernels for these tensors of one type, and for `wide` ones, which must be fp32."""
    dtype = tensors[0].dtype
    return (dtype in TYPES and all(owns_memory(t) and t.is_contiguous() and t.dtype == dtype for t in tensors)
            and all(owns_memory(t) and t.is_contiguous() and t.dtype == torch.float32 for t in wide)
            and training_kernels() is not None)


def owns_memory(x: Tensor) -> bool:
    """Whether a tensor has memory of its own on the CPU: none of those that stand for others (DTensor, FakeTensor)."""
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu


def norm(x: Tensor, rms: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, D) * rms (N, 1) * weight (D,), all fp32, in `dtype`."""
    out = torch.empty_like(x, dtype=dtype)
    training_kernels().norm(*map(pointer, (x, rms, weight, out)), dtype == torch.bfloat16, *x.shape,
                            torch.get_num_threads())
    return out


def norm_backward(grad: Tensor, x: Tensor, rms: Tensor, weight: Tensor, grad_x: Tensor, grad_weight: Tensor) -> None:
    """From grad (N, D), of either type, by what `norm` gave: fill grad_x (N, D), add to grad_weight (D,), both fp32."""
    training_kernels().norm_backward(
        pointer(grad), grad.dtype == torch.bfloat16, *map(pointer, (x, rms, weight, grad_x, grad_weight)), *x.shape,
        torch.get_num_threads())


def swiglu_backward(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From grad by y = silu(a) * b: y, the gradient by a, and that by b, which takes the memory of `grad`."""
    y, grad_a = torch.empty_like(a), torch.empty_like(a)
    training_kernels().swiglu_backward(*map(pointer, (a, b, grad, grad_a, y)), a.dtype == torch.bfloat16, a.numel(),
                                        torch.get_num_threads())
    return y, grad_a, grad


def drop(x: Tensor, dropped: int, key: int) -> Tensor:
    """x with dropped / 65536 of its elements zero, chosen by `key` (64 bits), the others scaled to the same mean."""
    if not owns_memory(x):
        raise TypeError(f"dropout's kernel cannot go on with a {type(x).__name__}: set LLAMAGEN_NATIVE=0")
    out = torch.empty_like(x)
    training_kernels().drop(pointer(x), pointer(out), x.dtype == torch.bfloat16, x.numel(), key, dropped,
                            torch.get_num_threads())
    return out


def rotate_(x: Tensor, table: Tensor, *, transposed: bool) -> None:
    """Turn pairs of x (B, T, H, K), whose heads lie side by side, in place by table (B or 1, T, K/2, 2) fp32: cosine
    and sine; or by the transposed matrices."""
    batch, tokens, heads, width = x.shape
    training_kernels().rotate(
        x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), x.stride(1), pointer(table),
        0 if len(table) == 1 else tokens * width, batch, tokens, heads * width, width, transposed,
        torch.get_num_threads())


def ready_for_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_backward` knows attention of q over k and v, all (B, T, heads, K)."""
    return (q.shape == k.shape == v.shape and q.shape[3] % 32 == 0
            and all(owns_memory(t) and t.dtype == torch.bfloat16 and t.stride()[2:] == (t.shape[3], 1)
                    for t in (q, k, v))
            and (library := training_kernels()) is not None and bool(library.has_attention()))


def attention_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of causal attention by q, k and v (B, T, heads, K), from its output and that one's gradient, both
    (B, T, heads K) contiguous."""
    gradients = tuple(torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    strides = (ctypes.c_long * 6)(*(part.stride(i) for part in (q, k, v) for i in (1, 0)))
    training_kernels().attention_backward(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, *map(pointer, (out, grad, *gradients)), *q.shape,
        torch.get_num_threads())
    return gradients


def training_kernels() -> ctypes.CDLL | None:
    """native/train.cpp, or None where it cannot be built, is switched off, or would run on one thread of several."""
    library = build.load("train")
    if library is None or (torch.get_num_threads() > 1 and not library.has_threads()):
        return None
    return _declared(library)


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    integer, size, address = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
    library.norm.argtypes = *[address] * 4, integer, size, size, integer
    library.norm_backward.argtypes = address, integer, *[address] * 5, size, size, integer
    library.swiglu_backward.argtypes = *[address] * 5, integer, size, integer
    library.drop.argtypes = address, address, integer, size, ctypes.c_uint64, integer, integer
    library.rotate.argtypes = address, integer, size, size, address, *[size] * 5, integer, integer
    library.attention_backward.argtypes = *[address] * 9, *[size] * 4, integer
    for name in ("attention_backward", "norm", "norm_backward", "swiglu_backward", "drop", "rotate"):
        getattr(library, name).restype = None
    return library
