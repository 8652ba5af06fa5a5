"""AdamW parameter groups and learning-rate schedules."""
import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "cosine"]


def adamw(module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices, embeddings and convolutions (two or more dimensions) and nothing else."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, schedule: Schedule,
                  final_ratio: float = 0.02) -> float:
    """Learning rate of a step: linear warm-up, then constant, or half a cosine down to final_ratio * peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
