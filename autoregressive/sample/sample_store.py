"""The files of a sample set: shards that hold finished images, and the npz that is made of them in the end.

<folder>/shards/shard-*.npz: images (arr_0) and their numbers (indices), written whole or not at all; zip's checksums
reveal damage. A finished npz counts as one more shard, so that a set can grow. Every file carries a seal in the zip
comment, the hash of the set's description: files that other models left in the same place do not count.
"""
import contextlib
import errno
import glob
import hashlib
import json
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.pictures import PictureReader
from evaluations.c2i.image_sets import NpzImages, small_array
from utils import cli, images
from utils.checkpoints.damage import WRONG_CONTENT
from utils.files import sweep

BROKEN_ZIP = (*WRONG_CONTENT, TypeError, zipfile.BadZipFile, zlib.error)
ROWS = 8  # images read at a time


class SampleStore:
    """The files of one sample set: images of `size` (height, width), made as `described` says."""

    def __init__(self, folder: Path, described: dict[str, Any], *, size: tuple[int, int]) -> None:
        self.folder, self.shards, self.size = folder, folder / "shards", size
        self.npz = folder.with_name(f"{folder.name}.npz")
        self.larger = self.shards / self.npz.name  # an earlier npz with more images than are asked for now
        self.seal = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest().encode()

    def foreign(self) -> Path | None:
        """Where there are images that may be another program's: PNGs, or an npz that is not this set's. They are ours
        if a config.json says so."""
        if self.npz.exists() and not self.is_ours(self.npz):
            return self.npz
        return self.folder if any(self.folder.glob("*.png")) else None

    def sweep(self) -> None:
        """Remove the unfinished files of killed writers."""
        sweep(self.folder)
        sweep(self.shards)
        for path in self.npz.parent.glob(f".{glob.escape(self.npz.name)}.*.tmp"):
            path.unlink()

    def png(self, index: int) -> Path:
        """The PNG of an image."""
        return self.folder / f"{index:06d}.png"

    def without_png(self, indices: Iterable[int]) -> list[int]:
        """Which of the images have no PNG yet."""
        present = {path.name for path in self.folder.glob("*.png")}
        return [index for index in indices if self.png(index).name not in present]

    def is_finished(self, count: int) -> bool:
        """Whether the npz holds images 0 to count - 1 of this set, as far as its header says."""
        try:
            return self.is_ours(self.npz) and len(self.indices(self.npz)) == count
        except (*BROKEN_ZIP, OSError):
            return False

    def is_ours(self, path: Path) -> bool:
        """Whether there is an npz of this set."""
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.comment == self.seal
        except FileNotFoundError:
            return False
        except (*BROKEN_ZIP, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a damaged offset
                raise
            return False

    def indices(self, path: Path) -> np.ndarray:
        """Which images a shard or the npz holds, ascending. Raises one of BROKEN_ZIP if it cannot be told."""
        if not self.is_ours(path):
            raise ValueError(f"{path} is cut short or of another set")
        found = NpzImages(path)
        if path.name == self.npz.name:
            return np.arange(found.count)
        with zipfile.ZipFile(path) as archive:
            indices = small_array(archive, "indices")
        if indices.shape != (found.count,) or found.size != self.size:
            raise ValueError(f"{path} does not hold the images that it announces")
        return indices

    def held(self, *, check: bool = False) -> dict[Path, np.ndarray]:
        """The shards, and the npz if it is this set's, each with the images that it holds.

        `check`: read whole files, not only their headers. Damaged files are named and removed.
        """
        held = {}
        for path in [*sorted(self.shards.glob("*.npz")), *([self.npz] if self.is_ours(self.npz) else [])]:
            try:
                indices = self.indices(path)
                if check:
                    deque(stored_images(path), maxlen=0)
                held[path] = indices
            except (*BROKEN_ZIP, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a damaged offset
                    raise
                cli.warn(f"{path.name} is removed, its images are made again: {error}", every_rank=True)
                path.unlink()
        return held

    def lacking(self, count: int) -> list[int]:
        """Which of images 0 to count - 1 no file holds; every file is read whole."""
        held = {index for indices in self.held(check=True).values() for index in indices.tolist()}
        return [index for index in range(count) if index not in held]

    def add(self, made: list[tuple[int, np.ndarray]]) -> None:
        """Write images (index, uint8 (H, W, 3)) as one shard."""
        made = sorted(made, key=lambda pair: pair[0])
        images.save_npz(self.shards / f"shard-{made[0][0]:06d}.npz", (picture for _, picture in made), count=len(made),
                        shape=self.size, extra={"indices": np.array([index for index, _ in made])}, comment=self.seal)

    def read_pngs(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Images that are in no shard but have a PNG: (index, uint8 (H, W, 3)). Damaged PNGs are named and removed."""
        reader = PictureReader()
        for index in indices:
            try:
                picture = np.asarray(reader(self.png(index)))
                if picture.shape[:2] != self.size:
                    raise ValueError(f"{self.png(index)} is {picture.shape[0]}x{picture.shape[1]}")
            except ValueError as error:
                cli.warn(f"{error}: it is made again", every_rank=True)
                self.png(index).unlink()
                continue
            yield index, picture

    def pack(self, labels: np.ndarray) -> None:
        """Make the npz of images 0 to len(labels) - 1 from shards and PNGs, then remove the shards.

        Raises ValueError if an image is missing or a shard turns out to be damaged.
        """
        if self.is_ours(self.npz) and len(self.indices(self.npz)) > len(labels) and not self.larger.exists():
            self.shards.mkdir(exist_ok=True)
            self.npz.replace(self.larger)  # keeps the images that the new one does not hold
        rows_in_order = self.in_order(len(labels))
        try:
            images.save_npz(self.npz, tqdm(rows_in_order, total=len(labels), desc="packing", unit="image",
                                           mininterval=1.0),
                            count=len(labels), shape=self.size, labels=labels, comment=self.seal)
        except BROKEN_ZIP as error:
            raise ValueError(f"{error}: run again to make what is missing") from None
        self.remove_shards(len(labels))

    def in_order(self, count: int) -> Iterator[np.ndarray]:
        """Images 0 to count - 1, in order; only a few of each shard that is being read are in memory."""
        held = self.held()
        home = {index: path for path, indices in held.items() for index in indices.tolist()}
        missing = [index for index in range(count) if index not in home]
        if missing:
            raise ValueError(f"{len(missing)} images, such as {missing[0]}, are gone from {self.folder}")
        readers: dict[Path, Iterator[tuple[int, np.ndarray]]] = {}
        for index in range(count):
            path = home[index]
            if path not in readers:
                readers[path] = zip(held[path].tolist(), stored_images(path), strict=True)
            yield next(picture for i, picture in readers[path] if i == index)
            if index == held[path][-1]:
                del readers[path]

    def remove_shards(self, count: int) -> None:
        """Remove the shards whose images are all in an npz of `count`."""
        for path, indices in self.held().items():
            if path != self.npz and indices[-1] < count:
                path.unlink()
        with contextlib.suppress(OSError):  # not empty, or not there
            self.shards.rmdir()


def stored_images(path: Path) -> Iterator[np.ndarray]:
    """The images of an npz, uint8 (H, W, 3), one by one. Raises ValueError where a checksum is wrong."""
    for _, pictures in NpzImages(path).read(ROWS, rank=0, world_size=1):
        yield from pictures
