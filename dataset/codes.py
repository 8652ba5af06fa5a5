"""Stores of image codes for training: opened from folders and URLs, checked, joined or mixed, drawn from in batches.

    stores = open_stores("/data/codes_110,s3://bucket/codes_105")                # other crops of the same images
    stores = open_stores("/data/imagenet,/data/mine", weights=(1.0, 20.0))       # other images
"""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import remote
from dataset.code_check import find_damage
from dataset.code_files import open_class_folders, open_numbered
from dataset.code_joins import Mixture, OtherViews
from dataset.code_layouts import CodeStore, PackedStore, class_folders, find_store, is_packed
from dataset.code_manifest import files_of_some, read_manifest
from dataset.control import check_column, unpacked
from utils import cli, dist
from utils.cli import REQUIRED, flag
from utils.files import few
from utils.seeding import derive_seed, hash_choice

CONDITION_DROPOUT = 0x434F4E44  # sets these draws apart from others of the same (seed, epoch, index)
ORDERS = 0x4F524445
CorruptShards = Literal["refuse", "skip"]


def store_weights(text: str) -> tuple[float, ...]:
    """Parse "1,0.5"."""
    weights = tuple(float(word) for word in text.split(","))
    if not all(0 < weight <= 1e6 for weight in weights):
        raise ValueError("expected numbers above 0, a million at most, with commas between, such as 1,0.5")
    return weights


@dataclass(kw_only=True)
class CodePathFlags:
    """Folder of codes."""

    shapes_run: ClassVar[bool] = False
    code_path: str = flag(REQUIRED, "store of codes. Extraction writes <code-path>/<dataset><size>_codes; readers take "
                                    "packed, LlamaGen's and ARPG's, packed ones also from a URL (s3://…), and several "
                                    "(comma-separated): other crops of the same images, or see --store-weights")


@dataclass(kw_only=True)
class StoreFlags(CodePathFlags):
    """Which codes are read."""

    shapes_run: ClassVar[bool] = False
    store_weights: tuple[float, ...] | None = flag(
        None, "the stores of --code-path are different images, mixed: how often each image of each store comes per "
              "epoch, such as 1,0.5", parse=store_weights)
    corrupt_shards: CorruptShards = flag("refuse", "packed stores are checked against their hashes before training: "
                                                   "stop at a damaged shard, or leave its images out",
                                         choices=("refuse", "skip"))


