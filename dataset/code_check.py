"""Is a packed store sound? Sizes and shapes at every opening; hashes and ranges once, before training.

The contents are read at about 1 GB/s a core (SHA-256; ImageNet at 256 pixels in ten views is 6.6 GB), shared out over
the processes of a machine, and a store found sound is remembered in the user's cache until a file of it changes.
"""
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.code_layouts import map_shard, read_manifest
from utils import dist
from utils.files import cache_folder, file_hash, replacing

REMEMBERED_FROM = 2**28  # bytes: less is read in no time, and leaves nothing in the cache


def verify(folder: Path) -> list[str]:
    """What is wrong with a packed store, by its files' hashes, shapes and ranges. Empty when it is sound."""
    return list(find_damage(folder, read_manifest(folder), contents=True, remembered=False).values())


def find_damage(folder: Path, manifest: dict[str, Any], *, contents: bool, remembered: bool = True) -> dict[str, str]:
    """{file: what is wrong with it}. Without `contents` only sizes and shapes are looked at.

    With `contents` all processes call this together, share the work and get the same; `remembered`: what was found
    sound once is not read again.
    """
    if not contents:
        return shard_problems(folder, manifest, manifest["shards"], contents=False)
    stamp = stamp_of(folder, manifest) if remembered else None
    sound = all(dist.gather_lists([stamp is not None and stamp.is_file()]))
    rank, workers = local_place()
    found = shard_problems(folder, manifest, manifest["shards"][rank::workers], contents=not sound)
    labels = folder / "labels.npy"
    if labels.is_file() and file_hash(labels) != manifest["labels_sha256"]:
        found[labels.name] = f"{labels} has changed since it was written"
    found = dict(sorted(pair for part in dist.gather_lists([found]) for pair in part.items()))
    if stamp is not None and not found:
        remember_sound(stamp)
    return found


def shard_problems(folder: Path, manifest: dict[str, Any], shards: list[dict[str, Any]], *,
                   contents: bool) -> dict[str, str]:
    """{file: what is wrong with it} of some shards."""
    bar = tqdm(shards, desc="checking codes", unit="shard", mininterval=1.0, delay=1.0, disable=dist.env_rank() > 0)
    found = {shard["file"]: shard_problem(folder / shard["file"], shard, manifest, contents=contents) for shard in bar}
    return {name: problem for name, problem in found.items() if problem is not None}


def shard_problem(path: Path, shard: dict[str, Any], manifest: dict[str, Any], *, contents: bool) -> str | None:
    """What is wrong with one shard, None if nothing."""
    try:
        codes = map_shard(path, (shard["rows"], manifest["views"], int(np.prod(manifest["grid"]))))
    except ValueError as error:
        return str(error)
    if contents and file_hash(path) != shard["sha256"]:
        return f"{path} has changed since it was written"
    if contents and int(codes.max(initial=0)) >= manifest["tokenizer"]["codebook_size"]:
        return f"{path} holds codes beyond the codebook"
    return None


def local_place() -> tuple[int, int]:
    """(this process's number, processes) on this machine, as torchrun says: each machine may have disks of its own."""
    if dist.world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def codes_cache() -> Path:
    """Where fetched stores and notes on sound ones are kept."""
    return cache_folder() / "codes"


def stamp_of(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """The note that says that the store, as it lies there now, is sound; None for one too small to be noted."""
    states = {}
    for name in ["manifest.json", "labels.npy", *(shard["file"] for shard in manifest["shards"])]:
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
