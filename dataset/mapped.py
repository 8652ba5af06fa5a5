"""Arrays in .npy files, memory-mapped without a file descriptor that stays open, few or tens of thousands of them.

np.load(mmap_mode=…) and Python's own mmap (before 3.13) keep a descriptor per file, of which a process may often have
no more than 1,024. The system call needs none once it has returned. It allows 65,530 maps per process
(vm.max_map_count), so files are mapped when they are first read from, and beyond MAPS the first ones are let go.
"""
import ctypes
import functools
import io
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

from utils.pickles import why_no_array

MAPS = 4096  # per list of files; a window of the order (2^21 rows) touches 2,048 files of the old 1,024 rows

NO_ARRAY = (ValueError, EOFError, SyntaxError, TypeError, OverflowError, TokenError)  # what numpy raises for headers

Header = tuple[tuple[int, ...], np.dtype, int]  # shape, dtype, where the numbers start in the file


def read_header(file: BinaryIO) -> Header:
    """The header of an open .npy file. Raises ValueError or EOFError when it is none, or the length is another."""
    version = np.lib.format.read_magic(file)
    length = file.read({(1, 0): 2, (2, 0): 4}.get(version, 0))
    shape, fortran, dtype = parse_header(version, length + file.read(int.from_bytes(length, "little")))
    expected, found = file.tell() + math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size
    if fortran or dtype.hasobject or expected != found:
        raise ValueError(f"{found} bytes, expected {expected} of a plain array")
    return shape, dtype, file.tell()


@functools.lru_cache(maxsize=256)
def parse_header(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, dtype); kept, as most of thousands of files have the same."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    return readers[version](io.BytesIO(header))


def map_array(path: Path, shape: tuple[int | None, ...], dtype: np.dtype) -> np.ndarray:
    """The array in a .npy file, read-only, memory-mapped; None in `shape`: any length.

    Raises ValueError for a file that is missing, cut short, or another array.
    """
    try:
        with open(path, "rb") as file:
            found, kind, start = read_header(file)
            buffer = _map(file.fileno(), os.fstat(file.fileno()).st_size)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, *NO_ARRAY) as error:
        raise ValueError(f"{path} is missing or cut short ({why_no_array(path, error)})") from None
    fits = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
    if not fits or kind != dtype:
        expected = tuple("any" if side is None else side for side in shape)
        raise ValueError(f"{path} has {kind} of shape {found}, expected {dtype} of {expected}")
    array = np.frombuffer(buffer, dtype=kind, offset=start, count=math.prod(found)).reshape(found)
    array.flags.writeable = False  # to write would end the process
    return array


def _map(descriptor: int, size: int) -> Any:
    """A buffer over a whole open file, unmapped when nothing refers to it any more."""
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = (ctypes.c_char * size).from_address(address)
    weakref.finalize(buffer, libc.munmap, address, size).atexit = False
    return buffer


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    return libc


class MappedFiles:
    """Files that together hold an array (N, *shape), mapped when first read from; file i begins at starts[i].

    Pickled without its maps.
    """

    def __init__(self, paths: Sequence[Path], starts: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.paths, self.starts, self.shape, self.dtype = list(paths), starts, shape, dtype
        self.mapped: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> np.ndarray:
        """The array in one file. Raises ValueError when it is missing or another."""
        if number not in self.mapped:
            if len(self.mapped) >= MAPS:
                del self.mapped[next(iter(self.mapped))]
            rows = int(self.starts[number + 1] - self.starts[number])
            self.mapped[number] = map_array(self.paths[number], (rows, *self.shape), self.dtype)
        return self.mapped[number]

    def home(self, rows: np.ndarray) -> np.ndarray:
        """In which file each of the rows (B,) is."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mapped": {}}
