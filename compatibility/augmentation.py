"""dataset.augmentation as LlamaGen has it: square crops, PIL image → PIL image; chance is Python's `random`."""
import math
import random

from PIL import Image

from dataset.augmentation import center_crop, covering, cut

__all__ = ["center_crop_arr", "random_crop_arr"]


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """ADM's centre crop of image_size x image_size pixels."""
    return Image.fromarray(center_crop(pil_image, (image_size, image_size)))


def random_crop_arr(pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8,
                    max_crop_frac: float = 1.0) -> Image.Image:
    """ADM's random crop: image_size is between min_crop_frac and max_crop_frac of the resized image's smaller side."""
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    side = random.randrange(smallest, largest + 1)
    image, (height, width) = covering(pil_image, (side, side))
    top, left = random.randrange(height - image_size + 1), random.randrange(width - image_size + 1)
    return Image.fromarray(cut(image, (height, width), (image_size, image_size), top, left))
