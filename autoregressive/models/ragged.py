"""Prefixes of different length in one training batch, without an attention mask.

Captions are padded on the left. A mask that hides the padding takes (B, T, T) and keeps attention from its fast causal
form. It is not needed: a prefix token has no position (its rotation is the same wherever it stands), so padding can be
left out. Each row is moved to begin with its first real token; what is over at its end comes after all others, so that
a causal row never sees it.
"""
import torch
from torch import Tensor


class Unpadded:
    """Moves the tokens of rows (B, T), a prefix of N and then codes, of whose prefixes the last `lengths` (B,), 1 to N,
    are real."""

    def __init__(self, lengths: Tensor, *, prefix: int, tokens: int) -> None:
        places = torch.arange(tokens, device=lengths.device)
        self.first = lengths - 1  # (B,) where the last token of each prefix goes
        self.index = (places + prefix - lengths[:, None]).clamp_max(tokens - 1)  # (B, T): where each comes from

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens x (…, B, T, D) in their new places."""
        return x.gather(-2, self.index[..., None].expand(x.shape))

    def rope(self, table: Tensor) -> Tensor:
        """The rotary table (T, K/2, 2), or one per row, for the new places, (B, T, K/2, 2)."""
        if table.ndim == 3:
            return table[self.index]
        return table.gather(1, self.index[..., None, None].expand(-1, -1, *table.shape[2:]))

    def asked(self, x: Tensor, count: int) -> Tensor:
        """From x (B, T, D) in the new places the `count` tokens from the last one of the prefix on, (B, count, D)."""
        places = self.first[:, None] + torch.arange(count, device=x.device)
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
