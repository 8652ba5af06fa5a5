"""What a packed store of codes consists of, and its manifest: read, checked, asked for its files.

    manifest.json                all that follows, written last
    labels.npy                   (N,) int64
    shard-00000.npy …            codes of consecutive images, (rows, views, L), uint16 (uint32 beyond 65,536 codes)
    caption-offsets.npy          column "caption": image i has values[offsets[i]:offsets[i + 1]], offsets (N + 1,) int64
    caption-00000.npy …          its values for consecutive images, (values of them, …)

The manifest has `format`, `count` (N), `views`, `grid` [h, w], `image_size` [height, width], `dtype` of the codes,
`classes` (names in label order, or null), `tokenizer` {name, downsample, codebook_size, weights_sha256}
(of a copy in fewer bits also rounded_from, the hash of the original), `labels_sha256` and `shards` [{file, rows,
sha256}]. Where it is known: `dataset`, `images` (N and those left out),
`image_names` (hash of the names), `crop`, `skipped` (names of unreadable images) and `columns`; of captioned pictures
`unusable` and `left_out`, {reason: how many} of what was no pair and of pictures that could not be used (`skipped` has
the first names).

A column is {name, kind, dtype, shape, offsets {file, sha256}, files [{file, rows, sha256}]}. Of kind "text" each image
has a string (UTF-8, dtype uint8, shape []), of kind "ragged" an array (n_i, *shape) of the dtype, such as the features
of its caption, of kind "views" an array (views, *shape), such as the edges of each crop (`control.py`). How a column is
cut into files has nothing to do with the shards. Readers that know no columns need not.
"""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import LOOKED_AT, kind_of

FORMAT = "llamagen-codes-1"
FEATURES = "llamagen-features-1"  # a store of columns alone: see text_features.py
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """What images have beside codes and label."""

    name: str
    kind: str  # "text": a string; "ragged": an array (n_i, *shape); "views": an array (*shape) for each view
    dtype: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not is_column(vars(self) | {"shape": list(self.shape)}):
            raise ValueError(f"{self} is no column: expected a name of small letters, digits and _, kind text (uint8, "
                             "no shape), ragged or views, and a numpy dtype of numbers")


def whole(least: int) -> Callable[[Any], bool]:
    """A whole number, at least."""
    return lambda value: type(value) is int and least <= value < 2**48


def list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list of what `fits`."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def record(**fields: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A dictionary with such fields and perhaps others."""
    return lambda value: isinstance(value, dict) and all(name in value and fits(value[name])
                                                         for name, fits in fields.items())


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_pair(value: Any) -> bool:
    """Two numbers above 0."""
    return list_of(whole(1))(value) and len(value) == 2


def is_number_type(value: Any) -> bool:
    """The name of a numpy dtype of numbers."""
    return is_text(value) and re.fullmatch(r"(u?int|float)(8|16|32|64)", value) is not None and value != "float8"


def is_column(value: Any) -> bool:
    """The declaration of a column."""
    if not record(name=is_text, kind=is_text, dtype=is_number_type, shape=list_of(whole(1)))(value):
        return False
    text = value["kind"] == "text" and value["dtype"] == "uint8" and not value["shape"]
    named = re.fullmatch("[a-z][a-z0-9_]{0,63}", value["name"]) is not None and value["name"] != "shard"
    return named and (text or value["kind"] in ("ragged", "views"))


is_file = record(file=is_text, sha256=is_text)
are_files = list_of(record(file=is_text, rows=whole(0), sha256=is_text))

FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (whole(1), "a whole number above 0"),
    "views": (whole(1), "a whole number above 0"),
    "grid": (is_pair, "two whole numbers above 0"),
    "image_size": (is_pair, "two whole numbers above 0"),
    "dtype": (lambda value: value in ("uint16", "uint32"), "uint16 or uint32"),
    "classes": (lambda value: value is None or list_of(is_text)(value), "a list of names or null"),
    "tokenizer": (record(codebook_size=whole(1), downsample=whole(1), weights_sha256=is_text),
                  "codebook_size, downsample and weights_sha256"),
    "labels_sha256": (is_text, "a text"),
    "shards": (are_files, "a list of {file, rows, sha256}"),
}
FEATURE_FIELDS = {"count": FIELDS["count"], "text_encoder": (record(name=is_text), "a name and more"),
                  "captions": (record(source=is_text), "what the rows belong to")}
FORMATS = {FORMAT: (FIELDS, "extract the codes again"), FEATURES: (FEATURE_FIELDS, "extract the features again")}
OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_names": (is_text, "a text"),
    "skipped": (list_of(is_text), "a list of names"),
    "columns": (list_of(lambda value: is_column(value) and record(offsets=is_file, files=are_files)(value)),
                "a list of {name, kind, dtype, shape, offsets, files}"),
}


