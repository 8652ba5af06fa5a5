"""What a store of codes is, and the layouts it is read from.

Packed (ours): `manifest.json`, `labels.npy`, `shard-00000.npy` … of (n, views, L) uint16 (uint32 beyond 65,536 codes),
memory-mapped. Also LlamaGen's `<name>_codes/{i}.npy` + `<name>_labels/{i}.npy`, and ARPG's and RandAR's
`<class int>/<i>.npy`.
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.seeding import hash_choice

FORMAT = "llamagen-codes-1"
NO_GAPS = "codes and labels are numbered 0 … N-1 without gaps"


@dataclass(kw_only=True)
class CodeStore:
    """Codes of images in V views of L = h*w tokens; an epoch visits each row once, in one of its views."""

    labels: np.ndarray  # (N,) int64, of the rows
    views: int
    grid: tuple[int, int]
    classes: list[str] | None = None
    vocab_size: int | None = None  # None: the layout does not say
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # where it lies on this machine
    packed: bool = False  # memory-mapped: no process is worth it to read a batch; files have hashes
    damaged: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # rows that cannot be read
    kept: np.ndarray | None = None  # rows of the files that are left when some are left out

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes named by the manifest, else one more than the largest label."""
        return len(self.classes) if self.classes else int(self.labels.max()) + 1

    def fingerprint(self) -> str:
        """A hash of what it holds: of its manifest where it has one, its labels, views and grid."""
        described = json.dumps([self.manifest, self.views, self.grid, len(self)], sort_keys=True)
        return hashlib.sha256(described.encode() + np.ascontiguousarray(self.labels).tobytes()).hexdigest()

    def read(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Rows (B,) in the views (B,) → codes (B, L) int64."""
        return self.read_files(rows if self.kept is None else self.kept[rows], views)

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """`read` before any row was left out."""
        raise NotImplementedError

    def leave_out(self, rows: np.ndarray) -> None:
        """Go on without some rows; the others close ranks."""
        if len(rows):
            self.kept = np.delete(np.arange(len(self.labels)), rows)
            self.labels = self.labels[self.kept]

    def draw(self, epochs: np.ndarray, indices: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `indices` (B,) of `epochs` (B,) → codes (B, L), labels (B,), each fixed by (seed, epoch, index)."""
        return self.read(indices, hash_choice(seed, epochs, indices, options=self.views)), self.labels[indices]


class PackedStore(CodeStore):
    """Ours. Shards in `skipped` are not opened: their rows are `damaged`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], skipped: set[str]) -> None:
        shape = (manifest["views"], math.prod(manifest["grid"]))
        counts = [shard["rows"] for shard in manifest["shards"]]
        labels = load_array(folder / "labels.npy")
        if not len(labels) == sum(counts) == manifest["count"]:
            raise ValueError(f"{folder} holds {len(labels)} labels and {sum(counts)} codes, its manifest says "
                             f"{manifest['count']}")
        bad = [shard["file"] in skipped for shard in manifest["shards"]]
        super().__init__(labels=labels, views=shape[0], grid=tuple(manifest["grid"]), classes=manifest["classes"],
                         vocab_size=manifest["tokenizer"]["codebook_size"], manifest=manifest, folder=folder,
                         packed=True, damaged=np.flatnonzero(np.repeat(bad, counts)))
        self.starts = np.cumsum([0, *counts])
        self.shards = [None if shard["file"] in skipped else
                       map_shard(folder / shard["file"], (shard["rows"], *shape)).reshape(-1, shape[1])  # (n*V, L)
                       for shard in manifest["shards"]]

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """One copy per row: with as many shards as rows in a batch, faster than a gather per shard."""
        homes = np.searchsorted(self.starts, rows, side="right") - 1
        places = (rows - self.starts[homes]) * self.views + views
        out = np.empty((len(rows), math.prod(self.grid)), dtype=self.manifest["dtype"])
        for i, (home, place) in enumerate(zip(homes.tolist(), places.tolist(), strict=True)):
            out[i] = self.shards[home][place]
        return out.astype(np.int64)


class FileStore(CodeStore):
    """One file of (views, L) codes per image, (1, views, L) as well."""

    def __init__(self, folder: Path, files: list[Path], labels: np.ndarray, grid: tuple[int, int] | None) -> None:
        if not files:
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

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """One file per row. Raises ValueError for one of another shape."""
        found = [self.load(self.files[row]) for row in rows]
        shape = (self.views, math.prod(self.grid))
        for row, codes in zip(rows, found, strict=True):
            if codes.shape != shape:
                raise ValueError(f"{self.files[row]} holds codes of shape {codes.shape}, the first file {shape}")
        return np.stack([codes[view] for codes, view in zip(found, views, strict=True)]).astype(np.int64)


def find_store(root: Path, *, subfolder: str | None) -> Path | None:
    """The packed store or LlamaGen's `<name>_codes` that `root` is or holds: `subfolder`, else the only one.

    None if there is none. Raises ValueError if there are several, or one is unfinished.
    """
    below = [root / subfolder] if subfolder and (root / subfolder).is_dir() else sorted(root.glob("*_codes"))
    for folder in [root, *below]:
        if (folder / "recipe.json").is_file() and not is_packed(folder):
            raise ValueError(f"{folder} is unfinished: run the extraction again to complete it")
    found = [folder for folder in [root, *below] if is_packed(folder) or labels_of(folder).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{root} holds several stores ({', '.join(folder.name for folder in found)}): give "
                         "the path of one")
    return found[0] if found else None


def is_packed(folder: Path) -> bool:
    """Whether a packed store is there, and finished."""
    return (folder / "manifest.json").is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed store. Raises ValueError when it is damaged or of another format."""
    return parse_manifest((folder / "manifest.json").read_text(), folder / "manifest.json")


def parse_manifest(text: str, source: str | Path) -> dict[str, Any]:
    """A manifest's content. Raises ValueError when it is damaged or of another format."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is damaged ({error}): extract the codes again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{source} is of another format, expected {FORMAT!r}")
    outside = [shard["file"] for shard in manifest["shards"] if Path(shard["file"]).name != shard["file"]]
    if outside:  # it may come from a stranger's server
        raise ValueError(f"{source} names the shard {outside[0]}, expected a file beside it")
    return manifest


def map_shard(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A shard (rows, views, L), memory-mapped. Raises ValueError for a file that is not that."""
    try:
        shard = np.asarray(np.load(path, mmap_mode="r"))  # a plain array: np.memmap is slow to index
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is missing or cut short ({error})") from None
    if shard.shape != shape:
        raise ValueError(f"{path} has shape {shard.shape}, its manifest says {shape}")
    return shard


def labels_of(codes: Path) -> Path:
    """Where LlamaGen keeps the labels of a `<name>_codes` folder."""
    codes = codes.absolute()
    return codes.parent / f"{codes.name.removesuffix('_codes')}_labels"


def open_pairs(codes: Path, grid: tuple[int, int] | None) -> FileStore:
    """LlamaGen's layout. Raises FileNotFoundError for a gap in the numbers."""
    names = {entry.name for entry in os.scandir(codes) if entry.name.endswith(".npy")}
    count = len(names)
    gap = next((i for i in range(count) if f"{i}.npy" not in names), None)
    if gap is not None:
        raise FileNotFoundError(f"{codes / str(gap)}.npy is missing: {NO_GAPS}")
    labels = labels_of(codes)
    codes = codes.absolute()
    numbers = tqdm(range(count), desc="reading labels", unit="file", mininterval=1.0, disable=count < 10_000)
    return FileStore(codes.parent, [codes / f"{i}.npy" for i in range(count)],
                     np.array([int(load_array(labels / f"{i}.npy").reshape(-1)[0]) for i in numbers], np.int64), grid)


def class_folders(root: Path) -> list[int]:
    """The classes of ARPG's layout: folders named by a number."""
    return sorted(int(entry.name) for entry in os.scandir(root) if entry.is_dir() and entry.name.isdigit())


def open_class_folders(root: Path, grid: tuple[int, int] | None) -> FileStore:
    """ARPG's and RandAR's layout; 10.npy comes after 9.npy."""
    files = [(file, label) for label in class_folders(root)
             for file in sorted((root / str(label)).glob("*.npy"), key=lambda file: (len(file.stem), file.stem))]
    return FileStore(root, [file for file, _ in files], np.array([label for _, label in files], np.int64), grid)


def load_array(path: Path) -> np.ndarray:
    """The array in a .npy file. Raises FileNotFoundError or ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{'' if path.name == 'labels.npy' else f': {NO_GAPS}'}")
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers, or cut short ({error})") from None
