"""The perceptual loss LPIPS-VGG (arXiv 1801.03924), from the `lpips` package."""
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from utils.checkpoints import containers
from utils.cli import flag


@dataclass(kw_only=True)
class LPIPSFlags:
    """LPIPS, the perceptual loss."""

    shapes_run: ClassVar[bool] = False
    lpips_backbone: str | None = flag(None, "file with torchvision's VGG-16 weights for LPIPS; None: torchvision "
                                            "fetches them")


def perceptual_loss(backbone: str | None, *, device: torch.device) -> nn.Module:
    """LPIPS on images in [-1, 1]: loss(a, b) → (B, 1, 1, 1). Its linear heads come with the package.

    backbone: a file with torchvision's VGG-16 weights; None lets torchvision find or download them. Raises ValueError
    or OSError that say what to do when they cannot be loaded.
    """
    import lpips

    if backbone is None:
        try:
            metric = lpips.LPIPS(net="vgg", verbose=False)
        except (OSError, RuntimeError) as error:
            raise OSError(f"VGG-16 for the perceptual loss could not be downloaded ({error}): give a local file by "
                          "--lpips-backbone, or do without (--perceptual-weight 0, no --lpips)") from None
    else:
        metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        load_vgg(metric, backbone)
    return metric.eval().requires_grad_(False).to(device)


def load_vgg(metric: nn.Module, path: str | Path) -> None:
    """Copy torchvision's VGG-16 convolutions (`features.*`) into the metric's slices, strictly."""
    state = containers.weights(containers.read(path), path)
    features = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    if not features:
        raise ValueError(f"--lpips-backbone {path} is no torchvision VGG-16 file: it has no features.* weights")
    renamed = {name: features[name.split(".", 1)[1]] for name in metric.net.state_dict()
               if name.split(".", 1)[1] in features}
    containers.load_strict(metric.net, renamed, path)
