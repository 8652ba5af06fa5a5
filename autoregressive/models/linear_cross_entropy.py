"""Cross-entropy of a linear head that never holds the logits of all tokens (chunks as in Cut Cross-Entropy's baseline
and Liger, arXiv 2411.09009 and 2410.10989).

The gradients are computed in the forward, chunk by chunk, while a chunk's logits exist: no product is done twice. torch
has the same as `F.linear_cross_entropy` since 2.14, as fast and as small with equal chunks. Ours works from 2.6 on,
takes a weight per sample without doing the products twice, and sums the head's gradient in fp32 under autocast.
"""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 512, "cuda": 4096}  # tokens whose logits exist at once; fewer make the products slower


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, valid: Tensor | None = None,
                         chunk: int | None = None, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Mean or sum of the cross-entropies of softmax(x @ weight.T) with `targets`, weighted by `valid`, fp32 scalar.

    x (N, D), weight (V, D), targets (N,) in 0 … V-1, valid (N,) weights or None for ones (none valid: the mean is 0).
    Products are in autocast's type or that of `weight`; softmax, loss and the sum of the weight's gradient are in fp32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    need = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss = _SummedLoss.apply(x, weight, targets, valid, dtype, chunk or CHUNK.get(device, CHUNK["cuda"]), need)
    if reduction == "sum":
        return loss
    return loss / (len(targets) if valid is None else valid.float().sum().clamp_min(1))


class _SummedLoss(torch.autograd.Function):
    """Sum over tokens of valid * cross-entropy. Not yet divided by their number: in fp16 the gradients would vanish."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, valid: Tensor | None, dtype: torch.dtype, chunk: int,
                need: bool) -> Tensor:
        head = weight.to(dtype)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        grad_x = torch.empty_like(x, dtype=dtype) if need else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            part, target = x[rows].to(dtype), targets[rows, None]
            scores = F.log_softmax(part @ head.t(), dim=-1, dtype=torch.float32)  # (chunk, V)
            per_token = -scores.gather(1, target).squeeze(1)
            loss += (per_token if valid is None else per_token * valid[rows]).sum()
            if need:
                slope = scores.exp_()  # the gradient of the logits: softmax - one-hot
                slope.scatter_add_(1, target, slope.new_full((1, 1), -1.0).expand_as(target))
                if valid is not None:
                    slope *= valid[rows, None]
                slope = slope.to(dtype)
                torch.mm(slope, head, out=grad_x[rows])
                if dtype == torch.float32:
                    grad_weight.addmm_(slope.t(), part)
                else:
                    grad_weight += slope.t() @ part
                del slope
            del scores  # free them before the next chunk
        if need:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as the saved gradient is as large as the head. Autograd raises an error if backward runs twice.
        gradients = [saved.mul_(grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *gradients, None, None, None, None, None
