"""Weight-only quantisation: int8 with a scale per output, int4 with one per 64 inputs. Not exact: it changes the model.

Rounding to nearest, symmetric, as in LLM.int8() (arXiv 2208.07339) and in 4-bit weight formats with groups.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.base import CodeModel

GROUP = 64  # inputs that share a scale in int4: the constant of the same name in native/product.h


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight is kept in 8 or 4 bits.

    weight int32 (out, in * bits / 32): field j of word i of a group is input 8 j + i of the group's 256 / bits, as
    native/product.h reads them. scale fp32 (out, 1), or (out, in / GROUP) for 4 bits.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, self.in_features = bits, linear.in_features
        weight = linear.weight.detach().float()
        grouped = weight.unflatten(1, (-1, GROUP if bits == 4 else self.in_features))  # (out, groups, n)
        limit = 2 ** (bits - 1) - 1
        scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / limit
        whole = (grouped / scale).round().clamp(-limit, limit).flatten(1).long()  # (out, in)
        fields = whole.unflatten(1, (-1, 32 // bits, 8)) & (2**bits - 1)  # (out, words / 8, fields, 8)
        shifts = torch.arange(32 // bits, device=weight.device)[:, None] * bits
        self.register_buffer("weight", (fields << shifts).sum(2).flatten(1).to(torch.int32))
        self.register_buffer("scale", scale.squeeze(-1).contiguous())

    def dequantized(self) -> Tensor:
        """The weight that is computed with, (out, in) fp32."""
        shifts = torch.arange(32 // self.bits, device=self.weight.device)[:, None] * self.bits
        words = self.weight.long().unflatten(1, (-1, 1, 8))
        fields = words << (64 - self.bits - shifts) >> (64 - self.bits)  # sign of the field
        return fields.flatten(1).float().unflatten(1, (self.scale.shape[1], -1)).mul(self.scale[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype))


def quantize_(model: CodeModel, bits: int) -> None:
    """Replace the linear layers of the blocks and the head, in place. Raises ValueError where a width does not fit."""
    for name, module in model.named_modules():
        if name.startswith("layers.") and type(module) is nn.Linear and module.in_features % GROUP:
            raise ValueError(f"--quantize int{bits}: {name} has {module.in_features} inputs, no multiple of {GROUP}")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (name == model.HEAD or name.startswith("layers.")):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, child, QuantizedLinear(module, bits))
