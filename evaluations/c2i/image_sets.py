"""Sets of images to be measured: ADM's npz files, folders of PNGs, data sets. Read in batches, never as a whole.

Each is checked before any work: a set that does not hold 8-bit RGB images of one size is refused, saying what is wrong.
"""
import hashlib
import os
import re
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from dataset.image_folders import ending, is_hidden, told_endings
from dataset.pictures import PictureReader, endings
from utils.files import few, file_hash, what_it_is
from utils.pickles import suspicious_names

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
MADE_WITH = "weights_sha256"  # in references that we make: the Inception weights behind the statistics
LOSSY = {".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif", ".jp2", ".j2k"}
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)  # what zipfile raises
BLOCK = 2**22  # bytes at a time
LOOKED_AT = 2**28  # bytes of an array of another type, to say what its range is
AHEAD = 2  # batches read while one is measured

Batch = tuple[np.ndarray, np.ndarray]  # indices (B,) int64, images (B, H, W, 3) uint8


class ImageSet:
    """Images 0 … count - 1 of one size, and what is known about them without reading them."""

    def __init__(self, name: str, count: int, size: tuple[int, int] | None) -> None:
        self.name, self.count, self.size = name, count, size  # size None: statistics only, no images
        self.stored: dict[str, np.ndarray] = {}  # ADM's statistics, as far as the file has them
        self.made_with: str | None = None  # hash of the weights that they were made with
        self.labels: np.ndarray | None = None
        self.notes: list[str] = []  # warnings for the report

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The batches of `size` images whose number is `rank` modulo `world_size`."""
        raise NotImplementedError


class FirstImages(ImageSet):
    """The first `count` images of a set, as a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        super().__init__(images.name, min(count, images.count), images.size)
        self.images = images

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The set's batches up to the last image, the last one cut."""
        for indices, pictures in self.images.batches(size, rank=rank, world_size=world_size):
            wanted = int((indices < self.count).sum())
            if not wanted:
                return
            yield indices[:wanted], pictures[:wanted]


