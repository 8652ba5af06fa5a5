"""Pictures of images that are not complete: what is drawn, and grey elsewhere."""
import numpy as np
import torch
from torch import Tensor

from autoregressive.sample.seams import GREY
from tokenizer.build import ImageTokenizer, decode_images
from utils import images


def preview(tokenizer: ImageTokenizer, codes: Tensor, drawn: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Codes (h*w,) int64 of an image and which of them are drawn (h*w,) bool → uint8 (H, W, 3).

    Before decoding a code that is not drawn yet takes the value of the last drawn one before it in raster order, so
    that the edge of what is drawn shows little of what is missing.
    """
    pixels = np.full((grid[0] * tokenizer.downsample, grid[1] * tokenizer.downsample, 3), GREY, np.uint8)
    if not drawn.any():
        return pixels
    places = torch.arange(len(codes), device=codes.device)
    last = torch.where(drawn, places, -1).cummax(0).values
    standing_in = codes[torch.where(last < 0, drawn.nonzero()[0], last)]
    decoded = images.to_uint8(decode_images(tokenizer, standing_in[None], grid))[0]
    shown = np.kron(drawn.cpu().numpy().reshape(grid), np.ones((tokenizer.downsample,) * 2, bool))
    return np.where(shown[..., None], decoded, pixels)
