"""Is a packed store sound? Sizes and shapes at every opening; hashes and ranges once, before training.

The contents are read at about 1 GB/s a core (SHA-256; ImageNet at 256 pixels in ten views is 6.6 GB), shared out over
the processes of a machine, and a store found sound is remembered in the user's cache until a file of it changes.
"""
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.code_layouts import INT64
from dataset.code_manifest import Manifest, file_hashes, read_manifest
from dataset.mapped import map_array
from utils import dist
from utils.files import cache_folder, file_hash, replacing

REMEMBERED_FROM = 2**28  # bytes: less is read in no time, and leaves nothing in the cache


def verify(folder: Path) -> list[str]:
    """What is wrong with a packed store, by its files' hashes, shapes and ranges. Empty when it is sound."""
    return list(find_damage(folder, read_manifest(folder), contents=True, remembered=False).values())


def find_damage(folder: Path, manifest: Manifest, *, contents: bool, remembered: bool = True) -> dict[str, str]:
    """{file: what is wrong with it}. Without `contents` only sizes and shapes are looked at.

    With `contents` all processes call this together, share the work and get the same; `remembered`: what was found
    sound once is not read again.
    """
    expected = expected_arrays(folder, manifest)
    if not contents:
        return problems(folder, expected, contents=False)
    stamp = stamp_of(folder, manifest) if remembered else None
    sound = all(dist.gather_lists([stamp is not None and stamp.is_file()]))
    rank, workers = local_place()
    found = problems(folder, dict(list(expected.items())[rank::workers]), contents=not sound)
    found = dict(sorted(pair for part in dist.gather_lists([found]) for pair in part.items()))
    if stamp is not None and not found:
        remember_sound(stamp)
    return found


@dataclass(frozen=True)
class Expected:
    """What a file should hold."""

    sha256: str
    shape: tuple[int | None, ...]  # None: a length that cannot be told
    dtype: np.dtype
    below: int | None = None  # codes: the size of the codebook
    rising: bool = False  # offsets


def expected_arrays(folder: Path, manifest: Manifest) -> dict[str, Expected]:
    """What each file should hold, the shards first."""
    count, found = manifest["count"], {}
    if "shards" in manifest:
        shape, size = (manifest["views"], math.prod(manifest["grid"])), manifest["tokenizer"]["codebook_size"]
        found = {shard["file"]: Expected(shard["sha256"], (shard["rows"], *shape), np.dtype(manifest["dtype"]),
                                         below=size) for shard in manifest["shards"]}
        found["labels.npy"] = Expected(manifest["labels_sha256"], (count,), INT64)
    for column in manifest.get("columns", []):
        name = column["offsets"]["file"]
        found[name] = Expected(column["offsets"]["sha256"], (count + 1,), INT64, rising=True)
        rows = np.cumsum([0, *(file["rows"] for file in column["files"])])
        try:
            lengths = np.diff(map_array(folder / name, (count + 1,), INT64)[rows]).tolist()
        except ValueError:  # which will be told
            lengths = [None] * len(column["files"])
        for file, length in zip(column["files"], lengths, strict=True):
            found[file["file"]] = Expected(file["sha256"], (length, *column["shape"]), np.dtype(column["dtype"]))
    return found


def problems(folder: Path, expected: dict[str, Expected], *, contents: bool) -> dict[str, str]:
    """{file: what is wrong with it} of some files."""
    bar = tqdm(expected, desc="checking codes", unit="file", mininterval=1.0, delay=1.0, disable=dist.env_rank() > 0)
    found = {name: problem(folder / name, expected[name], contents=contents) for name in bar}
    return {name: said for name, said in found.items() if said is not None}


def problem(path: Path, expected: Expected, *, contents: bool) -> str | None:
    """What is wrong with one file, None if nothing."""
    try:
        array = map_array(path, expected.shape, expected.dtype)
    except ValueError as error:
        return str(error)
    if contents and file_hash(path) != expected.sha256:
        return f"{path} has changed since it was written"
    if contents and expected.below is not None and int(array.max(initial=0)) >= expected.below:
        return f"{path} holds codes beyond the codebook"
    if contents and expected.rising and (array[0] or (np.diff(array) < 0).any()):
        return f"{path} holds offsets that do not rise from 0"
    return None


def local_place() -> tuple[int, int]:
    """(this process's number, processes) on this machine, as torchrun says: each machine may have disks of its own."""
    if dist.world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def codes_cache() -> Path:
    """Where fetched stores and notes on sound ones are kept."""
    return cache_folder() / "codes"


def stamp_of(folder: Path, manifest: Manifest) -> Path | None:
    """The note that says that the store, as it lies there now, is sound; None for one too small to be noted."""
    states = {}
    for name in ["manifest.json", *file_hashes(manifest)]:
        found = (folder / name).stat() if (folder / name).is_file() else None
        states[name] = found and (found.st_size, found.st_mtime_ns)
    if sum(state[0] for state in states.values() if state) < REMEMBERED_FROM:
        return None
    key = f"{folder.resolve()} {file_hash(folder / 'manifest.json')} {states}"
    return codes_cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.sound"


def remember_sound(stamp: Path) -> None:
    """Leave the note; that it cannot be written is no reason to stop."""
    try:
        with replacing(stamp):
            pass
    except OSError:
        return