class ImageFile(ImageSet):
    """A set at a path: it has a hash, and its batches are read by a thread while earlier ones are measured."""

    path: Path

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The same batches as `read`; a thread reads two of them ahead."""
        batches = self.read(size, rank=rank, world_size=world_size)
        with ThreadPoolExecutor(1) as reader:
            waiting = deque(reader.submit(next, batches, None) for _ in range(AHEAD))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(reader.submit(next, batches, None))
                yield batch

    def read(self, size: int, *, rank: int, world_size: int) -> Iterator[Batch]:
        """The batches of `size` images whose number is `rank` modulo `world_size`."""
        raise NotImplementedError

    def sha256(self) -> str:
        """Hash of the file."""
        return file_hash(self.path)

    def reading_notes(self) -> list[str]:
        """Warnings for the report that are known only after reading."""
        return []


def open_image_set(path: str | Path, *, exif_orientation: bool = True) -> ImageFile:
    """The image set at a path: an npz or a folder of images, which are turned as their EXIF orientation says."""
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, PictureReader(exif_orientation=exif_orientation))
    if not path.is_file():
        raise FileNotFoundError(f"no image set at {path}: expected an .npz or a folder of PNGs")
    return NpzImages(path)


class NpzImages(ImageFile):
    """`arr_0` uint8 (N, H, W, 3), stored or compressed; `mu`, `sigma`, `mu_s`, `sigma_s`; `arr_1` labels."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name, 0, None)
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
                if not {"arr_0", "mu", "mu_s"} & members:
                    raise ValueError(f"{path} has neither images (arr_0) nor statistics (mu): it holds "
                                     f"{', '.join(sorted(members)) or 'nothing'}")
                for key in STATISTICS:
                    if key in members:
                        self.stored[key] = small_array(archive, key)
                if "arr_0" in members:
                    self.count, self.size = self.checked_images(archive)
                if MADE_WITH in members:
                    self.made_with = str(small_array(archive, MADE_WITH))
                self.labels = integer_labels(archive, self.count) if {"arr_0", "arr_1"} <= members else None
        except UNREADABLE as error:
            if path.suffix == ".npy":
                raise ValueError(f"{path} is an .npy: expected an .npz (numpy.savez) or a folder of PNGs") from None
            found = what_it_is(path)
            if found is not None and "zip archive" not in found:
                raise ValueError(f"{path} is not a complete npz file, but {found}") from None
            raise ValueError(f"{path} is not a complete npz file ({error}): it was cut short or damaged") from None
        check_statistics(self.stored, path)

    def checked_images(self, archive: zipfile.ZipFile) -> tuple[int, tuple[int, int]]:
        """(count, (height, width)) of arr_0 from its header. Raises ValueError for what is no 8-bit RGB."""
        shape, fortran, dtype, header = array_header(archive, "arr_0")
        if dtype != np.uint8:
            advice = conversion(dtype, value_range(archive, "arr_0", dtype)) if dtype.kind in "fiub" else ""
            raise ValueError(f"{self.path}: arr_0 is {dtype}, expected uint8 pixels{advice}")
        if len(shape) != 4 or shape[3] != 3:
            hint = ": it looks like (N, 3, H, W), transpose it" if len(shape) == 4 and shape[1] == 3 else ""
            raise ValueError(f"{self.path}: arr_0 has shape {shape}, expected (N, H, W, 3){hint}")
        if fortran:
            raise ValueError(f"{self.path}: arr_0 is in Fortran order: save np.ascontiguousarray of it")
        if 0 in shape:
            raise ValueError(f"{self.path}: arr_0 has shape {shape}: it holds no images")
        if archive.getinfo("arr_0.npy").file_size != header + int(np.prod(shape)):
            raise ValueError(f"{self.path}: arr_0 announces {shape[0]} images and does not hold them: it was cut short")
        return shape[0], shape[1:3]

    def read(self, size: int, *, rank: int, world_size: int) -> Iterator[Batch]:
        """Batches of this process. Each process reads the whole member, so that its checksum is verified."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                member.read(array_header(archive, "arr_0")[3])
                for number, start in enumerate(range(0, self.count, size)):
                    indices = np.arange(start, min(start + size, self.count))
                    pictures = np.empty((len(indices), *self.size, 3), np.uint8)
                    read_into(member, memoryview(pictures).cast("B"))
                    if number % world_size == rank:
                        yield indices, pictures
                member.read(1)  # reading past the end verifies the checksum
        except UNREADABLE as error:
            raise ValueError(f"{self.path} is damaged ({error}): none of it can be trusted") from None


def read_into(member: IO[bytes], view: memoryview) -> None:
    """Fill a buffer from a file. Raises EOFError when it ends before."""
    while view:
        count = member.readinto(view)
        if not count:
            raise EOFError("it ends too early")
        view = view[count:]


def array_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, Fortran order?, dtype, length of the header in bytes) of a member."""
    with archive.open(f"{key}.npy") as member:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{archive.filename}: {key} is no array ({error})") from None
        if dtype.hasobject and (names := suspicious_names(Path(archive.filename))):
            raise ValueError(f"{archive.filename}: {key} is refused: it names {few(names)}, which would run code "
                             "when loaded; expected numbers")
        return shape, fortran, dtype, member.tell()


