"""Codes with a file for each image: LlamaGen's layout, ARPG's and RandAR's.

    <name>_codes/{i}.npy, <name>_labels/{i}.npy          LlamaGen: i = 0 … N-1
    <class number>/<name>.npy                            ARPG, RandAR

Hidden files (._3.npy) and files that are no .npy (Thumbs.db) are passed over, which is said; other strays are refused.
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

from dataset.code_index import Arrays, FolderIndex
from dataset.code_layouts import MOST_CLASSES, CodeStore, check_labels, class_folders, labels_of
from dataset.mapped import NO_ARRAY
from dataset.path_list import PathList
from utils import cli
from utils.files import few, file_hash
from utils.pickles import why_no_array

NO_GAPS = "codes and labels are numbered 0 … N-1 without gaps"
NUMBER = re.compile("0|[1-9][0-9]{0,17}")
# As many code files stand for all where stores are compared; of as many label files an index compares size and
# time, so that labels which were all written anew are noticed.
WITNESSES = 64
SHOWN = 4  # names in a message


class FileStore(CodeStore):
    """One file of (views, L) codes per image, (1, views, L) as well."""

    def __init__(self, folder: Path, files: Sequence[Path], labels: np.ndarray, grid: tuple[int, int] | None) -> None:
        if not len(files):
            raise ValueError(f"the code store {folder} holds no .npy files")
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
        """The codes of one image, (views, L). Raises ValueError for what are no codes."""
        codes = load_whole_numbers(path)
        if not codes.size or not (codes.ndim in (1, 2) or (codes.ndim == 3 and len(codes) == 1)):
            raise ValueError(f"{path} holds an array of shape {codes.shape}, expected codes of one image: (views, "
                             "tokens) or (1, views, tokens)")
        if codes.min() < 0:
            raise ValueError(f"{path} holds code {codes.min()}, expected 0 or more")
        return codes.reshape(-1, codes.shape[-1])

    def file_of(self, row: int, view: int) -> Path:
        """The image's file."""
        return self.files[row]

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


def open_numbered(codes: Path, grid: tuple[int, int] | None) -> FileStore:
    """LlamaGen's layout. Raises FileNotFoundError for a gap in the numbers, ValueError for wrong names or labels."""
    codes, labels = codes.absolute(), labels_of(codes)
    index = FolderIndex([codes, labels], fits=lambda found: np.array_equal(
        found["witnesses"], witnesses(labels, len(found["labels"]))))
    found = index.read()
    if found is None:
        count, passed = count_numbered(codes, labels)
        found = index.made(count, lambda count: {
            "labels": read_labels(labels, count), "witnesses": witnesses(labels, count),
            "passed": np.array(in_short(passed))})
    tell_passed_over(codes.parent, found)
    return FileStore(codes.parent, NumberedPaths(codes, len(found["labels"])), found["labels"], grid)


def count_numbered(codes: Path, labels: Path) -> tuple[int, list[str]]:
    """How many pairs there are, and files that are none of them.

    Raises FileNotFoundError unless both folders hold 0.npy, 1.npy, …, equally many.
    """
    there, passed = {}, []
    for folder in (codes, labels):
        stems, others = array_files(folder)
        wrong = [stem for stem in stems if not NUMBER.fullmatch(stem)]
        if wrong:
            raise ValueError(f"{folder} holds {in_short([f'{stem}.npy' for stem in wrong])}: expected 0.npy … N-1.npy")
        there[folder] = np.fromiter(map(int, stems), np.int64, len(stems))
        passed += [f"{folder.name}/{name}" for name in others]
    count = 1 + max(int(numbers.max(initial=-1)) for numbers in there.values())
    gaps = []
    for folder, numbers in there.items():
        near = np.arange(min(count, len(numbers) + SHOWN + 1))  # these have all gaps, or enough of them
        gaps += [f"{folder.name}/{number}.npy" for number in np.setdiff1d(near, numbers).tolist()]
    if gaps:
        raise FileNotFoundError(f"{codes.parent} holds {len(there[codes])} codes and {len(there[labels])} labels: "
                                f"{in_short(gaps)} {'is' if len(gaps) == 1 else 'are'} missing: {NO_GAPS}")
    return count, passed


