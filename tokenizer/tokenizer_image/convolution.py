"""A convolution with the operations before and after it in the tokenizer's layers, computed in one of two ways.

In fp32 on a CPU, when nothing is trained, native/conv.cpp does all of it in one pass: Winograd's convolution
(arXiv 1509.09308) with GroupNorm, SiLU, upsampling and the residual folded in, several times as fast as PyTorch's
kernels. Its results depend neither on the batch nor on the number of threads. Where 16 bits of a number are enough,
CPUs with AMX are faster still. Everywhere else the layers themselves run, one after the other.
"""
import contextlib
import ctypes
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from native import build
from native.build import pointer
from utils.training.allocator import keep_freed_memory


class PointwiseConv(nn.Conv2d):
    """1x1 convolution, computed as a matrix product over channels (a view where memory is channels-last).

    PyTorch's 1x1 kernel for CPUs splits its sums by the number of threads, which changes the last bit of an image; this
    product does not (measured, tests/tokenizer/test_tokenizer.py).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if ready(self, x):
            return run_kernel(x, self.weight, self.bias)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)  # its gradient is channels-last then, as DDP's buckets
        return F.linear(x.permute(0, 2, 3, 1), matrix, self.bias).permute(0, 3, 1, 2)


KNOWN = nn.Conv2d, PointwiseConv, nn.GroupNorm, nn.Dropout, nn.Embedding  # a subclass may compute something else


# what `keeping_16_bits` sets, for the thread that calls it
KEEPS_16_BITS = ContextVar("keeps_16_bits", default=False)


@contextlib.contextmanager
def keeping_16_bits(wanted: bool) -> Iterator[None]:
    """Within, kernels that can multiply faster by it keep 16 bits of a number, not all 24: those for AMX."""
    before = KEEPS_16_BITS.set(wanted)
    try:
        yield
    finally:
        KEEPS_16_BITS.reset(before)


def convolve(layer: nn.Conv2d, x: Tensor, *, norm: nn.GroupNorm | None = None, dropout: nn.Module | None = None,
             upsample: bool = False, residual: Tensor | None = None) -> Tensor:
    """residual + layer(dropout(silu(norm(x)))), x (B, in, h, w) → (B, out, h', w'); None: left out.

    `upsample` doubles h and w first (nearest neighbour). A layer of stride 2 without padding gets one zero row below
    and one zero column on the right.
    """
    if ready(layer, x, norm, dropout, residual):
        return run_kernel(x, layer.weight, layer.bias, stride=layer.stride[0], before=layer.padding[0],
                          upsample=upsample, norm=norm, silu=norm is not None, residual=residual)
    if norm is not None:
        x = F.silu(norm(x))
    if dropout is not None:
        x = dropout(x)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if (layer.stride, layer.padding) == ((2, 2), (0, 0)):
        x = F.pad(x, (0, 1, 0, 1))
    y = layer(x)
    return y if residual is None else residual + y


def ready(layer: nn.Module, *others: Tensor | nn.Module | None) -> bool:
    """Whether the kernels may run `layer` (with `others`, its inputs and what comes before it): eval mode, no gradient,
    no autocast, no tracing, fp32 on a CPU, a compiler; and modules that compute what the kernels do."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or layer.training:
        return False
    gradients = torch.is_grad_enabled()
    for one in (layer, *others):
        if isinstance(one, nn.Module) and not fits(one):
            return False
        weights = () if isinstance(one, Tensor) or one is None else (getattr(one, "weight", None),
                                                                     getattr(one, "bias", None))
        if not all(type(t) in (Tensor, nn.Parameter) for t in weights if t is not None):
            return False
        for t in (one,) if isinstance(one, Tensor) else weights:
            if t is not None and not (t.is_cpu and t.dtype is torch.float32 and not (gradients and t.requires_grad)):
                return False
    return kernels() is not None


def fits(module: nn.Module) -> bool:
    """Whether a module computes what the kernels do: no subclass (an adapter, say), no hooks, nothing replaced, and for
    a convolution a window that they know."""
    if (type(module) not in KNOWN or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            or module._compiled_call_impl is not None):
        return False
    if isinstance(module, nn.Conv2d):
        side, window = module.kernel_size[0], (module.stride, module.padding)
        known = (side % 2 and window == ((1, 1), (side // 2, side // 2))) or (side == 3 and window == ((2, 2), (0, 0)))
        return bool(known and module.kernel_size == (side, side) and module.groups == 1
                    and module.dilation == (1, 1) and module.padding_mode == "zeros")
    return not (module.training if isinstance(module, nn.Dropout) else isinstance(module, nn.GroupNorm)
                and not module.affine)


def run_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, before: int = 0,
               upsample: bool = False, norm: nn.GroupNorm | None = None, silu: bool = False,
               residual: Tensor | None = None) -> Tensor:
    """The kernels' convolution of x (B, in, h, w) by weight (out, in, k, k), h' = h (doubled by `upsample`) / stride.

    `before`: zeros above and left of the picture; `norm`, then `silu`, are applied to x first.
    """
    out, channels, side, _ = weight.shape
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"the input is {tuple(x.shape)}, the layer takes (batch, {channels}, height, width)")
    winograd = (side, stride, before) == (3, 1, 1)
    height, width = (size * 2 if upsample else size // stride for size in x.shape[2:])
    y = x.new_empty(x.shape[0], height, width, out)
    if residual is not None and residual.shape != (len(x), out, height, width):
        raise ValueError(f"the residual is {tuple(residual.shape)}, the layer gives {(len(x), out, height, width)}")
    if norm is not None and norm.num_channels != channels:
        raise ValueError(f"the norm is for {norm.num_channels} channels, the input has {channels}")
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)
    library = kernels()
    split = KEEPS_16_BITS.get()
    packed = x.new_empty(library.packed_size(winograd, side, channels, out, split), dtype=torch.uint8)
    x, residual = pixel_rows(x), None if residual is None else pixel_rows(residual)
    normed = (None, None, 0, 0.0) if norm is None else (
        pointer(norm.weight), pointer(norm.bias), norm.num_groups, norm.eps)
    strides = (ctypes.c_long * 4)(*weight.stride())
    library.convolution(
        winograd, pointer(x), *x.shape, *normed, silu, upsample, weight.data_ptr(), strides, side, stride, before,
        pointer(packed), pointer(bias), pointer(residual), pointer(y), height, width, out, split,
        torch.get_num_threads())
    return y.permute(0, 3, 1, 2)


def can_keep_16_bits() -> bool:
    """Whether `keeping_16_bits` changes anything here."""
    library = kernels()
    return library is not None and bool(library.splits())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by the kernels: (N, in) → (N, out)."""
    return run_kernel(x.t()[None, :, None], weight[:, :, None, None], bias)[0, :, 0].t()


def pixel_rows(x: Tensor) -> Tensor:
    """(B, C, h, w) in any memory format → (B, h, w, C) contiguous; a view where memory is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def kernels() -> ctypes.CDLL | None:
    """native/conv.cpp, or None where it cannot be built or is switched off."""
    library = build.load("conv")
    return library if library is None else declared(library)


@functools.cache
def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' types; freed memory stays with the process, as each layer needs as much again."""
    keep_freed_memory()
    integer, size, address = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
    library.packed_size.argtypes, library.packed_size.restype = (integer, size, size, size, integer), size
    library.convolution.argtypes = (
        integer, address, *[size] * 4, address, address, size, ctypes.c_double, integer, integer, address, address,
        *[size] * 3, *[address] * 4, *[size] * 3, integer, integer)
    library.convolution.restype = None
    return library
