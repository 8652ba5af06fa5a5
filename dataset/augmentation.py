"""Crops and flips of PIL images, as uint8 arrays (H, W, 3). Sizes are (height, width) in pixels.

The centre and random crops are those of ADM (arXiv 2105.05233), on which the published numbers rest: halve with a box
filter while the image is at least twice too large, then bicubic.
"""
import math

import numpy as np
from PIL import Image

from utils.compatible import missing_names

MOST_RESIZED = 2**25  # pixels, 100 MB: of a picture that would become larger only the crop is resized
MAX_CROP_RATIO = 1.25  # random crop: the smaller side is first drawn between 1x and 1.25x of the crop


def covering(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """The image, halved while it is twice too large, and the size to which it then just covers `size`."""
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    return image, (max(height, round(image.height * scale)), max(width, round(image.width * scale)))


def cut(image: Image.Image, whole: tuple[int, int], size: tuple[int, int], top: int, left: int,
        resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """Resize to `whole`, then cut `size` out at (top, left).

    Of a picture so thin that `whole` would be huge (of 1x20000 pixels at 256 resizing it takes 12.5 GB) only that part
    is resized. Not always, since Pillow then rounds otherwise than for the whole, which is what ADM resizes.
    """
    if math.prod(whole) > MOST_RESIZED:
        down, across = image.height / whole[0], image.width / whole[1]
        part = (left * across, top * down, min((left + size[1]) * across, image.width),
                min((top + size[0]) * down, image.height))
        return np.asarray(image.resize(size[::-1], resample, box=part))
    if whole != (image.height, image.width):
        image = image.resize(whole[::-1], resample)
    return np.asarray(image)[top:top + size[0], left:left + size[1]]


def center_crop(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """ADM's centre crop."""
    image, (height, width) = covering(image, size)
    return cut(image, (height, width), size, (height - size[0]) // 2, (width - size[1]) // 2)


def random_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """ADM's random crop, with the smaller side up to MAX_CROP_RATIO times the crop."""
    short = min(size)
    scale = int(rng.integers(short, math.ceil(short * MAX_CROP_RATIO) + 1)) / short
    image, (height, width) = covering(image, (round(size[0] * scale), round(size[1] * scale)))
    top, left = rng.integers(height - size[0] + 1), rng.integers(width - size[1] + 1)
    return cut(image, (height, width), size, int(top), int(left))


def train_view(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The tokenizer's training view: random crop, then mirrored half of the time."""
    view = random_crop(image, size, rng)
    return view[:, ::-1] if rng.random() < 0.5 else view


def code_views(image: Image.Image, size: tuple[int, int], *, ten_crop: bool, crop_range: float,
               mirror: bool = True) -> np.ndarray:
    """The views to extract codes of, (views, H, W, 3) uint8, cut from a centre crop of floor(size * crop_range).

    ten_crop: four corners and the centre, then the same of the mirrored image; else the centre and its mirror image.
    Without `mirror` the second half is left out.
    """
    outer = (int(size[0] * crop_range), int(size[1] * crop_range))
    base = center_crop(image, outer)
    bottom, right = outer[0] - size[0], outer[1] - size[1]
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)] if ten_crop else []
    places = [*corners, (round(bottom / 2), round(right / 2))]
    return np.stack([side[top:top + size[0], left:left + size[1]]
                     for side in (base, base[:, ::-1])[:1 + mirror] for top, left in places])


__getattr__ = missing_names(__name__)  # LlamaGen's center_crop_arr, random_crop_arr
