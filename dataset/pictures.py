"""One reader of picture files for training, extraction, reconstruction, references and the evaluator.

Whatever Pillow can decode comes out as 8-bit RGB, upright and opaque: turned as its EXIF orientation says, transparent
parts on white, integers and floats scaled by their own range. Everything else is an UnreadableError with its reason.
"""
import contextlib
import ctypes
import errno
import functools
import io
import logging
import math
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError

from utils import cli
from utils.files import LOOKED_AT, first_line, kind_of, what_it_is

# Pillow knows these formats by name only: they need a program or a library that it does not bring, or (EPS) would run
# Ghostscript on a stranger's file.
NO_DECODER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # says nothing about the file
ORIENTATION, PHOTOMETRIC, BITS = 0x0112, 262, 258  # tags of EXIF and TIFF
RANGE, STATISTICS = (340, 341), (280, 281)  # tags of TIFF: smallest and largest sample, of the kind and of this picture
WHITE_IS_ZERO = 0
BAND = 2**20  # pixels that are scaled at a time: of a whole picture of 100 megapixels the floats would be 2.4 GB
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


class UnreadableError(ValueError):
    """A picture cannot be used; the text says which and why, `kind` what it is counted under."""

    kind = "unreadable image"

    def __init__(self, text: str, *, kind: str = kind) -> None:
        super().__init__(text)
        self.kind = kind


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow can decode here, in the order in which it tries them."""
    Image.init()
    known = set(Image.registered_extensions().values()) - NO_DECODER
    return tuple(name for name in Image.ID if name in known)


@functools.cache
def endings() -> frozenset[str]:
    """The file name endings of those formats, such as ".jpg", in small letters."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


@functools.cache
def silence_decoders() -> None:
    """Keep Pillow and its libtiff from printing: what is wrong with a picture is said in a line of ours."""
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    for library in Path(PIL.__file__).parents[1].glob("[Pp]illow.libs/libtiff*"):  # in wheels for Linux
        with contextlib.suppress(OSError, AttributeError):
            libtiff = ctypes.CDLL(str(library))
            libtiff.TIFFSetErrorHandler(None)  # it would print up to a line for each row of a damaged picture
            libtiff.TIFFSetWarningHandler(None)


class PictureReader:
    """Reads picture files; says once, for all loading processes of a data set, that there are transparent ones."""

    def __init__(self, *, exif_orientation: bool = True) -> None:
        """`exif_orientation`: turn pictures upright. Without it they stay as they are stored, as in LlamaGen."""
        silence_decoders()
        formats()  # loads Pillow's plugins before loading processes start
        self.exif_orientation = exif_orientation
        self._told = torch.zeros(1, dtype=torch.uint8).share_memory_()

    @property
    def found_transparency(self) -> bool:
        """Whether one of the pictures read so far had transparent parts."""
        return bool(self._told[0])

    def __call__(self, path: str | Path) -> Image.Image:
        """The picture, RGB. Raises UnreadableError for anything that is no whole picture of a known range."""
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UnreadableError("it is no file")
            with Image.open(path, formats=formats()) as image:
                return self.converted(image, path)
        except Exception as error:  # damaged data makes decoders raise anything
            if isinstance(error, OSError) and error.errno in OUT_OF_RESOURCES:
                raise
            raise UnreadableError(f"{path} cannot be read as an image ({reason(error, path)})") from None

    def decoded(self, content: bytes, name: str) -> Image.Image:
        """The same of a file's content, which is called `name`."""
        try:
            with Image.open(io.BytesIO(content), formats=formats()) as image:
                return self.converted(image, name)
        except Exception as error:  # damaged data makes decoders raise anything
            raise UnreadableError(f"{name} cannot be read as an image ({reason(error, content)})") from None

    def converted(self, image: Image.Image, path: str | Path) -> Image.Image:
        """8-bit RGB, opaque and upright, of an opened file."""
        key = transparent_colour(image)
        image.load()
        if not all(image.size):
            raise UnreadableError(f"it is {image.width} pixels wide and {image.height} high")
        orientation = stored_orientation(image) if self.exif_orientation else 1
        if image.mode.startswith(("I", "F")):
            picture, transparent = eight_bits(image), isinstance(key, int) and np.asarray(image) == key
            if np.any(transparent):
                picture.paste("white", mask=Image.fromarray(transparent))
                self.tell_transparent(path)
        elif image.has_transparency_data:
            if key is not None:
                image.info["transparency"] = key
            picture = self.on_white(image, path)
        else:
            picture = image.convert("RGB")
        return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture

    def on_white(self, image: Image.Image, path: str | Path) -> Image.Image:
        """RGB of an image that can have transparent parts."""
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # colours that are multiplied by their opacity
        image = (image.convert(straight) if straight else image).convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            self.tell_transparent(path)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

    def tell_transparent(self, path: str | Path) -> None:
        """Say that transparent parts become white, unless it was said."""
        if not self.found_transparency:
            self._told[0] = 1
            cli.warn(f"{path} has transparent parts: they are laid on white, here and in any other picture",
                     kind="note", every_rank=True)


