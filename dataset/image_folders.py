"""Image folders as data sets: trees with a folder per class, flat folders, JSON lists of paths."""
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image

from dataset.pairs import Pairs
from dataset.path_list import PathList
from dataset.pictures import PictureReader, endings
from utils import cli

SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
SYSTEM_NAMES = {  # what archives, network storage and desktops leave behind; in small letters
    "__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler",
    "system volume information", "lost+found", "network trash folder", "temporary items", "__pycache__", "thumbs.db",
    "desktop.ini"}
NAMED = 3  # examples of what was passed over


class ImageFiles:
    """Files with labels. `classes` is None for images without classes (all labels 0)."""

    def __init__(self, files: PathList, labels: np.ndarray | None = None, classes: list[str] | None = None, *,
                 reader: PictureReader | None = None) -> None:
        self.files, self.classes, self.reader = files, classes, reader or PictureReader()
        labels = np.zeros(len(files), np.int64) if labels is None else labels
        self._labels = torch.from_numpy(labels)  # a tensor is shared with loading processes, an array is copied

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self._labels.numpy()

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """The RGB image. Raises UnreadableError."""
        return self.reader(self.files.name(index))

    def name(self, index: int) -> str:
        """The path, for reports."""
        return self.files.name(index)

    def states(self) -> dict[str, str]:
        """{"image_sizes", "image_times": hash} of the files: one of them changes when an image is replaced."""
        groups = (range(start, min(start + 1024, len(self))) for start in range(0, len(self), 1024))
        with ThreadPoolExecutor(16) as pool:  # network disks answer slowly and to many
            found = np.concatenate(list(pool.map(self.states_of, groups)))  # (N, 2)
        return {name: hashlib.sha256(np.ascontiguousarray(column).tobytes()).hexdigest()
                for name, column in zip(("image_sizes", "image_times"), found.T, strict=True)}

    def states_of(self, indices: range) -> np.ndarray:
        """(size in bytes, time of change) of each file, (B, 2) int64; -1 for what cannot be told."""
        found = np.full((len(indices), 2), -1, np.int64)
        for row, index in enumerate(indices):
            with contextlib.suppress(OSError):
                state = os.stat(self.files.name(index))
                found[row] = state.st_size, state.st_mtime_ns
        return found


def class_tree(root: str | Path, *, reader: PictureReader | None = None) -> ImageFiles:
    """root/<class>/…/<image>: labels follow the sorted folder names, as torchvision's ImageFolder numbers them."""
    root = existing_folder(root)
    search = Search(root)
    classes = search.class_folders()
    if not classes:
        raise ValueError(f"{root} has no class folders: expected <data-path>/<class>/<image>"
                         f"{', for images without classes use --dataset coco' if search.pictures(root) else ''}")
    if {name.lower() for name in classes} <= SPLIT_NAMES:
        raise ValueError(f"{root} holds the splits {', '.join(classes)}, not classes: point --data-path at one, "
                         f"such as {root / classes[0]}")
    counts: list[int] = []

    def names() -> Iterator[list[str]]:
        for name in classes:
            found = search.pictures(root / name)
            if not found:
                raise ValueError(f"class folder {root / name} holds no pictures{search.passed_over(root / name)}: if "
                                 "it is no class, --data-path should be a folder without it")
            counts.append(len(found))
            yield [os.path.join(name, image) for image in found]

    files = PathList.of(above(root), names())
    search.tell()
    return ImageFiles(files, np.repeat(np.arange(len(classes)), counts), classes, reader=reader)


def flat_folder(root: str | Path, *, reader: PictureReader | None = None) -> ImageFiles:
    """All images below a folder, without classes."""
    root = existing_folder(root)
    search = Search(root)
    names = search.pictures(root)
    if not names:
        raise ValueError(f"no images below {root}{search.passed_over(root)}")
    search.tell()
    return ImageFiles(PathList.of(above(root), [names]), reader=reader)


