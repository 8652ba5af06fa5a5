"""Control pictures beside codes: edges, depth or segments of the same crops, which a model learns to follow.

In a packed store they are a column of the kind's name, of column kind "views": one picture for each view of each image,
uint8. Its shape is (H, W) for grey levels, (H, W, 3) for colours, (H, ceil(W / 8)) for edges that are there or not, one
bit per pixel, the leftmost pixel in a byte's highest bit.
"""
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.augmentation import code_views, covering, cut
from dataset.code_manifest import Column
from dataset.pictures import PictureReader, UnreadableError, endings
from utils.cli import flag, require_package

SIGMA = 1.0  # of the smoothing before edges are looked for, in pixels
ASPECT_TOLERANCE = 0.05  # by which width / height of a map and its picture may differ


class Kind(NamedTuple):
    """How a kind of control pictures is kept. colours: else grey levels; bits: black or white; smooth: may be
    interpolated."""

    colours: bool = False
    bits: bool = False
    smooth: bool = True


Control = Literal["canny", "edges", "depth", "segmentation"]
KINDS: dict[str, Kind] = {"canny": Kind(bits=True, smooth=False), "edges": Kind(), "depth": Kind(),
                          "segmentation": Kind(colours=True, smooth=False)}


@dataclass(kw_only=True)
class ControlFlags:
    """Control pictures."""

    control: Control | None = flag(
        None, "kind of control pictures. Extraction writes them beside the codes: canny edges of each crop (found by "
              "scikit-image), or edges, depth or segmentation from --control-path; training learns to follow those of "
              "the store; in sampling, canny: --control-image is a photograph whose edges are to be found",
        choices=tuple(KINDS))


@dataclass(kw_only=True)
class CannyFlags:
    """How edges are found, and where other control pictures lie."""

    canny_low: float = flag(100.0, "canny: least gradient, for grey levels of 0 to 255, with which an edge goes on")
    canny_high: float = flag(200.0, "canny: least gradient with which an edge begins")
    control_path: str | None = flag(None, "folder with control pictures for --control edges, depth and segmentation, "
                                          "made elsewhere: at the place of <data-path>/a/b.jpg below it, a/b with any "
                                          "ending of a picture")


