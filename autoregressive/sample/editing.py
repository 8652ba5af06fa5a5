"""Draw parts of a picture anew: its other codes are kept and the model draws what belongs between them."""
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoregressive.sample.masks import Canvas, as_mask, chosen, dilated, stretched, windows
from autoregressive.sample.pipeline import Pipeline, pixel_dtype
from autoregressive.sample.seams import GREY, filled, pasted, psnr_where
from dataset.augmentation import center_crop, covering
from tokenizer.build import decode_images, encode_images
from utils import images
from utils.seeding import sample_generator

CELL_STREAM = 0xCE115  # a stream of its own for the cells that `redraw` takes: the codes do not depend on it


@dataclass(frozen=True)
class Edited:
    """Results of one edit: B pictures of H x W pixels."""

    pictures: np.ndarray  # uint8 (B, H, W, 3)
    masks: np.ndarray  # uint8 (B, H, W): white is what was marked, grey what was redrawn around it, black the rest
    codes: Tensor  # (B, rows, columns) of the whole canvas, on the CPU
    drawn: np.ndarray  # bool (B, rows, columns): which of them are new; the others are the picture's
    results: list[dict[str, float | None]]  # numbers of each


def edit(pipeline: Pipeline, image: np.ndarray, mask: np.ndarray | None = None, *,
         conditions: Sequence[int] | Sequence[Tensor] | None = None, seed: int = 0, indices: Sequence[int] = (0,),
         **settings) -> Edited:
    """Draw parts of a picture anew, once for each of `indices`: image (seed, index) does not depend on the others.

    image: uint8 (H, W, 3) of any size; mask: bool or uint8 (H, W), true or white where it is redrawn, see `as_mask`.
    conditions: a label for each image, or the text features of its prompt; None: the pipeline's `nothing` for all.
    settings: canvas (height, width), place (x, y), dilate, redraw, paste, as the flags of edit.py.

    The cells that are not drawn keep the picture's codes. So that these know nothing of the hole, it is blurred away
    before the picture is encoded; with `redraw` a variation of the picture is wanted, and it is encoded as it is.
    Raises ValueError for settings without sense, and for what a GPT cannot draw.
    """
    steps = edit_steps(pipeline, image, mask, conditions=conditions, seed=seed, indices=indices, **settings)
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(pipeline.draw(**wanted))
    except StopIteration as end:
        return end.value