class Search:
    """A search for pictures below `root`; it remembers what it passes over.

    Hidden files and folders, and those of systems (SYSTEM_NAMES), are no data. A folder is visited once, whatever links
    lead to it; a class folder belongs to its class, and `root` and the folders above it are not entered from below.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.visited = {identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
        self.hidden: list[str] = []
        self.links: list[str] = []
        self.others: dict[str, Counter[str]] = {}  # folder that was asked for → endings of what is no picture

    def class_folders(self) -> list[str]:
        """The names of the folders in root, sorted. Raises ValueError for two names of one folder."""
        places: dict[tuple[int, int], str] = {}
        beside = self.others.setdefault(str(self.root), Counter())
        for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                self.hidden.append(entry.name)
            elif not entry.is_dir():
                beside[ending(entry.name)] += 1
            elif (place := identity(entry)) in self.visited:
                self.links.append(entry.name)
            elif place in places:
                raise ValueError(f"{self.root / places[place]} and {self.root / entry.name} are the same folder under "
                                 "two names: which class do its pictures belong to?")
            else:
                places[place] = entry.name
        self.visited |= places.keys()
        return list(places.values())

    def pictures(self, folder: Path) -> list[str]:
        """Every picture below a folder by its relative path, sorted as Path objects are."""
        found: list[str] = []
        others = self.others.setdefault(str(folder), Counter())

        def refuse(error: OSError) -> NoReturn:
            raise ValueError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None

        for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
            below = os.path.relpath(where, folder)
            folders[:] = [name for name in folders if self.enters(os.path.join(where, name))]
            for name in names:
                if is_hidden(name):
                    self.hidden.append(os.path.relpath(os.path.join(where, name), self.root))
                elif ending(name) not in endings():
                    others[ending(name)] += 1
                else:
                    found.append(name if below == "." else os.path.join(below, name))
        return sorted(found, key=lambda name: name.split(os.sep))

    def enters(self, folder: str) -> bool:
        """Whether to visit a folder; if so, it counts as visited."""
        name = os.path.relpath(folder, self.root)
        if is_hidden(os.path.basename(folder)):
            self.hidden.append(name)
            return False
        place = identity(folder)
        if place in self.visited:
            self.links.append(name)
            return False
        self.visited.add(place)
        return True

    def passed_over(self, folder: Path) -> str:
        """" (passed over: 3 files: .txt 3)" of what lies in a folder beside its pictures."""
        found = told_endings(self.others.get(str(folder), Counter()))
        return f" (passed over: {found})" if found else ""

    def tell(self) -> None:
        """Say in one line what was passed over."""
        others = told_endings(sum(self.others.values(), Counter()))
        said = [f"{what} ({len(names)}: {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
                for names, what in ((self.hidden, "what is hidden or a system's own"),
                                    (self.links, "links to folders that are visited anyway")) if names]
        said += [f"what is no picture or in no class folder ({others})"] if others else []
        if said:
            cli.warn(f"passed over below {self.root}: {'; '.join(said)}", kind="note")


def told_endings(counts: Counter[str]) -> str:
    """"5 files: .txt 3, .npy 2"; empty for none."""
    most = ", ".join(f"{name or 'no ending'} {count}" for name, count in counts.most_common(2 * NAMED))
    files = "1 file" if counts.total() == 1 else f"{counts.total()} files"
    return f"{files}: {most}{', …' if len(counts) > 2 * NAMED else ''}" if counts else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or some system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def ending(name: str) -> str:
    """".jpg" of "a.JPG"."""
    return os.path.splitext(name)[1].lower()


def identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    """What tells a real folder from all others, whatever links lead to it."""
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def listed(path: str | Path, root: str | Path, *, reader: PictureReader | None = None) -> ImageFiles:
    """Images named by a JSON list of paths relative to `root`, without classes."""
    root, path = existing_folder(root), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no list of images at {path}: expected a JSON list of paths relative to {root}")
    try:
        names = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path} should be a JSON list of image paths relative to {root}")
    return ImageFiles(PathList.of("", chunks(str(root / name) for name in names)), reader=reader)


class JoinedImages:
    """Several data sets without classes as one, of any kinds."""

    classes: list[str] | None = None

    def __init__(self, parts: list["ImageFiles | Pairs"]) -> None:
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 zeros that take no memory."""
        return np.broadcast_to(np.int64(0), (len(self),))

    def place(self, index: int) -> tuple["ImageFiles | Pairs", int]:
        """The data set that holds image `index`, and its number there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def image(self, index: int) -> Image.Image:
        """The RGB image. Raises UnreadableError."""
        part, number = self.place(index)
        return part.image(number)

    def name(self, index: int) -> str:
        """The name in its data set."""
        part, number = self.place(index)
        return part.name(number)


def chunks(names: Iterable[str], size: int = 4096) -> Iterator[list[str]]:
    """Names, some at a time."""
    names = iter(names)
    while group := list(islice(names, size)):
        yield group


def existing_folder(root: str | Path) -> Path:
    """The path, if it is a readable folder; else FileNotFoundError or ValueError."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--data-path {root} is not a folder")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(f"--data-path {root} cannot be read: check its permissions")
    return root


def above(root: Path) -> str:
    """What comes before a name in the path of a file below `root`."""
    return os.path.join(root, "") if str(root) != "." else ""


def scan(folder: Path) -> list[Path]:
    """Every picture below a folder, sorted."""
    search = Search(folder)
    found = [folder / name for name in search.pictures(folder)]
    search.tell()
    return found