def reason(error: Exception, source: str | Path | bytes) -> str:
    """Why a picture, a file or its content, cannot be read, in a few words that do not repeat its name."""
    if isinstance(error, UnidentifiedImageError):
        found = kind_of(source[:LOOKED_AT]) if isinstance(source, bytes) else what_it_is(source)
        found = found or "no picture that Pillow can read"
        return f"it begins as {found} and is damaged" if found.endswith(" picture") else f"it is {found}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)[:200]


def transparent_colour(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The colour, in the image's own numbers, that stands for "transparent"; None if there is none. Before loading."""
    key, stored = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if isinstance(key, tuple) and stored == "RGB;16B":  # Pillow keeps the high bytes
        return tuple(value >> 8 for value in key)
    if isinstance(key, int) and stored in ("L;2", "L;4"):  # Pillow spreads these over 0 to 255
        return key * {"L;2": 85, "L;4": 17}[stored]
    return key


def stored_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none or the EXIF data is damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged tag raises anything, and says nothing about the picture
        return 1
    return found if found in range(1, 9) else 1


def eight_bits(image: Image.Image) -> Image.Image:
    """RGB of a grey image of 16-bit or 32-bit integers or floats. Raises UnreadableError if its range is unknown."""
    values = np.asarray(image)
    lowest, highest = float(values.min()), float(values.max())  # NaN if one is
    if not math.isfinite(lowest + highest):
        raise UnreadableError("it holds values that are no numbers, or infinite")
    low, high = black_and_white(image, lowest, highest)
    scaled = np.empty(values.shape, np.uint8)
    step = max(1, BAND // image.width)
    for row in range(0, len(values), step):
        band = values[row:row + step].astype(np.float64)
        scaled[row:row + step] = np.rint((band - low) * (255 / (high - low))).clip(0, 255)
    if white_is_zero(image):
        scaled = 255 - scaled
    return Image.fromarray(scaled).convert("RGB")


def black_and_white(image: Image.Image, lowest: float, highest: float) -> tuple[float, float]:
    """The values of an image of mode I, I;16 or F that are black and white; its own are `lowest` to `highest`."""
    tags = getattr(image, "tag_v2", {})
    unsigned = image.mode.startswith("I;16") and image.format != "FITS"  # whose integers Pillow takes for unsigned ones
    for pair in (RANGE,) if unsigned else (RANGE, STATISTICS):
        low, high = (number(tags.get(tag)) for tag in pair)
        if low is not None and high is not None and -math.inf < low < high < math.inf:
            return low, high
    if unsigned:
        bits = number(tags.get(BITS)) or 16
        return 0.0, 2.0**bits - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # files of 16 bits in a wider mode
        return 0.0, 65535.0
    if image.mode == "F" and lowest >= 0 and highest <= 1:
        return 0.0, 1.0
    kind = "floats" if image.mode == "F" else "integers"
    raise UnreadableError(f"it holds {kind} from {lowest:g} to {highest:g}, and which of them are black and white is "
                          "not known: save it as a PNG of 8 or 16 bits")


def number(tag: object) -> float | None:
    """The value of a TIFF tag, or its first one."""
    first = tag[0] if isinstance(tag, tuple) and tag else tag
    return float(first) if isinstance(first, int | float) else None


def white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF counts from white to black, which Pillow leaves as it is in these modes."""
    return number(getattr(image, "tag_v2", {}).get(PHOTOMETRIC)) == WHITE_IS_ZERO
