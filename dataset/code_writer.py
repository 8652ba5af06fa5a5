"""Writing a packed store of codes (`code_manifest.py` says what it is): parts, joined to files of some size.

    begin(folder, recipe)                        # claims the folder
    write_part(folder, i, codes, labels, …)      # in any order, by any number of processes
    finish(folder, parts)                        # joins the parts; the manifest makes the store readable

A part, PART_ROWS images, is what a kill or a full disk may cost: it is written whole or not at all, its note last,
below `parts/`. `join` puts parts behind one another in files of up to SHARD_BYTES and SHARD_ROWS and removes them, so
that little more disk is needed than for the codes. Larger files are fewer to list, copy and open (ImageNet in ten
views: 25, 50 million images in one: 96); but one that is damaged must be fetched again or left out as a whole, and
processes share the work of fetching and checking file by file. What is written does not depend on who wrote it, nor on
kills.
"""
import hashlib
import io
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.code_manifest import FORMAT, Column, Manifest, columns_of, read_manifest
from utils.files import file_hash, replacing, sweep

PART_ROWS = 2**10  # images
SHARD_BYTES = 2**28
SHARD_ROWS = 2**20  # images: a bound for narrow columns
MOST_NAMED = 1000  # images left out that a manifest names where it counts them by kind
NOT_COMPARED = ("columns", "image_times")  # columns are compared apart; copying images gives their files other times

Values = Sequence[str] | Sequence[np.ndarray]


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned type that holds every code."""
    return np.dtype(np.uint16 if codebook_size <= 2**16 else np.uint32)


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of names and their order."""
    digest = hashlib.sha256()
    for i, name in enumerate(names):
        digest.update(("\n" * (i > 0) + name).encode(errors="surrogateescape"))
    return digest.hexdigest()


def begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Claim `folder` for a store made by `recipe`. Raises ValueError if it holds codes of another one.

    The recipe is what the manifest says before the codes are known; "columns" [{name, kind, dtype, shape}] if there are
    any. What an older recipe does not say is taken to be as it is now, and NOT_COMPARED may change.
    """
    made = (folder / "manifest.json").is_file()
    if not made and not (folder / "recipe.json").is_file():
        with replacing(folder / "recipe.json") as temporary:
            temporary.write_text(json.dumps({**recipe, "layout": layout({})}, indent=1))
        return
    existing = read_manifest(folder, kind=recipe["format"]) if made else extraction_recipe(folder)
    differs = [key for key, value in recipe.items() if key not in NOT_COMPARED and existing.get(key, value) != value]
    declared, columns = (columns_of(content) for content in (existing, recipe))
    kind, flag = ("codes", "--code-path") if has_codes(recipe) else ("features", "--t5-path")
    if differs == ["image_sizes"]:
        raise ValueError(f"{folder} already holds codes of these images, but some files have been replaced since (they "
                         "have other sizes): give another --code-path")
    if differs or declared != columns:
        raise ValueError(f"{folder} already holds {kind} made with another {', '.join(differs or ['columns'])}: give "
                         f"another {flag}")
    if made:
        remove_parts(folder)
    else:
        adopt_shards(folder)


def extraction_recipe(folder: Path) -> dict[str, Any]:
    """What `begin` wrote. Raises ValueError when it is damaged."""
    try:
        return dict(json.loads((folder / "recipe.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'recipe.json'} is damaged ({error}): remove {folder}, extract again") from None


def layout(recipe: dict[str, Any]) -> dict[str, int]:
    """How the store is cut: part_rows, shard_bytes, shard_rows. As it was when the recipe was written."""
    return recipe.get("layout", {"part_rows": PART_ROWS, "shard_bytes": SHARD_BYTES, "shard_rows": SHARD_ROWS})


def adopt_shards(folder: Path) -> None:
    """Take the shards of 1,024 images that an earlier version left in an unfinished store for parts."""
    for old in folder.glob("shard-?????.json"):
        content, codes = json.loads(old.read_text()), old.with_suffix(".npy")
        path = part_path(folder, int(old.stem.removeprefix("shard-")))
        if codes.is_file():
            path.parent.mkdir(exist_ok=True)
            codes.rename(path)
            write_note(path, {**content, "sha256": {path.name: content["sha256"]}, "lengths": {}})
        old.unlink()


def part_path(folder: Path, part: int, column: str = "") -> Path:
    """The file of a part's codes, or of its values of a column."""
    return folder / "parts" / f"{part:06d}{column and '-' + column}.npy"


