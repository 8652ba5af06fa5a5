"""Stores of image codes: a packed writer, one reader for the layouts in use, and `verify`.

Packed (ours): `manifest.json`, `labels.npy`, `shard-00000.npy` … of (n, views, L) uint16 (uint32 beyond 65,536 codes).
A shard and then its `.json` note are written whole or not at all, so extraction continues where it was cut.
Also read: LlamaGen's `<name>_codes/{i}.npy` + `<name>_labels/{i}.npy`, and ARPG's and RandAR's `<class int>/<i>.npy`.
"""
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.checkpoint import file_hash, replacing
from utils.cli import REQUIRED, flag
from utils.seeding import hash_choice

SHARD_ROWS = 1024  # images per shard: the unit of resuming
FORMAT = "llamagen-codes-1"
NO_GAPS = "codes and labels are numbered 0 … N-1 without gaps"


@dataclass(kw_only=True)
class StoreFlags:
    """Where the codes are."""

    code_path: str = flag(REQUIRED, "store of codes. Extraction writes <code-path>/<dataset><size>_codes; readers take "
                                    "packed, LlamaGen's and ARPG's, and several (comma-separated) as one if they hold "
                                    "other crops of the same images")


@dataclass
class CodeStore:
    """Codes of N images in V views of L = h*w tokens. `read(rows, views)` gives (B, L) int64."""

    labels: np.ndarray  # (N,) int64
    views: int
    grid: tuple[int, int]
    read: Callable[[np.ndarray, np.ndarray], np.ndarray]
    classes: list[str] | None = None
    vocab_size: int | None = None  # None: the layout does not say
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # where the manifest is

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes named by the manifest, else one more than the largest label."""
        return len(self.classes) if self.classes else int(self.labels.max()) + 1


class CodeBatches(Dataset):
    """Training batches of codes; one of the views is drawn per visit, fixed by (seed, epoch, index)."""

    def __init__(self, store: CodeStore, *, vocab_size: int, seed: int) -> None:
        self.store, self.vocab_size, self.seed = store, vocab_size, seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """{"codes" (B, L) int64, "labels" (B,) int64} for keys (epoch, index); ValueError for a code >= vocab_size."""
        epochs, rows = np.array(keys).T
        views = hash_choice(self.seed, epochs, rows, options=self.store.views)
        codes = self.store.read(rows, views)
        if codes.min() < 0 or codes.max() >= self.vocab_size:
            wrong = min(codes.min(), 0) or codes.max()
            raise ValueError(f"the store holds code {wrong}, but the model's vocabulary is {self.vocab_size}: "
                             "give the tokenizer's size by --vocab-size")
        return {"codes": torch.from_numpy(codes),
                "labels": torch.from_numpy(self.store.labels[rows])}


# ---- writing


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned type that holds every code."""
    return np.dtype(np.uint16 if codebook_size <= 2**16 else np.uint32)


def shard_name(shard: int) -> str:
    """Stem of a shard's files."""
    return f"shard-{shard:05d}"


def begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Claim `folder` for a store made by `recipe`. Raises ValueError if it holds codes of another one."""
    path = folder / "recipe.json"
    made = folder / "manifest.json"
    existing = json.loads((made if made.is_file() else path).read_text()) if made.is_file() or path.is_file() else None
    if existing is not None:
        differs = [key for key, value in recipe.items() if existing.get(key) != value]
        if differs:
            raise ValueError(f"{folder} already holds codes made with another {', '.join(differs)}: give another "
                             "--code-path or remove it")
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(recipe, indent=1))


def is_done(folder: Path, shard: int) -> bool:
    """Whether a shard is whole."""
    return (folder / f"{shard_name(shard)}.json").is_file()


def write_shard(folder: Path, shard: int, codes: np.ndarray, labels: list[int], skipped: list[str]) -> None:
    """Write codes (n, views, L), then the note that makes them count."""
    path = folder / f"{shard_name(shard)}.npy"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, codes)
    note = {"file": path.name, "rows": len(codes), "sha256": file_hash(path), "labels": labels, "skipped": skipped}
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(note))


def finish(folder: Path, shards: int) -> dict[str, Any]:
    """Turn the shards' notes into `labels.npy` and `manifest.json`, which make the store readable → the manifest."""
    notes = [json.loads((folder / f"{shard_name(i)}.json").read_text()) for i in range(shards)]
    labels = np.array([label for note in notes for label in note["labels"]], dtype=np.int64)
    if not len(labels):
        for path in [folder / "recipe.json", *folder.glob("shard-*")]:
            path.unlink()
        folder.rmdir()
        raise ValueError(f"none of the {sum(len(note['skipped']) for note in notes)} images could be read, among them "
                         f"{notes[0]['skipped'][0]}")
    with replacing(folder / "labels.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, labels)
    manifest = {**json.loads((folder / "recipe.json").read_text()), "count": len(labels),
                "labels_sha256": file_hash(folder / "labels.npy"),
                "skipped": [name for note in notes for name in note["skipped"]],
                "shards": [{key: note[key] for key in ("file", "rows", "sha256")} for note in notes]}
    with replacing(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    for i in range(shards):
        (folder / f"{shard_name(i)}.json").unlink()
    (folder / "recipe.json").unlink()
    return manifest


# ---- reading


def open_stores(paths: str, *, subfolder: str | None = None, grid: tuple[int, int] | None = None) -> CodeStore:
    """Open one store, or several (comma-separated: the same images in other crops) as one with all their views.

    `subfolder` is tried below each path (LlamaGen keeps `imagenet256_codes` in the code path). `grid` is needed only
    for foreign stores whose token count is no square.
    """
    stores = [open_store(Path(path), subfolder=subfolder, grid=grid) for path in paths.split(",")]
    first = stores[0]
    for path, store in zip(paths.split(",")[1:], stores[1:], strict=True):
        if not np.array_equal(store.labels, first.labels) or store.grid != first.grid:
            raise ValueError(f"{path} does not hold other views of the images in {paths.split(',')[0]}: "
                             f"{len(store)} images of grid {store.grid} against {len(first)} of {first.grid}")
    if len(stores) == 1:
        return first
    offsets = np.cumsum([0, *(store.views for store in stores)])

    def read(rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), math.prod(first.grid)), dtype=np.int64)
        for store, low, high in zip(stores, offsets[:-1], offsets[1:], strict=True):
            mine = (views >= low) & (views < high)
            if mine.any():
                out[mine] = store.read(rows[mine], views[mine] - low)
        return out

    sizes = [store.vocab_size for store in stores if store.vocab_size is not None]
    return CodeStore(first.labels, int(offsets[-1]), first.grid, read, first.classes, max(sizes, default=None),
                     first.manifest)


def open_store(path: Path, *, subfolder: str | None = None, grid: tuple[int, int] | None = None) -> CodeStore:
    """Open a store of any known layout. Raises FileNotFoundError or ValueError that says what was found instead."""
    if not path.is_dir():
        raise FileNotFoundError(f"--code-path {path} is not a folder")
    below = [path / subfolder] if subfolder and (path / subfolder).is_dir() else sorted(path.glob("*_codes"))
    for folder in [path, *below]:
        if (folder / "recipe.json").is_file() and not (folder / "manifest.json").is_file():
            raise ValueError(f"{folder} is unfinished: run the extraction again to complete it")
    found = [folder for folder in [path, *below] if (folder / "manifest.json").is_file() or labels_of(folder).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{path} holds several stores ({', '.join(folder.name for folder in found)}): choose one by "
                         "--dataset and --image-size, or by its own path")
    if found:
        packed = (found[0] / "manifest.json").is_file()
        return _open_packed(found[0]) if packed else _open_pairs(found[0], labels_of(found[0]), grid)
    classes = sorted(int(entry.name) for entry in os.scandir(path) if entry.is_dir() and entry.name.isdigit())
    if classes:
        return _open_class_folders(path, classes, grid)
    raise ValueError(f"--code-path {path} holds no code store: expected manifest.json, <name>_codes/ with "
                     "<name>_labels/, or folders named by class number")


def labels_of(codes: Path) -> Path:
    """Where LlamaGen keeps the labels of a `<name>_codes` folder."""
    codes = codes.absolute()
    return codes.parent / f"{codes.name.removesuffix('_codes')}_labels"


