"""Turn a folder of images into a packed store of codes.

    bash scripts/autoregressive/extract_codes_c2i.sh --data-path /data/imagenet/train --code-path /data/codes \\
        --vq-ckpt vq_ds16_c2i.pt --ten-crop --crop-range 1.1

The store is <code-path>/<dataset><size>_codes. Run again to continue after an interruption. Labels and class names come
from the data set; unreadable images are left out, counted and named in the manifest.
"""
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import code_writer
from dataset.augmentation import code_views
from dataset.build import DataFlags, ImageDataset, flagged_dataset
from dataset.code_manifest import FORMAT, read_manifest
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
from dataset.loader import worker_count
from dataset.pictures import UnreadableError
from dataset.remote import is_url
from dataset.unreadable import PassedOver, check_readable, split_readable
from tokenizer.build import TokenizerFlags, check_image_size, describe_tokenizer, encode_images, load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli, dist, images
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


class Views(Dataset):
    """Image i → (i, its views (V, H, W, 3) uint8 and their control pictures as stored, None without --control; or the
    reason, a text, why it cannot be read)."""

    def __init__(self, data: ImageDataset, flags: ExtractFlags, crop_range: float) -> None:
        self.data, self.flags, self.crop_range, self.maps = data, flags, crop_range, None
        if flags.control not in (None, "canny"):
            self.maps = ControlMaps(flags.control, flags.control_path, flags.data_path)
            if len(data):  # the wrong folder is told before any work
                self.maps.path_of(data.name(0))

    def __getitem__(self, index: int) -> tuple[int, tuple[np.ndarray, np.ndarray | None] | str]:
        try:
            image = self.data.image(index)
        except UnreadableError as error:
            return index, str(error)
        flags, control = self.flags, None
        crops = {"ten_crop": flags.ten_crop, "crop_range": self.crop_range, "mirror": flags.mirror}
        views = code_views(image, flags.image_size, **crops)
        if self.maps is not None:
            control = self.maps.views(self.data.name(index), image, flags.image_size, **crops)
        elif flags.control is not None:
            control = np.stack([canny(view, low=flags.canny_low, high=flags.canny_high) for view in views])
        return index, (views, None if control is None else packed(control, flags.control))


Batch = list[tuple[int, tuple[np.ndarray, np.ndarray | None] | str]]


