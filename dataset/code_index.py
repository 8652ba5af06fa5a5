"""What was found out about folders of many files, kept in the user's cache until a folder changes.

An index is named by the hash of its folders' paths, inodes and times of change (which move when a file comes, goes or
is renamed), so one of another state is never found. It is an .npz, whose checksums tell damage; a cache that is damaged
or cannot be written only means that the folders are looked through again. Processes of a machine wait for the one that
makes it.
"""
import contextlib
import fcntl
import hashlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dataset.code_check import codes_cache
from utils.files import replacing

INDEXED_FROM = 10_000  # files: fewer are looked through in a second, and leave nothing in the cache
VERSION = 2  # of what is found out: to be raised when folders are looked at in another way
SETTLED = 5.0  # seconds: a folder that changed just now may change again without another time (some disks keep seconds)

Arrays = dict[str, np.ndarray]


class FolderIndex:
    """Arrays that depend on which files some folders hold; `fits` may look for what folders' times do not tell."""

    def __init__(self, folders: list[Path], *, fits: Callable[[Arrays], bool] = lambda found: True) -> None:
        states = [folder.stat() for folder in folders]
        key = [(str(folder.resolve()), state.st_ino, state.st_mtime_ns)
               for folder, state in zip(folders, states, strict=True)]
        self.path = codes_cache() / f"{hashlib.sha256(repr((VERSION, key)).encode()).hexdigest()[:32]}.npz"
        self.fits, self.changed = fits, max(state.st_mtime for state in states)

    def read(self) -> Arrays | None:
        """The arrays, None if they are not there, damaged, or no longer true."""
        try:
            with np.load(self.path) as content:
                found = {name: content[name] for name in content.files}
            return found if self.fits(found) else None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

    def made(self, count: int, make: Callable[[int], Arrays]) -> Arrays:
        """What make(count) finds out about `count` files; kept if that is worth it. One process makes it at a time."""
        if count < INDEXED_FROM:
            return make(count)
        with self.alone():
            found = self.read()  # another process may have made it meanwhile
            if found is None:
                found = make(count)
                self.keep(found)
        return found

    def keep(self, arrays: Arrays) -> None:
        """Leave the arrays for other processes, if they can be left and the folders are at rest."""
        if time.time() - self.changed < SETTLED:
            return
        with contextlib.suppress(OSError), replacing(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No two processes of a user are in here at a time; where locks cannot be had, they are."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(self.path.parent / "index.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
