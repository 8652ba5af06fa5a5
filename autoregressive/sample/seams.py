"""Pixels at the edge of what is drawn anew: holes filled before encoding, known pixels pasted back, PSNR, the strip."""
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.sample.masks import dilated
from evaluations.similarity import psnr
from utils import images

GREY = 127  # where nothing is known
LEGIBLE = 128  # pixels: smaller pictures are enlarged for the strip
MOST_IN_ROW = 8  # pictures of a strip


def filled(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) whose pixels in `hole` (H, W) are a blur of those around it: nothing of them is left.

    By averages of 2x2 known pixels, of these averages and so on, and back ("pull-push" of The Lumigraph, Gortler et
    al., SIGGRAPH 1996).
    """
    if hole.all():
        return np.full_like(image, GREY)
    colours = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    known = torch.from_numpy(~hole)[None, None]
    blurred = pulled(colours, known)[0].permute(1, 2, 0).round().numpy().astype(np.uint8)
    return np.where(hole[..., None], blurred, image)


def pulled(colours: Tensor, known: Tensor) -> Tensor:
    """Colours (1, 3, H, W); those that are not `known` (1, 1, H, W) come from averages at half the size."""
    if known.all():
        return colours
    share = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    halved = F.avg_pool2d(colours * known, 2, ceil_mode=True) / share.where(share > 0, 1)
    coarse = F.interpolate(pulled(halved, share > 0), colours.shape[-2:], mode="bilinear")
    return torch.where(known, colours, coarse)


def pasted(made: np.ndarray, original: np.ndarray, hole: np.ndarray, *, feather: int) -> np.ndarray:
    """`made` in the hole (H, W), `original` more than `feather` pixels away from it, between them a mixture; pictures
    are uint8 (H, W, 3)."""
    reaches = range(min(feather, max(hole.shape)) + 1)
    distance = np.sum([~dilated(hole, reach) for reach in reaches], axis=0)  # in pixels, diagonally too
    share = (1 - distance / (feather + 1)).clip(0)[..., None]
    return np.rint(share * made + (1 - share) * original).astype(np.uint8)


def psnr_where(picture: np.ndarray, other: np.ndarray, where: np.ndarray) -> float | None:
    """PSNR in dB of the pixels of two pictures, uint8 (H, W, 3), where `where` (H, W) is true; None if there are none,
    or if all are identical."""
    if not where.any():
        return None
    pixels = [torch.from_numpy(values[where].T.copy())[None, :, None] for values in (picture, other)]  # (1, 3, 1, n)
    decibels = float(psnr(*pixels))
    return decibels if math.isfinite(decibels) else None


def strip(original: np.ndarray, masks: np.ndarray, pictures: np.ndarray, *, names: Sequence[str]) -> np.ndarray:
    """original | mask | result, with labels: uint8 (H, W, 3), grey (B, H, W), (B, H, W, 3) and the results' names →
    uint8 (H', W', 3). Results of one mask are beside each other, others have a row each."""
    times = max(1, -(-LEGIBLE // max(original.shape[:2])))
    original, pictures, shown = (pixels.repeat(times, -3).repeat(times, -2) for pixels in (
        original, pictures, np.stack([masks] * 3, -1)))
    shown[:, [0, -1]] = shown[:, :, [0, -1]] = GREY  # a frame: the page is white too
    if (masks == masks[0]).all():
        panels, labels = [original, shown[0], *pictures], ["original", "mask", *names]
        columns = min(len(panels), MOST_IN_ROW)
    else:
        panels = [panel for row in zip(shown, pictures, strict=True) for panel in (original, *row)]
        labels, columns = [label for name in names for label in ("original", "mask", name)], 3
    return images.grid(np.stack(panels), columns=columns, labels=labels)
