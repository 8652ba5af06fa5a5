"""Images in: folders, crops, batches that depend on (seed, epoch, index) alone."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dataset import augmentation, image_folders, loader
from dataset.augmentation import center_crop, code_views, random_crop, train_view
from dataset.build import build_dataset
from dataset.loader import StepSampler, TrainImages
from evaluations.t2i.layouts import Prompt, PromptJob
from tests.conftest import ROOT, write_images
from utils.images import grid, load_png, save_npz, save_png, to_float, to_uint8
from utils.seeding import derive_seed, hash_choice, sample_generator


@pytest.fixture
def broken_folder(tmp_path):
    """As image_folder; red/05 is no image, green/03 is cut short."""
    root = write_images(tmp_path / "images", count=8)
    (root / "red" / "05.png").write_bytes(b"no image")
    whole = (root / "green" / "03.png").read_bytes()
    (root / "green" / "03.png").write_bytes(whole[:len(whole) // 2])
    return root


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- folders


def test_class_tree_numbers_classes_of_any_size_as_torchvision(tmp_path):
    root = write_images(tmp_path / "images", count=3)
    for name in ("red/00.jpg", "red/01.png", "green/02.jpg"):
        (root / name).unlink()
    ours, theirs = image_folders.class_tree(root), ImageFolder(str(root))
    assert [(str(f), label) for f, label in zip(ours.files, ours.labels, strict=True)] == theirs.samples


def test_class_tree_numbers_classes_as_torchvision(image_folder):
    ours, theirs = image_folders.class_tree(image_folder), ImageFolder(str(image_folder))
    assert ours.classes == theirs.classes == ["blue", "green", "red"]
    assert [(str(f), label) for f, label in zip(ours.files, ours.labels, strict=True)] == theirs.samples
    assert ours.image(0).mode == "RGB"


def test_images_of_any_mode_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode[0]}{len(mode)}.{'tif' if mode in ('CMYK', 'I;16') else 'png'}")
    data = image_folders.flat_folder(tmp_path)
    assert len(data) == 6
    assert {data.image(i).mode for i in range(6)} == {"RGB"}


def test_flat_folder_and_json_list(image_folder, tmp_path):
    assert len(build_dataset("coco", str(image_folder), size=(16, 16))) == 36
    assert build_dataset("pexels", str(image_folder), size=(16, 16)).classes is None
    names = ["red/00.jpg", "blue/01.png"]
    (tmp_path / "openimage_json").mkdir()
    (tmp_path / "openimage_json" / "image_paths.json").write_text(json.dumps(names))
    (tmp_path / "images").symlink_to(image_folder)
    listed = build_dataset("openimage", str(tmp_path / "images"), size=(16, 16))
    assert [listed.name(i) for i in range(2)] == [str(tmp_path / "images" / name) for name in names]
    joined = image_folders.JoinedImages([listed, build_dataset("coco", str(image_folder), size=(16, 16))])
    assert len(joined) == len(joined.labels) == 38 and not joined.labels.any()
    assert joined.name(1) == listed.name(1) and joined.name(2).endswith("blue/00.jpg")
    assert joined.image(1).tobytes() == listed.image(1).tobytes()


def test_openimage_reads_the_list_in_its_folder_first(image_folder, tmp_path):
    """As LlamaGen's tool writes it: paths that are joined with --data-path, of which one may be absolute."""
    root, elsewhere = tmp_path / "images", str(image_folder / "red" / "00.jpg")
    shutil.copytree(image_folder, root)
    (tmp_path / "openimage_json").mkdir()
    (tmp_path / "openimage_json" / "image_paths.json").write_text(json.dumps(["blue/01.png"]))
    for place, names in ((f"{root}/", ["blue/01.png"]), (root, ["red/00.jpg", "red/01.png", elsewhere])):
        if len(names) > 1:
            (root / "image_paths.json").write_text(json.dumps(names))
        data = build_dataset("openimage", str(place), size=(16, 16))
        assert [data.name(i) for i in range(len(data))] == [os.path.join(root, name) for name in names]
        assert data.image(0).mode == "RGB"


