"""Damaged picture files of every format are one line each, or a picture; what promises too much costs nothing."""
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from dataset import pictures
from dataset.pictures import PictureReader, UnreadableError
from tests.dataset.picture_files import png_bytes, saved

WRITTEN = {  # format: mode that it can write
    "AVIF": "RGB", "BMP": "RGB", "BLP": "P", "DDS": "RGBA", "DIB": "RGB", "GIF": "P", "ICNS": "RGBA", "ICO": "RGBA",
    "IM": "RGB", "JPEG": "RGB", "JPEG2000": "RGB", "MSP": "1", "PCX": "RGB", "PNG": "RGB", "PPM": "RGB", "QOI": "RGB",
    "SGI": "RGB", "TGA": "RGB", "TIFF": "RGB", "WEBP": "RGB", "XBM": "1"}


def test_every_format_that_pillow_writes_and_reads_is_tried():
    here = {name for name in pictures.formats() if name in Image.SAVE}
    assert here - WRITTEN.keys() == set()


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_damaged_files_are_one_line_or_a_picture(tmp_path, name):
    """Cut short anywhere, bits flipped, zeros in place of the rest: never another error, nor anything on the screen."""
    if name not in pictures.formats() or name not in Image.SAVE:
        pytest.skip(f"this Pillow does not read and write {name}")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).convert(WRITTEN[name])
    buffer = io.BytesIO()
    image.save(buffer, name)
    whole, path, refused = buffer.getvalue(), tmp_path / "a.jpg", []  # the ending does not matter
    cuts = [whole[:length] for length in (0, 1, 5, 20, *rng.integers(0, len(whole), 20))]
    zeros = [whole[:length] + bytes(len(whole) - length) for length in rng.integers(0, len(whole), 20)]
    flips = []
    for _ in range(60):
        flipped = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 3):
            flipped[place] ^= 1 << int(rng.integers(8))
        flips.append(bytes(flipped))
    reader = PictureReader()
    for content in (*cuts, *zeros, *flips):
        path.write_bytes(content)
        try:
            picture = reader(path)
        except UnreadableError as error:
            refused.append(str(error))
        else:
            assert picture.mode == "RGB" and min(picture.size) > 0
    assert len(refused) >= 4  # what is cut to nothing
    assert all(line.startswith(f"{path} cannot be read as an image (") and "\n" not in line for line in refused)
    path.write_bytes(whole)
    assert reader(path).size == image.size or name in ("ICNS", "ICO")  # which are written in sizes of their own


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_libtiff_prints_nothing_about_damaged_files(tmp_path, capfd, compression):
    if not list(Path(PIL.__file__).parents[1].glob("[Pp]illow.libs/libtiff*")):
        pytest.skip("this Pillow uses the system's libtiff, which prints what it likes")
    rng = np.random.default_rng(0)
    path = saved(tmp_path / "a.tif", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), compression=compression)
    content = bytearray(path.read_bytes())
    content[100:2000] = rng.bytes(1900)
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"a\.tif"):
        PictureReader()(path)
    assert capfd.readouterr().err == ""


def test_a_decoder_may_raise_anything(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.new("RGB", (6, 4)))
    for error in (RuntimeError("bad"), KeyError(3), MemoryError(), struct.error("short"), RecursionError("deep")):
        def load(self, error=error):
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        with pytest.raises(UnreadableError, match=r"a\.png"):
            PictureReader()(path)


def test_lack_of_file_descriptors_is_no_damage(tmp_path, monkeypatch):
    def no_more(*args, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", no_more)
    with pytest.raises(OSError, match="Too many"):
        PictureReader()(saved(tmp_path / "a.png", Image.new("RGB", (6, 4))))


def test_a_header_that_promises_too_much_is_passed_over(tmp_path):
    rows = [bytes(6)]
    content = bytearray(png_bytes(2, rows, width=1))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableError, match="3600000000 pixels"):
        PictureReader()(tmp_path / "a.png")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    content = bytearray(png_bytes(2, [bytes(6)], width=1))
    content[25] ^= 64
    (tmp_path / "header.png").write_bytes(content)
    for name, why in (("header.png", "it begins as a PNG picture and is damaged"), ("pipe.jpg", "no file"),
                      ("link.jpg", "No such file"), ("text.jpg", "a text file")):
        with pytest.raises(UnreadableError, match=f"{name}.*{why}"):
            PictureReader()(tmp_path / name)
