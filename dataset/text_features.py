"""Features of captions, stored apart from the codes, and attached to them.

A store of features is written by `language/extract_t5_feature.py` as code_writer.py writes codes, but has columns
alone: `features`, an array (n_i, dim) for each caption, never padded, float32 or, as numpy has no bfloat16, the bits of
bfloat16 as uint16; and `name`, the captions' names. The manifest also has `text_encoder` (which encoder made them) and
`captions` {source, key, rows}: `rows` is a hash of the names and their order, so that features meet the codes of the
same captions row by row; others are looked up by name.

LlamaGen's features, <folder>/<stem of the .jsonl>/<line>.npy, (1, n, dim) or (n, dim), are attached in the same way.
"""
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.code_check import find_damage
from dataset.code_layouts import CodeStore, ColumnValues
from dataset.code_manifest import FEATURES, Column, read_manifest
from dataset.pairs import Pairs
from dataset.remote import fetch_store, is_url
from utils import cli
from utils.files import few

CHUNK = 2**16  # names that are looked up at a time
BROKEN_SHOWN = 20  # damaged files that a process names
NUMBERED = re.compile(r"(?P<stem>.+)\.jsonl:(?P<line>\d+)")  # names of pairs of .jsonl files


@dataclass(frozen=True)
class FeatureFacts:
    """What attached features are: their width, and what made them, None where that is not known."""

    dim: int
    encoder: dict[str, Any] | None


class StoredFeatures:
    """The column of a store of features. places (N,) int64: where the features of each row are, -1: nowhere; None: row
    i's are at i."""

    def __init__(self, folder: Path, manifest: dict[str, Any], places: np.ndarray | None) -> None:
        column = next(column for column in manifest["columns"] if column["name"] == "features")
        self.values, self.places = ColumnValues(folder, column, manifest["count"]), places
        self.identity = json.dumps([column["offsets"]["sha256"], [file["sha256"] for file in column["files"]]])
        self.facts = FeatureFacts(column["shape"][0], manifest["text_encoder"])
        self.column = Column("features", "ragged", column["dtype"], tuple(column["shape"]))

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """See `Attached`; (0, dim) where there are none."""
        if self.places is None:
            return self.values.read(rows)
        places = self.places[rows]
        there = iter(self.values.read(places[places >= 0]))
        none = np.empty((0, *self.column.shape), self.column.dtype)
        return [next(there) if place >= 0 else none for place in places.tolist()]


class NumberedFeatures:
    """LlamaGen's files. A damaged one is told once when it is read, and counts as missing."""

    def __init__(self, folder: Path, store: CodeStore) -> None:
        self.folder, self.broken = folder, set()
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
        found = next((one for below in folders for path in itertools.islice(sorted(below.glob("*.npy")), BROKEN_SHOWN)
                      if (one := load_features(path)) is not None), None)
        if found is None:
            raise FileNotFoundError(f"{folder} holds no features: expected manifest.json, as language/"
                                    "extract_t5_feature.py writes it, or <stem of the .jsonl>/<line>.npy, each (1, n, "
                                    "dim)")
        self.column = Column("features", "ragged", "float32", found.shape[1:])
        self.facts = FeatureFacts(found.shape[1], None)
        self.identity = str(folder.resolve())
        there = {below.name: {path.name for path in os.scandir(below)} for below in folders}
        self.files: list[str | None] = []  # of each row, below the folder
        for names in chunks_of_names(store):
            for found in map(NUMBERED.fullmatch, names):
                stem, file = (Path(found["stem"]).name, f"{found['line']}.npy") if found else ("", "")
                self.files.append(f"{stem}/{file}" if file in there.get(stem, ()) else None)
        self.places = np.array([-1 if file is None else place for place, file in enumerate(self.files)])

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """See `Attached`; (0, dim) where there are none."""
        return [self.features_of(self.files[row]) for row in rows.tolist()]

    def features_of(self, file: str | None) -> np.ndarray:
        """The features in a file, (n, dim) float32."""
        found = None if file is None else load_features(self.folder / file)
        if found is not None and found.shape[1:] == self.column.shape:
            return found
        if file is not None and file not in self.broken:
            self.broken.add(file)
            if len(self.broken) <= BROKEN_SHOWN:
                cli.warn(f"{self.folder / file} holds no features (1, n, {self.column.shape[0]}), or is damaged: its "
                         "caption is passed over", every_rank=True)
        return np.empty((0, *self.column.shape), np.float32)


