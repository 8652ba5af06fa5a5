"""Extraction of codes: what the store says and holds, kills, ranks, unreadable images, other images in its place."""
import contextlib
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import ten_crop, to_tensor

from autoregressive.train import doctor, extract_codes
from dataset import code_check, code_writer, codes
from dataset.augmentation import center_crop, code_views
from dataset.image_folders import class_tree
from tests.conftest import TINY, TINY_GPT, call, write_images
from tests.dataset.codes import STORE, content, every_code
from tokenizer.build import TokenizerFlags, encode_images, fingerprint, load_tokenizer
from utils import cli
from utils.images import to_float


@pytest.fixture
def extract(image_folder, vq_ckpt, tmp_path):
    """extract(name, flags…) → the folder of the store written below tmp_path/name."""
    def run(name: str, *argv, size: int | str = 16):
        call("extract", "--data-path", image_folder, "--vq-ckpt", vq_ckpt, *TINY, "--image-size", size,
             "--code-path", tmp_path / name, *argv)
        return tmp_path / name / f"imagenet{size}_codes"

    return run


@pytest.fixture
def small_parts(monkeypatch):
    """Ten images per part: four parts of the 36."""
    monkeypatch.setattr(code_writer, "PART_ROWS", 10)


@pytest.fixture
def tokenizer(vq_ckpt):
    return load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))[1]



def test_the_manifest_says_all_about_the_codes(code_store, image_folder, tokenizer):
    manifest = json.loads((code_store / STORE / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert [(shard["file"], shard["rows"]) for shard in shards] == [("shard-00000.npy", 36)]
    assert len(manifest.pop("labels_sha256")) == len(shards[0]["sha256"]) == 64
    names = "\n".join(f"/{path.relative_to(image_folder)}" for path in class_tree(image_folder).files)
    assert manifest.pop("image_names") == hashlib.sha256(names.encode()).hexdigest()
    assert {key: manifest.pop(key) for key in ("image_sizes", "image_times")} == class_tree(image_folder).states()
    assert manifest == {
        "format": "llamagen-codes-1", "dataset": "imagenet", "images": 36, "count": 36, "skipped": [],
        "exif_orientation": True,
        "image_size": [16, 16], "grid": [4, 4], "views": 2, "dtype": "uint16", "classes": ["blue", "green", "red"],
        "crop": {"ten_crop": False, "range": 1.0, "mirror": True},
        "tokenizer": {"name": "VQ-4-S", "downsample": 4, "codebook_size": 256,
                      "weights_sha256": fingerprint(tokenizer)}}
    assert set(content(code_store / STORE)) >= {"manifest.json", "labels.npy", "shard-00000.npy"}


def test_codes_are_those_of_the_images_in_order(code_store, image_folder, tokenizer):
    data, store = class_tree(image_folder), codes.open_store(code_store)
    np.testing.assert_array_equal(store.labels, data.labels)
    crops = np.stack([center_crop(data.image(i), (16, 16)) for i in range(36)])
    expected = [encode_images(tokenizer, to_float(side)).numpy() for side in (crops, crops[:, :, ::-1])]
    np.testing.assert_array_equal(every_code(store), np.stack(expected, axis=1))
    assert len(np.unique(every_code(store))) > 3  # the tokenizer tells the images apart


def test_ten_crop_is_torchvisions():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 44, 3), dtype=np.uint8))
    for size, crop_range in ((16, 1.1), (16, 1.05), (16, 1.2), (15, 1.3), (16, 1.0)):  # margins 1, 0, 3, 4, 0
        base = Image.fromarray(center_crop(picture, (int(size * crop_range),) * 2))
        ours = code_views(picture, (size, size), ten_crop=True, crop_range=crop_range)
        for view, theirs in zip(ours, ten_crop(base, size), strict=True):
            assert np.array_equal(view, np.asarray(theirs))
    plain = code_views(picture, (16, 16), ten_crop=False, crop_range=1.0)
    assert np.array_equal(plain, [center_crop(picture, (16, 16)), center_crop(picture, (16, 16))[:, ::-1]])
    assert len(code_views(picture, (16, 16), ten_crop=False, crop_range=1.0, mirror=False)) == 1
    assert to_tensor(plain[0].copy()).shape == (3, 16, 16)


def test_a_store_without_mirror_images(extract, code_store):
    store, both = codes.open_store(extract("one", "--no-mirror")), codes.open_store(code_store)
    assert (store.views, both.views) == (1, 2)
    np.testing.assert_array_equal(every_code(store)[:, 0], every_code(both)[:, 0])


def test_ten_views_in_the_store(extract, image_folder, tokenizer):
    store = codes.open_store(extract("ten", "--ten-crop"))
    assert store.views == 10
    assert store.manifest["crop"] == {"ten_crop": True, "range": 1.1, "mirror": True}
    views = code_views(class_tree(image_folder).image(7), (16, 16), ten_crop=True, crop_range=1.1)
    np.testing.assert_array_equal(every_code(store)[7], encode_images(tokenizer, to_float(views)).numpy())