class CodeBatches(Dataset):
    """Training batches of codes and of some `columns`; what is drawn is fixed by (seed, epoch, index)."""

    def __init__(self, store: CodeStore, *, vocab_size: int, seed: int, condition_dropout: float = 0.0,
                 columns: tuple[str, ...] = (), any_order: bool = False, control: str | None = None) -> None:
        """`condition_dropout`: share of the samples whose condition is left out, for classifier-free guidance;
        `any_order`: codes come in a random order, another one for each sample and visit; `control`: kind of the control
        pictures that come with the codes, of the same views."""
        if control is not None:
            check_column(store.columns, control, store.manifest.get("image_size"), str(store.folder))
        self.any_order, self.control = any_order, control
        self.store, self.vocab_size, self.seed, self.columns = store, vocab_size, seed, columns
        self.condition_dropout = condition_dropout

    def __getitems__(self, keys: np.ndarray) -> dict[str, Any]:
        """{"codes" (B, L) int64, "labels" (B,) int64, "dropped" (B,) bool, and of each column a list (B)}; in any order
        also "orders" (B, L) int64, the cells that the codes are of; with control pictures "control" (B, C, H, W) uint8;
        of a store that may lose rows "valid" (B,) bool, false for those that could not be read.

        Keys (B, 2) are an epoch and an index each. Raises ValueError for a code >= vocab_size.
        """
        epochs, indices = np.asarray(keys).T
        rows, views = self.store.choose(epochs, indices, seed=self.seed)
        codes, labels, more = self.store.read(rows, views), self.store.labels[rows], {}
        if self.store.may_lose:
            read = codes[:, 0] >= 0
            codes[~read], more["valid"] = 0, torch.from_numpy(read)
        if codes.min() < 0 or codes.max() >= self.vocab_size:
            place = int(((codes < 0) | (codes >= self.vocab_size)).any(1).argmax())
            wrong = min(codes[place].min(), 0) or codes[place].max()
            raise ValueError(f"{self.store.where(int(rows[place]), int(views[place]))} holds code {wrong}, but the "
                             f"model's vocabulary is {self.vocab_size}: give the tokenizer's size by --vocab-size")
        chance = hash_choice(derive_seed(self.seed, CONDITION_DROPOUT), epochs, indices, options=2**24) / 2**24
        if self.any_order:
            cells = random_orders(self.seed, epochs, indices, length=codes.shape[1])
            codes, more["orders"] = np.take_along_axis(codes, cells, 1), torch.from_numpy(cells)
        beside = self.beside(rows, views, epochs, indices)
        if "valid" in beside and "valid" in more:
            beside["valid"] &= more["valid"]
        return {"codes": torch.from_numpy(codes), "labels": torch.from_numpy(labels),
                "dropped": torch.from_numpy(chance < self.condition_dropout), **more, **beside}

    def beside(self, rows: np.ndarray, views: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> dict[str, Any]:
        """What comes with the codes of rows (B,) in the views (B,), drawn for epochs and indices (B,)."""
        control = {} if self.control is None else {"control": control_pictures(self.store, self.control, rows, views)}
        return control | {name: self.store.column(name, rows) for name in self.columns}


def control_pictures(store: CodeStore, kind: str, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
    """The control pictures of rows (B,) in the views (B,) → (B, C, H, W) uint8."""
    return unpacked(store.column_in_view(kind, rows, views), kind, store.manifest["image_size"][1])


def random_orders(seed: int, epochs: np.ndarray, indices: np.ndarray, *, length: int) -> np.ndarray:
    """For each (epoch, index) (B,) a uniformly random permutation of 0 … length - 1, (B, length), fixed by (seed,
    epoch, index)."""
    stream = derive_seed(seed, ORDERS)
    samples = hash_choice(stream, epochs, indices, options=2**63)
    draws = hash_choice(stream, samples[:, None], np.arange(length)[None], options=2**63)  # (B, length)
    return np.argsort(draws, axis=1)


def open_stores(paths: str, *, subfolder: str | None = None, grid: tuple[int, int] | None = None,
                weights: tuple[float, ...] | None = None, corrupt: CorruptShards | None = None,
                remembered: bool = True) -> CodeStore:
    """Open the stores of --code-path, one or several (comma-separated), as one.

    `subfolder` is tried below each path (LlamaGen keeps `imagenet256_codes` in the code path). `grid` is needed only
    for foreign stores whose token count is no square. `weights`, one per store: they are different images, mixed; else
    other crops of the same images. `corrupt`: check the contents of packed stores too, and what to do about damage;
    `remembered`: not those that were found sound once. With `corrupt` or URLs all processes call this together.
    """
    names = paths.split(",")
    stores = [open_store(name, subfolder=subfolder, grid=grid, corrupt=corrupt, remembered=remembered)
              for name in names]
    if weights is not None:
        return Mixture(names, stores, weights)
    for name, sibling in other_crops(names, subfolder):
        cli.warn(f"{sibling} lies beside {name}: LlamaGen draws from both, here only what is named is read; "
                 f"--code-path {paths},{sibling} takes both", kind="note")
    if len(stores) > 1:
        return OtherViews(names, stores)
    stores[0].leave_out(stores[0].damaged)
    return stores[0]


def other_crops(names: list[str], subfolder: str | None) -> list[tuple[str, Path]]:
    """(path, sibling) of those in a folder …ten_crop beside which …ten_crop_105 has as much and is not named too."""
    given = {Path(name).absolute() for name in names if not remote.is_url(name)}
    found = []
    for name in names:
        place = os.path.join("" if remote.is_url(name) else Path(name).absolute(), "")
        sibling = Path(place.replace("ten_crop/", "ten_crop_105/"))  # as LlamaGen looks for it
        wanted = sibling / subfolder if subfolder and (Path(name) / subfolder).is_dir() else sibling
        if sibling != Path(place) and sibling not in given and wanted.is_dir():
            found.append((name, sibling))
    return found


def open_store(path: str | Path, *, subfolder: str | None = None, grid: tuple[int, int] | None = None,
               corrupt: CorruptShards | None = None, remembered: bool = True) -> CodeStore:
    """Open a store of any known layout. Raises FileNotFoundError or ValueError that says what was found instead.

    Damaged rows are still counted: `leave_out(damaged)` drops them.
    """
    name = str(path)
    if remote.is_url(name):
        folder, damage = remote.fetch_store(name, subfolder=subfolder)
        return open_packed(name, folder, damage, corrupt=corrupt, remembered=remembered)
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"--code-path {root} is not a folder")
    folder = find_store(root, subfolder=subfolder)
    if folder is not None and is_packed(folder):
        return open_packed(name, folder, {}, corrupt=corrupt, remembered=remembered)
    if folder is not None:
        return open_numbered(folder, grid)
    if class_folders(root):
        return open_class_folders(root, grid)
    raise ValueError(f"--code-path {root} holds no code store: expected manifest.json, <name>_codes/ with "
                     "<name>_labels/, or folders named by class number")


def open_packed(path: str, folder: Path, damage: dict[str, str], *, corrupt: CorruptShards | None,
                remembered: bool) -> PackedStore:
    """Open the packed store in `folder`, of which `damage` {file: what is wrong} is known, as `corrupt` says."""
    manifest = read_manifest(folder)
    if damage:
        remedy = f"upload {path} again"
    else:
        remedy = f"remove {folder}, a copy" if remote.is_url(path) else "extract the codes again"
    damage = {**find_damage(folder, manifest, contents=corrupt is not None, remembered=remembered), **damage}
    if damage:
        named = f"{path} is damaged: {few(list(damage.values()), between='; ')}"
        partial = {file["file"]: rows for rows, file in files_of_some(manifest)}
        left = np.ones(manifest["count"], dtype=bool)
        for name in damage.keys() & partial.keys():
            left[partial[name]] = False
        spared = damage.keys() <= partial.keys() and left.any()  # what all rows need is sound, and some rows
        if corrupt != "skip" or not spared:
            raise ValueError(f"{named}: {remedy}{', or go on without by --corrupt-shards skip' if spared else ''}")
        if dist.env_rank() == 0:
            cli.warn(f"{named}: {(~left).sum()} of {len(left)} images are left out")
    return PackedStore(folder, manifest, set(damage))
