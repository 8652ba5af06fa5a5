"""Exponential moving average of a model's weights."""
import copy

import torch
from torch import nn


class EMA:
    """A copy of the model that follows it. Buffers are copied as they are.

    Decay ramps up as (1 + n) / (10 + n) until it reaches `decay`, so that short runs do not keep their random start.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model` after optimizer step number `step` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
