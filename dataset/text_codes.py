"""LlamaGen's codes of captioned pictures: a file for each line of the .jsonl files, beside them or elsewhere.

    <data-path>/part-0.jsonl                 its line 17, counted from 0, names a picture and its captions
    <code-path>/part-0/17.npy                the picture's codes, (views, L) or (1, views, L)

Read as a store with the columns `name`, `caption` and, if any line has one, `short_caption`, like the packed stores
that `autoregressive/train/extract_codes_t2i.py` writes. Pairs without codes are left out, counted and told.
"""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.code_files import NUMBER, FileStore, array_files, in_short
from dataset.code_index import FolderIndex
from dataset.code_layouts import CodeStore, find_store
from dataset.code_manifest import Column
from dataset.pairs_lines import LinePairs
from dataset.remote import has_manifest, is_url
from dataset.t2i import file_ending, open_pairs
from utils import cli


class TextFileStore(FileStore):
    """Codes in numbered files, captions from the .jsonl files."""

    def __init__(self, folder: Path, files: "LineFiles", grid: tuple[int, int] | None) -> None:
        labels = np.broadcast_to(np.int64(0), (len(files),))
        super().__init__(folder, files, labels, grid)
        self.pairs, self.rows = files.pairs, files.rows
        names = ["name", "caption", *["short_caption"] * self.pairs.has_short]
        self.columns = {name: Column(name, "text", "uint8") for name in names}

    def contents(self) -> list[Any]:
        """Hashes of some code files and of the lines' places."""
        return [*super().contents(), self.pairs.states()["image_names"]]

    def column_files(self, name: str, rows: np.ndarray) -> list[str]:
        """From the .jsonl files. Raises ValueError if one has changed."""
        indices = self.rows[rows].tolist()
        if name == "name":
            return [self.pairs.name(index) for index in indices]
        captions = [self.pairs.captions(index) for index in indices]
        return [long if name == "caption" else short or "" for long, short in captions]


@dataclass(frozen=True)
class LineFiles(Sequence[Path]):
    """The files of the pairs that have one: <folder>/<stem of the .jsonl>/<line>.npy."""

    folder: Path
    pairs: LinePairs
    rows: np.ndarray  # (N,) int64: which of the pairs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Path:
        return line_file(self.folder, self.pairs, int(self.rows[index]))


def holds_codes(path: str, *, subfolder: str | None = None) -> bool:
    """Whether --data-path is a packed store of codes, else captioned pictures. Of URLs those of archives, which may end
    in a signature, and of folders without a manifest are pictures."""
    if is_url(path):
        return file_ending(path) != ".tar" and has_manifest(path, subfolder=subfolder)
    return Path(path).is_dir() and find_store(Path(path), subfolder=subfolder) is not None


def line_file(folder: Path, pairs: LinePairs, index: int) -> Path:
    """Where the file of a pair is."""
    path, line = pairs.line(index)
    return folder / Path(path).stem / f"{line}.npy"


def open_text_codes(data_path: str | Path, code_path: str | Path, *, grid: tuple[int, int] | None = None,
                    part: tuple[int | None, int | None] = (None, None)) -> CodeStore:
    """Open LlamaGen's codes of the .jsonl files at `data_path`.

    `grid` is needed only where the number of tokens is no square; `part`: see `open_pairs`. Raises FileNotFoundError or
    ValueError that says what was found instead.
    """
    pairs, folder = open_pairs(data_path, part=part), Path(code_path)
    if not isinstance(pairs, LinePairs):
        raise ValueError(f"--data-path {data_path}: codes in numbered files belong to the lines of .jsonl files, and "
                         "there are none")
    if not folder.is_dir():
        raise FileNotFoundError(f"--code-path {folder} is not a folder")
    there = numbered_lines(folder, pairs)
    rows = np.flatnonzero(np.concatenate([np.isin(pairs.rows_of(number)[:, 2], lines)
                                          for number, lines in enumerate(there)]))
    if not len(rows):
        raise FileNotFoundError(f"--code-path {folder} has codes of none of the {len(pairs)} pairs: expected "
                                f"{line_file(folder, pairs, 0)} and so on")
    if len(rows) < len(pairs):
        first = int(np.setdiff1d(np.arange(min(len(pairs), len(rows) + 1)), rows)[0])
        cli.warn(f"{len(pairs) - len(rows)} of {len(pairs)} pairs have no codes and are left out, such as "
                 f"{pairs.name(first)}: there is no {line_file(folder, pairs, first)}")
    return TextFileStore(folder, LineFiles(folder, pairs, rows), grid)


def numbered_lines(folder: Path, pairs: LinePairs) -> list[np.ndarray]:
    """For each .jsonl file the numbers of the lines that have codes."""
    stems = [Path(source.path).stem for source in pairs.sources]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--data-path has several files of one stem ({in_short(sorted(stems))}): their codes cannot "
                         "be told apart")
    folders = [folder / stem for stem in stems if (folder / stem).is_dir()]
    index = FolderIndex([folder, *folders])
    found = index.read()
    if found is None:
        count = sum(1 for path in folders for _ in os.scandir(path))
        found = index.made(count, lambda count: list_numbers(folders))
    parts = dict(zip(folders, np.split(found["numbers"], found["ends"][:-1]), strict=True)) if folders else {}
    return [parts.get(folder / stem, np.empty(0, np.int64)) for stem in stems]


def list_numbers(folders: list[Path]) -> dict[str, np.ndarray]:
    """{"numbers": of all folders' files one after the other, "ends" (F,): where each folder's end}."""
    numbers = []
    for folder in folders:
        stems, _ = array_files(folder)
        numbers.append(np.array([int(stem) for stem in stems if NUMBER.fullmatch(stem)], np.int64))
    return {"numbers": np.concatenate([np.empty(0, np.int64), *numbers]), "ends": np.cumsum([*map(len, numbers)])}