def edit_steps(pipeline: Pipeline, image: np.ndarray, mask: np.ndarray | None = None, *,
               conditions: Sequence[int] | Sequence[Tensor] | None = None, seed: int = 0, indices: Sequence[int] = (0,),
               dilate: int = 1, redraw: float | None = None, canvas: tuple[int, int] | None = None,
               place: tuple[int, int] | None = None, paste: int | None = None) -> Generator[dict, Tensor, Edited]:
    """`edit`, for callers that draw themselves: yields the arguments of `Pipeline.draw` for each window, is sent the
    codes (B, h*w), and returns the result."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"the image is {image.dtype} of shape {image.shape}, expected uint8 (height, width, 3)")
    if conditions is None:
        conditions = [pipeline.conditions.nothing] * len(indices)
    if not len(conditions) == len(indices) > 0:
        raise ValueError(f"{len(conditions)} conditions for {len(indices)} images: expected one for each, and an image")
    size = image.shape[:2]
    hole = np.zeros(size, bool) if mask is None else as_mask(mask, size)
    check_edit(size, None if mask is None else hole, dilate=dilate, redraw=redraw, canvas=canvas, place=place,
               paste=paste)
    layout = Canvas.around(size, canvas, place, patch=pipeline.tokenizer.downsample, grid=pipeline.gpt.config.grid)
    cells = layout.opened(hole | (mask is None and redraw is not None), dilate=dilate)  # (h, w)
    if redraw is None:
        drawn = np.repeat(cells[None], len(indices), 0)  # (B, h, w)
    else:
        drawn = np.stack([chosen(cells, redraw, sample_generator(seed ^ CELL_STREAM, index)) for index in indices])
    known = picture_codes(pipeline, image if redraw is not None else filled(image, hole))  # (h, w)
    codes = yield from draw_windows(pipeline.gpt.config.grid, layout.whole(np.where(drawn, -1, known), beyond=-1),
                                    layout.whole(cells), conditions, seed=seed, indices=indices)
    device = next(pipeline.gpt.parameters()).device
    decoded = images.to_uint8(decode_images(pipeline.tokenizer, codes.flatten(1).to(device), layout.cells,
                                            dtype=pixel_dtype(pipeline.gpt, pipeline.tokenizer)))
    decoded = decoded[(slice(None), *layout.result)]  # (B, H, W, 3)

    drawn = layout.whole(drawn)
    redrawn = layout.pixels(drawn)  # (B, H, W)
    marked = redrawn if redraw is not None else np.repeat(layout.laid(hole, beyond=True)[None], len(indices), 0)
    original, pictures, results = layout.laid(image, beyond=GREY), decoded.copy(), []
    for i, here in enumerate(marked):
        if paste is not None:
            pictures[i] = pasted(decoded[i], original, here, feather=paste)
        near = dilated(here, (dilate + 1) * layout.patch) & ~here
        results.append({"cells": drawn[i].size, "redrawn": int(drawn[i].sum()),
                        "seam_psnr": psnr_where(original, pictures[i], near),
                        "seam_psnr_decoded": psnr_where(original, decoded[i], near),
                        "known_psnr": psnr_where(original, pictures[i], ~here)})
    masks = np.where(marked, 255, np.where(redrawn, GREY, 0)).astype(np.uint8)
    return Edited(pictures, masks, codes, drawn, results)


def draw_windows(grid: tuple[int, int], codes: np.ndarray, cells: np.ndarray,
                 conditions: Sequence[int] | Sequence[Tensor], *, seed: int,
                 indices: Sequence[int]) -> Generator[dict, Tensor, Tensor]:
    """Ask for what is -1 in codes (B, rows, columns), in windows of the model's grid that cover the true `cells` (rows,
    columns), so that the windows are the same for all images: see `edit_steps`. Returns all codes, on the CPU."""
    codes, generators = torch.from_numpy(codes).long(), [sample_generator(seed, index) for index in indices]
    for window in windows(cells, grid):
        part = codes[(..., *window)]
        made = yield {"given": conditions, "seed": seed, "generators": generators, "known": part.flatten(1)}
        codes[(..., *window)] = made.cpu().view_as(part)
    return codes


def check_edit(size: tuple[int, int] | None, mask: np.ndarray | None, *, dilate: int, redraw: float | None,
               canvas: tuple[int, int] | None, place: tuple[int, int] | None, paste: int | None) -> None:
    """Raise ValueError for settings of `edit` without sense. size: the picture's, None if it is not known yet; mask:
    bool."""
    for name, value in (("dilate", dilate), ("paste", paste)):
        if value is not None and value < 0:
            raise ValueError(f"--{name} is {value}, expected 0 or more")
    if redraw is not None and not 0 < redraw <= 1:
        raise ValueError(f"--redraw is {redraw}, expected a share of the cells: more than 0, at most 1")
    if place is not None and canvas is None:
        raise ValueError("--place says where on a --canvas the picture lies: give --canvas too")
    if size is not None:
        Canvas.around(size, canvas, place)
    if canvas is not None and (size is None or tuple(canvas) != tuple(size)):
        return
    if mask is None and redraw is None:
        raise ValueError("nothing is to be redrawn: give --mask, --box, --redraw or a larger --canvas")
    if mask is not None and not mask.any():
        raise ValueError("nothing is to be redrawn: no pixel of the mask is white (128 or more of 255)")


def model_view(picture: Image.Image, mask: np.ndarray | None, size: tuple[int, int], *,
               fill: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(what to edit, the picture, its mask), cropped and resized to `size` as pictures for training are. fill: of what
    is edited the hole is blurred away first, before its pixels are mixed with their neighbours.

    Raises ValueError if that cuts the whole mask off.
    """
    original = center_crop(picture, size)
    if mask is None:
        return original, original, None
    _, whole = covering(picture, size)
    corner = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    view = stretched(mask, whole, corner=corner, kept=size)
    if mask.any() and not view.any():
        raise ValueError(f"the mask lies in the part of the picture that is cut off to make it {size[0]}x{size[1]}: "
                         "crop the picture yourself, or edit it whole by --keep-size")
    image = center_crop(Image.fromarray(filled(np.asarray(picture), mask)), size) if fill else original
    return image, original, view


def picture_codes(pipeline: Pipeline, image: np.ndarray) -> np.ndarray:
    """The codes (h, w) of a picture; where it covers a cell in part, its last row or column is repeated."""
    patch = pipeline.tokenizer.downsample
    whole = np.pad(image, [*((0, -side % patch) for side in image.shape[:2]), (0, 0)], mode="edge")
    pixels = images.to_float(whole[None]).to(next(pipeline.gpt.parameters()).device)
    codes = encode_images(pipeline.tokenizer, pixels)
    return codes.cpu().numpy().reshape([side // patch for side in whole.shape[:2]])