def canny(picture: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Edges of uint8 (H, W, 3) → uint8 (H, W), 255 on an edge, else 0. Thresholds are of Sobel's gradient for grey
    levels of 0 to 255, after smoothing."""
    require_package("skimage", purpose="--control canny", package="scikit-image")
    from skimage.feature import canny as find_edges

    grey = np.asarray(Image.fromarray(picture).convert("L"))
    return np.uint8(255) * find_edges(grey, sigma=SIGMA, low_threshold=low, high_threshold=high)


def check_thresholds(low: float, high: float) -> None:
    """Raise ValueError for thresholds that make no sense."""
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"--canny-low is {low} and --canny-high {high}, expected numbers from 0 on, the low one at "
                         "most the high one")


class ControlMaps:
    """Pictures that were made elsewhere, one for each picture of a folder of images."""

    def __init__(self, kind: str, folder: str | None, data_path: str | None) -> None:
        if folder is None or data_path is None:
            raise ValueError(f"--control {kind} needs --control-path, the folder of these pictures, and --data-path, "
                             "that of the images which they belong to; only canny edges are found here")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--control-path {folder} is not a folder")
        self.kind, self.folder, self.data_path = kind, Path(folder), data_path
        self.read = PictureReader(exif_orientation=False)

    def path_of(self, name: str) -> Path:
        """The map of the picture `name`. Raises FileNotFoundError where there is none."""
        place = self.folder / os.path.relpath(name, self.data_path)
        for likely in (place.with_suffix(".png"), place):  # folders may be long to list
            if likely.is_file():
                return likely
        found = sorted(path for path in place.parent.glob(f"{glob.escape(place.stem)}.*")
                       if path.stem == place.stem and path.suffix.lower() in endings())
        if not found:
            raise FileNotFoundError(f"--control-path has no picture for {name}: expected {place.with_suffix('')} with "
                                    "an ending such as .png")
        return found[0]

    def views(self, name: str, image: Image.Image, size: tuple[int, int], **crops: Any) -> np.ndarray:
        """The map of `image`, cut as `code_views` cuts the image, (V, H, W) or (V, H, W, 3) uint8."""
        path = self.path_of(name)
        try:
            picture = self.read(path)
        except UnreadableError as error:
            raise ValueError(f"--control-path: {error}") from None
        apart = picture.width * image.height / (picture.height * image.width)
        if abs(apart - 1) > ASPECT_TOLERANCE:
            raise ValueError(f"{path} is {picture.width}x{picture.height} pixels, its picture {name} {image.width}x"
                             f"{image.height}: a control picture shows the whole picture, at any size")
        return cropped(picture, self.kind, size, like=image.size, **crops)


def cropped(picture: Image.Image, kind: str, size: tuple[int, int], *, like: tuple[int, int], crop_range: float = 1.0,
            **crops: Any) -> np.ndarray:
    """Views of the control picture of a picture of `like` (width, height) pixels: what `code_views` cuts out there."""
    if picture.size != like:
        picture = picture.resize(like, Image.Resampling.BICUBIC if KINDS[kind].smooth else Image.Resampling.NEAREST)
    if not KINDS[kind].smooth:  # cut before `code_views` would interpolate
        outer = tuple(int(side * crop_range) for side in size)
        picture = Image.fromarray(centre(picture, outer, Image.Resampling.NEAREST))
    views = code_views(picture, size, crop_range=crop_range, **crops)
    return views if KINDS[kind].colours else grey_of(views)


def centre(picture: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """The part of a picture that `center_crop` takes, resized from the picture itself, without halving it first."""
    _, (height, width) = covering(picture, size)
    return cut(picture, (height, width), size, (height - size[0]) // 2, (width - size[1]) // 2, resample)


def grey_of(views: np.ndarray) -> np.ndarray:
    """uint8 (V, H, W, 3) → its grey levels (V, H, W)."""
    return np.stack([np.asarray(Image.fromarray(view).convert("L")) for view in views])


def read_control(path: str, kind: str, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """A control picture file, its centre cut out at `size` where it has another → (uint8 (C, H, W), its own size).

    Edges that are there or not keep their lines when they shrink; segments are not mixed; the rest is interpolated.
    Raises FileNotFoundError and ValueError for what is no picture.
    """
    picture = read_picture(path)
    own = picture.height, picture.width
    if KINDS[kind].bits:
        lines = np.asarray(picture.convert("L")) >= 128
        picture = Image.fromarray(np.uint8(255) * lines).convert("RGB")
        if own != size:  # a line of one pixel would be lost, were only the nearest pixels taken
            grey = centre(picture.convert("L"), size, Image.Resampling.BOX)
            picture = Image.fromarray(np.uint8(255) * (grey > 0)).convert("RGB")
    views = cropped(picture, kind, size, like=picture.size, ten_crop=False, mirror=False)
    return (views[0].transpose(2, 0, 1) if views.ndim == 4 else views), own


def read_picture(path: str) -> Image.Image:
    """A picture file. Raises FileNotFoundError and ValueError in one line."""
    if not Path(path).is_file():
        what = "this is a folder, expected a picture" if Path(path).is_dir() else "there is no such file"
        raise FileNotFoundError(f"--control-image {path}: {what}")
    try:
        return PictureReader()(path)
    except UnreadableError as error:
        raise ValueError(f"--control-image: {error}") from None


# ---- in a store


def column_of(kind: str, size: tuple[int, int]) -> Column:
    """The column of control pictures of `size` (height, width)."""
    height, width = size
    shape = (height, -(-width // 8)) if KINDS[kind].bits else (height, width, 3)[:2 + KINDS[kind].colours]
    return Column(kind, "views", "uint8", shape)


def packed(pictures: np.ndarray, kind: str) -> np.ndarray:
    """uint8 (V, H, W) or (V, H, W, 3) as the column holds them."""
    return np.packbits(pictures > 0, axis=-1) if KINDS[kind].bits else pictures


def unpacked(stored: np.ndarray, kind: str, width: int) -> Tensor:
    """The reverse, `width` pixels wide → uint8 (B, C, H, W)."""
    if KINDS[kind].bits:
        stored = np.uint8(255) * np.unpackbits(stored, axis=-1, count=width)
    stored = stored.transpose(0, 3, 1, 2) if KINDS[kind].colours else stored[:, None]
    return torch.from_numpy(np.ascontiguousarray(stored))


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1], as models take them."""
    return pictures.float() / 127.5 - 1


def check_column(columns: dict[str, Column], kind: str, size: tuple[int, int] | None, source: str) -> None:
    """Raise ValueError if a store has no control pictures of this kind and of the images' size."""
    found = columns.get(kind)
    if found is None or size is None or found != column_of(kind, size):
        there = ", ".join(name for name, column in columns.items() if column.kind == "views") or "none at all"
        raise ValueError(f"{source} holds no {kind} control pictures of the codes' size (there are {there}): extract "
                         f"the codes with --control {kind} to another --code-path")
