"""Files and folders: written whole or not at all, their hashes, the cache; what a wrong file is."""
import codecs
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LOOKED_AT = 4096  # bytes at the start of a file that say what it is
KINDS = {  # how files start that are no text
    b"PK\x03\x04": "a zip archive: unpack it and give what is in it", b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "compressed by gzip: unpack it (gunzip, or tar xzf)",
    b"BZh": "compressed by bzip2: unpack it (bunzip2, or tar xjf)",
    b"\xfd7zXZ\0": "compressed by xz: unpack it (unxz, or tar xJf)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it (unzstd)", b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!": "a rar archive: unpack it", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture", b"%PDF": "a PDF document", b"\x89HDF": "an HDF5 file (Keras, h5py)",
    b"\x93NUMPY": "a NumPy array (.npy)",
}
AGAIN = "download it again"
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # Unicode's names of such marks


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
    return plain((str(error).strip() or type(error).__name__).splitlines()[0])


def few(words: Sequence[str], *, most: int = 4, between: str = ", ") -> str:
    """The first of some words, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more


def plain(text: str) -> str:
    """A text in which control characters are spelt out (\\x1b), so that it can do nothing to a terminal.

    Names of files and classes and what files hold may come from strangers. Marks that turn the direction of writing
    are spelt out too.
    """
    def harmless(letter: str) -> bool:
        return unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and (
            unicodedata.bidirectional(letter) not in TURNING)

    return "".join(letter if harmless(letter) else letter.encode("unicode_escape").decode() for letter in text)


def what_it_is(path: str | Path) -> str | None:
    """What a file is, and what to do, if that can be seen at its start; None where it cannot, or there is no file.

    For readers that could not read it as what it should be: "{path} is {what it is}". What they read themselves, such
    as zip archives, may be among the answers.
    """
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(LOOKED_AT))
    except OSError:
        return None


def kind_of(start: bytes) -> str | None:
    """The same for the first bytes of something that was read from elsewhere."""
    if not start:
        return f"empty: {AGAIN}, or make it again"
    if not start.strip(b"\0"):
        return f"nothing but zeros at its start, a download or copy that was not finished: {AGAIN}"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it (tar xf) and give what is in it"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP picture"
    binary = next((kind for mark, kind in KINDS.items() if start.startswith(mark)), None)
    return binary or _kind_of_text(start)


def _kind_of_text(start: bytes) -> str | None:
    """The same for the start of a text; None for what is none."""
    encoding = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start).strip()
    except UnicodeDecodeError:
        return None
    if re.search(r"[\0-\x08\x0e-\x1a\x7f]", text):
        return None
    shown = plain(" ".join(text[:60].split()))
    if re.match(r"version https?://(git-lfs|git-media|hawser)", text):
        return "a Git LFS pointer, which only names the file: `git lfs pull` in its repository fetches it"
    if re.match(r"<(!doctype html|html|head|body|title)|<.*<html", text, flags=re.IGNORECASE | re.DOTALL):
        return f"an HTML page, which a server sent in place of the file (does it ask for a login?): {AGAIN}"
    if re.match(r"<[?!\w]", text):
        return f"an XML text ({shown}), perhaps a server's error: {AGAIN}"
    if re.match(r"[{\[]", text):
        return f"a JSON text ({shown}), perhaps a server's error: {AGAIN}, if it is not the wrong file"
    return f"a text file ({shown}): {AGAIN}, if it is not the wrong file" if text else f"a blank text file: {AGAIN}"


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders of killed writers; only for a folder that no other process writes to."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder for files that can be made again: $XDG_CACHE_HOME/llamagen, else ~/.cache/llamagen; for users without
    a home `own_temporary_folder`, which may raise PermissionError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"
    except RuntimeError:  # neither $HOME nor an entry in the list of users, as in some containers
        return own_temporary_folder()


def own_temporary_folder() -> Path:
    """A folder in the temporary directory that nobody else can write to, always the same. Raises PermissionError if
    another user holds its name."""
    folder = Path(tempfile.gettempdir()) / f"llamagen-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not ours alone, so nothing in it can be trusted: remove it, or set "
                              "XDG_CACHE_HOME to a folder for caches")
    return folder


def remembered(kind: str, key: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` gave on this machine for `key`, anything that JSON can hold; kept in the cache folder."""
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
    path = None
    with contextlib.suppress(OSError, ValueError):
        path = cache_folder() / "measured" / f"{kind}-{digest}.json"
        return json.loads(path.read_text())
    found = json.loads(json.dumps(measure()))
    if path is not None:
        with contextlib.suppress(OSError), replacing(path) as temporary:
            temporary.write_text(json.dumps(found))
    return found


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
