"""The two halves of a Llama block with a backward that keeps few tensors, and dropout that keeps no mask.

Autograd would keep every intermediate of norm, rotation and SwiGLU for the backward. Here the backward computes again
what is cheap (the normed input, silu(a) * b, dropout's mask), and the rotation happens in place; no matrix product is
done twice. Plain operations run instead where nothing has to be kept (decoding), under torch.compile, which makes such
choices itself, and for layers that something else wraps, such as LoRA's.

In fp32 the forward's numbers are those of the plain operations, bit for bit. They may differ in the last bit for head
sizes that are no multiple of 16 (PyTorch rotates pairs that do not fill a vector with fused multiply-adds) and for more
than `ROWS` tokens on a CPU (a product of another size may use another kernel).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoregressive.models import lean_kernels

ROWS = 1024  # tokens whose intermediates exist at once


def applies(*linears: nn.Linear) -> bool:
    """Whether these layers may be taken apart: plain, trained, without hooks, in a forward that autograd records."""
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and all(type(linear) is nn.Linear and linear.bias is None and linear.weight.requires_grad
                    and not (linear._forward_hooks or linear._forward_pre_hooks) for linear in linears))


def normed_qkv(x: Tensor, norm: Tensor, eps: float, wqkv: Tensor, rope: Tensor,
               heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm, packed projection and rotation: x (B, T, D), rope (T, K/2, 2) or one table per row (B, T, K/2, 2) → q
    (B, T, heads[0], K), k and v (B, T, heads[1], K)."""
    return _NormedQKV.apply(x, norm, wqkv, rope, eps, _compute_type(x), heads)


