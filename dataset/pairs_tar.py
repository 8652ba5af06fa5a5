"""Captioned pictures in tar archives, as img2dataset writes them for WebDataset: members of one stem are a pair.

An archive is looked through once, from header to header; its pairs are then read at their places. Archives that lie
elsewhere (s3://, https://, …) are fetched whole into a bounded cache, to be looked through and again to be read. Pairs
are read in order, so each archive is fetched twice at most, at the full speed of the line, where asking for each part
of a pair would wait for the server three times.
"""
import json
import os
from array import array

import numpy as np
from PIL import Image

from dataset.pair_cache import open_local
from dataset.pair_index import Found, IndexedPairs, Source
from dataset.pairs import (
    BROKEN_CAPTION,
    DAMAGED_FILE,
    DUPLICATE,
    EMPTY_CAPTION,
    MOST_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    Captions,
    PairProblemError,
    Problems,
    choose_captions,
    clean_name,
    decode_caption,
)
from dataset.pictures import PictureReader, UnreadableError, endings
from dataset.tar_members import BLOCK, Member, ReadAt, member_at, members, reader_at
from utils.files import first_line, kind_of, plain

JSON_KEYS = ("caption", "text", "TEXT", "top_caption")
JSON_SHORT_KEYS = ("short_caption", "short_text")
MOST_IMAGE = 2**32 - 1  # bytes
MOST_ARCHIVE = 2**32 * BLOCK  # bytes: places are numbers of 32 bits


class TarPairs(IndexedPairs):
    """Pairs in archives. A row is (headers of the picture, its content, its bytes, .txt, its bytes, .json, its bytes):
    places in blocks of 512 bytes, 0 for what is not there."""

    def __init__(self, archives: list[Source], *, reader: PictureReader | None, smallest: tuple[int, int]) -> None:
        super().__init__(archives, look_at_archive, kind="tar", width=7, dtype=np.dtype(np.uint32), reader=reader,
                         smallest=smallest)

    def name(self, index: int) -> str:
        """"00001.tar:000010042": the archive and the stem."""
        source, _, row = self.place(index)
        member, _, _ = member_at(reads(source), row[0] * BLOCK, source.size)
        return pair_name(source, "?" if member is None else stem_and_ending(member.name)[0])

    def captions(self, index: int) -> Captions:
        """See `Pairs`."""
        source, _, row = self.place(index)
        return captions_at(reads(source), row)

    def picture(self, index: int) -> Image.Image:
        """See `Pairs`."""
        source, _, row = self.place(index)
        return self.reader.decoded(reads(source)(row[1] * BLOCK, row[2]), self.name(index))


def reads(source: Source) -> ReadAt:
    """Reads an archive anywhere. It is opened for each call: archives are many, open files few."""
    def read(offset: int, size: int) -> bytes:
        with open_local(source.path, size=source.size, changed=source.changed) as file:
            return os.pread(file.fileno(), size, offset)

    return read


def stem_and_ending(name: str) -> tuple[str, str]:
    """("a/0001", "seg.png") of "a/0001.seg.png": WebDataset's rule, the stem ends at the base name's first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem if stem else "", ending.lower()


def pair_name(source: Source, stem: str) -> str:
    """What a pair is called."""
    return clean_name(f"{source.name}:{stem}")


def look_at_archive(source: Source) -> Found:
    """Go through an archive. Raises PairProblemError if it is none."""
    if source.size >= MOST_ARCHIVE:
        raise PairProblemError(DAMAGED_FILE, f"{source.size} bytes, expected less than 2 TiB: split it")
    with open_local(source.path, size=source.size, changed=source.changed) as file:
        read, problems = reader_at(file.fileno()), Problems()
        groups = group_members(read, source, problems)
        if not groups and DAMAGED_FILE in problems.counts:
            found = kind_of(read(0, 4096))
            raise PairProblemError(DAMAGED_FILE, found or f"no tar archive ({problems.examples[DAMAGED_FILE][0]})")
        rows, has_short = array("I"), False
        for stem, parts in groups.items():
            try:
                row = row_of(parts)
                has_short = captions_at(read, row).short is not None or has_short
            except PairProblemError as error:
                problems.add(error.kind, f"{pair_name(source, plain(stem))}: {error}")
                continue
            rows.extend(row)
    return Found(np.frombuffer(rows, np.uint32).reshape(-1, 7), problems, has_short)


def group_members(read: ReadAt, source: Source, problems: Problems) -> dict[str, dict[str, Member]]:
    """{stem: {"image", "txt", "json": member}} in the order of the archive."""
    groups: dict[str, dict[str, Member]] = {}

    def tell(wrong: str) -> None:
        problems.add(DAMAGED_FILE, f"{source.name}: {plain(wrong)}")

    for member in members(read, source.size, tell):
        stem, ending = stem_and_ending(member.name)
        if not stem:  # a hidden file
            continue
        kind = ending if ending in ("txt", "json") else "image" if f".{ending}" in endings() else None
        parts = groups.setdefault(stem, {}) if kind else {}
        if kind in parts:
            problems.add(DUPLICATE, f"{pair_name(source, plain(stem))}.{plain(ending)}: it is there twice")
        elif kind:
            parts[kind] = member
    return groups


def row_of(parts: dict[str, Member]) -> list[int]:
    """The row of a pair. Raises PairProblemError for what is none."""
    if "image" not in parts:
        raise PairProblemError(NO_IMAGE, "there is no picture of this stem")
    if len(parts) == 1:
        raise PairProblemError(NO_CAPTION, "there is neither .txt nor .json of this stem")
    if parts["image"].size > MOST_IMAGE:
        raise PairProblemError(UnreadableError.kind, f"the picture is {parts['image'].size} bytes long")
    row = [parts["image"].header // BLOCK]
    for kind in ("image", "txt", "json"):
        row += [parts[kind].start // BLOCK, min(parts[kind].size, MOST_IMAGE)] if kind in parts else [0, 0]
    return row


def captions_at(read: ReadAt, row: list[int]) -> Captions:
    """The captions of a pair: .txt, else what .json says. Raises PairProblemError."""
    text, described, sized = "", {}, [min(size, MOST_CAPTION + 1) for size in (row[4], row[6])]
    if row[3]:
        text = decode_caption(read(row[3] * BLOCK, sized[0]))
    if row[5]:
        try:
            described = json.loads(decode_caption(read(row[5] * BLOCK, sized[1])))
        except (ValueError, RecursionError) as error:  # also PairProblemError
            if not text:
                raise PairProblemError(BROKEN_CAPTION, f".json: {first_line(error)[:80]}") from None
    described = described if isinstance(described, dict) else {}
    texts = [text, *(described.get(key) for key in JSON_KEYS)]
    long = next((one for one in texts if isinstance(one, str) and one.strip()), "")
    short = next((described[key] for key in JSON_SHORT_KEYS if described.get(key)), None)
    captions = choose_captions([long], short)
    if captions is None:
        if not row[3] and not any(key in described for key in JSON_KEYS):
            raise PairProblemError(NO_CAPTION, f".json has none of {', '.join(JSON_KEYS)}")
        raise PairProblemError(EMPTY_CAPTION, "the caption is empty")
    return captions
