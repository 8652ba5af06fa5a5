"""What tests of code stores share: stores of random codes in every layout, a look at all that a store holds."""
from pathlib import Path

import numpy as np
import pytest

from dataset import code_writer
from dataset.code_layouts import CodeStore
from dataset.code_manifest import FORMAT, Column

STORE = "imagenet16_codes"


def content(folder: Path) -> dict[str, bytes]:
    """Name → bytes of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def every_code(store: CodeStore) -> np.ndarray:
    """All codes, (N, V, L)."""
    rows = np.arange(len(store.labels))
    return np.stack([store.read(rows, np.full(len(rows), view)) for view in range(store.views)], axis=1)


def draw(store: CodeStore, epochs: np.ndarray, indices: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples → codes (B, L), labels (B,)."""
    rows, views = store.choose(epochs, indices, seed=seed)
    return store.read(rows, views), store.labels[rows]


def fake_codes(count: int = 14, views: int = 10, tokens: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, views, tokens))


def write_llamagen(root: Path, codes: np.ndarray, labels, *, name: str = "imagenet16") -> Path:
    """<root>/<name>_codes/{i}.npy (1, V, L) int64 and <name>_labels/{i}.npy (1,)."""
    for i, (code, label) in enumerate(zip(codes, labels, strict=True)):
        for kind, value in (("codes", code[None].astype(np.int64)), ("labels", np.array([label]))):
            (root / f"{name}_{kind}").mkdir(parents=True, exist_ok=True)
            np.save(root / f"{name}_{kind}" / f"{i}.npy", value)
    return root


def write_packed(folder: Path, codes: np.ndarray, labels, *, rows: int = 4, classes: list[str] | None = None,
                 tokenizer: str = "0" * 64, columns: dict[Column, list] | None = None) -> Path:
    """A packed store of codes (N, V, h*h) in shards of `rows` images, and of columns {declaration: values}."""
    side = round(codes.shape[-1] ** 0.5)
    columns = columns or {}
    recipe = {
        "format": FORMAT, "images": len(codes), "image_size": [4 * side] * 2, "grid": [side, side],
        "views": codes.shape[1], "dtype": "uint16", "classes": classes,
        "tokenizer": {"name": "VQ-4-S", "downsample": 4, "codebook_size": 256, "weights_sha256": tokenizer}}
    if columns:
        recipe["columns"] = [{**vars(column), "shape": list(column.shape)} for column in columns]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_writer, "SHARD_ROWS", rows)
        code_writer.begin(folder, recipe)
    starts = range(0, len(codes), rows if rows % 2 else rows // 2)
    for part, start in enumerate(starts):
        mine = slice(start, start + starts.step)
        code_writer.write_part(folder, part, codes[mine].astype(np.uint16), labels[mine],
                               columns={column.name: values[mine] for column, values in columns.items()})
    code_writer.finish(folder, len(starts))
    return folder


def flip_byte(path: Path) -> None:
    """Spoil a file without changing its size."""
    spoilt = bytearray(path.read_bytes())
    spoilt[-3] ^= 1
    path.write_bytes(spoilt)
