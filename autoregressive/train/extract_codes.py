"""Turn a folder of images into a packed store of codes.

    bash scripts/autoregressive/extract_codes_c2i.sh --data-path /data/imagenet/train --code-path /data/codes \\
        --vq-ckpt vq_ds16_c2i.pt --ten-crop --crop-range 1.1

The store is <code-path>/<dataset><size>_codes. Run again to continue after an interruption. Labels and class names come
from the data set; unreadable images are left out, counted and named in the manifest.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.train.extraction import Row, Views, check_extraction, extract
from dataset import code_writer
from dataset.augmentation import code_views
from dataset.build import DataFlags, ImageDataset, flagged_dataset
from dataset.code_manifest import FORMAT
from dataset.codes import CodePathFlags
from dataset.control import (
    KINDS,
    SIGMA,
    CannyFlags,
    ControlFlags,
    ControlMaps,
    canny,
    check_thresholds,
    column_of,
    packed,
)
from dataset.image_folders import ImageFiles
from dataset.unreadable import check_readable
from tokenizer.build import TokenizerFlags, check_image_size, load_tokenizer
from utils import cli, dist
from utils.cli import flag
from utils.files import plain
from utils.options import BatchFlags, RecipeFlags, SeedFlags, WorkerFlags

DEBUG_IMAGES = 64


@dataclass(kw_only=True)
class ExtractFlags(CodePathFlags, DataFlags, ControlFlags, CannyFlags, TokenizerFlags, BatchFlags, SeedFlags,
                   WorkerFlags, RecipeFlags):
    """The extraction command."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("extract",)
    ten_crop: bool = flag(False, "ten views: corners, centre and their mirror images; else centre and mirror image")
    crop_range: float | None = flag(None, "crops are cut from a centre crop this many times larger; "
                                          "None: 1.1 with --ten-crop, else 1")
    mirror: bool = flag(True, "also the mirror image of each view; --no-mirror suits writing, flags and clocks")
    debug: bool = flag(False, f"extract {DEBUG_IMAGES} images only, drawn by --global-seed, to try a command")


class DrawnImages:
    """`count` images of a data set, drawn by a seed, in its order: a data set too, with the same classes."""

    def __init__(self, data: ImageDataset, count: int, *, seed: int) -> None:
        self.data, self.classes = data, data.classes
        self.indices = np.sort(np.random.default_rng(seed).choice(len(data), count, replace=False))
        self.labels = data.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """See `ImageDataset`."""
        return self.data.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        """See `ImageDataset`."""
        return self.data.name(int(self.indices[index]))


class ClassViews(Views):
    """The views of an image, and their control pictures as stored if there are any."""

    def __init__(self, data: ImageDataset, flags: ExtractFlags, crop_range: float) -> None:
        super().__init__(data)
        self.flags, self.crop_range, self.maps = flags, crop_range, None
        if flags.control not in (None, "canny"):
            self.maps = ControlMaps(flags.control, flags.control_path, flags.data_path)
            if len(data):  # the wrong folder is told before any work
                self.maps.path_of(data.name(0))

    def views(self, index: int, image: Image.Image) -> Row:
        """See `Views`."""
        flags = self.flags
        crops = {"ten_crop": flags.ten_crop, "crop_range": self.crop_range, "mirror": flags.mirror}
        views = code_views(image, flags.image_size, **crops)
        if flags.control is None:
            return views, {}
        if self.maps is not None:
            control = self.maps.views(self.data.name(index), image, flags.image_size, **crops)
        else:
            control = np.stack([canny(view, low=flags.canny_low, high=flags.canny_high) for view in views])
        return views, {flags.control: packed(control, flags.control)}


def store_recipe(flags: ExtractFlags, data: ImageDataset, *, crop_range: float,
                 grid: tuple[int, int]) -> dict[str, Any]:
    """What a store of these images is made by, for its manifest; without the tokenizer.

    The hash of the names is another for other images, not for a moved folder. Only rank 0 asks the disk for the files'
    sizes and times.
    """
    above = "" if flags.data_path is None else str(Path(flags.data_path))
    recipe = {"format": FORMAT, "dataset": flags.dataset, "images": len(data),
              "image_names": code_writer.names_hash(data.name(i).removeprefix(above) for i in range(len(data))),
              "image_size": list(flags.image_size), "exif_orientation": flags.exif_orientation, "grid": list(grid),
              "views": (5 if flags.ten_crop else 1) * (1 + flags.mirror),
              "crop": {"ten_crop": flags.ten_crop, "range": crop_range, "mirror": flags.mirror},
              "classes": data.classes}
    if isinstance(data, ImageFiles) and dist.env_rank() == 0:
        recipe |= data.states()
    if flags.control is not None:
        recipe["columns"] = [vars(column_of(flags.control, flags.image_size))]
        recipe["control"] = {"kind": flags.control}
        if flags.control == "canny":
            recipe["control"] |= {"low": flags.canny_low, "high": flags.canny_high, "sigma": SIGMA}
    if flags.debug:
        recipe["debug"] = {"images": DEBUG_IMAGES, "global_seed": flags.global_seed}
    return recipe


def check_control_flags(flags: ExtractFlags) -> None:
    """Raise ValueError for flags of control pictures that do not fit together, or lack a package."""
    if flags.control_path is not None and flags.control in (None, "canny"):
        others = ", ".join(kind for kind in KINDS if kind != "canny")
        raise ValueError(f"--control-path is for --control {others}: canny edges are found in the images themselves")
    if flags.control == "canny":
        check_thresholds(flags.canny_low, flags.canny_high)
        canny(np.zeros((8, 8, 3), np.uint8), low=flags.canny_low, high=flags.canny_high)


def main(flags: ExtractFlags) -> None:
    """Extract the codes of images with classes."""
    process = dist.setup()
    crop_range = flags.crop_range if flags.crop_range is not None else (1.1 if flags.ten_crop else 1.0)
    if crop_range < 1:
        raise ValueError(f"--crop-range is {crop_range}, expected at least 1")
    check_extraction(flags.code_path, flags.per_proc_batch_size)
    check_control_flags(flags)
    outer = tuple(int(side * crop_range) for side in flags.image_size)
    data = flagged_dataset(flags, size=outer)
    check_readable(data)
    name, tokenizer = load_tokenizer(flags, device=process.device)
    grid = check_image_size(flags.image_size, tokenizer.downsample)
    if flags.debug and len(data) > DEBUG_IMAGES:
        data = DrawnImages(data, DEBUG_IMAGES, seed=flags.global_seed)
    folder = Path(flags.code_path) / f"{flags.dataset}{cli.shown_size(flags.image_size)}_codes"
    recipe = store_recipe(flags, data, crop_range=crop_range, grid=grid)
    manifest = extract(ClassViews(data, flags, crop_range), folder, recipe=recipe, tokenizer=tokenizer, name=name,
                       process=process, batch_size=flags.per_proc_batch_size, num_workers=flags.num_workers)
    if manifest is not None:
        skipped = manifest["skipped"]
        more = f"; {len(skipped)} unreadable images left out, such as {plain(skipped[0])}" if skipped else ""
        print(f"{manifest['count']} images x {manifest['views']} views of {grid[0]}x{grid[1]} codes in {folder}{more}")
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, ExtractFlags)