@pytest.mark.parametrize(("content", "said"), [
    (b"[", "is not JSON"), (b"\xff\xfe\xff", "is not JSON"), (b"[" * 10**5, "is not JSON"), (b"", "is not JSON"),
    (b"{}", "should be a JSON list of image paths relative to"), (b"[]", "should be a JSON list"),
    (b"[1]", "should be a JSON list"), (b'["a.png", null]', "should be a JSON list"), (b'[""]', "should be a JSON li"),
    (None, "expected a JSON list of paths relative to")])
def test_lists_that_are_none_are_named(tmp_path, content, said):
    path = tmp_path / "images" / "image_paths.json"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)) as stop:
        build_dataset("openimage", str(path.parent), size=(16, 16))
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)


def test_folders_that_are_no_data_sets_are_refused(tmp_path, image_folder):
    def message(make, *args):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            make(*args)
        return str(caught.value)

    assert "not a folder" in message(image_folders.class_tree, tmp_path / "absent")
    assert "no class folders" in message(image_folders.class_tree, tmp_path)
    assert "no images" in message(image_folders.flat_folder, tmp_path)
    assert "--dataset coco" in message(image_folders.class_tree, image_folder / "red")  # what would work
    splits = tmp_path / "splits"
    splits.mkdir()
    for name in ("train", "val"):
        (splits / name).symlink_to(image_folder)
    assert str(splits / "train") in message(image_folders.class_tree, splits)
    gap = write_images(tmp_path / "gap", count=1)
    (gap / "empty").mkdir()
    assert str(gap / "empty") in message(image_folders.class_tree, gap)
    assert "choose from" in message(lambda: build_dataset("nope", str(image_folder), size=(16, 16)))
    assert "--data-path" in message(lambda: build_dataset("imagenet", None, size=(16, 16)))
    (tmp_path / "list.json").write_text("{}")
    assert "JSON list" in message(image_folders.listed, tmp_path / "list.json", image_folder)


# ---- crops


def adms_center_crop(picture: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr (arXiv 2105.05233): box filter by halves, bicubic, margins rounded down."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


@pytest.mark.parametrize(("height", "width"), [(20, 20), (40, 40), (47, 90), (90, 47), (20, 33), (33, 20), (20, 36),
                                               (39, 61), (41, 61), (80, 163)])
def test_center_crop_is_adms(height, width):
    """Also where a margin is odd: 13 pixels are 6 and 7."""
    picture = noise(height, width)
    np.testing.assert_array_equal(center_crop(picture, (20, 20)), adms_center_crop(picture, 20))
    if min(height, width) == 20:
        top, left = (height - 20) // 2, (width - 20) // 2
        np.testing.assert_array_equal(center_crop(picture, (20, 20)),
                                      np.asarray(picture)[top:top + 20, left:left + 20])


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16), (7, 33)])
@pytest.mark.parametrize("shape", [(16, 16), (5, 90), (90, 5), (33, 65), (200, 151)])
def test_every_crop_has_its_size(size, shape):
    picture = noise(*shape)
    assert center_crop(picture, size).shape == (*size, 3)
    for seed in range(5):
        assert random_crop(picture, size, np.random.default_rng(seed)).shape == (*size, 3)
    assert code_views(picture, size, ten_crop=True, crop_range=1.1).shape == (10, *size, 3)


def test_random_crop_is_adms(monkeypatch):
    """guided-diffusion's random_crop_arr: the smaller side is drawn from the crop's to 1.25 times that, rounded up,
    both ends included; then every place is as likely, the last one included."""
    found, cut = Counter(), augmentation.cut

    def watched(image: Image.Image, whole: tuple[int, int], size: tuple[int, int], top: int, left: int) -> np.ndarray:
        found[(*whole, top, left)] += 1
        return cut(image, whole, size, top, left)

    monkeypatch.setattr(augmentation, "cut", watched)
    picture, rng = noise(20, 20), np.random.default_rng(0)
    for _ in range(4000):
        random_crop(picture, (20, 20), rng)
    wanted = {(side, side, top, left): 4000 / 6 / (side - 19) ** 2
              for side in range(20, 26) for top in range(side - 19) for left in range(side - 19)}
    assert found.keys() == wanted.keys()
    assert sum((found[key] - count) ** 2 / count for key, count in wanted.items()) < 137  # 1 in 1000 of 90 degrees


