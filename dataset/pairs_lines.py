"""Captioned pictures that a text file lists line by line: LlamaGen's .jsonl, and tables (.csv, .tsv)."""
import csv
import io
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dataset.pair_index import Found, IndexedPairs, Source
from dataset.pairs import (
    BROKEN_LINE,
    EMPTY_CAPTION,
    MISSING_IMAGE,
    NO_KEYS,
    Captions,
    PairProblemError,
    Problems,
    choose_captions,
    clean_name,
)
from dataset.pictures import PictureReader, UnreadableError
from utils.files import first_line, plain

IMAGE_KEYS = ("image_path", "image", "file_name", "filename", "file", "filepath", "path", "img_path", "image_file")
TEXT_KEYS = ("text", "caption", "prompt", "title", "captions", "description")
SHORT_KEYS = ("short_caption", "short_text", "short_prompt")
MOST_LINE = 2**24  # bytes: a longer line is no pair
MOST_LINES = 20  # of one table row, by line breaks in quotes: more are taken for a quote that was never closed
DELIMITERS = (",", ";", "\t", "|")
MARK = b"\xef\xbb\xbf"  # with which some programs begin UTF-8 files


class Record(NamedTuple):
    """A line's content."""

    image: str
    captions: Captions


class LinePairs(IndexedPairs):
    """Pairs listed by files. A row is (where the record begins, its bytes, number of its first line, from 0)."""

    def __init__(self, files: list[Source], *, reader: PictureReader | None, smallest: tuple[int, int]) -> None:
        self.parsers = [parser_of(Path(source.path)) for source in files]
        look = {source.path: parser for source, parser in zip(files, self.parsers, strict=True)}
        super().__init__(files, lambda source: look_at_lines(source, look[source.path]), kind="lines", width=3,
                         dtype=np.dtype(np.int64), reader=reader, smallest=smallest)

    def record(self, index: int) -> Record:
        """What the line says. Raises PairProblemError if the file has changed."""
        source, number, (start, size, line) = self.place(index)
        with open(source.path, "rb") as file:
            file.seek(start)
            content = file.read(size)
        try:
            return self.parsers[number].parse(content)
        except PairProblemError as error:
            raise PairProblemError(error.kind, f"{source.name}:{line}: {error}; the file has changed") from None

    def name(self, index: int) -> str:
        """"part-0.jsonl:17": lines are counted from 0, as LlamaGen names the files of codes."""
        source, _, (_, _, line) = self.place(index)
        return clean_name(f"{source.name}:{line}")

    def line(self, index: int) -> tuple[str, int]:
        """(path of the file, number of the line from 0)."""
        source, _, (_, _, line) = self.place(index)
        return source.path, line

    def captions(self, index: int) -> Captions:
        """See `Pairs`."""
        return self.record(index).captions

    def picture(self, index: int) -> Image.Image:
        """The picture at the path: absolute, else below the file's folder, else below the working directory."""
        source, _, _ = self.place(index)
        try:
            image = self.record(index).image
        except PairProblemError as error:
            raise UnreadableError(str(error), kind=error.kind) from None
        path = os.path.join(os.path.dirname(source.path), image)
        path = path if os.path.exists(path) else image
        if not os.path.exists(path):
            raise UnreadableError(f"{self.name(index)}: there is no {image}, neither below the list's folder nor below "
                                  "the working directory", kind=MISSING_IMAGE)
        try:
            return self.reader(path)
        except UnreadableError as error:
            raise UnreadableError(f"{self.name(index)}: {error}", kind=error.kind) from None


def look_at_lines(source: Source, parser: "JsonLines | Table") -> Found:
    """Go through a file."""
    rows, problems, has_short = array("q"), Problems(), False
    with open(source.path, "rb") as file:
        for start, line, content in parser.records(file):
            try:
                record = parser.parse(content)
            except PairProblemError as error:
                problems.add(error.kind, clean_name(f"{source.name}:{line}: {plain(str(error))}"))
                continue
            has_short = has_short or record.captions.short is not None
            rows.extend((start, len(content), line))
    return Found(np.frombuffer(rows, np.int64).reshape(-1, 3), problems, has_short)


