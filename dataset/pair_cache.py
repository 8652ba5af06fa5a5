"""Archives of pairs that lie elsewhere: any URL that fsspec understands, copied whole to a cache of bounded size."""
import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from dataset.pair_index import alone
from dataset.remote import filesystem, is_url
from utils.files import cache_folder, first_line, replacing

MOST_CACHED = 2**36  # bytes, 64 GiB: about 130 archives of img2dataset's 10,000 pairs; less if the disk is nearly full

ABANDONED = 86_400.0  # seconds without a byte: who wrote it has ended
MARKS = ("ETag", "etag", "md5Hash", "sha256", "LastModified", "mtime", "created")  # of a version, by several back ends


def open_local(path: str, *, size: int, changed: str) -> BinaryIO:
    """Open a file, or its copy in the cache, which is fetched if it is not there. Raises OSError."""
    if not is_url(path):
        return open(path, "rb")
    copy = cache_folder() / "archives" / f"{hashlib.sha256(repr((path, size, changed)).encode()).hexdigest()[:32]}.tar"
    while True:
        with contextlib.suppress(FileNotFoundError):  # another process may have needed the room
            os.utime(copy)  # marks it as the latest used
            return open(copy, "rb")
        with alone(copy):
            if not copy.is_file():
                make_room(copy.parent, size)
                fetch_whole(path, copy, size=size)
                make_room(copy.parent, 0)  # others were fetched at the same time


def make_room(folder: Path, size: int) -> None:
    """Remove the copies that were used longest ago until a file of `size` bytes has room, and what kills have left."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    used = []
    for path in folder.glob("*.tar"):
        with contextlib.suppress(OSError):  # another process has removed it
            state = path.stat()
            used.append((state.st_mtime_ns, state.st_size, path))
    total, free = sum(each for _, each, _ in used), shutil.disk_usage(folder).free
    for _, each, path in sorted(used):
        if total + size <= MOST_CACHED and free > 2 * size:
            return
        path.unlink(missing_ok=True)
        total, free = total - each, free + each


def fetch_whole(url: str, copy: Path, *, size: int) -> None:
    """Copy a file, whole or not at all. Raises OSError."""
    files, place = filesystem(url, flag="--data-path")
    try:
        with replacing(copy) as temporary:
            with files.open(place, "rb") as incoming, open(temporary, "wb") as outgoing:
                shutil.copyfileobj(incoming, outgoing, 2**22)
            came = temporary.stat().st_size
            if came != size:
                raise OSError(f"{came} bytes came, expected {size}")
    except Exception as error:  # back ends raise what they like
        raise OSError(f"{url} cannot be fetched ({first_line(error)[:200]})") from None


def remote_state(url: str) -> tuple[int, str]:
    """(bytes, what tells the file's versions apart) of a URL. Raises FileNotFoundError, OSError or ValueError."""
    files, place = filesystem(url, flag="--data-path")
    try:
        found = files.info(place)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {url}") from None
    except Exception as error:  # back ends raise what they like
        raise OSError(f"{url} cannot be asked for ({first_line(error)[:200]})") from None
    if not isinstance(found.get("size"), int):
        raise OSError(f"{url}: the server does not say how long it is")
    return found["size"], " ".join(str(found.get(key, "")) for key in MARKS)


def list_remote(url: str, ending: str) -> list[str]:
    """The files with the ending in a remote folder, sorted. Raises OSError."""
    files, place = filesystem(url, flag="--data-path")
    try:
        names = files.ls(place, detail=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {url}") from None
    except Exception as error:  # back ends raise what they like
        raise OSError(f"{url} cannot be listed ({first_line(error)[:200]})") from None
    found = sorted(str(name).rpartition("/")[2] for name in names if str(name).lower().endswith(ending))
    return [f"{url.rstrip('/')}/{name}" for name in found]
