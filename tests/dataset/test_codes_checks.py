"""Packed stores that are damaged, or not: found by verification, refused or skipped by training, remembered."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import code_check
from dataset.code_check import verify
from dataset.codes import CodeBatches, open_stores
from tests.conftest import call
from tests.dataset.codes import STORE, every_code, fake_codes, flip_byte, write_llamagen, write_packed
from utils.checkpoints import containers
from utils.files import file_hash


def beyond_the_codebook(path):
    codes = np.load(path)
    codes[1, 1, 1] = 256
    np.save(path, codes)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = file_hash(path)
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
    "labels.npy is missing or cut short": lambda folder: (folder / "labels.npy").write_bytes(b""),
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
        assert said.strip() in error
        assert str(tmp_path) in error


def test_a_sound_store_is_verified_and_decoded(code_store, vq_ckpt, tmp_path, capsys):
    folder = shutil.copytree(code_store / STORE, tmp_path / STORE)
    assert verify(folder) == []
    for path in (folder, tmp_path):
        call("verify", "--code-path", path, "--vq-ckpt", vq_ckpt)
        assert "36 images, 2 views of 4x4 codes, 3 classes: sound" in capsys.readouterr().out
        picture = np.asarray(Image.open(folder / "verify.png"))
        assert picture.shape[1] == 8 * 18 + 2
        assert picture.std() > 5
        (folder / "verify.png").unlink()
    other = tmp_path / "other.pt"
    content = containers.read(vq_ckpt)
    state = containers.weights(content, vq_ckpt)
    state["quant_conv.bias"] += 1
    torch.save({"model": state, "config": containers.saved_config(content)}, other)
    with pytest.raises(SystemExit):
        call("verify", "--code-path", folder, "--vq-ckpt", other)
    assert "other.pt is not the tokenizer that made the codes" in capsys.readouterr().err


def test_verification_says_where_there_are_no_hashes(tmp_path, capsys):
    call("verify", "--code-path", write_llamagen(tmp_path, fake_codes(), [0] * 14))
    out = capsys.readouterr().out
    assert "no hashes to check" in out
    assert "sound" not in out


# ---- before training


@pytest.fixture
def packed(tmp_path):
    """A store of 14 images in shards of four."""
    return write_packed(tmp_path / "packed", fake_codes(), np.arange(14) % 3)


def test_a_corrupt_shard_is_refused_by_name(packed):
    flip_byte(packed / "shard-00001.npy")
    assert len(open_stores(str(packed))) == 14  # sizes alone do not show it
    with pytest.raises(ValueError, match=r"shard-00001\.npy has changed .*: extract the codes again, or go on without "
                                         r"by --corrupt-shards skip"):
        open_stores(str(packed), corrupt="refuse")
    (packed / "shard-00002.npy").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.npy has changed .*shard-00002\.npy is missing"):
        open_stores(str(packed), corrupt="refuse")
    with pytest.raises(ValueError, match=r"damaged: [^;]*shard-00002\.npy is missing"):
        open_stores(str(packed))


def test_images_of_corrupt_shards_are_left_out_as_asked(packed, capsys):
    codes, labels, left = fake_codes(), np.arange(14) % 3, [*range(4), *range(8, 12)]
    flip_byte(packed / "shard-00001.npy")
    (packed / "shard-00003.npy").write_bytes(b"")
    store = open_stores(str(packed), corrupt="skip")
    warning = capsys.readouterr().err
    assert "warning: " in warning
    assert "6 of 14 images are left out" in warning
    assert warning.count(".npy") == 2
    assert len(store) == 8
    np.testing.assert_array_equal(store.labels, labels[left])
    np.testing.assert_array_equal(every_code(store), codes[left])
    batch = CodeBatches(store, vocab_size=256, seed=0).__getitems__(np.array([(0, 7), (3, 4)]))
    assert batch["labels"].tolist() == labels[[11, 8]].tolist()
    mixed = open_stores(str(packed), weights=(2.0,), corrupt="skip")
    assert (len(mixed), len(mixed.labels)) == (16, 8)
    np.testing.assert_array_equal(every_code(mixed), codes[left])


def test_what_one_crop_lost_the_other_leaves_out_too(packed, tmp_path):
    other = write_packed(tmp_path / "other", fake_codes(seed=1), np.arange(14) % 3, rows=5)
    flip_byte(packed / "shard-00000.npy")
    flip_byte(other / "shard-00002.npy")
    both = open_stores(f"{packed},{other}", corrupt="skip")
    np.testing.assert_array_equal(both.labels, (np.arange(14) % 3)[4:10])
    expected = np.concatenate([fake_codes(), fake_codes(seed=1)], axis=1)[4:10]
    np.testing.assert_array_equal(every_code(both), expected)


def test_labels_and_whole_stores_cannot_be_skipped(packed):
    for shard in packed.glob("shard-*"):
        flip_byte(shard)
    with pytest.raises(ValueError, match=r"extract the codes again$"):
        open_stores(str(packed), corrupt="skip")
    flip_byte(packed / "labels.npy")
    with pytest.raises(ValueError, match=r"labels\.npy has changed .* and 1 more: extract the codes again$"):
        open_stores(str(packed), corrupt="skip")


def test_a_store_found_sound_is_read_once(packed, own_cache, monkeypatch):
    hashed = []
    monkeypatch.setattr(code_check, "file_hash", lambda path: hashed.append(path.name) or file_hash(path))

    def shards_read(**options) -> int:
        hashed.clear()
        open_stores(str(packed), corrupt="refuse", **options)
        return sum(name.startswith("shard") for name in hashed)

    assert [shards_read(), shards_read()] == [4, 4]  # small stores leave nothing in the cache
    assert not code_check.codes_cache().exists()
    monkeypatch.setattr(code_check, "REMEMBERED_FROM", 0)
    assert [shards_read(), shards_read(), shards_read(remembered=False)] == [4, 0, 4]
    os.utime(packed / "shard-00002.npy", ns=(1, 1))
    assert [shards_read(), shards_read()] == [4, 0]
    moved = shutil.copytree(packed, packed.parent / "moved")  # with its times
    flip_byte(moved / "shard-00003.npy")
    shutil.copystat(packed / "shard-00003.npy", moved / "shard-00003.npy")
    for _ in range(2):  # damage is not remembered as sound
        with pytest.raises(ValueError, match=r"shard-00003\.npy has changed"):
            open_stores(str(moved), corrupt="refuse")
    flip_byte(packed / "shard-00003.npy")
    with pytest.raises(ValueError, match=r"shard-00003\.npy has changed"):
        open_stores(str(packed), corrupt="refuse")


def test_a_cache_that_cannot_be_written_does_not_stop_training(packed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(code_check, "REMEMBERED_FROM", 0)
    assert len(open_stores(str(packed), corrupt="refuse")) == 14


def test_verification_skips_as_asked(packed, capsys):
    flip_byte(packed / "shard-00000.npy")
    call("verify", "--code-path", packed, "--corrupt-shards", "skip")
    captured = capsys.readouterr()
    assert "10 images, 10 views of 4x4 codes, 3 classes: sound where not left out" in captured.out
    assert "shard-00000.npy has changed" in captured.err
