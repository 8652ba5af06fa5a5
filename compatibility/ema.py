"""utils.ema as LlamaGen has it. Our trainings average by utils/training/ema.py."""
import torch
from torch import nn

__all__ = ["requires_grad", "update_ema"]


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """Move the parameters of `ema_model` towards those of `model`: decay * average + (1 - decay) * weight."""
    averages = dict(ema_model.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter, alpha=1 - decay)


def requires_grad(model: nn.Module, flag: bool = True) -> None:
    """Train all parameters of a model, or none."""
    model.requires_grad_(flag)