def _open_packed(folder: Path) -> CodeStore:
    manifest = read_manifest(folder)
    grid = tuple(manifest["grid"])
    shape = (manifest["views"], math.prod(grid))
    shards = [_map_shard(folder / shard["file"], (shard["rows"], *shape)) for shard in manifest["shards"]]
    labels = _load(folder / "labels.npy")
    if len(labels) != manifest["count"] or sum(map(len, shards)) != manifest["count"]:
        raise ValueError(f"{folder} holds {len(labels)} labels and {sum(map(len, shards))} codes, its manifest says "
                         f"{manifest['count']}")
    starts = np.cumsum([0, *map(len, shards)])

    def read(rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), shape[1]), dtype=np.int64)
        homes = np.searchsorted(starts, rows, side="right") - 1
        for home in np.unique(homes):
            mine = homes == home
            out[mine] = shards[home][rows[mine] - starts[home], views[mine]]
        return out

    return CodeStore(labels, shape[0], grid, read, manifest["classes"], manifest["tokenizer"]["codebook_size"],
                     manifest, folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed store. Raises ValueError when it is damaged or of another format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): extract the codes again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of another format, expected {FORMAT!r}")
    return manifest


def _map_shard(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is missing or cut short ({error}): extract it again") from None
    if shard.shape != shape:
        raise ValueError(f"{path} has shape {shard.shape}, its manifest says {shape}")
    return shard


def _open_pairs(codes: Path, labels: Path, grid: tuple[int, int] | None) -> CodeStore:
    names = {entry.name for entry in os.scandir(codes) if entry.name.endswith(".npy")}
    count = len(names)
    gap = next((i for i in range(count) if f"{i}.npy" not in names), None)
    if gap is not None:
        raise FileNotFoundError(f"{codes / str(gap)}.npy is missing: {NO_GAPS}")
    numbers = tqdm(range(count), desc="reading labels", unit="file", mininterval=1.0, disable=count < 10_000)
    return _from_files([codes / f"{i}.npy" for i in range(count)],
                       np.array([int(_load(labels / f"{i}.npy").reshape(-1)[0]) for i in numbers], np.int64), grid)


def _open_class_folders(root: Path, classes: list[int], grid: tuple[int, int] | None) -> CodeStore:
    files = [(file, label) for label in classes
             for file in sorted((root / str(label)).glob("*.npy"), key=lambda file: (len(file.stem), file.stem))]
    return _from_files([file for file, _ in files], np.array([label for _, label in files], np.int64), grid)


def _from_files(files: list[Path], labels: np.ndarray, grid: tuple[int, int] | None) -> CodeStore:
    if not files:
        raise ValueError("the code store holds no .npy files")

    def load(path: Path) -> np.ndarray:
        codes = _load(path)
        return codes.reshape(-1, codes.shape[-1])  # (views, L)

    views, length = load(files[0]).shape
    side = math.isqrt(length)
    if grid is None and side * side != length:
        raise ValueError(f"{files[0]} has {length} tokens, no square: give --image-size and --downsample-size")
    grid = (side, side) if grid is None else grid
    if math.prod(grid) != length:
        raise ValueError(f"{files[0]} has {length} tokens, which a grid of {grid[0]}x{grid[1]} does not hold")

    def read(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        found = [load(files[row]) for row in rows]
        for row, codes in zip(rows, found, strict=True):
            if codes.shape != (views, length):
                raise ValueError(f"{files[row]} holds codes of shape {codes.shape}, the first file ({views}, {length})")
        return np.stack([codes[view] for codes, view in zip(found, chosen, strict=True)]).astype(np.int64)

    return CodeStore(labels, views, grid, read)


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{'' if path.name == 'labels.npy' else f': {NO_GAPS}'}")
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers, or cut short ({error})") from None


# ---- checking


def verify(folder: Path) -> list[str]:
    """What is wrong with a packed store: hashes, shapes, counts, codes outside the codebook. Empty when it is sound."""
    manifest = read_manifest(folder)
    problems = []
    if file_hash(folder / "labels.npy") != manifest["labels_sha256"]:
        problems.append("labels.npy has changed since it was written")
    for shard in tqdm(manifest["shards"], desc="verifying", unit="shard", mininterval=1.0):
        path = folder / shard["file"]
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif file_hash(path) != shard["sha256"]:
            problems.append(f"{path.name} has changed since it was written")
        elif int(np.load(path, mmap_mode="r").max(initial=0)) >= manifest["tokenizer"]["codebook_size"]:
            problems.append(f"{path.name} holds codes beyond the codebook")
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if rows != manifest["count"]:
        problems.append(f"the shards hold {rows} images, the manifest says {manifest['count']}")
    return problems
