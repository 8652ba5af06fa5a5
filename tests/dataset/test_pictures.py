"""Picture files as people have them: any mode, range, transparency and orientation becomes 8-bit RGB; thin ones too."""
import struct
import tracemalloc

import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from dataset.augmentation import MOST_RESIZED, center_crop, random_crop
from dataset.pictures import PictureReader, UnreadableError
from tests.dataset.picture_files import png_bytes, saved

RAMP = np.linspace(0, 65535, 16).round().astype(np.uint16)[None].repeat(16, 0)  # black on the left, white on the right
EIGHT = np.rint(RAMP / 257).astype(np.uint8)


def grey(path) -> np.ndarray:
    """The picture, which must be grey, (H, W)."""
    found = np.asarray(PictureReader()(path))
    assert found.shape[2] == 3 and (found == found[..., :1]).all()
    return found[..., 0]


def tiff_tags(**tags: int | float):
    found = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        number = {"photometric": 262, "least": 280, "most": 281, "smallest": 340, "largest": 341}[name]
        found[number] = value
        if name in ("smallest", "largest"):
            found.tagtype[number] = 11  # float
    return found


# ---- integers and floats


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2", "a.im"])
def test_sixteen_bits_are_scaled_by_257(tmp_path, name):
    np.testing.assert_allclose(grey(saved(tmp_path / name, RAMP)), EIGHT, atol=1)


def test_big_endian_and_twelve_bits(tmp_path):
    Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    np.testing.assert_array_equal(grey(tmp_path / "big.tif"), EIGHT)
    twelve = np.rint(RAMP / 65535 * 4095).astype(int)
    packed = bytearray()
    for a, b in twelve.reshape(-1, 2).tolist():
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    path = tmp_path / "twelve.tif"
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 3, 16), (279, 4, len(packed))]
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + struct.pack("<H", len(entries))
                     + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4))
    np.testing.assert_allclose(grey(path), EIGHT, atol=1)


def test_floats_from_0_to_1_and_of_a_range_that_the_file_states(tmp_path):
    unit = (RAMP / 65535).astype(np.float32)
    np.testing.assert_array_equal(grey(saved(tmp_path / "a.tif", unit)), EIGHT)
    np.testing.assert_array_equal(grey(saved(tmp_path / "b.pfm", unit)), EIGHT)
    tags = tiff_tags(smallest=-100.0, largest=100.0)
    np.testing.assert_array_equal(grey(saved(tmp_path / "c.tif", unit * 200 - 100, tiffinfo=tags)), EIGHT)


@pytest.mark.parametrize("values", [RAMP.astype(np.float32), RAMP.astype(np.float32) / 257,
                                    RAMP / np.float32(65535) - 0.1, RAMP.astype(np.int32),
                                    np.where(RAMP > 0, RAMP / np.float32(65535), np.nan),
                                    np.full((4, 4), np.inf, np.float32)])
def test_a_range_that_is_not_known_is_refused_by_name(tmp_path, values):
    path = saved(tmp_path / "a.tif", values.astype(np.int32 if values.dtype == np.int32 else np.float32))
    with pytest.raises(UnreadableError, match=r"a\.tif cannot be read as an image \(it holds (floats|integers|values)"):
        PictureReader()(path)


def test_a_large_picture_is_scaled_in_bands(tmp_path):
    """4 megapixels took 128 MB of floats, more than ten times the picture."""
    path = saved(tmp_path / "a.tif", np.tile(RAMP, (125, 125)))
    tracemalloc.start()
    found = grey(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.tile(EIGHT, (125, 125)))
    assert peak < 70e6


def test_an_infinite_range_is_none(tmp_path):
    path = saved(tmp_path / "a.tif", RAMP.astype(np.float32), tiffinfo=tiff_tags(smallest=0.0, largest=float("inf")))
    with pytest.raises(UnreadableError, match="floats from 0 to 65535"):
        PictureReader()(path)


@pytest.mark.parametrize("values", [RAMP, (RAMP / 65535).astype(np.float32)])
def test_white_may_be_zero(tmp_path, values):
    path = saved(tmp_path / "a.tif", values, tiffinfo=tiff_tags(photometric=0))
    np.testing.assert_allclose(grey(path), 255 - EIGHT, atol=1)