def parser_of(path: Path) -> "JsonLines | Table":
    """How to read a file. Raises ValueError for a table without the columns."""
    return JsonLines() if path.suffix.lower() == ".jsonl" else Table(path)


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, line) of each; of one that is too long the beginning, which is no whole record."""
    start = 0
    while line := file.readline(MOST_LINE):
        size, rest = len(line), line
        while len(rest) == MOST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MOST_LINE)
            size += len(rest)
        yield start, line
        start += size


class JsonLines:
    """A JSON object a line."""

    def records(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """(where it begins, line number from 0, content) of each line that is not blank."""
        for number, (start, line) in enumerate(lines_of(file)):
            if line.strip():
                yield start, number, line

    def parse(self, content: bytes) -> Record:
        """Raises PairProblemError for what is no pair."""
        try:
            found = json.loads(content.removeprefix(MARK))
        except (ValueError, RecursionError) as error:
            raise PairProblemError(BROKEN_LINE, f"no JSON ({first_line(error)[:80]})") from None
        if not isinstance(found, dict):
            raise PairProblemError(NO_KEYS, "no JSON object with image_path and text")
        return record_of(found)


class Table:
    """Comma- or tab-separated values, the first line names the columns. Line breaks may stand in quotes."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            header = file.readline(MOST_LINE).removeprefix(MARK).decode(errors="replace")
        for self.delimiter in DELIMITERS:
            self.columns = [word.strip().lower() for word in next(csv.reader([header], delimiter=self.delimiter), [])]
            if first_key(self.columns, IMAGE_KEYS) and first_key(self.columns, TEXT_KEYS):
                return
        raise ValueError(f"{path} begins with {plain(header.strip())[:100]!r}: expected the names of its columns, one "
                         f"of {', '.join(IMAGE_KEYS)} and one of {', '.join(TEXT_KEYS)}")

    def records(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """(where it begins, line number from 0, content) of each row below the header; a row may have several lines.

        A quote that is never closed costs its own line only: what follows is read again line by line.
        """
        waiting: list[tuple[int, int, bytes]] = []
        lines = ((start, number, line) for number, (start, line) in enumerate(lines_of(file)) if number)
        while waiting or (following := next(lines, None)):
            waiting = waiting or [following]
            used, content = 1, waiting[0][2]
            while self.is_open(content) and used < MOST_LINES:
                if used == len(waiting):
                    if (following := next(lines, None)) is None:
                        break
                    waiting.append(following)
                content += waiting[used][2]
                used += 1
            if used > 1 and not self.is_whole(content):
                used, content = 1, waiting[0][2]
            if content.strip():
                yield *waiting[0][:2], content
            waiting = waiting[used:]

    def is_whole(self, content: bytes) -> bool:
        """Whether a row of several lines has all of its columns, with nothing beside its quotes."""
        try:
            return len(self.fields(content, strict=True)) == len(self.columns)
        except PairProblemError:
            return False

    def is_open(self, content: bytes) -> bool:
        """Whether a row ends within quotes."""
        if b'"' not in content:
            return False
        try:
            text = io.StringIO(content.decode(errors="replace"), newline="")
            list(csv.reader(text, delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            return "end of data" in str(error)
        return False

    def fields(self, content: bytes, *, strict: bool = False) -> list[str]:
        """The row's fields. Raises PairProblemError."""
        try:
            rows = list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter=self.delimiter, strict=strict))
        except (csv.Error, UnicodeDecodeError) as error:
            raise PairProblemError(BROKEN_LINE, first_line(error)[:80]) from None
        return rows[0] if len(rows) == 1 else []

    def parse(self, content: bytes) -> Record:
        """Raises PairProblemError for what is no pair."""
        if self.is_open(content):
            raise PairProblemError(BROKEN_LINE, "a quote is not closed")
        fields = self.fields(content)
        if len(fields) != len(self.columns):
            raise PairProblemError(BROKEN_LINE, f"{len(fields)} fields, {len(self.columns)} columns")
        return record_of(dict(zip(self.columns, fields, strict=True)))


def first_key(names: Any, keys: tuple[str, ...]) -> str | None:
    """The first of the keys that is among the names."""
    return next((key for key in keys if key in names), None)


def record_of(found: dict[str, Any]) -> Record:
    """A pair from its fields. Raises PairProblemError."""
    image, text = found.get(first_key(found, IMAGE_KEYS)), found.get(first_key(found, TEXT_KEYS))
    if not isinstance(image, str) or not image.strip() or not isinstance(text, str | list):
        lacking = "image" if not isinstance(image, str) or not image.strip() else "caption"
        raise PairProblemError(NO_KEYS, f"no {lacking}: expected {'image_path' if lacking == 'image' else 'text'}")
    captions = choose_captions([text] if isinstance(text, str) else text, found.get(first_key(found, SHORT_KEYS)))
    if captions is None:
        raise PairProblemError(EMPTY_CAPTION, "the caption is empty")
    return Record(image, captions)