def load_features(path: Path) -> np.ndarray | None:
    """The features in a file of LlamaGen's, (n, dim) float32; None if there are none that can be used."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    found = found[0] if found.ndim == 3 and len(found) == 1 else found
    fits = found.ndim == 2 and found.size and found.dtype.kind == "f" and np.isfinite(found).all()
    return found.astype(np.float32) if fits else None


def attach_features(store: CodeStore, path: str, *, column: str) -> None:
    """Give a store the column "features" or "short_features" from the folder or URL `path`.

    Rows without features are counted and told; without long ones they are left out. All processes call this together.
    Raises FileNotFoundError or ValueError for what holds no features, or none of these captions.
    """
    if "name" not in store.columns:
        raise ValueError(f"{store.folder} has no names of captions, so that {path} cannot be attached: extract it with "
                         "autoregressive/train/extract_codes_t2i.py")
    found = open_features(path, store)
    lost = np.flatnonzero(found.places < 0) if found.places is not None else np.empty(0, np.int64)
    if len(lost) == len(store.labels):
        raise ValueError(f"{path} has features of none of the {len(lost)} captions of {store.folder or 'the data'}, "
                         f"such as {store.column('name', np.zeros(1, np.int64))[0]}: they are of other captions")
    if len(lost):
        named = few(store.column("name", lost[:3]))
        what = "are left out" if column == "features" else "have long captions only"
        cli.warn(f"{path} lacks features of {len(lost)} of {len(store.labels)} captions, such as {named}: these {what}")
    store.attached[column], store.columns[column] = found, replace(found.column, name=column)
    check_same_encoder(store)
    if column == "features":
        store.damaged = np.union1d(store.damaged, lost)


def open_features(path: str, store: CodeStore) -> StoredFeatures | NumberedFeatures:
    """The features at `path`, with the places of those of the store's captions."""
    damage: dict[str, str] = {}
    if is_url(path):
        folder, damage = fetch_store(path, kind=FEATURES)
    elif not (folder := Path(path)).is_dir():
        raise FileNotFoundError(f"{path} is not a folder of features: language/extract_t5_feature.py makes them")
    elif (folder / "recipe.json").is_file() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{path} is unfinished: run language/extract_t5_feature.py again to complete it")
    if not (folder / "manifest.json").is_file():
        return NumberedFeatures(folder, store)
    manifest = read_manifest(folder, kind=FEATURES)
    damage = {**find_damage(folder, manifest, contents=False), **damage}  # terabytes: their hashes are not checked
    if damage:
        raise ValueError(f"{path} is damaged: {few(list(damage.values()), between='; ')}: extract the features again")
    same = store.kept is None and manifest["captions"].get("rows") == rows_hash(store)
    if same and manifest["captions"].get("contents") != captions_hash(store):
        cli.warn(f"{path} has features of other captions than {store.folder} has now under the same names: make them "
                 "anew, to another --t5-path")
    names = next(column for column in manifest["columns"] if column["name"] == "name")
    places = None if same else find_names(store, ColumnValues(folder, names, manifest["count"]), manifest["count"])
    return StoredFeatures(folder, manifest, places)


class PairNames:
    """Captioned pictures as `open_features` sees a store: their names alone."""

    kept, manifest = None, {}

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.labels = pairs, pairs.labels

    def column_files(self, name: str, rows: np.ndarray) -> list[str]:
        """The names."""
        return [self.pairs.name(row) for row in rows.tolist()]