def test_train_views_are_fixed_by_their_seed():
    picture = noise(16, 16)
    views = [train_view(picture, (16, 16), np.random.default_rng(seed)) for seed in (3, 3, *range(30))]
    assert np.array_equal(views[0], views[1])
    assert len({view.tobytes() for view in views}) > 20


def test_train_views_are_mirrored_half_of_the_time():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 15, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    rng = np.random.default_rng(0)
    views = [train_view(ramp, (16, 16), rng)[0, :, 0].astype(int) for _ in range(1000)]
    assert abs(sum(view[0] > view[-1] for view in views) - 500) < 52  # 1 in 1000


# ---- batches


def test_augmentation_depends_on_seed_epoch_and_index_only(image_folder):
    data = image_folders.class_tree(image_folder)

    def views(keys, seed=0):
        return dict(zip(keys, TrainImages(data, (16, 16), seed=seed).__getitems__(keys)["images"], strict=True))

    together = views([(0, 1), (0, 2), (1, 1), (3, 20)])
    for key, image in together.items():
        assert torch.equal(views([key])[key], image)  # alone or in a batch
        assert not torch.equal(views([key], seed=1)[key], image)
    assert not torch.equal(together[0, 1], together[1, 1])
    assert together[0, 1].dtype == torch.float32
    assert together[0, 1].shape == (3, 16, 16)
    assert -1 <= together[0, 1].min() < together[0, 1].max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(image_folder, monkeypatch, workers):
    monkeypatch.setattr(loader.os, "cpu_count", lambda: 2)
    data = TrainImages(image_folders.class_tree(image_folder), (16, 16), seed=0)
    sampler = StepSampler(36, global_batch=8, accumulation=1, rank=0, world_size=1, seed=0, start_step=0, end_step=5)
    batches = list(loader.loader(data, sampler, num_workers=workers, pin_memory=False))
    direct = [data.__getitems__(keys) for keys in sampler]
    for ours, expected in zip(batches, direct, strict=True):
        assert torch.equal(ours["images"], expected["images"])
        assert torch.equal(ours["labels"], expected["labels"])


def test_unreadable_images_are_named_and_batches_keep_their_size(broken_folder, monkeypatch):
    data = image_folders.class_tree(broken_folder)  # blue 0-7, green 8-15, red 16-23
    cut, garbage = 8 + 3, 16 + 5
    train = TrainImages(data, (16, 16), seed=0)
    batch = train.__getitems__([(0, garbage), (0, 0), (0, cut)])
    assert batch["images"].shape == (3, 3, 16, 16)
    assert batch["labels"].tolist() == [2, 0, 1]
    named = [text.split(" cannot be read")[0] for text in sorted(batch["broken"])]
    assert named == [data.name(cut), data.name(garbage)]
    alone = train.__getitems__([(0, garbage)])
    assert torch.equal(alone["images"][0], batch["images"][0])
    data.files[15].write_bytes(b"no image")  # the last of its class: the next is of another
    assert train.__getitems__([(0, 15)])["labels"].tolist() == [2]
    monkeypatch.setattr(loader, "MAX_BROKEN_RUN", 1)
    with pytest.raises(ValueError, match=re.escape(data.name(garbage))):
        train.__getitems__([(0, garbage)])