def normed_swiglu(x: Tensor, norm: Tensor, eps: float, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """w2(silu(w1 n) * w3 n) with n the RMS norm of x (B, T, D) → (B, T, D)."""
    return _NormedSwiGLU.apply(x, norm, w1, w3, w2, eps, _compute_type(x))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Causal attention of q over k and v (B, T, heads, K) → (B, T, heads K), with a fast backward; None where there is
    none: in other types than bfloat16, and on all but CPUs with AMX."""
    if (torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling()
            and lean_kernels.ready_for_attention(q, k, v)):
        return _CausalAttention.apply(q, k, v)
    return None


class _CausalAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2).contiguous()
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return lean_kernels.attention_backward(*ctx.saved_tensors, grad.contiguous())


class Dropout(nn.Dropout):
    """Dropout that on a CPU keeps what the mask is made of and no mask, and draws 16 bits per element: the rate is
    rounded to a multiple of 1/65536, and the scale fits the rounded rate."""

    def forward(self, x: Tensor) -> Tensor:
        """x with a share p of its elements zero and the rest scaled up, in training only."""
        if self.training and 0 < self.p < 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Dropped.apply(x, round(self.p * 2**16), None)
        return super().forward(x)


class _Dropped(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, dropped: int, key: int | None) -> Tensor:
        ctx.dropped, ctx.key, ctx.state = dropped, key, None
        if key is None and lean_kernels.applicable(x):
            ctx.key = int(torch.empty((), dtype=torch.int64, device="cpu").random_(-2**63, None))
        if ctx.key is not None:
            return lean_kernels.drop(x, dropped, ctx.key)
        ctx.state = torch.get_rng_state()
        return _drop(x, dropped, torch.default_generator)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.key is not None:
            return _Dropped.apply(grad.contiguous(), ctx.dropped, ctx.key), None, None
        return _drop(grad, ctx.dropped, torch.Generator().set_state(ctx.state)), None, None


class _NormedQKV(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, norm: Tensor, wqkv: Tensor, rope: Tensor, eps: float, dtype: torch.dtype,
                heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        rows, weight = x.flatten(0, 1), wqkv.to(dtype).t()
        rms = _inverse_rms(rows, eps)
        qkv = x.new_empty(len(rows), len(wqkv), dtype=dtype)
        for part in _parts(qkv):
            torch.mm(_norm(rows[part], rms[part], norm, dtype), weight, out=qkv[part])
        qkv = qkv.view(*x.shape[:2], heads[0] + 2 * heads[1], -1)
        _rotate_(qkv[:, :, :sum(heads)], rope)
        ctx.save_for_backward(x, rms, norm, wqkv, rope)
        ctx.heads = heads
        return qkv.split((heads[0], heads[1], heads[1]), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rms, norm, wqkv, rope = ctx.saved_tensors
        grad = torch.cat(grads, dim=2)  # (B, T, heads, K)
        _rotate_(grad[:, :, :sum(ctx.heads)], rope, transposed=True)
        grad, rows, weight = grad.view(len(rms), -1), x.flatten(0, 1), wqkv.to(grad.dtype)
        grad_x, grad_norm, grad_weight = torch.empty_like(rows), _sum_like(norm), torch.empty_like(weight)
        for part in _parts(grad):
            _add_product(grad_weight, grad[part].t(), _norm(rows[part], rms[part], norm, grad.dtype), part)
            _norm_backward(grad[part] @ weight, rows[part], rms[part], norm, grad_x[part], grad_norm)
        return grad_x.view(x.shape), grad_norm.to(norm.dtype), grad_weight.to(wqkv.dtype), None, None, None, None


class _NormedSwiGLU(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, eps: float,
                dtype: torch.dtype) -> Tensor:
        rows, first, third, second = x.flatten(0, 1), w1.to(dtype).t(), w3.to(dtype).t(), w2.to(dtype).t()
        rms = _inverse_rms(rows, eps)
        a, b = (x.new_empty(len(rows), len(w1), dtype=dtype) for _ in range(2))  # (B T, F)
        out = x.new_empty(rows.shape, dtype=dtype)
        for part in _parts(a):
            normed = _norm(rows[part], rms[part], norm, dtype)
            torch.mm(normed, first, out=a[part])
            torch.mm(normed, third, out=b[part])
            torch.mm(F.silu(a[part]).mul_(b[part]), second, out=out[part])
        ctx.save_for_backward(x, rms, norm, w1, w3, w2, a, b)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rms, norm, w1, w3, w2, all_a, all_b = ctx.saved_tensors
        dtype = all_a.dtype
        rows, grad, first, third, second = x.flatten(0, 1), grad.flatten(0, 1), w1.to(dtype), w3.to(dtype), w2.to(dtype)
        grad_x, grad_norm = torch.empty_like(rows), _sum_like(norm)
        sums = [torch.empty_like(weight) for weight in (first, third, second)]
        for part in _parts(all_a):
            a, b, g = all_a[part], all_b[part], grad[part].to(dtype)
            gated, grad_a, grad_b = _swiglu_backward(a, b, g @ second)
            _add_product(sums[2], g.t(), gated, part)
            normed = _norm(rows[part], rms[part], norm, dtype)
            _add_product(sums[0], grad_a.t(), normed, part)
            _add_product(sums[1], grad_b.t(), normed, part)
            g = (grad_a @ first).addmm_(grad_b, third)
            _norm_backward(g, rows[part], rms[part], norm, grad_x[part], grad_norm)
        gradients = [total.to(weight.dtype) for total, weight in zip(sums, (w1, w3, w2), strict=True)]
        return grad_x.view(x.shape), grad_norm.to(norm.dtype), *gradients, None, None


def _parts(rows: Tensor) -> list[slice]:
    """Row ranges to treat one after the other: on a CPU, intermediates then stay in its cache, and the heap is less
    fragmented. In half precision all at once, as the weights' gradients would be summed in that type."""
    step = ROWS if rows.device.type == "cpu" and rows.dtype == torch.float32 else max(1, len(rows))
    return [slice(start, start + step) for start in range(0, max(1, len(rows)), step)]


def _add_product(total: Tensor, left: Tensor, right: Tensor, part: slice) -> None:
    """total += left @ right; the first part takes the place of what `total` held."""
    total.addmm_(left, right, beta=1 if part.start else 0)


def _sum_like(norm: Tensor) -> Tensor:
    return torch.zeros_like(norm, dtype=torch.float32)


def _drop(x: Tensor, dropped: int, generator: torch.Generator) -> Tensor:
    """x with dropped / 65536 of its elements zero, scaled to the same mean. One 64-bit draw serves four elements."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu").random_(-2**63, None, generator=generator)
    kept = draws.view(torch.int16)[:x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(kept, x, 0).mul_(2**16 / (2**16 - dropped))


def _compute_type(x: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's, else that of the tensors."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    """(N, 1) fp32 of rows (N, D)."""
    parts = [torch.rsqrt(rows[part].float().square().mean(-1, keepdim=True) + eps) for part in _parts(rows)]
    return torch.cat(parts)


def _norm(x: Tensor, rms: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """x * rms in fp32, cast back, then scaled; in the type of the matrix product that follows."""
    if (dtype in lean_kernels.TYPES and norm.shape == x.shape[1:] and rms.shape == (len(x), 1)
            and lean_kernels.applicable(x, rms, norm, wide=(x,))):
        return lean_kernels.norm(x, rms, norm, dtype)
    return ((x * rms).type_as(x) * norm).to(dtype)


def _norm_backward(grad: Tensor, x: Tensor, rms: Tensor, norm: Tensor, grad_x: Tensor, grad_norm: Tensor) -> None:
    """From `grad` (N, D) by what `_norm` gave, which is used up: fill grad_x (N, D), add to grad_norm (D,) fp32."""
    if grad.shape == x.shape and lean_kernels.applicable(grad, wide=(x, rms, norm, grad_x, grad_norm)):
        return lean_kernels.norm_backward(grad, x, rms, norm, grad_x, grad_norm)
    grad, unit = grad.float(), x * rms
    product = grad * unit
    grad_norm += product.sum(0)
    mean = (product @ norm.float() / x.shape[-1])[:, None]
    grad_x.copy_(grad.mul_(norm).addcmul_(unit, mean, value=-1).mul_(rms))
    return None


def _swiglu_backward(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From `grad` by y = silu(a) * b, which is used up: y, the gradients by a and by b."""
    if lean_kernels.applicable(a, b, grad):
        return lean_kernels.swiglu_backward(a, b, grad)
    gate = F.silu(a)
    y, grad_b = gate * b, gate.mul_(grad)
    return y, torch.ops.aten.silu_backward(grad.mul_(b), a), grad_b


def _rotate_(x: Tensor, rope: Tensor, *, transposed: bool = False) -> None:
    """`apply_rope` in place on x (B, T, H, K): a pair is a complex number, (cos, sin) another. `transposed` multiplies
    by the transposed matrices, for the backward (not the inverse: the prefix's matrices are zero and have none)."""
    fits = rope.shape[-3:] == (x.shape[1], x.shape[3] // 2, 2) and (rope.ndim == 3 or len(rope) in (1, len(x)))
    if (fits and lean_kernels.owns_memory(x) and x.dtype in lean_kernels.TYPES and x.stride()[2:] == (x.shape[3], 1)
            and lean_kernels.applicable(rope, wide=(rope,))):
        return lean_kernels.rotate_(x, rope if rope.ndim == 4 else rope[None], transposed=transposed)
    table = torch.view_as_complex(rope).unsqueeze(-2)  # (T, 1, K/2) or (B, T, 1, K/2)
    table = table.conj().resolve_conj() if transposed else table
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(table)
    else:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        x.copy_(torch.view_as_real(pairs.mul_(table)).flatten(-2))
    return None