def write_note(path: Path, content: dict[str, Any]) -> None:
    """Say that a file is whole, by another beside it."""
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content))


def is_done(folder: Path, part: int) -> bool:
    """Whether a part is whole."""
    return part_path(folder, part).with_suffix(".json").is_file()


def write_part(folder: Path, part: int, codes: np.ndarray | None, labels: Sequence[int],
               skipped: Sequence[str] = (), *, columns: dict[str, Values] | None = None,
               left_out: dict[str, int] | None = None) -> None:
    """Write a part: codes (n, views, L), labels (n), names of images that could not be read, columns of n each. A store
    of columns alone has neither codes (None) nor labels.

    A column has n strings, or n arrays (n_i, *shape) of its dtype. `left_out`: how many images were left out for which
    reason; then the manifest has the sum as "left_out", and in "skipped" only the first MOST_NAMED names.
    """
    values = columns or {}
    declared = columns_of(extraction_recipe(folder))
    assert declared.keys() == values.keys(), (list(declared), list(values))
    rows = len(next(iter(values.values()))) if codes is None else len(codes)
    given = [*values.values(), *([] if codes is None else [labels])]
    assert all(len(one) == rows for one in given), "as many labels and values as codes"
    arrays = {**({} if codes is None else {"": (np.ascontiguousarray(codes), [])}),
              **{name: joined_values(declared[name], values[name]) for name in values}}
    hashes = {part_path(folder, part, name).name: save_array(part_path(folder, part, name), array)
              for name, (array, _) in arrays.items()}
    write_note(part_path(folder, part), {
        "rows": rows, "labels": [int(label) for label in labels], "skipped": list(skipped), "sha256": hashes,
        "lengths": {name: lengths for name, (_, lengths) in arrays.items() if name},
        **({} if left_out is None else {"left_out": left_out})})


def joined_values(column: Column, values: Values) -> tuple[np.ndarray, list[int]]:
    """(the values of some images behind one another, how many each has)."""
    arrays = [np.frombuffer(value.encode(), np.uint8) if column.kind == "text" else value for value in values]
    for array in arrays:
        assert array.dtype == column.dtype and array.shape[1:] == column.shape, (column, array.dtype, array.shape)
    empty = np.empty((0, *column.shape), column.dtype)
    return np.concatenate([empty, *arrays]), [len(array) for array in arrays]


@dataclass(frozen=True)
class Piece:
    """A file of the finished store, and the parts that it is made of."""

    path: Path
    column: str  # "": codes
    parts: range
    rows: int
    dtype: np.dtype
    shape: tuple[int, ...]  # of the array in it


def plan(folder: Path, parts: int) -> list[Piece]:
    """Which parts become which files, as the parts' notes and the recipe say."""
    recipe = extraction_recipe(folder)
    columns = columns_of(recipe)
    codes = {"": (np.dtype(recipe["dtype"]), (recipe["views"], math.prod(recipe["grid"])))} if has_codes(recipe) else {}
    kinds = {**codes,
             **{name: (np.dtype(column.dtype), column.shape) for name, column in columns.items()}}
    rows: list[int] = []
    lengths: dict[str, list[int]] = {name: [] for name in kinds}
    for note in notes(folder, parts):
        rows.append(note["rows"])
        for name, found in lengths.items():
            found.append(sum(note["lengths"][name]) if name else note["rows"])
    pieces = []
    for name, (dtype, shape) in kinds.items():
        sizes = [length * dtype.itemsize * math.prod(shape) for length in lengths[name]]
        for i, mine in enumerate(groups(rows, sizes, layout(recipe))):
            pieces.append(Piece(folder / f"{name or 'shard'}-{i:05d}.npy", name, mine, sum(rows[part] for part in mine),
                                dtype, (sum(lengths[name][part] for part in mine), *shape)))
    return pieces


def has_codes(recipe: dict[str, Any]) -> bool:
    """Whether the store is one of codes, not of columns alone."""
    return recipe["format"] == FORMAT


def notes(folder: Path, parts: int) -> Iterator[dict[str, Any]]:
    """The notes of the parts."""
    return (json.loads(part_path(folder, part).with_suffix(".json").read_text()) for part in range(parts))


def groups(rows: list[int], sizes: list[int], limits: dict[str, int]) -> Iterator[range]:
    """Neighbouring parts that together keep within the limits, at least one with images."""
    first = total = size = 0
    for part in range(len(rows)):
        if total and (total + rows[part] > limits["shard_rows"] or size + sizes[part] > limits["shard_bytes"]):
            yield range(first, part)
            first, total, size = part, 0, 0
        total, size = total + rows[part], size + sizes[part]
    yield range(first, len(rows))


