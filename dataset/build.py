"""From a name to a data set of images. Every one offers the same: len, labels, classes, image(i), name(i)."""
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image

from dataset import image_folders
from dataset.emoji import open_emoji
from dataset.pairs import Pairs
from dataset.pairs_plain import EmojiPairs
from dataset.pictures import PictureReader
from dataset.t2i import open_pairs, refuse_part
from utils.cli import flag
from utils.options import SizeFlags


class ImageDataset(Protocol):
    """Images with labels; `classes` names them in label order, None when there are none (all labels 0)."""

    classes: list[str] | None
    labels: np.ndarray

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """RGB image. Raises UnreadableError."""

    def name(self, index: int) -> str:
        """What to call image `index` in a report."""


@dataclass(kw_only=True)
class DatasetFlags:
    """Which data set."""

    shapes_run: ClassVar[bool] = False
    dataset: str = flag("imagenet", "imagenet (a folder per class), coco or pexels (no classes), openimage (JSON "
                        "list), t2i_image (captioned pictures without their captions), t2i (with them), emoji or "
                        "emoji_heldout (embedded; emoji_without_CLASS, emoji_only_CLASS: a part of emoji); for codes "
                        "the same with _code")


@dataclass(kw_only=True)
class PictureFlags:
    """How pictures are read."""

    exif_orientation: bool = flag(True, "turn pictures upright as their EXIF says (phones store them sideways); "
                                        "--no-exif-orientation: take them as they are stored, as LlamaGen does")


@dataclass(kw_only=True)
class DataPathFlags(DatasetFlags):
    """Where the images are."""

    shapes_run: ClassVar[bool] = False
    data_path: str | None = flag(None, "folder of images (not needed for emoji); captioned ones: .jsonl, table, plain "
                                       "files or tar archives, see dataset/t2i.py")


@dataclass(kw_only=True)
class DataFlags(DataPathFlags, SizeFlags, PictureFlags):
    """Which images, at which size."""

    shapes_run: ClassVar[bool] = False
    image_size: tuple[int, int] = (256, 256)


@dataclass(kw_only=True)
class PairFlags(DataPathFlags):
    """Which captioned pictures."""

    shapes_run: ClassVar[bool] = False
    dataset: str = "t2i"
    data_start: int | None = flag(None, "number of the first .jsonl file or archive to take, in sorted order from 0")
    data_end: int | None = flag(None, "number of the last one, which is taken too")


@dataclass(kw_only=True)
class FeaturePathFlags:
    """Text features."""

    t5_feat_path: str | None = flag(None, "features of the captions, as language/extract_t5_feature.py writes them, or "
                                          "LlamaGen's, <folder>/<stem of the .jsonl>/<line>.npy; in training, of "
                                          "several stores in --data-path one for each, with commas between")


@dataclass(kw_only=True)
class SmallPictureFlags:
    """What is done about small pictures."""

    shapes_run: ClassVar[bool] = False
    min_size: int | None = flag(None, "leave out pictures with fewer pixels than this at a side; 0: take all, enlarged "
                                      "where they are smaller than --image-size; None: --image-size")

    def least(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture must have for images of `size`. Raises ValueError for a wrong --min-size."""
        if self.min_size is not None and self.min_size < 0:
            raise ValueError(f"--min-size is {self.min_size}, expected pixels, at least 0")
        return size if self.min_size is None else (self.min_size, self.min_size)


@dataclass(kw_only=True)
class PairPictureFlags(PairFlags, SizeFlags, PictureFlags, SmallPictureFlags):
    """Which captioned pictures, at which size."""

    shapes_run: ClassVar[bool] = False
    image_size: tuple[int, int] = (512, 512)

    @property
    def smallest(self) -> tuple[int, int]:
        """Height and width that a picture must have."""
        return self.least(self.image_size)


def data_fingerprint(data: ImageDataset, roots: tuple[str | None, ...]) -> str:
    """A hash of the names, below the folders `roots`, and labels of a data set: the same when a folder has moved."""
    if isinstance(data, Pairs):  # names of millions are slow to ask for one by one
        return data.states()["image_names"]
    above = tuple(str(Path(root)) + os.sep for root in roots if root is not None)
    digest = hashlib.sha256(np.asarray(data.labels).tobytes())
    for index in range(len(data)):
        name = data.name(index)
        for root in above:
            name = name.removeprefix(root)
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def build_dataset(name: str, data_path: str | None, *, size: tuple[int, int],
                  exif_orientation: bool = True) -> ImageDataset:
    """The data set `name`. Raises ValueError or FileNotFoundError when it is unknown or not there.

    `size` is that of the emoji, which are drawn; files are read as they are, turned by their EXIF orientation.
    """
    if name == "emoji" or name.startswith("emoji_"):
        return open_emoji(name, size=max(size))
    if name not in FOLDERS:
        raise ValueError(f"--dataset {name} is unknown: choose from {', '.join([*FOLDERS, 'emoji', 'emoji_heldout'])}")
    if data_path is None:
        raise ValueError(f"--dataset {name} needs --data-path")
    return FOLDERS[name](data_path, reader=PictureReader(exif_orientation=exif_orientation))


def flagged_dataset(flags: DataFlags, *, size: tuple[int, int] | None = None) -> ImageDataset:
    """The data set that the flags ask for; emoji of `size`, else of --image-size."""
    return build_dataset(flags.dataset, flags.data_path, size=size or flags.image_size,
                         exif_orientation=flags.exif_orientation)


def flagged_pairs(flags: PairFlags, *, reader: PictureReader | None = None, smallest: tuple[int, int] = (0, 0),
                  emoji_size: int = 256) -> Pairs:
    """The captioned pictures that the flags ask for: --dataset t2i from --data-path, or emoji."""
    emoji = flags.dataset == "emoji" or flags.dataset.startswith("emoji_")
    if not emoji and flags.dataset not in CAPTIONED:
        raise ValueError(f"--dataset {flags.dataset} has no captions: choose t2i or emoji")
    if not emoji and flags.data_path is None:
        raise ValueError(f"--dataset {flags.dataset} needs --data-path: .jsonl, a table, pictures beside .txt, or tar "
                         "archives")
    part = flags.data_start, flags.data_end
    if emoji:
        refuse_part(part, f"--dataset {flags.dataset}")
        return EmojiPairs(open_emoji(flags.dataset, size=emoji_size))
    return open_pairs(flags.data_path, reader=reader, smallest=smallest, part=part)


def _openimage(root: str, *, reader: PictureReader) -> ImageDataset:
    """The list that LlamaGen's tools/openimage_json.py writes: in the folder of images, or beside it."""
    inside, beside = Path(root) / "image_paths.json", Path(root).parent / "openimage_json" / "image_paths.json"
    return image_folders.listed(beside if beside.is_file() and not inside.exists() else inside, root, reader=reader)


CAPTIONED = ("t2i", "t2i_image")
FOLDERS: dict[str, Callable[..., ImageDataset]] = {
    "imagenet": image_folders.class_tree,
    "coco": image_folders.flat_folder,
    "pexels": image_folders.flat_folder,
    "openimage": _openimage,
    "t2i_image": open_pairs,
}
