"""What tests of the evaluation share: small image sets, fast networks in Inception's place, the command itself."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import call

WIDTHS = {"mu": 96, "mu_s": 80}
TINY = ("--features", "tests.evaluations.stand_ins:tiny_network")


class TinyNetwork(nn.Module):
    """Means of the four quarters of each channel, scaled differently: twelve features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) * torch.arange(1, 13)


def tiny_network() -> nn.Module:
    return TinyNetwork()


class StandIn(nn.Module):
    """Gives what Inception gives, from fixed random projections, in 96 and 80 dimensions for 2048 and 2023."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pixels.shape[1:] == (3, 299, 299)
        patches = F.adaptive_avg_pool2d(pixels, 4).flatten(1) / 255  # (B, 48)
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(48, width, generator=generator) for width in WIDTHS.values()]
        return tuple((patches @ m).relu() for m in maps)

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        relative = F.normalize(pooled - pooled.mean(1, keepdim=True))
        return 200 * relative.repeat(1, 11)[:, :1008]


def pictures(count: int, *, seed: int, size: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.integers(60, 200, (count, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def evaluate(ref: Path, sample: Path, *flags) -> dict:
    call("evaluate", ref, sample, *flags)
    return json.loads(sample.with_name(f"{sample.name.removesuffix('.npz')}.json").read_text())


def refused(capsys, says: str, *argv) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call("evaluate", *argv)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and says in lines[0], lines
    assert "FID" not in shown.out


def save_program(path: Path, network: nn.Module) -> tuple[str, str]:
    """A network as a TorchScript file → the flags to use it."""
    torch.jit.trace(network, torch.zeros(2, 3, 16, 16)).save(str(path))
    return "--features", str(path)


def for_other_sizes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 2))


class NotFinite(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) / 0


def not_finite() -> nn.Module:
    return NotFinite()
