"""2-D rotary position embedding (RoFormer, arXiv 2104.09864, on two axes as in LlamaGen, arXiv 2406.06525 §2.2)."""
import torch
from torch import Tensor


def rope_table(grid: tuple[int, int], head_dim: int, prefix_length: int, *, base: float = 10000.0,
               prefix_at_origin: bool = False) -> Tensor:
    """Cosines and sines for a prefix followed by an h x w grid: (prefix_length + h*w, head_dim/2, 2) float32.

    The first half of a head's pairs turns by row * w_j, the second by column * w_j, w_j = base^(-2j / (head_dim/2)).
    Prefix rows are all zero, not (1, 0): queries and keys of the prefix become zero. The released weights were trained
    with that. `prefix_at_origin`: they are those of row 0, column 0, which is (1, 0). The frequency is written as
    power, then reciprocal: another form differs by an ulp, which 24 layers amplify to 5e-5 in the logits.
    """
    if head_dim % 4:
        raise ValueError(f"head size {head_dim} is not divisible by 4, as a rotary table over rows and columns needs")
    half = head_dim // 2
    frequencies = 1.0 / (base ** (torch.arange(0, half, 2, dtype=torch.float32) / half))  # (K/4,)
    h, w = grid
    rows = torch.outer(torch.arange(h, dtype=torch.float32), frequencies)  # (h, K/4)
    columns = torch.outer(torch.arange(w, dtype=torch.float32), frequencies)  # (w, K/4)
    angles = torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], dim=-1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (h*w, K/2, 2)
    prefix = table[:1] if prefix_at_origin else table.new_zeros(1, half, 2)
    return torch.cat([prefix.expand(prefix_length, -1, -1), table])


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs (2c, 2c+1) of x (B, T, H, K) by `table` (T, K/2, 2) or (B, T, K/2, 2), in fp32, cast
    back."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, K/2) each
    cos, sin = table.unsqueeze(-3).unbind(-1)  # (T, 1, K/2) or (B, T, 1, K/2) each
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)