def value_range(archive: zipfile.ZipFile, key: str, dtype: np.dtype) -> tuple[float, float]:
    """The smallest and the largest value of a member, of its first LOOKED_AT bytes; NaN if one is."""
    start = array_header(archive, key)[3]
    low, high = np.inf, -np.inf
    with archive.open(f"{key}.npy") as member:
        member.read(start)
        for _ in range(LOOKED_AT // BLOCK):
            block = member.read(BLOCK)
            values = np.frombuffer(block[:len(block) // dtype.itemsize * dtype.itemsize], dtype)
            if not len(values):
                break
            low, high = np.minimum(low, values.min()), np.maximum(high, values.max())  # these keep a NaN
    return float(low), float(high)


def conversion(dtype: np.dtype, found: tuple[float, float]) -> str:
    """How pixels x of another type become uint8, by the range that was found; what to say after the expectation."""
    low, high = found
    if low == np.inf and high == -np.inf:
        return "; it holds none"
    if not (np.isfinite(low) and np.isfinite(high)):
        return "; it holds values that are not finite (NaN, infinite): what made them has failed"
    values = f"; its values lie in [{low:g}, {high:g}]: "
    if low >= 0 and high <= 1:
        return f"{values}if that is [0, 1], save numpy.uint8(255 * x + 0.5)"
    if -1.5 <= low < 0 and high <= 1.5 and dtype.kind == "f":  # decoders leave [-1, 1] a little
        return f"{values}if that is [-1, 1], save numpy.uint8(numpy.clip(127.5 * x + 128, 0, 255))"
    if low >= 0 and 2 <= high <= 255:
        return f"{values}if that is [0, 255], save x.{'round().' if dtype.kind == 'f' else ''}astype(numpy.uint8)"
    if dtype == np.uint16:
        return f"{values}if that is [0, 65535], save (x / 257).round().astype(numpy.uint8)"
    return f"{values}how they become 0 to 255 is not known here"


def small_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """A member as an array; pickled objects are refused."""
    with archive.open(f"{key}.npy") as member:
        try:
            return np.lib.format.read_array(member, allow_pickle=False)
        except (ValueError, SyntaxError) as error:
            names = suspicious_names(Path(archive.filename))
            reason = f"it names {few(names)}, which would run code when loaded" if names else error
            raise ValueError(f"{archive.filename}: {key} cannot be read ({reason})") from None


def integer_labels(archive: zipfile.ZipFile, count: int) -> np.ndarray | None:
    """arr_1 if it is a label for each image; evaluators ignore it otherwise."""
    try:
        shape, _, dtype, _ = array_header(archive, "arr_1")
        return small_array(archive, "arr_1") if shape == (count,) and dtype.kind in "iu" else None
    except ValueError:
        return None


def check_statistics(stored: dict[str, np.ndarray], path: Path) -> None:
    """Raise ValueError unless means and covariances come in pairs, fit each other and are finite."""
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in stored) != (covariance in stored):
            raise ValueError(f"{path} has only one of {mean} and {covariance}")
        if mean not in stored:
            continue
        shape = stored[mean].shape
        if len(shape) != 1 or stored[covariance].shape != shape * 2:
            raise ValueError(f"{path}: {mean} is {shape} and {covariance} {stored[covariance].shape}: expected (D,) "
                             "and (D, D)")
        for key in (mean, covariance):
            if stored[key].dtype.kind != "f" or not np.isfinite(stored[key]).all():
                raise ValueError(f"{path}: {key} should be finite floats")


class FolderImages(ImageFile):
    """The pictures of a folder (not of folders in it), in natural order of their names: 2.png before 10.png."""

    def __init__(self, path: Path, reader: PictureReader) -> None:
        names = sorted((entry.name for entry in os.scandir(path) if not (is_hidden(entry.name) or entry.is_dir())),
                       key=natural)
        self.files = [path / name for name in names if ending(name) in endings()]
        others = Counter(ending(name) for name in names if ending(name) not in endings())
        if not self.files:
            beside = f" (but {told_endings(others)})" if others else ""
            raise ValueError(f"{path} holds no images{beside}: expected PNGs (for a tree of folders build a reference "
                             "with evaluations/c2i/reference.py)")
        self.reader = reader
        super().__init__(f"{path.resolve().name}/", len(self.files), self.pixels(self.files[0]).shape[:2])
        self.path = path
        if others:
            self.notes.append(f"passed over in {path} what is no picture ({told_endings(others)})")
        lossy = sum(ending(file.name) in LOSSY for file in self.files)
        if lossy:
            self.notes.append(f"{lossy} of {self.count} files in {path} are lossy (such as JPEG): compression moves "
                              "every metric, save PNGs")

    def reading_notes(self) -> list[str]:
        """Whether pictures were laid on white."""
        found = self.reader.found_transparency
        return [f"pictures of {self.name} have transparent parts: they were laid on white"] if found else []

    def pixels(self, file: Path) -> np.ndarray:
        """One picture, uint8 (H, W, 3). Raises UnreadableError: a set with a damaged picture is not measured."""
        return np.asarray(self.reader(file))

    def read(self, size: int, *, rank: int, world_size: int) -> Iterator[Batch]:
        """Batches of this process, decoded by a few threads: Pillow releases the interpreter lock while it decodes."""
        with ThreadPoolExecutor(4) as pool:
            for start in range(rank * size, self.count, size * world_size):
                files = self.files[start:start + size]
                pictures = list(pool.map(self.pixels, files))
                for file, picture in zip(files, pictures, strict=True):
                    if picture.shape[:2] != self.size:
                        raise ValueError(f"{file} is {picture.shape[0]}x{picture.shape[1]}, {self.files[0].name} "
                                         f"{self.size[0]}x{self.size[1]}: a set has one size")
                yield np.arange(start, start + len(files)), np.stack(pictures)

    def sha256(self) -> str:
        """Hash of all names and contents."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file_hash(file)}\n".encode())
        return digest.hexdigest()


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers count as numbers."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name) if part]
