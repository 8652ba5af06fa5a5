"""Codes with a file for each image: LlamaGen's layout, ARPG's and RandAR's.

    <name>_codes/{i}.npy, <name>_labels/{i}.npy          LlamaGen: i = 0 … N-1
    <class number>/<name>.npy                            ARPG, RandAR

What is to be known before the first batch (how many, which labels, which names) takes a minute for ImageNet, since each
label is in a file of its own. It is read once and kept in the user's cache until a folder changes.
"""
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset.code_index import FolderIndex
from dataset.code_layouts import CodeStore, class_folders, labels_of
from dataset.path_list import PathList
from utils.files import file_hash
from utils.pickles import why_no_array

NO_GAPS = "codes and labels are numbered 0 … N-1 without gaps"
NUMBER = re.compile("0|[1-9][0-9]{0,17}")
# As many code files stand for all where stores are compared; of as many label files an index compares size and
# time, so that labels which were all written anew are noticed.
WITNESSES = 64


class FileStore(CodeStore):
    """One file of (views, L) codes per image, (1, views, L) as well."""

    def __init__(self, folder: Path, files: Sequence[Path], labels: np.ndarray, grid: tuple[int, int] | None) -> None:
        if not len(files):
            raise ValueError("the code store holds no .npy files")
        views, length = self.load(files[0]).shape
        side = math.isqrt(length)
        if grid is None and side * side != length:
            raise ValueError(f"{files[0]} has {length} tokens, no square: give --image-size and --downsample-size")
        grid = (side, side) if grid is None else grid
        if math.prod(grid) != length:
            raise ValueError(f"{files[0]} has {length} tokens, which a grid of {grid[0]}x{grid[1]} does not hold")
        super().__init__(labels=labels, views=views, grid=grid, folder=folder)
        self.files = files

    @staticmethod
    def load(path: Path) -> np.ndarray:
        """The codes of one image, (views, L)."""
        codes = load_array(path)
        return codes.reshape(-1, codes.shape[-1])

    def contents(self) -> list[str]:
        """Hashes of some code files, evenly spaced."""
        places = np.unique(np.linspace(0, len(self.files) - 1, WITNESSES).astype(int)).tolist()
        return [file_hash(self.files[place]) for place in places]

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """One file per row. Raises ValueError for one of another shape."""
        found = [self.load(self.files[row]) for row in rows.tolist()]
        shape = (self.views, math.prod(self.grid))
        for row, codes in zip(rows.tolist(), found, strict=True):
            if codes.shape != shape:
                raise ValueError(f"{self.files[row]} holds codes of shape {codes.shape}, the first file {shape}")
        return np.stack([codes[view] for codes, view in zip(found, views, strict=True)]).astype(np.int64)


@dataclass(frozen=True)
class NumberedPaths(Sequence[Path]):
    """folder/0.npy … folder/<count - 1>.npy."""

    folder: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Path:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.folder / f"{index}.npy"


def open_pairs(codes: Path, grid: tuple[int, int] | None) -> FileStore:
    """LlamaGen's layout. Raises FileNotFoundError for a gap in the numbers."""
    codes, labels = codes.absolute(), labels_of(codes)
    index = FolderIndex([codes, labels], fits=lambda found: np.array_equal(
        found["witnesses"], witnesses(labels, len(found["labels"]))))
    found = index.read()
    if found is None:
        found = index.made(count_numbered(codes), lambda count: {
            "labels": read_labels(labels, count), "witnesses": witnesses(labels, count)})
    return FileStore(codes.parent, NumberedPaths(codes, len(found["labels"])), found["labels"], grid)


def count_numbered(codes: Path) -> int:
    """How many .npy files there are. Raises FileNotFoundError unless they are 0.npy, 1.npy, …."""
    stems = (entry.name[:-4] for entry in os.scandir(codes) if entry.name.endswith(".npy"))
    numbers = np.fromiter((int(stem) if NUMBER.fullmatch(stem) else -1 for stem in stems), np.int64)
    there = np.zeros(len(numbers), dtype=bool)
    there[numbers[(numbers >= 0) & (numbers < len(numbers))]] = True
    if not there.all():
        raise FileNotFoundError(f"{codes / str(int(there.argmin()))}.npy is missing: {NO_GAPS}")
    return len(numbers)


def read_labels(labels: Path, count: int) -> np.ndarray:
    """The labels, (count,) int64."""
    files = tqdm(NumberedPaths(labels, count), desc="reading labels", unit="file", mininterval=1.0,
                 disable=count < 10_000)
    return np.fromiter((int(load_array(file).reshape(-1)[0]) for file in files), np.int64, count)


def witnesses(labels: Path, count: int) -> np.ndarray:
    """Size and time of some label files, spread over all, and of the one that should not be there, (…, 2) int64."""
    numbers = [*np.linspace(0, max(count - 1, 0), WITNESSES).astype(int).tolist(), count]
    found = []
    for file in (labels / f"{number}.npy" for number in numbers):
        try:
            state = file.stat()
        except OSError:
            found.append((-1, -1))
        else:
            found.append((state.st_size, state.st_mtime_ns))
    return np.array(found, np.int64)


def open_class_folders(root: Path, grid: tuple[int, int] | None) -> FileStore:
    """ARPG's and RandAR's layout; 10.npy comes after 9.npy."""
    folders = class_folders(root)
    index = FolderIndex([root, *(root / name for name in folders)])
    found = index.read()
    if found is None:
        count = sum(entry.name.endswith(".npy") for name in folders for entry in os.scandir(root / name))
        found = index.made(count, lambda count: name_files(root, folders))
    files = PathList(os.path.join(root, ""), torch.from_numpy(found["names"]), torch.from_numpy(found["ends"]))
    return FileStore(root, files, found["labels"], grid)


def name_files(root: Path, folders: list[str]) -> dict[str, np.ndarray]:
    """{"names", "ends": of a PathList below `root`, "labels" (N,)} of the files in class folders."""
    counts: list[int] = []

    def names() -> Iterator[list[str]]:
        for folder in folders:
            stems = [entry.name[:-4] for entry in os.scandir(root / folder) if entry.name.endswith(".npy")]
            counts.append(len(stems))
            yield [f"{folder}/{stem}.npy" for stem in sorted(stems, key=lambda stem: (len(stem), stem))]

    files = PathList.of("", names())
    labels = np.repeat([int(folder) for folder in folders], counts)
    return {"names": files.names.numpy(), "ends": files.ends.numpy(), "labels": labels}


def load_array(path: Path) -> np.ndarray:
    """The array in a .npy file. Raises FileNotFoundError or ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {NO_GAPS}")
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers, or cut short ({why_no_array(path, error)})") from None
