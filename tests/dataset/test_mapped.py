"""Memory-mapped files: no descriptor stays open, maps are bounded, thousands of old shards are one store."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dataset import mapped
from dataset.codes import open_stores
from dataset.mapped import MappedFiles, map_array
from tests.conftest import ROOT
from tests.dataset.codes import every_code, fake_codes
from utils.files import file_hash

UINT16 = np.dtype(np.uint16)


def saved(path, array) -> np.ndarray:
    np.save(path, array)
    return array


def maps_of(folder) -> list[str]:
    """The files below a folder that this process has mapped."""
    with open("/proc/self/maps") as file:
        return [line.split(maxsplit=5)[5].strip() for line in file if str(folder) in line]


def test_an_array_is_mapped_without_a_descriptor(tmp_path):
    wanted = saved(tmp_path / "a.npy", np.arange(24, dtype=np.uint16).reshape(4, 3, 2))
    before = len(os.listdir("/proc/self/fd"))
    array = map_array(tmp_path / "a.npy", (4, 3, 2), UINT16)
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(array, wanted)
    assert maps_of(tmp_path) == [str(tmp_path / "a.npy")]
    assert not array.flags.writeable
    row = array[3]
    del array
    assert row.tolist() == wanted[3].tolist()  # a view keeps the map
    del row
    assert not maps_of(tmp_path)
    assert map_array(tmp_path / "a.npy", (None, 3, 2), UINT16).shape == (4, 3, 2)


@pytest.mark.parametrize(("write", "said"), [
    (lambda path: None, "is missing or cut short"),
    (lambda path: path.mkdir(), "is missing or cut short"),
    (lambda path: path.write_bytes(b""), "is missing or cut short"),
    (lambda path: path.write_bytes(b"x" * 500), "is missing or cut short"),
    (lambda path: path.write_bytes(whole(path)[:-1]), "129 bytes|bytes, expected"),
    (lambda path: path.write_bytes(whole(path) + b"x"), "bytes, expected"),
    (lambda path: saved(path, np.zeros((3, 2), np.uint16)), r"uint16 of shape \(3, 2\), expected uint16 of \(2, 2\)"),
    (lambda path: saved(path, np.zeros(4, np.uint16)), r"uint16 of shape \(4,\), expected"),
    (lambda path: saved(path, np.zeros((2, 2), np.int64)), r"int64 of shape \(2, 2\), expected uint16"),
    (lambda path: saved(path, np.zeros((2, 2), np.uint16, order="F")), "a plain array"),
    (lambda path: saved(path, np.array([[None] * 2] * 2)), "a plain array"),
])
def test_what_is_another_file_is_named(tmp_path, write, said):
    write(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=said) as caught:
        map_array(tmp_path / "a.npy", (2, 2), UINT16)
    assert str(caught.value).startswith(str(tmp_path / "a.npy"))
    assert len(str(caught.value).splitlines()) == 1


def whole(path) -> bytes:
    saved(path, np.zeros((2, 2), np.uint16))
    return path.read_bytes()


def test_maps_are_bounded_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAPS", 3)
    paths = [tmp_path / f"{i}.npy" for i in range(8)]
    wanted = [saved(path, np.full((2, 4), i, np.uint16)) for i, path in enumerate(paths)]
    files = MappedFiles(paths, np.arange(0, 18, 2), (4,), UINT16)
    assert files.home(np.array([0, 1, 2, 15])).tolist() == [0, 0, 1, 7]
    for i in np.random.default_rng(0).integers(8, size=100).tolist():
        np.testing.assert_array_equal(files[i], wanted[i])
        assert len(maps_of(tmp_path)) <= 3
    assert not files.__getstate__()["mapped"]


def many_shards(folder, codes, labels) -> None:
    """A store as earlier versions wrote it, with a file per image."""
    folder.mkdir()
    shards = []
    for i, code in enumerate(codes):
        np.save(folder / f"shard-{i:05d}.npy", code[None].astype(np.uint16))
        shards.append({"file": f"shard-{i:05d}.npy", "rows": 1, "sha256": file_hash(folder / f"shard-{i:05d}.npy")})
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    (folder / "manifest.json").write_text(json.dumps({
        "format": "llamagen-codes-1", "dataset": "imagenet", "images": len(codes), "image_names": "0" * 64,
        "image_size": [16, 16], "grid": [4, 4], "views": codes.shape[1],
        "crop": {"ten_crop": False, "range": 1.0, "mirror": True}, "dtype": "uint16", "classes": None,
        "tokenizer": {"name": "VQ-4-S", "downsample": 4, "codebook_size": 256, "weights_sha256": "0" * 64},
        "count": len(codes), "labels_sha256": file_hash(folder / "labels.npy"), "skipped": [], "shards": shards}))


UNDER_A_LOW_LIMIT = """
import os, resource, sys
import numpy as np, torch
from dataset.codes import CodeBatches, open_stores
from dataset.loader import StepSampler, loader
from tests.conftest import call
from tests.dataset.codes import every_code, fake_codes

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
a, b = sys.argv[1:]
before = len(os.listdir("/proc/self/fd"))
both = open_stores(f"{a},{b}", corrupt="refuse")
wanted = np.concatenate([fake_codes(2500, 2), fake_codes(2500, 1, seed=1)], axis=1)
np.testing.assert_array_equal(every_code(both), wanted)
np.testing.assert_array_equal(both.labels, np.arange(2500) % 7)
assert len(os.listdir("/proc/self/fd")) == before, os.listdir("/proc/self/fd")
for workers in (0, 2):
    seen = []
    sampler = StepSampler(2500, global_batch=250, accumulation=1, rank=0, world_size=1, seed=0, start_step=0,
                          end_step=10)
    for batch in loader(CodeBatches(both, vocab_size=256, seed=0), sampler, num_workers=workers, pin_memory=False):
        seen.append(batch["labels"])
        assert batch["codes"].shape == (250, 16)
    assert torch.equal(torch.cat(seen).bincount(), torch.from_numpy(both.labels.astype(int)).bincount())
call("verify", "--code-path", a)
call("verify", "--code-path", f"{a},{b}")
"""


@pytest.mark.processes
def test_thousands_of_old_shards_open_under_a_low_limit_of_descriptors(tmp_path):
    for name, codes in (("a", fake_codes(2500, 2)), ("b", fake_codes(2500, 1, seed=1))):
        many_shards(tmp_path / name, codes, np.arange(2500) % 7)
    done = subprocess.run([sys.executable, "-c", UNDER_A_LOW_LIMIT, str(tmp_path / "a"), str(tmp_path / "b")], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "2500 images, 2 views of 4x4 codes, 7 classes: sound" in done.stdout
    assert "2500 images, 3 views of 4x4 codes, 7 classes: sound" in done.stdout


def test_old_shards_are_told_when_they_are_damaged_or_missing(tmp_path):
    many_shards(tmp_path / "a", fake_codes(9, 2), np.arange(9))
    (tmp_path / "a" / "shard-00004.npy").unlink()
    with pytest.raises(ValueError, match=r"shard-00004\.npy is missing"):
        open_stores(str(tmp_path / "a"))
    store = open_stores(str(tmp_path / "a"), corrupt="skip")
    np.testing.assert_array_equal(every_code(store), np.delete(fake_codes(9, 2), 4, axis=0))
