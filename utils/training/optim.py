"""AdamW and Muon with their parameter groups, and learning-rate schedules."""
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from utils.training.parallel import blocks_of

Schedule = Literal["constant", "cosine"]
Kind = Literal["adamw", "muon"]


def adamw(module: nn.Module | Iterable[nn.Parameter], *, lr: float, weight_decay: float,
          betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices, embeddings and convolutions (two or more dimensions) and nothing else.

    Its moments are made here: made in the first step they would lie where the activations have been, and the heap would
    have to grow for those of the second.
    """
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)
    for p in parameters:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def build_optimizer(module: nn.Module, *, kind: Kind, lr: float, weight_decay: float,
                    betas: tuple[float, float]) -> "torch.optim.Optimizer | MuonWithAdamW":
    """AdamW for everything, or with "muon" Muon for the matrices of the module's blocks and AdamW for the rest.

    Raises ValueError where torch has no Muon or the module no such matrices.
    """
    if kind == "adamw":
        return adamw(module, lr=lr, weight_decay=weight_decay, betas=betas)
    return MuonWithAdamW(module, lr=lr, weight_decay=weight_decay, betas=betas)


class MuonWithAdamW:
    """Muon on the matrices inside a model's blocks, fused AdamW on embeddings, head, norms and all else: one optimizer.

    Muon's steps are scaled by 0.2 * sqrt(longer side), to the size of AdamW's (arXiv 2502.16982 §2.2): learning rate
    and weight decay keep the meaning that they have with AdamW.
    """

    found_inf: torch.Tensor | None = None  # set from outside, as on a fused optimizer: if true, `step` does nothing

    def __init__(self, module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"--optimizer muon needs torch >= 2.9, this is {torch.__version__}: use adamw")
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        inside = {id(p) for block in blocks_of(module) for p in block.parameters()}
        matrices = {name: p for name, p in trained.items() if id(p) in inside and p.ndim == 2}
        rest = [p for name, p in trained.items() if name not in matrices]
        if not matrices:
            raise ValueError("--optimizer muon is for models with trained matrices in their blocks: use adamw")
        muon = torch.optim.Muon(matrices.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon] + ([adamw(rest, lr=lr, weight_decay=weight_decay, betas=betas)] if rest else [])
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = muon.state  # one table for both, by parameter, complete from the start
        for matrix in matrices.values():
            self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
        for part in self.parts[1:]:
            self.state.update(part.state)
            part.state = self.state
        self.defaults = {"fused": True}  # what AdamW's part is: its step counts live on the device

    def step(self) -> None:
        """Update, unless `found_inf`, for which the host waits: Muon cannot skip on the device."""
        if self.found_inf is None or not bool(self.found_inf):
            for part in self.parts:
                part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, schedule: Schedule,
                  lowest: float | None = None) -> float:
    """Learning rate of a step: linear warm-up, then constant, or half a cosine down to `lowest` (None: peak / 50)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    ratio = 0.02 if lowest is None else lowest / peak if peak else 0.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
