"""Loss scaling for fp16, and optimizer steps that the device may skip."""
import torch
from torch import Tensor


class LossScale:
    """Loss scaling for fp16, on the device: halved when gradients overflow, doubled after 2000 steps in which none did.

    (The rule of "Mixed Precision Training", arXiv 1710.03740, §3.2. torch's GradScaler finds overflows per process,
    which sharded gradients do not allow.)
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.streak = torch.zeros((), device=device)

    def update(self, bad: Tensor) -> None:
        """Take note of whether (bool, on the device) a step overflowed."""
        if self.enabled:
            self.streak.copy_(torch.where(bad, 0, self.streak + 1))
            grown = torch.where(self.streak >= 2000, self.scale * 2, self.scale)
            self.scale.copy_(torch.where(bad, self.scale / 2, grown))
            self.streak.copy_(torch.where(self.streak >= 2000, 0, self.streak))


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """optimizer.step(), or nothing where `bad` (bool): decided on the device if the optimizer is a fused one."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float().to(optimizer.param_groups[0]["params"][0].device)  # what GradScaler sets
        optimizer.step()
        del optimizer.found_inf
    elif not bool(bad):
        optimizer.step()
