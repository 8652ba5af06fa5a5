"""Picture files for tests: written by Pillow, or by hand where it cannot."""
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

RECENT = int(PIL.__version__.split(".")[0]) >= 12  # older ones cannot write or read all that is tried here


def saved(path, image: Image.Image | np.ndarray, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    try:
        image.save(path, **options)
    except (OSError, ValueError, KeyError) as error:
        if RECENT:
            raise
        pytest.skip(f"Pillow {PIL.__version__} cannot write it: {error}")
    return path


def png_bytes(colour: int, rows: list[bytes], *, width: int, bits: int = 16, transparent: bytes | None = None) -> bytes:
    """A PNG of so many bits per sample, written by hand: Pillow writes few of them."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header),
                     b"" if transparent is None else chunk(b"tRNS", transparent),
                     chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")])
