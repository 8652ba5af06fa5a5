"""Writing a packed store of codes: shards, labels, manifest.

A shard and then its `.json` note are written whole or not at all, so extraction continues where it was cut. `finish`
turns the notes into the manifest, which makes the store readable.
"""
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import file_hash, replacing

SHARD_ROWS = 1024  # images per shard: the unit of resuming


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned type that holds every code."""
    return np.dtype(np.uint16 if codebook_size <= 2**16 else np.uint32)


def shard_name(shard: int) -> str:
    """Stem of a shard's files."""
    return f"shard-{shard:05d}"


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of names and their order."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Claim `folder` for a store made by `recipe`. Raises ValueError if it holds codes of another one.

    What an older recipe does not say is taken to be as it is now.
    """
    path = folder / "recipe.json"
    made = folder / "manifest.json"
    existing = json.loads((made if made.is_file() else path).read_text()) if made.is_file() or path.is_file() else None
    if existing is not None:
        differs = [key for key, value in recipe.items() if existing.get(key, value) != value]
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