def part_batches(data: Views, parts: list[range]) -> Iterator[Iterator[Batch]]:
    """The batches of each part, all loaded by the same workers, which go on with the next part meanwhile."""
    size = data.flags.per_proc_batch_size
    batches = (part[start:start + size] for part in parts for start in range(0, len(part), size))
    loaded = iter(()) if not parts else iter(DataLoader(
        data, batch_sampler=batches, num_workers=worker_count(data.flags.num_workers), collate_fn=list))
    for part in parts:
        yield itertools.islice(loaded, -(-len(part) // size))


@torch.inference_mode()
def encode_part(tokenizer: VQModel, batches: Iterable[Batch], *, device: torch.device, bar: tqdm,
                passed_over: PassedOver) -> tuple[np.ndarray, list[np.ndarray | None], list[int], list[int]]:
    """Encode the views of some images → (codes (n, V, L), their n control pictures, indices that were read, indices
    that could not be)."""
    parts, control, read, broken = [], [], [], []
    for batch in batches:
        indices, found, unreadable = split_readable(batch, passed_over)
        if indices:
            control += [pictures for _, pictures in found]
            pixels = images.to_float(np.concatenate([views for views, _ in found])).to(device)
            codes = encode_images(tokenizer, pixels)  # (n*V, L)
            parts.append(codes.view(len(indices), -1, codes.shape[-1]).cpu().numpy())
        read += indices
        broken += unreadable
        bar.update(len(batch))
    return (np.concatenate(parts) if parts else np.empty((0, 0, 0))), control, read, broken


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


def tell_complete(made: dict[str, Any], recipe: dict[str, Any], folder: Path) -> None:
    """Say that a finished store is kept, and why. `made`: its manifest; `recipe`: of what would be made now."""
    when = "image_times"
    if when not in recipe:
        print(f"{folder} is complete: nothing to do")
    elif when not in made:  # an older version's
        print(f"{folder} is complete: nothing to do. It does not say of which size and time the image files were, and "
              "contents are not compared: if pictures were replaced, extract to another --code-path")
    elif made.get(when) == recipe[when]:
        print(f"{folder} is complete: nothing to do (names, sizes and times of the image files are those of then)")
    else:
        print(f"{folder} is complete: nothing to do. Names and sizes of the image files are those of then, their times "
              "are not, and contents are not compared: if pictures were replaced, extract to another --code-path")


def tell_other_times(begun: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Warn if image files have other times than when an extraction began. `begun`: its recipe; `recipe`: as of now."""
    if begun.get("image_times", now := recipe.get("image_times")) != now:
        cli.warn("some image files have other times than when this extraction began, and contents are not compared: "
                 "if pictures were replaced, extract to another --code-path")


def check_control_flags(flags: ExtractFlags) -> None:
    """Raise ValueError for flags of control pictures that do not fit together, or lack a package."""
    if flags.control_path is not None and flags.control in (None, "canny"):
        others = ", ".join(kind for kind in KINDS if kind != "canny")
        raise ValueError(f"--control-path is for --control {others}: canny edges are found in the images themselves")
    if flags.control == "canny":
        check_thresholds(flags.canny_low, flags.canny_high)
        canny(np.zeros((8, 8, 3), np.uint8), low=flags.canny_low, high=flags.canny_high)


def main(flags: ExtractFlags) -> None:
    """Extract the parts that are not there yet, join them, write the manifest."""
    process = dist.setup()
    crop_range = flags.crop_range if flags.crop_range is not None else (1.1 if flags.ten_crop else 1.0)
    if crop_range < 1:
        raise ValueError(f"--crop-range is {crop_range}, expected at least 1")
    if flags.per_proc_batch_size < 1:
        raise ValueError(f"--per-proc-batch-size is {flags.per_proc_batch_size}, expected at least 1")
    if is_url(flags.code_path):
        raise ValueError(f"--code-path {flags.code_path} is a URL: extract to a folder, and upload that")
    check_control_flags(flags)
    outer = tuple(int(side * crop_range) for side in flags.image_size)
    data = flagged_dataset(flags, size=outer)
    check_readable(data)
    name, tokenizer = load_tokenizer(flags, device=process.device)
    grid = check_image_size(flags.image_size, tokenizer.downsample)
    if flags.debug and len(data) > DEBUG_IMAGES:
        data = DrawnImages(data, DEBUG_IMAGES, seed=flags.global_seed)
    count, data_views = len(data), Views(data, flags, crop_range)
    size = "x".join(map(str, flags.image_size if flags.image_size[0] != flags.image_size[1] else flags.image_size[:1]))
    folder = Path(flags.code_path) / f"{flags.dataset}{size}_codes"
    recipe = store_recipe(flags, data, crop_range=crop_range, grid=grid) | {
        "dtype": str(code_writer.code_dtype(tokenizer.codebook_size)), "tokenizer": describe_tokenizer(name, tokenizer)}
    if process.is_main:
        code_writer.begin(folder, recipe)
    dist.barrier()
    if (folder / "manifest.json").is_file():
        if process.is_main:
            tell_complete(read_manifest(folder), recipe, folder)
        return

    begun = code_writer.extraction_recipe(folder)
    if process.is_main:
        tell_other_times(begun, recipe)
    rows, views = code_writer.layout(begun)["part_rows"], recipe["views"]
    parts = [range(first, min(first + rows, count)) for first in range(0, count, rows)]
    mine = [i for i in range(process.rank, len(parts), process.world_size) if not code_writer.is_done(folder, i)]
    with tqdm(total=sum(len(parts[i]) for i in mine), desc=f"{name} codes", unit="image", mininterval=1.0,
              disable=not process.is_main) as bar:
        loaded, passed_over = part_batches(data_views, [parts[i] for i in mine]), PassedOver()
        for i, batches in zip(mine, loaded, strict=True):
            codes, control, read, broken = encode_part(tokenizer, batches, device=process.device, bar=bar,
                                              passed_over=passed_over)
            codes = codes.astype(recipe["dtype"]).reshape(len(read), views, grid[0] * grid[1])
            columns = None if flags.control is None else {flags.control: control}
            code_writer.write_part(folder, i, codes, data.labels[read].tolist(), [data.name(index) for index in broken],
                                   columns=columns)
    dist.barrier()
    code_writer.join(folder, len(parts), rank=process.rank, workers=process.world_size)
    dist.barrier()
    if process.is_main:
        manifest = code_writer.finish(folder, len(parts))
        skipped = manifest["skipped"]
        more = f"; {len(skipped)} unreadable images left out, such as {plain(skipped[0])}" if skipped else ""
        print(f"{manifest['count']} images x {views} views of {grid[0]}x{grid[1]} codes in {folder}{more}")
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, ExtractFlags)