def array_files(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the .npy files without the ending, names of all that is passed over: hidden, or no .npy).

    Raises ValueError for an ending in capitals: on another system it may be the same file, here it is not.
    """
    stems, passed = [], []
    for entry in os.scandir(folder):
        stem, ending = os.path.splitext(entry.name)
        if ending == ".npy" and stem[0] != ".":
            stems.append(stem)
        elif ending.lower() == ".npy" and stem[0] != ".":
            raise ValueError(f"{folder / entry.name}: expected an ending in small letters, {stem}.npy")
        else:
            passed.append(entry.name)
    return stems, passed


def in_short(names: Sequence[str]) -> str:
    """The first of some names, by number, and how many more there are."""
    return few(sorted(names, key=lambda name: (len(name), name)), most=SHOWN)


def tell_passed_over(folder: Path, found: Arrays) -> None:
    """Name what an index has passed over, if there is any."""
    passed = str(found["passed"])
    if passed:
        cli.warn(f"passed over in {folder}: {passed} (hidden, or no .npy)", kind="note")


def read_labels(labels: Path, count: int) -> np.ndarray:
    """The labels, (count,) int64. Raises ValueError that names the file of a wrong one."""
    files = tqdm(NumberedPaths(labels, count), desc="reading labels", unit="file", mininterval=1.0,
                 disable=count < 10_000)
    return np.fromiter(map(read_label, files), np.int64, count)


def read_label(path: Path) -> int:
    """The label of an image. Raises ValueError that names the file."""
    label = load_whole_numbers(path)
    if label.size != 1:
        raise ValueError(f"{path} holds an array of shape {label.shape}, expected one label")
    check_labels(label, path)
    return int(label.flat[0])


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
        too_large = [name for name in folders if int(name) >= MOST_CLASSES]
        if too_large:
            raise ValueError(f"{root / too_large[0]} is no class folder: expected numbers below {MOST_CLASSES}")
        count = sum(entry.name.endswith(".npy") for name in folders for entry in os.scandir(root / name))
        found = index.made(count, lambda count: name_files(root, folders))
    tell_passed_over(root, found)
    files = PathList(os.path.join(root, ""), torch.from_numpy(found["names"]), torch.from_numpy(found["ends"]))
    return FileStore(root, files, found["labels"], grid)


def name_files(root: Path, folders: list[str]) -> dict[str, np.ndarray]:
    """{"names", "ends": of a PathList below `root`, "labels" (N,), "passed"} of the files in class folders."""
    counts: list[int] = []
    passed = [entry.name for entry in os.scandir(root) if entry.name not in folders]

    def names() -> Iterator[list[str]]:
        for folder in folders:
            stems, others = array_files(root / folder)
            counts.append(len(stems))
            passed.extend(f"{folder}/{name}" for name in others)
            yield [f"{folder}/{stem}.npy" for stem in sorted(stems, key=lambda stem: (len(stem), stem))]

    files = PathList.of("", names())
    labels = np.repeat([int(folder) for folder in folders], counts)
    return {"names": files.names.numpy(), "ends": files.ends.numpy(), "labels": labels,
            "passed": np.array(in_short(passed))}


def load_whole_numbers(path: Path) -> np.ndarray:
    """The array of whole numbers in a .npy file. Raises FileNotFoundError or ValueError that names it."""
    try:
        with open(path, "rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{path} is missing: {NO_GAPS}") from None
    except (*NO_ARRAY, MemoryError) as error:
        raise ValueError(f"{path} is no array of numbers, or cut short ({why_no_array(path, error)})") from None
    if found.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {found.dtype}, expected whole numbers: save the array .astype(numpy.int64)")
    return found
