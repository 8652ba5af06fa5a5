"""Files and folders: written whole or not at all, their hashes, the cache."""
import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. When the block ends well, it is synced to disk and takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)  # with the rights that the user's umask gives
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def names_in(folder: Path) -> list[str]:
    """What a folder holds; nothing if it is not there. (Path.glob hides a failing disk from Python 3.13 on.)"""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(path: Path) -> bool:
    """Whether a path is there; a disk that cannot tell is an OSError (Path.exists hides it from Python 3.14 on)."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Sync a folder's list of names to disk, so that a rename survives a power cut."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders of killed writers; only for a folder that no other process writes to."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder for files that can be made again: $XDG_CACHE_HOME/llamagen, else ~/.cache/llamagen."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
