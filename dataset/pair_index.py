"""Where each pair lies in large files (.jsonl, .csv, .tar): found out once per file, kept in the user's cache.

The rows of a file, a few numbers for each pair, are an .npy file in the cache, memory-mapped: 50 million pairs are
1.2 GB (.jsonl, .csv: 24 bytes each) or 1.4 GB (.tar: 28 bytes) on disk, shared by all processes of a machine, and no
memory that could not be given back. A file's index is named by a hash of its path, size and time of change, so a file
that was replaced is looked through again. Processes that open the same data share the work file by file: each begins
elsewhere, and takes what another has done meanwhile.
"""
import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.mapped import MappedFiles, map_array
from dataset.pairs import DAMAGED_FILE, PairProblemError, Pairs, Problems
from dataset.pictures import PictureReader
from utils import dist
from utils.files import cache_folder, replacing

VERSION = 1  # of what an index says: to be raised when files are looked at in another way
KEPT_FROM = 2**24  # bytes: smaller files are looked through in a moment, and leave nothing in the cache
THREADS = 4  # files looked through at a time: disks and servers answer slowly


@dataclass(frozen=True)
class Source:
    """A file that holds pairs."""

    name: str  # what its pairs' names begin with
    path: str  # a file here, or a URL
    size: int  # bytes
    changed: str  # what tells its versions apart


@dataclass
class Found:
    """What a look through a file has found: where its pairs are, and what is wrong with others."""

    rows: np.ndarray  # (n, K)
    problems: Problems
    has_short: bool


Looker = Callable[[Source], Found]


class IndexedPairs(Pairs):
    """Pairs in some files, one file after the other."""

    def __init__(self, sources: list[Source], look: Looker, *, kind: str, width: int, dtype: np.dtype,
                 reader: PictureReader | None, smallest: tuple[int, int]) -> None:
        """`look` goes through a file; `kind` names how; rows are (n, width) of the dtype."""
        super().__init__(reader=reader, smallest=smallest)
        self.sources, self.held = sources, {}
        found = look_through(sources, look, kind=kind, width=width, dtype=dtype)
        for number, one in enumerate(found):
            self.problems.merge(one.problems.described())
            self.has_short |= one.has_short
            if not isinstance(one.rows, Path):
                self.held[number] = one.rows
        self.starts = np.cumsum([0, *(one.count for one in found)])
        self.mapped = MappedFiles([one.rows if isinstance(one.rows, Path) else Path() for one in found], self.starts,
                                  (width,), dtype)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows_of(self, number: int) -> np.ndarray:
        """The rows (n, K) of a file."""
        return self.held[number] if number in self.held else self.mapped[number]

    def place(self, index: int) -> tuple[Source, int, list[int]]:
        """(file, its number, the row (K) as integers) of a pair."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], number, self.rows_of(number)[index - int(self.starts[number])].tolist()

    def states(self) -> dict[str, str]:
        """Names of files and the places of pairs in them; sizes and times of the files."""
        names = hashlib.sha256()
        for number, source in enumerate(self.sources):
            names.update(f"{source.name}\n".encode())
            names.update(np.ascontiguousarray(self.rows_of(number)))
        sizes, times = (hashlib.sha256(json.dumps(values).encode()) for values in (
            [source.size for source in self.sources], [source.changed for source in self.sources]))
        return {"image_names": names.hexdigest(), "image_sizes": sizes.hexdigest(), "image_times": times.hexdigest()}


@dataclass
class Indexed:
    """The index of a file: its rows, or the file in the cache that holds them."""

    rows: np.ndarray | Path
    count: int
    problems: Problems
    has_short: bool


def look_through(sources: list[Source], look: Looker, *, kind: str, width: int, dtype: np.dtype) -> list[Indexed]:
    """The index of each file, from the cache where it is there."""
    world = max(dist.world_size(), 1)
    first = dist.env_rank() * len(sources) // world
    order = [*range(first, len(sources)), *range(first)]

    def one(number: int) -> Indexed:
        return indexed(sources[number], look, kind=kind, width=width, dtype=dtype)

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(order, tqdm(pool.map(one, order), total=len(order), desc="looking through pairs", unit="file",
                                     mininterval=1.0, delay=1.0, disable=dist.env_rank() > 0), strict=True))
    return [found[number] for number in range(len(sources))]


def indexed(source: Source, look: Looker, *, kind: str, width: int, dtype: np.dtype) -> Indexed:
    """The index of one file; a file that cannot be read has no rows and is counted."""
    def looked() -> Found:
        try:
            return look(source)
        except (OSError, PairProblemError) as error:
            problems = Problems()
            said = getattr(error, "strerror", None) or str(error)
            problems.add(getattr(error, "kind", DAMAGED_FILE), f"{source.name}: {said}")
            return Found(np.empty((0, width), dtype), problems, False)

    if source.size < KEPT_FROM:
        found = looked()
        return Indexed(found.rows, len(found.rows), found.problems, found.has_short)
    key = repr((VERSION, kind, source.path, source.size, source.changed))
    path = cache_folder() / "pairs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    kept = read_kept(path, width=width, dtype=dtype)
    if kept is None:
        with alone(path):
            kept = read_kept(path, width=width, dtype=dtype)  # another process may have made it meanwhile
            if kept is None:
                found = looked()
                kept = keep(path, found) or Indexed(found.rows, len(found.rows), found.problems, found.has_short)
    return kept


def read_kept(path: Path, *, width: int, dtype: np.dtype) -> Indexed | None:
    """An index in the cache; None if it is not there, or damaged."""
    try:
        said = json.loads(path.with_suffix(".json").read_text())
        problems = Problems()
        problems.merge(said["problems"])
        map_array(path, (said["count"], width), dtype)
        return Indexed(path, said["count"], problems, said["has_short"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(path: Path, found: Found) -> Indexed | None:
    """Leave an index in the cache, what it says last; None if it cannot be left there."""
    said: dict[str, Any] = {"count": len(found.rows), "problems": found.problems.described(),
                            "has_short": found.has_short}
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, found.rows)
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(said))
    except OSError:
        return None
    return Indexed(path, len(found.rows), found.problems, found.has_short)


@contextlib.contextmanager
def alone(path: Path):
    """No two processes of a user make the same file at a time; where locks cannot be had, they may."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_suffix(".lock")
            file = stack.enter_context(open(lock, "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            stack.callback(lock.unlink, missing_ok=True)
        yield