def lacks_features(path: str, pairs: Pairs) -> np.ndarray:
    """Which of the pairs have no features at `path`, (N,) bool."""
    places = open_features(path, PairNames(pairs)).places
    return np.zeros(len(pairs), bool) if places is None else places < 0


def rows_hash(store: CodeStore) -> str | None:
    """A hash of the names of a packed store's rows and their order, from its manifest; None of another store."""
    names = next((column for column in store.manifest.get("columns", []) if column["name"] == "name"), None)
    if names is None:
        return None
    contents = [store.manifest["count"], names["offsets"]["sha256"], [file["sha256"] for file in names["files"]]]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def captions_hash(store: CodeStore) -> str | None:
    """A hash of the captions of a packed store, from its manifest; None of another store."""
    columns = [[column["name"], column["offsets"]["sha256"], [file["sha256"] for file in column["files"]]]
               for column in store.manifest.get("columns", []) if column["name"] in ("caption", "short_caption")]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest() if columns else None


def find_names(store: CodeStore, names: ColumnValues, count: int) -> np.ndarray:
    """Where the names of a store's rows are among `count` others, (N,) int64; -1: nowhere."""
    hashes = np.concatenate([hashes_of(names.read(rows)) for rows in row_chunks(count)])
    order = np.argsort(hashes, kind="stable")
    ordered, found = hashes[order], []
    for mine in chunks_of_names(store):
        at = np.searchsorted(ordered, hashes_of(mine)).clip(max=count - 1)
        theirs = names.read(order[at])
        found.append(np.where([a == b for a, b in zip(mine, theirs, strict=True)], order[at], -1))
    return np.concatenate(found)


def hashes_of(names: list[str]) -> np.ndarray:
    """A number for each name, the same in this process only, (n,) int64."""
    return np.fromiter(map(hash, names), np.int64, len(names))


def row_chunks(count: int) -> Iterator[np.ndarray]:
    """0 … count - 1, some at a time."""
    return (np.arange(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))


def chunks_of_names(store: CodeStore) -> Iterator[list[str]]:
    """The names of all rows of a store's files, some at a time."""
    return (store.column_files("name", rows) for rows in row_chunks(len(store.labels)))


def check_same_encoder(store: CodeStore) -> None:
    """Raise ValueError if long and short captions have features of different encoders."""
    known = {column: found.facts for column, found in store.attached.items()}
    dims = {facts.dim for facts in known.values()}
    encoders = [{**facts.encoder, "name": None} for facts in known.values() if facts.encoder is not None]
    if len(dims) > 1 or any(encoder != encoders[0] for encoder in encoders):
        said = " and ".join(f"{column} of {(facts.encoder or {}).get('name', 'an unknown encoder')}, {facts.dim} wide"
                            for column, facts in known.items())
        raise ValueError(f"the captions have features of different encoders: {said}; make both with one")


def feature_facts(store: CodeStore) -> FeatureFacts:
    """What the features of a store are."""
    stores = getattr(store, "stores", [store])
    known = [one.attached["features"].facts for one in stores if "features" in one.attached]
    if any(facts != known[0] for facts in known):
        raise ValueError("the stores have features of different encoders: "
                         + few([str((facts.encoder or {}).get("name")) for facts in known]))
    return known[0] if known else FeatureFacts(store.columns["features"].shape[0], None)


def read_features(store: CodeStore, column: str, rows: np.ndarray) -> list[Tensor]:
    """Features (n_i, dim) of rows (B,), bfloat16 or float32; (0, dim) where there are none."""
    return [torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) if value.dtype == np.uint16
            else torch.from_numpy(value) for value in store.column(column, rows)]


def as_stored(features: Tensor) -> np.ndarray:
    """Features (n, dim), bfloat16 or float32, as their column holds them."""
    features = features.cpu()
    return features.view(torch.int16).numpy().view(np.uint16) if features.dtype == torch.bfloat16 else features.numpy()
