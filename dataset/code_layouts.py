"""What a store of codes is; the packed one; which layout a folder has.

The packed format is described in `code_manifest.py`; the layouts of one file per image are in `code_files.py`.
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataset.code_manifest import Column, Manifest, columns_of, files_of_some
from dataset.mapped import MappedFiles, map_array
from utils.seeding import hash_choice

INT64 = np.dtype(np.int64)
MOST_CLASSES = 2**24  # a table of more would not fit into memory: such labels are damage


class Attached(Protocol):
    """A column that lies elsewhere."""

    identity: str  # tells its contents from others

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Its arrays (n_i, *shape) for rows (B,) of the store's files."""


@dataclass(kw_only=True)
class CodeStore:
    """Codes of images in V views of L = h*w tokens; an epoch visits each row once, in one of its views."""

    labels: np.ndarray  # (N,) int64, of the rows
    views: int
    grid: tuple[int, int]
    classes: list[str] | None = None
    vocab_size: int | None = None  # None: the layout does not say
    manifest: Manifest = field(default_factory=dict)
    folder: Path | None = None  # where it lies on this machine
    packed: bool = False  # memory-mapped: no process is worth it to read a batch; files have hashes
    columns: dict[str, Column] = field(default_factory=dict)  # what rows have beside codes and label
    damaged: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # rows that cannot be read
    kept: np.ndarray | None = None  # rows of the files that are left when some are left out
    attached: dict[str, "Attached"] = field(default_factory=dict)  # columns that lie elsewhere
    may_lose: bool = False  # rows may turn out unreadable only when they are read; their codes are then -1

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes named by the manifest, else one more than the largest label."""
        return len(self.classes) if self.classes else int(self.labels.max()) + 1

    def fingerprint(self) -> str:
        """A hash of what it holds, by its labels and `contents`."""
        elsewhere = [{name: column.identity for name, column in self.attached.items()}] if self.attached else []
        described = json.dumps([self.contents(), self.views, self.grid, len(self), *elsewhere], sort_keys=True)
        return hashlib.sha256(described.encode() + np.ascontiguousarray(self.labels).tobytes()).hexdigest()

    def contents(self) -> Any:
        """What tells its codes from others, JSON-ready: the manifest, which has the hashes of the files."""
        return self.manifest

    def read(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Rows (B,) in the views (B,) → codes (B, L) int64."""
        return self.read_files(rows if self.kept is None else self.kept[rows], views)

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """`read` before any row was left out."""
        raise NotImplementedError

    def where(self, row: int, view: int) -> Path:
        """The file that holds a row in a view."""
        return self.file_of(row if self.kept is None else int(self.kept[row]), view)

    def file_of(self, row: int, view: int) -> Path:
        """`where` before any row was left out."""
        raise NotImplementedError

    def column(self, name: str, rows: np.ndarray) -> list[str] | list[np.ndarray]:
        """A column at the rows (B,): strings, or arrays (n_i, *shape). Raises ValueError if there is none of the name.
        """
        rows = rows if self.kept is None else self.kept[rows]
        if name in self.attached:
            return self.attached[name].read(rows)
        if name not in self.columns:
            there = ", ".join(self.columns) or "none at all"
            raise ValueError(f"the store has no column {name!r}: there is {there}")
        return self.column_files(name, rows)

    def column_files(self, name: str, rows: np.ndarray) -> list[str] | list[np.ndarray]:
        """`column` before any row was left out."""
        raise NotImplementedError

    def column_in_view(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """What the views (B,) of rows (B,) have in a column of kind "views" → (B, *shape): it belongs to the codes that
        `read` gives."""
        return self.column_view_files(name, rows if self.kept is None else self.kept[rows], views)

    def column_view_files(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """`column_in_view` before any row was left out."""
        raise NotImplementedError

    def leave_out(self, rows: np.ndarray) -> None:
        """Go on without some rows; those that follow move up."""
        if len(rows):
            self.kept = np.delete(np.arange(len(self.labels)), rows)
            self.labels = self.labels[self.kept]

    def choose(self, epochs: np.ndarray, indices: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `indices` (B,) of `epochs` (B,) → rows (B,), views (B,), each fixed by (seed, epoch, index)."""
        return indices, hash_choice(seed, epochs, indices, options=self.views)


class PackedStore(CodeStore):
    """Ours. Files in `skipped` are not opened: their rows are `damaged`."""

    def __init__(self, folder: Path, manifest: Manifest, skipped: set[str]) -> None:
        labels = map_array(folder / "labels.npy", (manifest["count"],), INT64)
        classes = manifest["classes"]
        check_labels(labels, folder / "labels.npy", classes=len(classes) if classes else None)
        bad = [np.arange(*rows.indices(len(labels))) for rows, file in files_of_some(manifest)
               if file["file"] in skipped]
        super().__init__(labels=labels, views=manifest["views"], grid=tuple(manifest["grid"]), classes=classes,
                         vocab_size=manifest["tokenizer"]["codebook_size"], manifest=manifest, folder=folder,
                         packed=True, columns=columns_of(manifest),
                         **({"damaged": np.unique(np.concatenate(bad))} if bad else {}))
        self.shards = code_shards(folder, manifest)
        self.column_values = {column["name"]: ColumnValues(folder, column, len(labels))
                              for column in manifest.get("columns", [])}

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """One copy per row: with as many shards as rows in a batch, faster than a gather per shard."""
        homes = self.shards.home(rows)
        out = np.empty((len(rows), math.prod(self.grid)), dtype=self.shards.dtype)
        places = (rows - self.shards.starts[homes]).tolist()
        for i, (home, place, view) in enumerate(zip(homes.tolist(), places, views.tolist(), strict=True)):
            out[i] = self.shards[home][place, view]
        return out.astype(np.int64)

    def file_of(self, row: int, view: int) -> Path:
        """The shard."""
        return self.shards.paths[int(self.shards.home(np.array(row)))]

    def column_files(self, name: str, rows: np.ndarray) -> list[str] | list[np.ndarray]:
        """Copies."""
        return self.column_values[name].read(rows)

    def column_view_files(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Copies."""
        values = self.column_values[name]
        firsts, ends = values.offsets[rows], values.offsets[rows + 1]
        wrong = np.flatnonzero(ends - firsts != self.views)
        if len(wrong):
            raise ValueError(f"{self.folder}: image {rows[wrong[0]]} has {(ends - firsts)[wrong[0]]} pictures in "
                             f"column {name}, but {self.views} views: extract the codes again")
        return values.read_places(rows, firsts + views)


class ColumnValues:
    """A column of a packed store."""

    def __init__(self, folder: Path, column: dict[str, Any], count: int) -> None:
        self.kind = column["kind"]
        self.offsets = map_array(folder / column["offsets"]["file"], (count + 1,), INT64)
        self.first_rows = np.cumsum([0, *(file["rows"] for file in column["files"])])
        self.values = MappedFiles([folder / file["file"] for file in column["files"]], self.offsets[self.first_rows],
                                  tuple(column["shape"]), np.dtype(column["dtype"]))

    def read(self, rows: np.ndarray) -> list[str] | list[np.ndarray]:
        """The strings, or arrays (n_i, *shape), of rows (B,)."""
        homes = np.searchsorted(self.first_rows, rows, side="right") - 1
        bases = self.values.starts[homes]
        starts, ends = (self.offsets[rows] - bases).tolist(), (self.offsets[rows + 1] - bases).tolist()
        found = [np.array(self.values[home][start:end])
                 for home, start, end in zip(homes.tolist(), starts, ends, strict=True)]
        return [value.tobytes().decode() for value in found] if self.kind == "text" else found

    def read_places(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The single values at `places` (B,), which belong to rows (B,) → (B, *shape)."""
        homes = np.searchsorted(self.first_rows, rows, side="right") - 1
        within = (places - self.values.starts[homes]).tolist()
        return np.stack([self.values[home][place] for home, place in zip(homes.tolist(), within, strict=True)])


def check_labels(labels: np.ndarray, path: Path, *, classes: int | None = None) -> None:
    """Raise ValueError for a whole number that is no label; `classes`: how many the store names."""
    wrong = next((end for end in (int(labels.min()), int(labels.max()))
                  if not 0 <= end < (classes or MOST_CLASSES)), None)
    if wrong is not None:
        named = f": the manifest names {classes} classes" if classes else ""
        raise ValueError(f"{path} holds label {wrong}, expected 0 to {(classes or MOST_CLASSES) - 1}{named}")


def code_shards(folder: Path, manifest: Manifest) -> MappedFiles:
    """The codes of a packed store, (N, views, L)."""
    rows = [shard["rows"] for shard in manifest["shards"]]
    return MappedFiles([folder / shard["file"] for shard in manifest["shards"]], np.cumsum([0, *rows]),
                       (manifest["views"], math.prod(manifest["grid"])), np.dtype(manifest["dtype"]))


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


def labels_of(codes: Path) -> Path:
    """Where LlamaGen keeps the labels of a `<name>_codes` folder."""
    codes = codes.absolute()
    return codes.parent / f"{codes.name.removesuffix('_codes')}_labels"


def class_folders(root: Path) -> list[str]:
    """The class folders of ARPG's layout, named by a number, in numerical order."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name.isdecimal()]
    return sorted(names, key=lambda name: (int(name), name))