def test_extraction_goes_on_after_a_kill_between_parts(extract, small_parts, monkeypatch, capsys):
    whole = extract("whole")
    assert set(content(whole)) == {"manifest.json", "labels.npy", "shard-00000.npy"}
    write, written = code_writer.write_part, []

    def killed(folder, part, *rest, **columns):
        if part == 2:
            raise KeyboardInterrupt
        write(folder, part, *rest, **columns)

    monkeypatch.setattr(code_writer, "write_part", killed)
    with pytest.raises(SystemExit) as caught:
        extract("cut")
    assert caught.value.code == 130
    folder = whole.parents[1] / "cut" / whole.name
    for path in (folder, folder.parent):
        with pytest.raises(ValueError, match="unfinished: run the extraction again"):
            codes.open_store(path)
    monkeypatch.setattr(code_writer, "write_part", lambda folder, part, *rest, **columns: (written.append(part),
                                                                           write(folder, part, *rest, **columns)))
    extract("cut")
    assert written == [2, 3]
    assert content(folder) == content(whole)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    extract("cut")
    assert "complete: nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_kill_while_a_part_is_written_leaves_nothing_of_it(extract, small_parts, monkeypatch, tmp_path):
    def half(file, array):
        file.write(array.tobytes()[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(code_writer.np, "save", half)
        with pytest.raises(SystemExit):
            extract("cut")
    left = [path.name for path in (tmp_path / "cut" / STORE).rglob("*") if path.is_file()]
    assert left == ["recipe.json"]
    assert code_check.verify(extract("cut")) == []


def test_a_kill_after_the_manifest_leaves_a_readable_store(extract):
    folder = extract("done")
    (folder / "recipe.json").write_text("{}")  # the last thing that `finish` removes
    assert len(codes.open_store(folder)) == 36


def test_codes_of_another_recipe_are_not_mixed_in(extract, capsys):
    extract("codes")
    with pytest.raises(SystemExit):
        extract("codes", "--ten-crop")
    assert "already holds codes made with another views, crop" in capsys.readouterr().err


def test_codes_of_other_images_are_not_gone_on_with(image_folder, vq_ckpt, tmp_path, capsys):
    """Same classes, same count, another name; the folder itself may be called anything."""
    def extract(images):
        call("extract", "--data-path", images, "--vq-ckpt", vq_ckpt, *TINY, "--code-path", tmp_path / "codes")

    first = shutil.copytree(image_folder, tmp_path / "first")
    extract(first)
    moved = first.rename(tmp_path / "moved")
    capsys.readouterr()
    extract(f"{moved}/")
    assert "complete: nothing to do" in capsys.readouterr().out
    file = class_tree(moved).files[5]
    file.rename(file.with_stem("another"))
    with pytest.raises(SystemExit):
        extract(moved)
    assert "already holds codes made with another image_names" in capsys.readouterr().err
    path = tmp_path / "codes" / STORE / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["image_names"], manifest["image_sizes"]  # as stores were before
    path.write_text(json.dumps(manifest))
    extract(moved)
    assert "complete: nothing to do" in capsys.readouterr().out


def test_what_is_known_of_images_that_were_replaced_is_said(image_folder, vq_ckpt, small_parts, tmp_path, monkeypatch,
                                                            capsys):
    images = shutil.copytree(image_folder, tmp_path / "images")
    picture, manifest = images / "red" / "00.jpg", tmp_path / "codes" / STORE / "manifest.json"

    def said(*flags) -> str:
        with contextlib.suppress(SystemExit):
            call("extract", "--data-path", images, "--code-path", tmp_path / "codes", "--vq-ckpt", vq_ckpt, *TINY,
                 *flags)
        written = capsys.readouterr()
        return written.out + written.err

    with monkeypatch.context() as patch:
        write = code_writer.write_part
        patch.setattr(code_writer, "write_part", lambda folder, part, *rest, **columns: (
            _ for _ in ()).throw(KeyboardInterrupt) if part else write(folder, part, *rest, **columns))
        assert "other times" not in said()
    os.utime(picture, (1, 1))  # another picture of the same size
    assert "have other times than when this extraction began, and contents are not compared" in said()
    assert "their times are not, and contents are not compared" in said()
    assert "made with another exif_orientation" in said("--no-exif-orientation")
    content = picture.read_bytes()
    picture.write_bytes(content + b"more")
    assert "some files have been replaced since (they have other sizes)" in said()
    picture.write_bytes(content)
    made = json.loads(manifest.read_text())
    del made["image_times"], made["image_sizes"]  # as stores were before
    manifest.write_text(json.dumps(made))
    assert "does not say of which size and time" in said()


def test_codes_are_not_extracted_to_a_url(image_folder, vq_ckpt, capsys):
    with pytest.raises(SystemExit):
        call("extract", "--data-path", image_folder, "--vq-ckpt", vq_ckpt, *TINY, "--code-path", "s3://bucket/codes")
    assert "is a URL: extract to a folder, and upload that" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--per-proc-batch-size", 5], ["--num-workers", 2]], ids=str)
def test_codes_do_not_depend_on_batch_or_workers(extract, code_store, flags):
    made = content(extract("again", *flags))
    assert {name: made[name] for name in made} == {name: content(code_store / STORE)[name] for name in made}


def test_debug_draws_some_images_by_the_seed(extract, code_store, image_folder, monkeypatch, capsys):
    monkeypatch.setattr(extract_codes, "DEBUG_IMAGES", 5)
    whole = codes.open_store(code_store / STORE)
    drawn = {}
    for seed in (0, 1):
        folder = extract(f"debug{seed}", "--debug", "--global-seed", seed)
        store = codes.open_store(folder)
        rows = np.sort(np.random.default_rng(seed).choice(36, 5, replace=False))
        assert np.array_equal(store.read(np.arange(5), view := np.zeros(5, int)), whole.read(rows, view))
        assert np.array_equal(store.labels, whole.labels[rows]) and store.classes == whole.classes
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["debug"] == {"images": 5, "global_seed": seed} and manifest["images"] == 5
        drawn[seed] = rows.tolist()
    assert drawn[0] != drawn[1] and len(set(whole.labels[drawn[0]])) > 1
    with pytest.raises(SystemExit):
        extract("debug0", "--debug", "--global-seed", 1)
    assert "debug" in capsys.readouterr().err
    assert "debug" not in json.loads((code_store / STORE / "manifest.json").read_text())


@pytest.mark.parametrize("rows", [1024, 4], ids=["one part", "a part without a readable image"])
def test_corrupt_images_are_left_out_named_and_labels_stay_aligned(rows, vq_ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(code_writer, "PART_ROWS", rows)
    root = write_images(tmp_path / "images", count=8)
    flags = ["--vq-ckpt", vq_ckpt, *TINY, "--per-proc-batch-size", 3]
    call("extract", "--data-path", root, *flags, "--code-path", tmp_path / "sound")
    sound = codes.open_store(tmp_path / "sound")
    lost = [4, 5, 6, 7, 13]  # the second half of the first class, one in the middle
    names = class_tree(root).files
    for i in lost:
        names[i].write_bytes(names[i].read_bytes()[:60])
    call("extract", "--data-path", root, *flags, "--code-path", tmp_path / "codes")
    assert "5 unreadable images left out, such as " + str(names[4]) in capsys.readouterr().out
    store = codes.open_store(tmp_path / "codes")
    assert store.manifest["skipped"] == [str(names[i]) for i in lost]
    assert (len(store), store.manifest["count"], store.manifest["images"]) == (19, 19, 24)
    kept = np.delete(np.arange(24), lost)
    np.testing.assert_array_equal(store.labels, sound.labels[kept])
    np.testing.assert_array_equal(every_code(store), every_code(sound)[kept])
    assert code_check.verify(store.folder) == []


def test_images_need_not_be_square(extract, tmp_path):
    folder = extract("wide", size="16x24")
    store = codes.open_store(folder)
    assert store.grid == (4, 6)
    assert every_code(store).shape == (36, 2, 24)
    call("train_gpt", "--code-path", tmp_path / "wide", *TINY_GPT, "--epochs", 1, "--image-size", "16x24",
         "--results-dir", tmp_path / "results")
    config = json.loads((tmp_path / "results" / "000-GPT-S" / "config.json").read_text())
    assert config["model"]["grid"] == [4, 6]


def test_names_of_strangers_folders_do_nothing_to_a_terminal_and_end_no_command(vq_ckpt, tmp_path, capsys):
    root = write_images(tmp_path / "images", count=4)
    for name, path in zip(("a\x1b[31mred", "two\nlines", "turned\u202eround"), sorted(root.iterdir()), strict=True):
        (path / "br\x1b[33moken.png").write_bytes(b"x")
        path.rename(root / name)
    given = ["--vq-ckpt", vq_ckpt, "--code-path", tmp_path / "codes"]
    call("extract", "--data-path", root, *given, *TINY)
    call("verify", *given)
    with pytest.raises(SystemExit):  # random codes are found to be a problem
        cli.run(doctor.main, doctor.DoctorFlags, [str(word) for word in (*given, "--output", tmp_path / "doctor")])
    call("train_gpt", *given, "--results-dir", tmp_path / "results", *TINY_GPT, "--epochs", 1)
    said = "".join(capsys.readouterr())
    assert r"br\x1b[33moken.png" in said and "pictures: " in said
    assert not [letter for letter in said.replace("\x1b[A", "") if letter in "\x1b\u202e\a"]
