"""Control pictures: edges that are found, maps that are made elsewhere, each of the same crop as its codes."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import code_writer, control
from dataset.augmentation import code_views
from dataset.build import build_dataset
from dataset.code_manifest import Column
from dataset.codes import CodeBatches, open_stores
from tests.conftest import TINY, call
from tests.dataset.codes import STORE, content, fake_codes, write_packed

WHITE_SQUARE = np.zeros((24, 32, 3), np.uint8)
WHITE_SQUARE[6:18, 8:24] = 255


# ---- one picture


def test_edges_are_where_brightness_changes():
    edges = control.canny(WHITE_SQUARE, low=100, high=200)
    assert edges.shape == (24, 32) and set(np.unique(edges)) == {0, 255}
    rows, columns = edges.nonzero()
    assert (abs(rows - 5.5).min(), abs(columns - 7.5).min()) == (0.5, 0.5)
    assert not edges[8:16, 10:22].any() and not edges[:4].any() and not edges[:, :6].any()
    dim = WHITE_SQUARE // 255 * 30
    assert control.canny(dim, low=10, high=20).any() and not control.canny(dim, low=100, high=200).any()


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_pictures_of_one_shade_have_no_edges(shade):
    assert not control.canny(np.full((16, 16, 3), shade, np.uint8), low=100, high=200).any()


def test_without_scikit_image(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--control canny needs scikit-image: .* -m pip install scikit-image"):
        control.canny(WHITE_SQUARE, low=100, high=200)


@pytest.mark.parametrize(("kind", "shape"), [("canny", (6, 2)), ("edges", (6, 13)), ("depth", (6, 13)),
                                             ("segmentation", (6, 13, 3))])
def test_what_is_stored_comes_back(kind, shape):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 6, 13, 3) if kind == "segmentation" else (4, 6, 13), np.uint8)
    if kind == "canny":
        pictures = pictures // 128 * 255
    column, stored = control.column_of(kind, (6, 13)), control.packed(pictures, kind)
    assert (column.kind, column.shape) == ("views", shape) and stored.shape == (4, *shape)
    found = control.unpacked(stored, kind, 13)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.movedim(1, -1).numpy(), pictures.reshape(4, 6, 13, -1))


def file_of(pixels: np.ndarray, path) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.mark.parametrize("kind", control.KINDS)
def test_a_picture_of_the_right_size_is_taken_as_it_is(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    if kind != "segmentation":
        pixels = np.repeat(pixels[..., :1] // (128 if kind == "canny" else 1) * (255 if kind == "canny" else 1), 3, -1)
    found, own = control.read_control(file_of(pixels, tmp_path / "a.png"), kind, (24, 32))
    assert own == (24, 32) and np.array_equal(found, pixels.transpose(2, 0, 1)[:len(found)])
    assert len(found) == (3 if kind == "segmentation" else 1)


@pytest.mark.parametrize("size", [(12, 16), (24, 32), (48, 64), (20, 20), (30, 17)])
def test_lines_survive_another_size_and_segments_do_not_mix(size, tmp_path):
    lines = np.zeros((96, 128), np.uint8)
    lines[47] = lines[:, 63] = 255
    found, _ = control.read_control(file_of(lines, tmp_path / "a.png"), "canny", size)
    assert found.shape == (1, *size) and set(np.unique(found)) == {0, 255}
    assert found.any(1).all() and found.any(2).all()  # one line down, one across
    assert (found > 0).mean() < 4 * (1 / size[0] + 1 / size[1])
    segments = np.zeros((96, 128, 3), np.uint8)
    segments[:48], segments[48:, :64] = (200, 30, 10), (10, 40, 220)
    found, _ = control.read_control(file_of(segments, tmp_path / "b.png"), "segmentation", size)
    colours = {tuple(colour) for colour in found.reshape(3, -1).T.tolist()}
    assert found.shape == (3, *size) and colours == {(200, 30, 10), (10, 40, 220), (0, 0, 0)}


@pytest.mark.parametrize("shade", [0, 255])
def test_edges_of_one_shade(shade, tmp_path):
    found, _ = control.read_control(file_of(np.full((50, 40), shade, np.uint8), tmp_path / "a.png"), "canny", (16, 16))
    assert (found == shade).all()


def test_pictures_that_cannot_be_taken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--control-image .*none.png: there is no such file"):
        control.read_control(str(tmp_path / "none.png"), "canny", (16, 16))
    with pytest.raises(FileNotFoundError, match="this is a folder, expected a picture"):
        control.read_control(str(tmp_path), "canny", (16, 16))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"--control-image: .*text.png cannot be read as an image"):
        control.read_control(str(tmp_path / "text.png"), "depth", (16, 16))


@pytest.mark.parametrize("kind", control.KINDS)
@pytest.mark.parametrize("shape", [(20000, 1), (1, 20000)])
def test_of_a_thin_picture_only_the_crop_is_resized(kind, shape, tmp_path, monkeypatch):
    sizes, resize = [], Image.Image.resize

    def noting(image, size, *args, **options):
        sizes.append(size)
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", noting)
    pixels = np.zeros(shape, np.uint8)
    pixels.ravel()[10000:] = 255  # the second half, of the whole and of its centre
    found, own = control.read_control(file_of(pixels, tmp_path / "thin.png"), kind, (256, 256))
    assert own == shape and max(map(max, sizes)) <= 256
    long = found[0] if shape[0] > 1 else found[0].T
    assert (long[:4] < 16).all() and (long[-4:] > 239).all()  # between them a smooth kind is interpolated


# ---- with the codes of the same crop

FIRST_FOUR = Column("depth", "views", "uint8", (4,))


def write(folder, *, seed: int, views: int = 3, labels=None):
    """A store whose column holds the first four codes of each view: it tells which codes a picture belongs to."""
    codes = fake_codes(views=views, seed=seed)
    return write_packed(folder, codes, np.arange(14) % 3 if labels is None else labels, rows=3,
                        columns={FIRST_FOUR: list(codes[:, :, :4].astype(np.uint8))})


def check(store) -> None:
    rows, views = (part.ravel() for part in np.meshgrid(np.arange(len(store.labels)), np.arange(store.views)))
    shuffled = np.random.default_rng(0).permutation(len(rows))
    rows, views = rows[shuffled], views[shuffled]
    assert np.array_equal(store.column_in_view("depth", rows, views), store.read(rows, views)[:, :4])


def test_a_picture_is_of_the_same_view_as_the_codes(tmp_path):
    one, two = write(tmp_path / "one", seed=1), write(tmp_path / "two", seed=2, views=2)
    store = open_stores(str(one), corrupt="refuse")
    check(store)
    store.leave_out(np.array([0, 4, 13]))
    check(store)
    both = open_stores(f"{one},{two}", corrupt="refuse")  # other crops of the same images
    assert both.views == 5
    check(both)
    assert [len(pictures) for pictures in both.column("depth", np.arange(14))] == [5] * 14
    check(open_stores(f"{one},{two}", weights=(1.0, 0.5)))  # other images


def test_a_store_of_other_crops_without_pictures_takes_them_from_all(tmp_path):
    one = write(tmp_path / "one", seed=1)
    bare = write_packed(tmp_path / "bare", fake_codes(seed=2), np.arange(14) % 3)
    for options in ({}, {"weights": (1.0, 1.0)}):
        store = open_stores(f"{one},{bare}", **options)
        with pytest.raises(ValueError, match="holds no depth control pictures"):
            CodeBatches(store, vocab_size=256, seed=0, control="depth")


def test_a_picture_missing_for_a_view_is_told(tmp_path):
    codes = fake_codes(views=3)
    pictures = list(codes[:, :, :4].astype(np.uint8))
    pictures[5] = pictures[5][:2]
    store = open_stores(str(write_packed(tmp_path / "a", codes, np.zeros(14), columns={FIRST_FOUR: pictures})))
    with pytest.raises(ValueError, match="image 5 has 2 pictures in column depth, but 3 views"):
        store.column_in_view("depth", np.arange(14), np.zeros(14, int))


# ---- extraction


def colours_of(pictures: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in pictures.reshape(-1, 3).tolist()}


def extract(folder, vq_ckpt, out, *argv):
    call("extract", "--data-path", folder, "--vq-ckpt", vq_ckpt, *TINY, "--code-path", out, *argv)
    return open_stores(str(out), corrupt="refuse")


@pytest.mark.parametrize("argv", [[], ["--ten-crop"], ["--no-mirror"], ["--image-size", "12x20", "--ten-crop"]],
                         ids=["two views", "ten crops", "no mirror", "not square"])
def test_extracted_edges_are_those_of_each_view(argv, image_folder, vq_ckpt, tmp_path):
    store = extract(image_folder, vq_ckpt, tmp_path, "--control", "canny", "--canny-low", 10, "--canny-high", 20, *argv)
    size = tuple(store.manifest["image_size"])
    assert store.manifest["control"] == {"kind": "canny", "low": 10, "high": 20, "sigma": 1}
    data = build_dataset("imagenet", str(image_folder), size=size)
    batches = CodeBatches(store, vocab_size=256, seed=0, any_order=True, control="canny")
    seen = 0
    for epoch in range(4):
        keys = np.stack([np.full(len(store), epoch), np.arange(len(store))], 1)
        found = batches.__getitems__(keys)["control"].numpy()
        rows, views = store.choose(*keys.T, seed=0)
        for row, view, edges in zip(rows, views, found, strict=True):
            crops = code_views(data.image(int(row)), size, ten_crop="--ten-crop" in argv,
                               crop_range=store.manifest["crop"]["range"], mirror="--no-mirror" not in argv)
            assert np.array_equal(edges[0], control.canny(crops[view], low=10, high=20))
            seen += edges.any()
    assert found.shape[1:] == (1, *size) and seen > 10


@pytest.fixture
def maps(image_folder, tmp_path):
    """For each picture one of twice its size, of four colours, under the name with another ending."""
    rng, root = np.random.default_rng(0), tmp_path / "maps"
    for path in sorted(image_folder.rglob("*.*")):
        with Image.open(path) as image:
            small = rng.choice([0, 60, 120, 255], (image.height, image.width, 3)).astype(np.uint8)
        place = (root / path.relative_to(image_folder)).with_suffix(".bmp" if int(path.stem) % 2 else ".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small.repeat(2, 0).repeat(2, 1)).save(place)
    return root


@pytest.mark.parametrize("kind", ["edges", "depth", "segmentation"])
def test_maps_are_cut_as_their_pictures_are(kind, image_folder, maps, vq_ckpt, tmp_path):
    store = extract(image_folder, vq_ckpt, tmp_path / "codes", "--control", kind, "--control-path", maps, "--ten-crop",
                    "--crop-range", 1.125)  # 18 pixels: some pictures are cut as they are
    data, exact = build_dataset("imagenet", str(image_folder), size=(16, 16)), 0
    for row in range(len(store)):
        place = Path(data.name(row))
        path, = (maps / place.parent.name).glob(f"{place.stem}.*")
        with Image.open(path) as picture:
            halved = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.NEAREST)
        found = control.unpacked(store.column(kind, np.array([row]))[0], kind, 16).movedim(1, -1).numpy()
        if kind == "segmentation":
            assert colours_of(found) <= colours_of(np.asarray(halved))
            crops = code_views(halved, (16, 16), ten_crop=True, crop_range=1.125)
            if halved.size == (18, 18):
                assert np.array_equal(found, crops)
                exact += 1
        else:  # interpolated: near what the plain crops are, and not those of another view
            smooth = picture.resize(halved.size, Image.Resampling.BICUBIC)
            crops = control.grey_of(code_views(smooth, (16, 16), ten_crop=True, crop_range=1.125))
            assert np.array_equal(found[..., 0], crops)
            exact += 1
    assert exact > 1


@pytest.mark.parametrize(("argv", "said"), [
    (["--control", "depth"], "--control depth needs --control-path"),
    (["--control", "depth", "--control-path", "nowhere"], "--control-path nowhere is not a folder"),
    (["--control-path", "nowhere"], "--control-path is for --control edges, depth, segmentation"),
    (["--control", "canny", "--control-path", "nowhere"], "--control-path is for --control edges, depth, segmentation"),
    (["--control", "canny", "--canny-low", "300"], "--canny-low is 300.0 and --canny-high 200.0"),
    (["--control", "canny", "--canny-low", "-1"], "--canny-low is -1.0"),
    (["--control", "canny", "--canny-high", "nan"], "--canny-high nan"),
    (["--control", "hed"], "invalid choice: 'hed'")])
def test_flags_that_do_not_fit_together(argv, said, image_folder, vq_ckpt, tmp_path, capsys):
    with pytest.raises(SystemExit):
        extract(image_folder, vq_ckpt, tmp_path, *argv)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*_codes"))


def test_a_map_that_is_missing_or_of_another_picture(image_folder, maps, vq_ckpt, tmp_path, capsys):
    argv = ["--control", "depth", "--control-path", maps]
    last = maps / "red" / "05.bmp"
    Image.new("RGB", (90, 30)).save(last)
    with pytest.raises(SystemExit):
        extract(image_folder, vq_ckpt, tmp_path / "one", *argv)
    assert "05.bmp is 90x30 pixels, its picture" in capsys.readouterr().err
    last.unlink()
    with pytest.raises(SystemExit):
        extract(image_folder, vq_ckpt, tmp_path / "two", *argv)
    assert "--control-path has no picture for" in capsys.readouterr().err
    (maps / "red" / "05.txt").write_text("of another program: no picture")
    with pytest.raises(SystemExit):
        extract(image_folder, vq_ckpt, tmp_path / "two", *argv)
    assert "red/05 with an ending such as .png" in capsys.readouterr().err
    (maps / "blue" / "00.png").unlink()
    with pytest.raises(SystemExit):
        extract(image_folder, vq_ckpt, tmp_path / "three", *argv)
    assert "blue/00 with an ending such as .png" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("kind", ["depth", "segmentation"])
def test_one_thin_picture_among_others(kind, vq_ckpt, tmp_path):
    pixels = np.zeros((20000, 1, 3), np.uint8)
    pixels[10000:] = 255
    for name in ("photos", "maps"):
        (tmp_path / name / "a").mkdir(parents=True)
        file_of(pixels, tmp_path / name / "a" / "thin.png")
        file_of(WHITE_SQUARE, tmp_path / name / "a" / "usual.png")
    store = extract(tmp_path / "photos", vq_ckpt, tmp_path / "codes", "--image-size", 64, "--control", kind,
                    "--control-path", tmp_path / "maps")
    thin, _ = (control.unpacked(pictures, kind, 64) for pictures in store.column(kind, np.arange(2)))
    assert (thin[..., :2, :] < 16).all() and (thin[..., -2:, :] > 239).all()


def test_an_extraction_that_was_killed_goes_on_with_its_edges(image_folder, vq_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(code_writer, "PART_ROWS", 10)
    extract(image_folder, vq_ckpt, tmp_path / "whole", "--control", "canny")
    write = code_writer.write_part

    def killed(folder, part, *rest, **columns):
        if part == 2:
            raise KeyboardInterrupt
        write(folder, part, *rest, **columns)

    with monkeypatch.context() as patch:
        patch.setattr(code_writer, "write_part", killed)
        with pytest.raises(SystemExit):
            extract(image_folder, vq_ckpt, tmp_path / "cut", "--control", "canny")
    extract(image_folder, vq_ckpt, tmp_path / "cut", "--control", "canny")
    whole, cut = (content(tmp_path / name / STORE) for name in ("whole", "cut"))
    assert cut == whole and {"canny-00000.npy", "canny-offsets.npy"} <= whole.keys()


def test_other_edges_are_another_store(image_folder, vq_ckpt, tmp_path, capsys):
    extract(image_folder, vq_ckpt, tmp_path, "--control", "canny")
    kept = json.loads((tmp_path / "imagenet16_codes" / "manifest.json").read_text())
    for argv, differs in ((["--control", "canny", "--canny-low", 50], "control"), ([], "columns")):
        with pytest.raises(SystemExit):
            extract(image_folder, vq_ckpt, tmp_path, *argv)
        assert f"made with another {differs}: give another --code-path" in capsys.readouterr().err
    extract(image_folder, vq_ckpt, tmp_path, "--control", "canny")
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "imagenet16_codes" / "manifest.json").read_text()) == kept
    call("verify", "--code-path", tmp_path)
    assert "column canny, uint8 arrays nx16x2, n from 2 to 2" in capsys.readouterr().out