def join(folder: Path, parts: int, *, rank: int = 0, workers: int = 1) -> None:
    """Join parts, which are all done, to the files of the store; this process's share of them.

    Raises ValueError for a part that was damaged after it was written; the extraction then makes it anew.
    """
    pieces = plan(folder, parts)[rank::workers]
    for piece in tqdm(pieces, desc="joining", unit="file", mininterval=1.0, delay=1.0, disable=rank > 0):
        if not piece_note(piece).is_file():
            write_note(piece_note(piece), {"file": piece.path.name, "rows": piece.rows, "sha256": join_piece(piece)})
        for part in piece.parts:
            part_path(folder, part, piece.column).unlink(missing_ok=True)


def piece_note(piece: Piece) -> Path:
    """What says that a joined file is whole."""
    return piece.path.parent / "parts" / f"{piece.path.stem}.json"


def join_piece(piece: Piece) -> str:
    """Write one file of the store → its SHA-256."""
    digest = hashlib.sha256()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.lib.format.dtype_to_descr(piece.dtype),
                                                  "fortran_order": False, "shape": piece.shape})
    with replacing(piece.path) as temporary, open(temporary, "wb") as target:
        for block in itertools.chain([header.getvalue()], (part_bytes(piece, part) for part in piece.parts)):
            digest.update(block)
            target.write(block)
    return digest.hexdigest()


def part_bytes(piece: Piece, part: int) -> bytes:
    """The numbers of one part. Raises ValueError, and has the part made anew, if its hash is not what its note says."""
    path = part_path(piece.path.parent, part, piece.column)
    note = part_path(piece.path.parent, part).with_suffix(".json")
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != json.loads(note.read_text())["sha256"][path.name]:
        note.unlink()
        raise ValueError(f"{path} was damaged after it was written: run the extraction again, which makes it anew")
    return np.load(io.BytesIO(content)).tobytes()


def finish(folder: Path, parts: int) -> Manifest:
    """Join what is not joined yet, then write labels, offsets and the manifest, which make the store readable."""
    join(folder, parts)
    recipe = {key: value for key, value in extraction_recipe(folder).items() if key != "layout"}
    columns = recipe.pop("columns", [])
    labels: list[np.ndarray] = []
    lengths: dict[str, list[np.ndarray]] = {column["name"]: [np.zeros(1, np.int64)] for column in columns}
    skipped: list[str] = []
    count = 0
    left_out: Counter[str] | None = None
    for note in notes(folder, parts):
        count += note["rows"]
        labels.append(np.array(note["labels"], np.int64))
        skipped += note["skipped"]
        if "left_out" in note:
            left_out = Counter(note["left_out"]) + (left_out or Counter())
            skipped = skipped[:MOST_NAMED]
        for name, found in lengths.items():
            found.append(np.array(note["lengths"][name], np.int64))
    if not count:
        for piece in plan(folder, parts):
            piece.path.unlink()
        remove_parts(folder)
        folder.rmdir()
        total = len(skipped) if left_out is None else left_out.total()
        raise ValueError(f"none of the {total} images could be read, among them {skipped[0]}")
    files: dict[str, list[dict[str, Any]]] = {}
    for piece in plan(folder, parts):
        files.setdefault(piece.column, []).append(json.loads(piece_note(piece).read_text()))
    manifest = {**recipe, "count": count}
    if has_codes(recipe):
        manifest |= {"labels_sha256": save_array(folder / "labels.npy", np.concatenate(labels)), "skipped": skipped,
                     "shards": files[""]}
    if left_out is not None:
        manifest["left_out"] = dict(sorted(left_out.items()))
    for column in columns:
        path = folder / f"{column['name']}-offsets.npy"
        sha256 = save_array(path, np.cumsum(np.concatenate(lengths[column["name"]])))
        entry = {**column, "offsets": {"file": path.name, "sha256": sha256}, "files": files[column["name"]]}
        manifest.setdefault("columns", []).append(entry)
    with replacing(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    remove_parts(folder)
    return manifest


def save_array(path: Path, array: np.ndarray) -> str:
    """Write an array → the file's SHA-256."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    return file_hash(path)


def remove_parts(folder: Path) -> None:
    """Remove what a finished store does not need."""
    shutil.rmtree(folder / "parts", ignore_errors=True)
    (folder / "recipe.json").unlink(missing_ok=True)
    sweep(folder)