def test_a_decompression_bomb_counts_as_unreadable(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    batch = TrainImages(image_folders.flat_folder(tmp_path), (4, 4), seed=0).__getitems__([(0, 0), (0, 1)])
    assert [text.split(" cannot be read")[0] for text in batch["broken"]] == [str(tmp_path / "a.png")]


# ---- seeds


def test_seeds_depend_on_every_number():
    keys = [(seed, index) for seed in range(20) for index in range(20)] + [(2**40, 1), (1, 2, 3), (3, 2, 1)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**62 for key in keys)
    assert derive_seed(3, 4) == derive_seed(3, 4)
    assert derive_seed(7, 3, 5) == 4316895526964219963  # seeds stay what they are: images and batches depend on them
    assert derive_seed(2**40 + 7) == 243648170076096133
    assert torch.rand(1, generator=sample_generator(0, 1)) != torch.rand(1, generator=sample_generator(1, 0))


def test_large_numbers_repeat_no_streams():
    """(2^32, 0) is (0, 1) to SeedSequence, and 2^64 was 0: refused where a run's seed enters, and what would wrap."""
    edges = [0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**64 - 1]
    pairs = [(seed, index) for seed in edges[:4] for index in edges]
    assert len({derive_seed(*pair) for pair in pairs}) == len(pairs)
    for seed in (-1, 2**32, 2**32 + 5, 2**64, 0.5):
        with pytest.raises(ValueError, match=f"^{seed} is no seed: expected a whole number from 0 to 4294967295$"):
            sample_generator(seed, 0)
        with pytest.raises(ValueError, match="is no seed"):
            PromptJob(Prompt("a cat"), 0, 0).seed(seed)
    assert sample_generator(np.int64(3), np.int64(4)).initial_seed() == derive_seed(3, 4)
    for key in ((-1,), (0, -1), (2**64,), (0, 2**64), (0, -2**64, 1)):
        with pytest.raises(ValueError, match="no seed can be derived from"):
            derive_seed(*key)


def test_views_are_chosen_evenly_and_for_each_visit_alone():
    epochs, rows = np.divmod(np.arange(40_000), 4000)
    chosen = hash_choice(0, epochs, rows, options=10)
    counts = np.bincount(chosen, minlength=10)
    assert abs(counts - 4000).max() < 5 * np.sqrt(4000)
    pairs = np.bincount(chosen[:36_000] * 10 + chosen[4000:], minlength=100)  # this epoch's view and the next one's
    assert abs(pairs - 360).max() < 5.5 * np.sqrt(360)
    np.testing.assert_array_equal(hash_choice(0, epochs[5:6], rows[5:6], options=10), chosen[5:6])
    assert (hash_choice(1, epochs, rows, options=10) != chosen).mean() > 0.85


# ---- images out


def test_uint8_rule_and_round_trip():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]
    picture = np.array(noise(5, 6))[None]
    assert abs(to_uint8(to_float(picture)).astype(int) - picture).max() <= 1
    assert to_float(picture).shape == (1, 3, 5, 6)
    ends = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(to_float(ends).flatten(), torch.tensor([-1, 1, -0.6]), atol=1e-7, rtol=0)


def test_pictures_on_disk_are_what_was_given(tmp_path):
    pictures = np.stack([np.asarray(noise(6, 8, seed)) for seed in range(3)])
    save_png(tmp_path / "a" / "x.png", pictures[0])
    np.testing.assert_array_equal(load_png(tmp_path / "a" / "x.png"), pictures[0])
    save_npz(tmp_path / "s.npz", pictures, count=3, shape=(6, 8), labels=np.arange(3))
    with np.load(tmp_path / "s.npz") as packed:
        np.testing.assert_array_equal(packed["arr_0"], pictures)
        assert packed["arr_1"].tolist() == [0, 1, 2]
    with pytest.raises(AssertionError):
        save_npz(tmp_path / "short.npz", pictures, count=4, shape=(6, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "s.npz"]
    sheet = grid(pictures, columns=2, gap=2)
    assert sheet.shape == (2 * 8 + 2, 2 * 10 + 2, 3)
    np.testing.assert_array_equal(sheet[2:8, 2:10], pictures[0])
    np.testing.assert_array_equal(sheet[10:16, 2:10], pictures[2])


def test_a_label_stands_below_its_picture():
    pictures = np.full((2, 40, 40, 3), 200, np.uint8)
    sheet = grid(pictures, columns=1, labels=["I", ""], gap=2)
    cell = (len(sheet) - 2) // 2
    for top in (2, 2 + cell):
        np.testing.assert_array_equal(sheet[top:top + 40, 2:42], pictures[0])
    assert sheet[42:2 + cell].min() < 100 and sheet[42 + cell:].min() == 255  # text, and none


UNFINISHED = """
import numpy as np
from dataset.loader import loader

class Keys:
    def __getitems__(self, keys):
        return {"keys": keys}

batches = iter(loader(Keys(), [np.zeros((1, 2), np.int64)] * 100, num_workers=1, pin_memory=False))
next(batches)
"""


@pytest.mark.processes
def test_a_process_ends_though_its_workers_have_not_finished():
    """Workers ignore SIGTERM, which multiprocessing sends them at exit before it waits for their end."""
    subprocess.run([sys.executable, "-c", UNFINISHED], cwd=ROOT, timeout=60,
                   check=True)
