"""The two halves of a Llama block with a backward that keeps little, and dropout that draws and keeps little.

Autograd would keep every intermediate of norm, rotation and SwiGLU. Here what a pass over memory can make again (the
normed input, silu(a) * b) is made again, and the rotation happens in place. Products are never repeated. Forward
numbers are those of the plain operations; these are used instead wherever nothing is to be saved: without gradients,
under torch.compile (which makes such choices itself) and for layers that something else wraps (LoRA's).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def applies(*linears: nn.Linear) -> bool:
    """Whether these layers may be taken apart: plain, trained ones without hooks, in a forward that autograd records."""
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and all(type(linear) is nn.Linear and linear.bias is None and linear.weight.requires_grad
                    and not (linear._forward_hooks or linear._forward_pre_hooks) for linear in linears))


def normed_qkv(x: Tensor, norm: Tensor, eps: float, wqkv: Tensor, rope: Tensor,
               heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm, packed projection and rotation: x (B, T, D) → q (B, T, heads[0], K), k and v (B, T, heads[1], K)."""
    return _NormedQKV.apply(x, norm, wqkv, rope, eps, _compute_type(x), heads)


def normed_swiglu(x: Tensor, norm: Tensor, eps: float, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """w2(silu(w1 n) * w3 n) with n the RMS norm of x (B, T, D) → (B, T, D)."""
    return _NormedSwiGLU.apply(x, norm, w1, w3, w2, eps, _compute_type(x))


class Dropout(nn.Dropout):
    """Dropout that on a CPU keeps no mask but the random state it is drawn from, and draws 16 bits per element: the
    rate is rounded to a 65536th, and the scale fits the rounded rate."""

    def forward(self, x: Tensor) -> Tensor:
        """x with a share p of its elements zero and the rest scaled up, in training only."""
        if self.training and 0 < self.p < 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Dropped.apply(x, round(self.p * 2**16))
        return super().forward(x)


class _Dropped(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, dropped: int) -> Tensor:
        ctx.state, ctx.dropped = torch.get_rng_state(), dropped
        return _drop(x, dropped, torch.default_generator)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _drop(grad, ctx.dropped, torch.Generator().set_state(ctx.state)), None


class _NormedQKV(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, norm: Tensor, wqkv: Tensor, rope: Tensor, eps: float, dtype: torch.dtype,
                heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        rms = _inverse_rms(x, eps)
        qkv = _norm(x, rms, norm, dtype) @ wqkv.to(dtype).t()  # (B, T, (H + 2 KV heads) K)
        ctx.save_for_backward(x, rms, norm, wqkv, rope)
        ctx.heads = heads
        qkv = qkv.unflatten(-1, (heads[0] + 2 * heads[1], -1))
        _rotate_(qkv[:, :, :sum(heads)], rope)
        return qkv.split((heads[0], heads[1], heads[1]), dim=2)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rms, norm, wqkv, rope = ctx.saved_tensors
        grad = torch.cat(grads, dim=2)
        _rotate_(grad[:, :, :sum(ctx.heads)], rope, transposed=True)
        grad = grad.flatten(2).flatten(0, 1)  # (B T, …)
        normed = _norm(x, rms, norm, grad.dtype).flatten(0, 1)
        grad_weight = (grad.t() @ normed).to(wqkv.dtype)
        return *_norm_backward(grad @ wqkv.to(grad.dtype), x, rms, norm), grad_weight, None, None, None, None


class _NormedSwiGLU(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, eps: float,
                dtype: torch.dtype) -> Tensor:
        rms = _inverse_rms(x, eps)
        normed = _norm(x, rms, norm, dtype)
        a, b = normed @ w1.to(dtype).t(), normed @ w3.to(dtype).t()  # (B, T, F) each
        ctx.save_for_backward(x, rms, norm, w1, w3, w2, a, b)
        return F.silu(a).mul_(b) @ w2.to(dtype).t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rms, norm, w1, w3, w2, a, b = ctx.saved_tensors
        dtype = a.dtype
        grad, a, b = grad.to(dtype).flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)
        gate = F.silu(a)
        grad_w2 = (grad.t() @ (gate * b)).to(w2.dtype)
        grad = grad @ w2.to(dtype)  # of silu(a) * b
        grad_b = gate.mul_(grad)
        grad_a = torch.ops.aten.silu_backward(grad.mul_(b), a)
        del gate, a, b
        normed = _norm(x, rms, norm, dtype).flatten(0, 1)
        grad_w1, grad_w3 = (grad_a.t() @ normed).to(w1.dtype), (grad_b.t() @ normed).to(w3.dtype)
        grad = torch.addmm(grad_a @ w1.to(dtype), grad_b, w3.to(dtype))
        return *_norm_backward(grad, x, rms, norm), grad_w1, grad_w3, grad_w2, None, None


def _drop(x: Tensor, dropped: int, generator: torch.Generator) -> Tensor:
    """x with dropped / 65536 of its elements zero, scaled to the same mean. One 64-bit draw serves four elements."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu").random_(-2**63, None, generator=generator)
    kept = draws.view(torch.int16)[:x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(kept, x, 0).mul_(2**16 / (2**16 - dropped))


def _compute_type(x: Tensor) -> torch.dtype:
    """The type that matrix products have here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)  # (B, T, 1) fp32


def _norm(x: Tensor, rms: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """x * rms in fp32, cast back, then scaled; in the type of the product that follows."""
    return ((x * rms).type_as(x) * norm).to(dtype)


def _norm_backward(grad: Tensor, x: Tensor, rms: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x (B, T, D) and by the scale (D,) from `grad` (B T, D) by what `_norm` gave; `grad` is used up."""
    grad, unit = grad.float(), (x * rms).flatten(0, 1)
    product = grad * unit
    grad_norm = product.sum(0).to(norm.dtype)
    mean = (product @ norm.float() / x.shape[-1])[:, None]
    grad = grad.mul_(norm).addcmul_(unit, mean, value=-1).mul_(rms.flatten(0, 1))
    return grad.view(x.shape).type_as(x), grad_norm


def _rotate_(x: Tensor, rope: Tensor, *, transposed: bool = False) -> None:
    """`apply_rope` in place on x (B, T, H, K): a pair is a complex number, (cos, sin) another. `transposed` multiplies
    by the transposed matrices, which is what a backward needs: the prefix's are zero and have no inverse."""
    table = torch.view_as_complex(rope)[:, None]  # (T, 1, K/2)
    table = table.conj().resolve_conj() if transposed else table
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(table)
    else:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        x.copy_(torch.view_as_real(pairs.mul_(table)).flatten(-2))
