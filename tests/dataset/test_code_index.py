"""Folders of one file per image: looked through once, and again when they have changed; no list of paths is held."""
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dataset import code_files, code_index
from dataset.code_check import codes_cache
from dataset.codes import CodeBatches, open_stores
from dataset.loader import StepSampler, loader
from tests.dataset.codes import STORE, every_code, fake_codes, write_llamagen

LABELS = np.arange(14) % 5
CODES = fake_codes(views=2)


@pytest.fixture(autouse=True)
def small_indices(monkeypatch, own_cache):
    """Ten files are worth an index."""
    monkeypatch.setattr(code_index, "INDEXED_FROM", 10)


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """What is looked through."""
    found = []
    for name in ("read_labels", "name_files", "count_numbered"):
        real = getattr(code_files, name)
        monkeypatch.setattr(code_files, name, lambda *args, name=name, real=real: (found.append(name), real(*args))[1])
    return found


def settle(*folders) -> None:
    """Long ago, nothing has changed since."""
    for folder in folders:
        os.utime(folder, ns=(10**18, 10**18 + folder.stat().st_mtime_ns % 10**9))


@pytest.fixture
def llamagen(tmp_path):
    write_llamagen(tmp_path / "llamagen", CODES, LABELS)
    settle(*(tmp_path / "llamagen").iterdir())
    return tmp_path / "llamagen"


@pytest.fixture
def arpg(tmp_path):
    root = tmp_path / "arpg"
    for i, (code, label) in enumerate(zip(CODES, LABELS, strict=True)):
        folder = root / (f"{label:03d}" if label == 4 else str(label))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{'x' * (i % 2)}{i}.npy", code)
    settle(root, *root.iterdir())
    return root


ARPG_ORDER = sorted(range(14), key=lambda i: (LABELS[i], len(f"{'x' * (i % 2)}{i}"), f"{'x' * (i % 2)}{i}"))


def check_llamagen(root, *, codes=CODES, labels=LABELS) -> None:
    store = open_stores(str(root))
    np.testing.assert_array_equal(every_code(store), codes)
    np.testing.assert_array_equal(store.labels, labels)


def check_arpg(root) -> None:
    store = open_stores(str(root))
    np.testing.assert_array_equal(every_code(store), CODES[ARPG_ORDER])
    np.testing.assert_array_equal(store.labels, LABELS[ARPG_ORDER])


def test_labels_and_names_are_looked_through_once(llamagen, arpg, looked):
    check_llamagen(llamagen)
    check_arpg(arpg)
    assert looked == ["count_numbered", "read_labels", "name_files"]
    looked.clear()
    for _ in range(2):
        check_llamagen(llamagen)
        check_arpg(arpg)
    assert not looked
    assert len(list(codes_cache().glob("*.npz"))) == 2


def test_small_folders_leave_nothing_in_the_cache(llamagen, arpg, monkeypatch):
    monkeypatch.setattr(code_index, "INDEXED_FROM", 15)
    check_llamagen(llamagen)
    check_arpg(arpg)
    assert not codes_cache().exists()


def test_a_folder_that_changed_is_looked_through_again(llamagen, arpg, looked):
    check_llamagen(llamagen)
    more = fake_codes(count=1, views=2, seed=9)
    for kind, value in (("codes", more), ("labels", np.array([3]))):
        np.save(llamagen / f"imagenet16_{kind}" / "14.npy", value)
    check_llamagen(llamagen, codes=np.concatenate([CODES, more]), labels=[*LABELS, 3])
    check_arpg(arpg)
    os.rename(arpg / "1" / "x1.npy", arpg / "1" / "zzzz.npy")
    assert [path.name for path in open_stores(str(arpg)).files][3:6] == ["6.npy", "x11.npy", "zzzz.npy"]


def test_what_times_of_folders_do_not_tell(llamagen, looked):
    """A file system that is slow to say so, and labels that were written anew in place."""
    check_llamagen(llamagen)
    states = {path: path.stat().st_mtime_ns for path in llamagen.iterdir()}
    more = fake_codes(count=1, views=2, seed=9)
    for kind, value in (("codes", more), ("labels", np.array([3]))):
        np.save(llamagen / f"imagenet16_{kind}" / "14.npy", value)
    for path, state in states.items():
        os.utime(path, ns=(state, state))
    check_llamagen(llamagen, codes=np.concatenate([CODES, more]), labels=[*LABELS, 3])
    for i in range(15):
        np.save(llamagen / "imagenet16_labels" / f"{i}.npy", np.array([4]))
    check_llamagen(llamagen, codes=np.concatenate([CODES, more]), labels=[4] * 15)


def test_a_folder_that_changed_just_now_is_not_kept(llamagen):
    now = time.time_ns()
    os.utime(llamagen / STORE, ns=(now, now))
    check_llamagen(llamagen)
    assert not list(codes_cache().glob("*.npz"))


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-50]),
    lambda path: path.write_bytes(b"x" * 900), lambda path: np.savez(path, other=np.zeros(3)),
    lambda path: path.write_bytes(path.read_bytes().replace(LABELS.tobytes(), (LABELS + 1).tobytes())),
    lambda path: (path.unlink(), path.mkdir())], ids=["empty", "cut", "garbage", "another", "other labels", "a folder"])
def test_a_damaged_index_does_not_hurt(llamagen, spoil):
    check_llamagen(llamagen)
    index, = codes_cache().glob("*.npz")
    before = index.read_bytes()
    spoil(index)
    check_llamagen(llamagen)
    assert index.is_dir() or index.read_bytes() == before


def test_a_cache_that_cannot_be_written_does_not_hurt(llamagen, arpg, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check_llamagen(llamagen)
    check_arpg(arpg)


def test_one_of_many_makes_the_index(llamagen, looked):
    with ThreadPoolExecutor(6) as pool:
        for store in pool.map(lambda _: open_stores(str(llamagen)), range(6)):
            np.testing.assert_array_equal(store.labels, LABELS)
    assert looked.count("read_labels") == 1


def test_paths_are_not_held(llamagen, arpg):
    store = open_stores(str(llamagen))
    assert len(pickle.dumps(store.files)) < 300
    assert store.files[13] == llamagen.absolute() / STORE / "13.npy"
    for files in (store.files, open_stores(str(arpg)).files):
        assert len(list(files)) == len(files) == 14
        for index in (14, -1):
            with pytest.raises(IndexError):
                files[index]


@pytest.mark.parametrize("root", ["llamagen", "arpg"])
def test_loading_processes_read_the_files(root, request):
    store = open_stores(str(request.getfixturevalue(root)))
    data = CodeBatches(store, vocab_size=256, seed=0)
    sampler = StepSampler(14, global_batch=7, accumulation=1, rank=0, world_size=1, seed=0, start_step=0, end_step=2)
    found = [batch["codes"].tolist() for batch in loader(data, sampler, num_workers=2, pin_memory=False)]
    assert found == [data.__getitems__(keys)["codes"].tolist() for keys in sampler]