def test_the_extremes_of_a_16_bit_picture_do_not_stretch_it(tmp_path):
    dark = RAMP // 16
    found = grey(saved(tmp_path / "a.tif", dark, tiffinfo=tiff_tags(least=0, most=4095)))
    np.testing.assert_array_equal(found, np.rint(dark / 257))


def test_integers_of_fits_are_signed_which_pillow_does_not_see(tmp_path):
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2",
             "NAXIS1  =                   16", "NAXIS2  =                   16", "BZERO   =                32768",
             "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (tmp_path / "a.fits").write_bytes(header + (RAMP.astype(int) - 32768).astype(">i2").tobytes().ljust(2880, b"\0"))
    with pytest.raises(UnreadableError, match=r"a\.fits .*it holds integers"):
        PictureReader()(tmp_path / "a.fits")


# ---- transparency: white under it


def disc(alpha: int) -> Image.Image:
    """Black everywhere; 4x4 pixels in the middle of 8x8 are opaque, the others as opaque as `alpha`."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3] = alpha
    pixels[2:6, 2:6, 3] = 255
    return Image.fromarray(pixels)


def palette_with(alpha: bytes | int) -> Image.Image:
    image = Image.fromarray(np.asarray(disc(0))[..., 3] // 255)  # 0 around, 1 in the middle
    image = image.convert("P")
    image.putpalette([0, 0, 0, 0, 0, 0, *[9] * 762])
    image.info["transparency"] = alpha
    return image


def with_transparent_black(mode: str) -> Image.Image:
    """Around: the colour that is declared transparent; in the middle: another dark one."""
    image = Image.fromarray(np.asarray(disc(0))[..., 3] // 255).convert(mode)
    image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    return image


@pytest.mark.parametrize(("name", "image"), [
    ("a.png", disc(0)), ("a.webp", disc(0)), ("a.tif", disc(0)), ("a.tga", disc(0)), ("a.ico", disc(0)),
    ("a.avif", disc(0)), ("a.jp2", disc(0)), ("a.dds", disc(0)), ("a.qoi", disc(0)),
    ("a.icns", disc(0).resize((16, 16))),
    ("la.png", disc(0).convert("LA")), ("pa.gif", palette_with(0)), ("p.png", palette_with(0)),
    ("bytes.png", palette_with(b"\0\xff")), ("l.png", with_transparent_black("L")),
    ("rgb.png", with_transparent_black("RGB")), ("one.png", with_transparent_black("1")),
])
def test_what_is_transparent_becomes_white(tmp_path, capsys, name, image):
    options = {"lossless": True} if name == "a.webp" else {"sizes": [(8, 8)]} if name == "a.ico" else {}
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    reader = PictureReader()
    path = saved(tmp_path / name, image, **options)
    found = np.asarray(reader(path)).astype(int)
    side, atol = len(found), 40 if name == "a.avif" else 3
    np.testing.assert_allclose(found[0, 0], 255, atol=atol)
    expected = 255 if name == "one.png" else 1  # its other colour is white
    np.testing.assert_allclose(found[side // 2, side // 2], expected, atol=atol)
    reader(path)
    assert capsys.readouterr().err.count("has transparent parts") == 1
    assert reader.found_transparency


def test_what_is_half_transparent_is_mixed_with_white(tmp_path):
    assert PictureReader()(saved(tmp_path / "a.png", disc(128))).getpixel((0, 0)) == (127, 127, 127)
    assert PictureReader()(saved(tmp_path / "b.png", palette_with(b"\x80\xff"),
                                 transparency=b"\x80\xff")).getpixel((0, 0)) == (127, 127, 127)
    straight, multiplied = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))  # what a TIFF says of alpha
    content = saved(tmp_path / "c.tif", disc(128).convert("LA")).read_bytes()
    assert content.count(straight) == 1
    (tmp_path / "c.tif").write_bytes(content.replace(straight, multiplied))
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip(f"Pillow {PIL.__version__} does not read such a TIFF")
    assert Image.open(tmp_path / "c.tif").mode == "La"
    assert PictureReader()(tmp_path / "c.tif").getpixel((0, 0)) == (127, 127, 127)


def test_a_transparent_colour_of_sixteen_bits(tmp_path):
    grey_rows = [struct.pack(">2H", 300, 20000)] * 2
    (tmp_path / "grey.png").write_bytes(png_bytes(0, grey_rows, width=2, transparent=struct.pack(">H", 300)))
    assert grey(tmp_path / "grey.png")[0].tolist() == [255, round(20000 / 257)]
    rows = [struct.pack(">6H", 0x1234, 0x1234, 0x1234, 0x3412, 0, 0)] * 2
    (tmp_path / "rgb.png").write_bytes(png_bytes(2, rows, width=2, transparent=struct.pack(">3H", *[0x1234] * 3)))
    assert np.asarray(PictureReader()(tmp_path / "rgb.png"))[0].tolist() == [[255] * 3, [0x34, 0, 0]]


@pytest.mark.parametrize(("bits", "pixels", "expected"), [(2, 0b01101100, [255, 170, 255, 0]), (4, 0x1a, [255, 170])])
def test_a_transparent_grey_of_few_bits(tmp_path, bits, pixels, expected):
    content = png_bytes(0, [bytes([pixels])], width=8 // bits, bits=bits, transparent=struct.pack(">H", 1))
    (tmp_path / "a.png").write_bytes(content)
    assert grey(tmp_path / "a.png")[0].tolist() == expected


def test_opaque_pictures_with_an_alpha_channel_stay_as_they_are(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    found = np.asarray(PictureReader()(saved(tmp_path / "a.png", pixels)))
    np.testing.assert_array_equal(found, pixels[..., :3])
    assert capsys.readouterr().err == ""


# ---- orientation


UPRIGHT = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.transpose(1, 0, 2),
          6: UPRIGHT.transpose(1, 0, 2)[::-1], 7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
          8: UPRIGHT.transpose(1, 0, 2)[:, ::-1]}  # what a camera writes when it is held so


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_pictures_are_turned_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, np.ascontiguousarray(STORED[orientation]), exif=exif, **options)
    np.testing.assert_array_equal(np.asarray(PictureReader()(path)), UPRIGHT)
    if name != "a.tif":  # which Pillow itself turns
        np.testing.assert_array_equal(np.asarray(PictureReader(exif_orientation=False)(path)), STORED[orientation])


def test_orientation_of_jpeg_and_of_sixteen_bits_and_transparent_ones(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (40, 20)), exif=exif)
    assert PictureReader()(path).size == (20, 40)
    assert PictureReader(exif_orientation=False)(path).size == (40, 20)
    np.testing.assert_array_equal(grey(saved(tmp_path / "b.png", RAMP, exif=exif)), EIGHT.T)  # turned clockwise
    assert PictureReader()(saved(tmp_path / "c.png", disc(0).crop((0, 0, 8, 4)), exif=exif)).size == (4, 8)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_is_none_turns_nothing(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(PictureReader()(saved(tmp_path / "a.png", UPRIGHT, exif=exif)), UPRIGHT)


def test_damaged_exif_data_is_no_reason_to_pass_a_picture_over(tmp_path):
    path = saved(tmp_path / "a.png", UPRIGHT, exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish")
    np.testing.assert_array_equal(PictureReader()(path), UPRIGHT)


# ---- thin pictures


def test_of_a_thin_picture_only_the_crop_is_resized(monkeypatch):
    """The same pixels as by way of the whole, to a rounding, for a size at which the whole can be made."""
    picture = Image.fromarray(np.random.default_rng(0).integers(96, 160, (3000, 3, 3), dtype=np.uint8))
    whole = [center_crop(picture, (64, 64)), random_crop(picture, (64, 64), np.random.default_rng(1))]
    monkeypatch.setattr("dataset.augmentation.MOST_RESIZED", 1000)
    parts = [center_crop(picture, (64, 64)), random_crop(picture, (64, 64), np.random.default_rng(1))]
    assert np.abs(np.stack(whole).astype(int) - np.stack(parts)).max() <= 1


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (2, 100_000)])
def test_a_thin_picture_never_becomes_large(size, monkeypatch):
    made, resize = [], Image.Image.resize

    def watched(self, size, *args, **options):
        made.append(size[0] * size[1])
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    picture = Image.new("RGB", size, "green")
    assert center_crop(picture, (256, 256)).tolist() == np.full((256, 256, 3), (0, 128, 0)).tolist()
    assert random_crop(picture, (256, 256), np.random.default_rng(0)).shape == (256, 256, 3)
    assert max(made) <= MOST_RESIZED
