"""Code stores: extraction that survives kills and ranks, every layout that is read, verification."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import ten_crop, to_tensor

from autoregressive.train import extract_codes
from autoregressive.train.train import open_codes
from dataset import codes as stores
from dataset.augmentation import center_crop, code_views
from dataset.image_folders import class_tree
from tests.conftest import TINY, TINY_GPT, call, entry, write_images
from tokenizer.build import TokenizerFlags, encode_images, fingerprint, load_tokenizer
from utils.cli import build_parser
from utils.images import to_float

STORE = "imagenet16_codes"


@pytest.fixture
def extract(image_folder, vq_ckpt, tmp_path):
    """extract(name, flags…) → the folder of the store written below tmp_path/name."""
    def run(name: str, *argv, size: int | str = 16):
        call("extract", "--data-path", image_folder, "--vq-ckpt", vq_ckpt, *TINY, "--image-size", size,
             "--code-path", tmp_path / name, *argv)
        return tmp_path / name / f"imagenet{size}_codes"

    return run


@pytest.fixture
def small_shards(monkeypatch):
    """Ten images per shard: four shards of the 36."""
    monkeypatch.setattr(stores, "SHARD_ROWS", 10)


@pytest.fixture
def tokenizer(vq_ckpt):
    return load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))[1]


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def every_code(store: stores.CodeStore) -> np.ndarray:
    """All codes, (N, V, L)."""
    rows = np.arange(len(store))
    return np.stack([store.read(rows, np.full(len(store), view)) for view in range(store.views)], axis=1)


# ---- extraction


def test_the_manifest_says_all_about_the_codes(code_store, tokenizer):
    manifest = json.loads((code_store / STORE / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert [(shard["file"], shard["rows"]) for shard in shards] == [("shard-00000.npy", 36)]
    assert len(manifest.pop("labels_sha256")) == len(shards[0]["sha256"]) == 64
    assert manifest == {
        "format": "llamagen-codes-1", "dataset": "imagenet", "images": 36, "count": 36, "skipped": [],
        "image_size": [16, 16], "grid": [4, 4], "views": 2, "dtype": "uint16", "classes": ["blue", "green", "red"],
        "crop": {"ten_crop": False, "range": 1.0, "mirror": True},
        "tokenizer": {"name": "VQ-4-S", "downsample": 4, "codebook_size": 256,
                      "weights_sha256": fingerprint(tokenizer)}}
    assert set(content(code_store / STORE)) >= {"manifest.json", "labels.npy", "shard-00000.npy"}


def test_codes_are_those_of_the_images_in_order(code_store, image_folder, tokenizer):
    data, store = class_tree(image_folder), stores.open_store(code_store)
    np.testing.assert_array_equal(store.labels, data.labels)
    crops = np.stack([center_crop(data.image(i), (16, 16)) for i in range(36)])
    expected = [encode_images(tokenizer, to_float(side)).numpy() for side in (crops, crops[:, :, ::-1])]
    np.testing.assert_array_equal(every_code(store), np.stack(expected, axis=1))
    assert len(np.unique(every_code(store))) > 3  # the tokenizer tells the images apart


def test_ten_crop_is_torchvisions():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 44, 3), dtype=np.uint8))
    for size, crop_range in ((16, 1.1), (16, 1.05), (15, 1.3), (16, 1.0)):
        base = Image.fromarray(center_crop(picture, (int(size * crop_range),) * 2))
        ours = code_views(picture, (size, size), ten_crop=True, crop_range=crop_range)
        for view, theirs in zip(ours, ten_crop(base, size), strict=True):
            assert np.array_equal(view, np.asarray(theirs))
    plain = code_views(picture, (16, 16), ten_crop=False, crop_range=1.0)
    assert np.array_equal(plain, [center_crop(picture, (16, 16)), center_crop(picture, (16, 16))[:, ::-1]])
    assert len(code_views(picture, (16, 16), ten_crop=False, crop_range=1.0, mirror=False)) == 1
    assert to_tensor(plain[0].copy()).shape == (3, 16, 16)


def test_ten_views_in_the_store(extract, image_folder, tokenizer):
    store = stores.open_store(extract("ten", "--ten-crop"))
    assert store.views == 10
    assert store.manifest["crop"] == {"ten_crop": True, "range": 1.1, "mirror": True}
    views = code_views(class_tree(image_folder).image(7), (16, 16), ten_crop=True, crop_range=1.1)
    np.testing.assert_array_equal(every_code(store)[7], encode_images(tokenizer, to_float(views)).numpy())


def test_extraction_goes_on_after_a_kill_between_shards(extract, small_shards, monkeypatch, capsys):
    whole = extract("whole")
    assert sorted(name for name in content(whole) if name.endswith("npy")) == [
        "labels.npy", *(f"shard-0000{i}.npy" for i in range(4))]
    write, written = stores.write_shard, []

    def killed(folder, shard, *rest):
        if shard == 2:
            raise KeyboardInterrupt
        write(folder, shard, *rest)

    monkeypatch.setattr(stores, "write_shard", killed)
    with pytest.raises(SystemExit) as caught:
        extract("cut")
    assert caught.value.code == 130
    folder = whole.parents[1] / "cut" / whole.name
    for path in (folder, folder.parent):
        with pytest.raises(ValueError, match="unfinished: run the extraction again"):
            stores.open_store(path)
    monkeypatch.setattr(stores, "write_shard", lambda folder, shard, *rest: (written.append(shard),
                                                                             write(folder, shard, *rest)))
    extract("cut")
    assert written == [2, 3]
    assert content(folder) == content(whole)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    extract("cut")
    assert "complete: nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_kill_while_a_shard_is_written_leaves_no_part_of_it(extract, small_shards, monkeypatch, tmp_path):
    def half(file, array):
        file.write(array.tobytes()[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stores.np, "save", half)
        with pytest.raises(SystemExit):
            extract("cut")
    assert list(content(tmp_path / "cut" / STORE)) == ["recipe.json"]
    assert stores.verify(extract("cut")) == []


def test_a_kill_after_the_manifest_leaves_a_readable_store(extract):
    folder = extract("done")
    (folder / "recipe.json").write_text("{}")  # the last thing that `finish` removes
    assert len(stores.open_store(folder)) == 36


def test_codes_of_another_recipe_are_not_mixed_in(extract, capsys):
    extract("codes")
    with pytest.raises(SystemExit):
        extract("codes", "--ten-crop")
    assert "already holds codes made with another views, crop" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--per-proc-batch-size", 5], ["--num-workers", 2]], ids=str)
def test_codes_do_not_depend_on_batch_or_workers(extract, code_store, flags):
    made = content(extract("again", *flags))
    assert {name: made[name] for name in made} == {name: content(code_store / STORE)[name] for name in made}


def test_debug_takes_the_first_images_only(extract, monkeypatch):
    monkeypatch.setattr(extract_codes, "DEBUG_IMAGES", 5)
    assert len(stores.open_store(extract("debug", "--debug"))) == 5


@pytest.mark.parametrize("rows", [1024, 4], ids=["one shard", "a shard without a readable image"])
def test_corrupt_images_are_left_out_named_and_labels_stay_aligned(rows, vq_ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stores, "SHARD_ROWS", rows)
    root = write_images(tmp_path / "images", count=8)
    flags = ["--vq-ckpt", vq_ckpt, *TINY, "--per-proc-batch-size", 3]
    call("extract", "--data-path", root, *flags, "--code-path", tmp_path / "sound")
    sound = stores.open_store(tmp_path / "sound")
    lost = [4, 5, 6, 7, 13]  # the second half of the first class, one in the middle
    names = class_tree(root).files
    for i in lost:
        names[i].write_bytes(names[i].read_bytes()[:60])
    call("extract", "--data-path", root, *flags, "--code-path", tmp_path / "codes")
    assert "5 unreadable images left out, such as " + str(names[4]) in capsys.readouterr().out
    store = stores.open_store(tmp_path / "codes")
    assert store.manifest["skipped"] == [str(names[i]) for i in lost]
    assert (len(store), store.manifest["count"], store.manifest["images"]) == (19, 19, 24)
    kept = np.delete(np.arange(24), lost)
    np.testing.assert_array_equal(store.labels, sound.labels[kept])
    np.testing.assert_array_equal(every_code(store), every_code(sound)[kept])
    assert stores.verify(store.folder) == []


def test_images_need_not_be_square(extract, tmp_path):
    folder = extract("wide", size="16x24")
    store = stores.open_store(folder)
    assert store.grid == (4, 6)
    assert every_code(store).shape == (36, 2, 24)
    call("train_gpt", "--code-path", tmp_path / "wide", *TINY_GPT, "--epochs", 1, "--image-size", "16x24",
         "--results-dir", tmp_path / "results")
    config = json.loads((tmp_path / "results" / "000-GPT-S" / "config.json").read_text())
    assert config["model"]["grid"] == [4, 6]


# ---- other layouts


def write_llamagen(root, codes: np.ndarray, labels, *, name: str = "imagenet16"):
    """<root>/<name>_codes/{i}.npy (1, V, L) int64 and <name>_labels/{i}.npy (1,)."""
    for i, (code, label) in enumerate(zip(codes, labels, strict=True)):
        for kind, value in (("codes", code[None].astype(np.int64)), ("labels", np.array([label]))):
            (root / f"{name}_{kind}").mkdir(parents=True, exist_ok=True)
            np.save(root / f"{name}_{kind}" / f"{i}.npy", value)
    return root


def fake_codes(count: int = 14, views: int = 10, tokens: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, views, tokens))


@pytest.mark.parametrize("views", [1, 2, 10])
def test_llamagens_layout_is_read(tmp_path, views, monkeypatch):
    codes, labels = fake_codes(views=views), np.arange(14) % 5
    write_llamagen(tmp_path, codes, labels)
    for path in (tmp_path, tmp_path / STORE):
        store = stores.open_store(path)
        np.testing.assert_array_equal(every_code(store), codes)
        np.testing.assert_array_equal(store.labels, labels)
        assert (store.views, store.grid, store.num_classes, store.vocab_size) == (views, (4, 4), 5, None)
    monkeypatch.chdir(tmp_path)
    assert len(stores.open_store(stores.Path("."))) == 14
    monkeypatch.chdir(tmp_path / STORE)
    assert len(stores.open_store(stores.Path("."))) == 14


def test_arpgs_layout_is_read(tmp_path):
    codes = fake_codes(views=2)
    labels = np.array([0] * 11 + [2] + [10] * 2)
    places = [*range(11), 0, 0, 1]
    for code, label, place in zip(codes, labels, places, strict=True):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        np.save(tmp_path / str(label) / f"{place}.npy", code)
    store = stores.open_store(tmp_path)
    np.testing.assert_array_equal(every_code(store), codes)  # 10.npy comes after 9.npy, class 10 after class 2
    np.testing.assert_array_equal(store.labels, labels)
    assert store.num_classes == 11


def test_other_layouts_may_hold_grids_that_are_not_square(tmp_path):
    write_llamagen(tmp_path, fake_codes(tokens=24), [0] * 14, name="imagenet64x96")
    with pytest.raises(ValueError, match="24 tokens, no square: give --image-size"):
        stores.open_store(tmp_path)
    assert stores.open_store(tmp_path, grid=(4, 6)).grid == (4, 6)
    with pytest.raises(ValueError, match="grid of 4x4 does not hold"):
        stores.open_store(tmp_path, grid=(4, 4))
    flags = entry("train_gpt")[1]

    def opened(*argv):
        words = map(str, ["--code-path", tmp_path, *argv])
        return open_codes(flags(**vars(build_parser(flags).parse_args(list(words)))))

    assert opened("--image-size", "64x96").grid == (4, 6)
    assert opened("--image-size", "32x48", "--downsample-size", 8).grid == (4, 6)
    with pytest.raises(ValueError, match="does not hold"):
        opened("--image-size", "32x96")


def test_two_crop_ranges_are_mixed(tmp_path, extract):
    wide, narrow = extract("wide", "--ten-crop"), extract("narrow", "--ten-crop", "--crop-range", 1.05)
    both = stores.open_stores(f"{wide},{narrow}")
    assert both.views == 20
    parts = [every_code(stores.open_store(folder)) for folder in (wide, narrow)]
    assert not np.array_equal(*parts)
    np.testing.assert_array_equal(every_code(both), np.concatenate(parts, axis=1))
    rows, views = np.array([3, 3, 30, 0]), np.array([19, 0, 10, 9])
    np.testing.assert_array_equal(both.read(rows, views), every_code(both)[rows, views])
    llamagen = write_llamagen(tmp_path / "old", parts[0], both.labels)
    assert stores.open_stores(f"{llamagen},{narrow}").vocab_size == 256
    other = write_llamagen(tmp_path / "other", fake_codes(count=36), np.roll(both.labels, 1))
    with pytest.raises(ValueError, match="does not hold other views"):
        stores.open_stores(f"{wide},{other}")


def test_damaged_files_of_other_layouts_are_named(tmp_path):
    write_llamagen(tmp_path, fake_codes(), [0] * 14)
    folder = tmp_path / STORE
    for content, said in ((b"", "cut short"), (b"garbage", "no array"), (None, "is missing")):
        path = folder / "3.npy"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            every_code(stores.open_store(tmp_path)) if content is not None else stores.open_store(tmp_path)
    write_llamagen(tmp_path, fake_codes(), [0] * 14)
    np.save(folder / "3.npy", fake_codes(count=1, views=2))
    with pytest.raises(ValueError, match=r"3\.npy holds codes of shape \(2, 16\)"):
        every_code(stores.open_store(tmp_path))


# ---- batches


def test_batches_draw_one_view_per_visit(tmp_path):
    codes = fake_codes()
    store = stores.open_store(write_llamagen(tmp_path, codes, np.arange(14)))
    keys = [(epoch, row) for epoch in range(30) for row in range(14)]
    batch = stores.CodeBatches(store, vocab_size=256, seed=0).__getitems__(keys)
    assert batch["codes"].shape == (420, 16)
    assert batch["codes"].dtype == batch["labels"].dtype == torch.int64
    drawn = []
    for (_, row), code, label in zip(keys, batch["codes"].numpy(), batch["labels"].tolist(), strict=True):
        view, = np.flatnonzero((codes[row] == code).all(-1))
        drawn.append(view)
        assert label == row
    assert np.bincount(drawn, minlength=10).min() > 20
    alone = stores.CodeBatches(store, vocab_size=256, seed=0).__getitems__(keys[77:78])
    assert torch.equal(alone["codes"][0], batch["codes"][77])
    other = stores.CodeBatches(store, vocab_size=256, seed=1).__getitems__(keys)
    assert not torch.equal(other["codes"], batch["codes"])


@pytest.mark.parametrize("wrong", [-1, 256])
def test_codes_outside_the_vocabulary_are_refused(tmp_path, wrong):
    codes = fake_codes(views=1)
    codes[5, 0, 3] = wrong
    batches = stores.CodeBatches(stores.open_store(write_llamagen(tmp_path, codes, [0] * 14)), vocab_size=256, seed=0)
    assert len(batches.__getitems__([(0, row) for row in range(5)])["codes"]) == 5
    with pytest.raises(ValueError, match=f"code {wrong}, but the model's vocabulary is 256"):
        batches.__getitems__([(0, row) for row in range(14)])


def test_codes_are_stored_in_the_smallest_type():
    assert [stores.code_dtype(size) for size in (256, 2**16, 2**16 + 1)] == [np.uint16, np.uint16, np.uint32]


# ---- verification


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def beyond_the_codebook(path):
    codes = np.load(path)
    codes[1, 1, 1] = 256
    np.save(path, codes)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = stores.file_hash(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "shard-00000.npy has changed": lambda folder: flip_byte(folder / "shard-00000.npy"),
    "labels.npy has changed": lambda folder: flip_byte(folder / "labels.npy"),
    "holds codes beyond the codebook": lambda folder: beyond_the_codebook(folder / "shard-00000.npy"),
    "shard-00000.npy is missing or cut short": lambda folder: (folder / "shard-00000.npy").unlink(),
    "shard-00000.npy is missing or cut short ": lambda folder: (folder / "shard-00000.npy").write_bytes(
        (folder / "shard-00000.npy").read_bytes()[:-100]),
    "shard-00000.npy is missing or cut short  ": lambda folder: (folder / "shard-00000.npy").write_bytes(b""),
    "labels.npy is missing": lambda folder: (folder / "labels.npy").unlink(),
    "labels.npy is no array": lambda folder: (folder / "labels.npy").write_bytes(b""),
    "manifest.json is damaged": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_verification_finds_damage(said, code_store, tmp_path, capsys):
    folder = shutil.copytree(code_store / STORE, tmp_path / STORE)
    DAMAGE[said](folder)
    for path in (folder, tmp_path, f"{code_store},{folder}"):  # also where the store is one of several, or below
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call("verify", "--code-path", path)
        assert caught.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1].rpartition("error: ")[2]
        assert said.strip() in error or (said.startswith("labels.npy has") and "does not hold other views" in error)
        assert str(tmp_path) in error


def test_a_sound_store_is_verified_and_decoded(code_store, vq_ckpt, gpt_ckpt, tmp_path, capsys):
    folder = shutil.copytree(code_store / STORE, tmp_path / STORE)
    assert stores.verify(folder) == []
    for path in (folder, tmp_path):
        call("verify", "--code-path", path, "--vq-ckpt", vq_ckpt)
        assert "36 images, 2 views of 4x4 codes, 3 classes: sound" in capsys.readouterr().out
        picture = np.asarray(Image.open(folder / "verify.png"))
        assert picture.shape[1] == 8 * 18 + 2
        assert picture.std() > 5
        (folder / "verify.png").unlink()
    other = tmp_path / "other.pt"
    state = torch.load(vq_ckpt, weights_only=True)
    state["ema"]["quant_conv.bias"] += 1
    torch.save(state, other)
    with pytest.raises(SystemExit):
        call("verify", "--code-path", folder, "--vq-ckpt", other)
    assert "other.pt is not the tokenizer that made the codes" in capsys.readouterr().err


def test_verification_says_where_there_are_no_hashes(tmp_path, capsys):
    call("verify", "--code-path", write_llamagen(tmp_path, fake_codes(), [0] * 14))
    out = capsys.readouterr().out
    assert "no hashes to check" in out
    assert "sound" not in out
