"""Image folders as data sets: trees with a folder per class, flat folders, JSON lists of paths."""
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.path_list import PathList

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class ImageFiles:
    """Files with labels. `classes` is None for images without classes (all labels 0)."""

    def __init__(self, files: PathList, labels: np.ndarray | None = None, classes: list[str] | None = None) -> None:
        self.files, self.classes = files, classes
        labels = np.zeros(len(files), np.int64) if labels is None else labels
        self._labels = torch.from_numpy(labels)  # a tensor is shared with loading processes, an array is copied

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self._labels.numpy()

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """The RGB image. Raises OSError, SyntaxError or ValueError (as Pillow does) for a broken file."""
        with Image.open(self.files[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        """The path, for reports."""
        return self.files.name(index)


def class_tree(root: str | Path) -> ImageFiles:
    """root/<class>/…/<image>: labels follow the sorted folder names, as torchvision's ImageFolder numbers them."""
    root = existing_folder(root)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise ValueError(f"{root} has no class folders: expected <data-path>/<class>/<image>"
                         f"{', for images without classes use --dataset coco' if scan(root) else ''}")
    if {name.lower() for name in classes} <= SPLIT_NAMES:
        raise ValueError(f"{root} holds the splits {', '.join(classes)}, not classes: point --data-path at one, "
                         f"such as {root / classes[0]}")
    counts: list[int] = []

    def names() -> Iterator[list[str]]:
        for name in classes:
            found = scan_names(root / name)
            if not found:
                raise ValueError(f"class folder {root / name} holds no images: remove it, or the labels would be off")
            counts.append(len(found))
            yield [os.path.join(name, image) for image in found]

    files = PathList.of(above(root), names())
    return ImageFiles(files, np.repeat(np.arange(len(classes)), counts), classes)


def flat_folder(root: str | Path) -> ImageFiles:
    """All images below a folder, without classes."""
    root = existing_folder(root)
    names = scan_names(root)
    if not names:
        raise ValueError(f"no images below {root}")
    return ImageFiles(PathList.of(above(root), [names]))


def listed(path: str | Path, root: str | Path) -> ImageFiles:
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
    return ImageFiles(PathList.of("", chunks(str(root / name) for name in names)))


def concatenate(parts: list[ImageFiles]) -> ImageFiles:
    """Several unlabelled data sets as one."""
    return ImageFiles(PathList.of("", chunks(part.name(i) for part in parts for i in range(len(part)))))


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
    """Every image below a folder, sorted."""
    return [folder / name for name in scan_names(folder)]


def scan_names(folder: Path) -> list[str]:
    """Every image below a folder by its relative path, sorted as Path objects are."""
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(where, folder)
        images = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
        found += images if below == "." else [os.path.join(below, name) for name in images]
    return sorted(found, key=lambda name: name.split(os.sep))