def read_manifest(folder: Path, *, kind: str = FORMAT) -> Manifest:
    """The manifest of a packed store, of format `kind`. Raises ValueError when it is damaged or of another format."""
    path = folder / "manifest.json"
    return parse_manifest(path.read_text(errors="replace"), path, kind=kind)


def parse_manifest(text: str, source: str | Path, *, kind: str = FORMAT) -> Manifest:
    """A manifest's content. Raises ValueError, one line that names it, when it is damaged or of another format."""
    fields, remedy = FORMATS[kind]
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = None if text.lstrip().startswith("{") else kind_of(text.encode(errors="replace")[:LOOKED_AT])
        if found is not None:
            raise ValueError(f"{source} is {found}") from None
        raise ValueError(f"{source} is damaged ({error}): {remedy}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise ValueError(f"{source} is of another format, expected {kind!r}")
    for name, (fits, expected) in (fields | OPTIONAL).items():
        if name in fields and name not in manifest:
            raise ValueError(f"{source} is damaged: {name} is missing, expected {expected}; {remedy}")
        if name in manifest and not fits(manifest[name]):
            raise ValueError(f"{source} is damaged: {name} should be {expected}; {remedy}")
    check_named_files(manifest, source, remedy)
    return manifest


def check_named_files(manifest: Manifest, source: str | Path, remedy: str) -> None:
    """Raise ValueError for files outside the folder, named twice, or with another number of rows in all."""
    names = ["labels.npy", *(file["file"] for file in files_of_all(manifest)),
             *(file["file"] for _, file in files_of_some(manifest))]
    outside = [name for name in names if Path(name).name != name or name in ("", "..") or "\0" in name]
    if outside:  # it may come from a stranger's server
        raise ValueError(f"{source} names the file {outside[0]!r}, expected one beside it")
    columns = [column["name"] for column in manifest.get("columns", [])]
    if len(set(names)) < len(names) or len(set(columns)) < len(columns):
        raise ValueError(f"{source} is damaged: it names a file or a column twice; {remedy}")
    for title, files in row_files(manifest).items():
        rows = sum(file["rows"] for file in files)
        if rows != manifest["count"]:
            raise ValueError(f"{source} is damaged: {title} have {rows} rows, count is {manifest['count']}; "
                             f"{remedy}")


def row_files(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """{what it is: files} of all that is cut by rows: the shards, and each column."""
    return {**({"shards": manifest["shards"]} if "shards" in manifest else {}),
            **{f"files of column {column['name']}": column["files"] for column in manifest.get("columns", [])}}


def files_of_all(manifest: Manifest) -> list[dict[str, Any]]:
    """{file, sha256} of what every image needs, beside the labels: offsets."""
    return [column["offsets"] for column in manifest.get("columns", [])]


def files_of_some(manifest: Manifest) -> list[tuple[slice, dict[str, Any]]]:
    """(rows, file) of what only these rows need: shards, columns' values."""
    found = []
    for files in row_files(manifest).values():
        ends = np.cumsum([file["rows"] for file in files]).tolist()
        found += [(slice(end - file["rows"], end), file) for end, file in zip(ends, files, strict=True)]
    return found


def file_hashes(manifest: Manifest) -> dict[str, str]:
    """{file: SHA-256} of all but the manifest itself."""
    return {**({"labels.npy": manifest["labels_sha256"]} if "labels_sha256" in manifest else {}),
            **{file["file"]: file["sha256"] for file in files_of_all(manifest)},
            **{file["file"]: file["sha256"] for _, file in files_of_some(manifest)}}


def columns_of(manifest: Manifest) -> dict[str, Column]:
    """The columns by name."""
    return {column["name"]: Column(column["name"], column["kind"], column["dtype"], tuple(column["shape"]))
            for column in manifest.get("columns", [])}


def same_tokenizer(one: Any, other: Any) -> bool | None:
    """Whether two `tokenizer` entries are of one tokenizer, or of copies of one; None where a hash is not known."""
    hashes = [{entry.get(key) for key in ("weights_sha256", "rounded_from") if is_text(entry.get(key))}
              if isinstance(entry, dict) else set() for entry in (one, other)]
    return bool(hashes[0] & hashes[1]) if all(hashes) else None


def tokenizer_name(entry: dict[str, Any]) -> str:
    """What to call the tokenizer of such an entry, whose hash is known."""
    return f"{entry.get('name') or 'tokenizer'} {entry['weights_sha256'][:12]}"
