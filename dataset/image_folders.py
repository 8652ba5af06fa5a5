"""Image folders as data sets: trees with a folder per class, flat folders, JSON lists of paths."""
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class ImageFiles:
    """Files with labels. `classes` is None for images without classes (all labels 0)."""

    def __init__(self, files: list[Path], labels: list[int] | None = None, classes: list[str] | None = None) -> None:
        self.files, self.classes = files, classes
        self.labels = np.asarray(labels if labels is not None else np.zeros(len(files)), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """The RGB image. Raises OSError, SyntaxError or ValueError (as Pillow does) for a broken file."""
        with Image.open(self.files[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        """The path, for reports."""
        return str(self.files[index])


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
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = scan(root / name)
        if not found:
            raise ValueError(f"class folder {root / name} holds no images: remove it, or the labels would be off")
        files += found
        labels += [label] * len(found)
    return ImageFiles(files, labels, classes)


def flat_folder(root: str | Path) -> ImageFiles:
    """All images below a folder, without classes."""
    files = scan(existing_folder(root))
    if not files:
        raise ValueError(f"no images below {root}")
    return ImageFiles(files)


def listed(path: str | Path, root: str | Path) -> ImageFiles:
    """Images named by a JSON list of paths relative to `root`, without classes."""
    root, path = existing_folder(root), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no JSON list of image paths at {path}")
    try:
        names = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} should be a JSON list of relative image paths")
    return ImageFiles([root / name for name in names])


def concatenate(parts: list[ImageFiles]) -> ImageFiles:
    """Several unlabelled data sets as one."""
    return ImageFiles([file for part in parts for file in part.files])


def existing_folder(root: str | Path) -> Path:
    """The path, if it is a readable folder; else FileNotFoundError or ValueError."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--data-path {root} is not a folder")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(f"--data-path {root} cannot be read: check its permissions")
    return root


def scan(folder: Path) -> list[Path]:
    """Every image below a folder, sorted."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder, followlinks=True) for name in names
                  if os.path.splitext(name)[1].lower() in EXTENSIONS)
