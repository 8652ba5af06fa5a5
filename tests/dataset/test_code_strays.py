"""One file per image: labels and codes that are none, gaps, strays. Each is one line that names the file."""
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from dataset import code_files, code_index
from dataset.codes import open_stores
from tests.dataset.codes import STORE, every_code, fake_codes, write_llamagen, write_packed

CODES, LABELS = fake_codes(count=8, views=2), np.arange(8) % 3


class Touch:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pairs(tmp_path):
    return write_llamagen(tmp_path / "pairs", CODES, LABELS)


@pytest.fixture
def arpg(tmp_path):
    for i, (code, label) in enumerate(zip(CODES, LABELS, strict=True)):
        (tmp_path / "arpg" / str(label)).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "arpg" / str(label) / f"{i}.npy", code)
    return tmp_path / "arpg"


def refused(root, *, read: bool = False) -> str:
    look = (lambda path: every_code(open_stores(path))) if read else open_stores
    with pytest.raises((ValueError, FileNotFoundError)) as stop:
        look(str(root))
    assert "\n" not in str(stop.value)
    return str(stop.value)


WRONG_LABELS = {
    "negative": ([-1], "holds label -1, expected 0 to"),
    "fraction": ([1.5], "holds float64, expected whole numbers"),
    "whole floats": ([3.0], "holds float64, expected whole numbers"),
    "not a number": ([np.nan], "holds float64, expected whole numbers"),
    "half": (np.float16([1]), "holds float16, expected whole numbers"),
    "bool": ([True], "holds bool, expected whole numbers"),
    "text": (["3"], "holds <U1, expected whole numbers"),
    "date": (np.array(["2026-01-01"], "M8[D]"), "holds datetime64[D], expected whole numbers"),
    "complex": ([1j], "holds complex128, expected whole numbers"),
    "two": ([1, 2], "holds an array of shape (2,), expected one label"),
    "none": (np.zeros(0, np.int64), "holds an array of shape (0,), expected one label"),
    "one-hot": (np.eye(3, dtype=np.int64)[:1], "holds an array of shape (1, 3), expected one label"),
    "beyond int64": (np.array([2**63], np.uint64), "holds label 9223372036854775808, expected 0 to 16777215"),
    "no table is so large": ([2**40], "holds label 1099511627776, expected 0 to 16777215"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_wrong_labels_name_their_file(pairs, case):
    value, said = WRONG_LABELS[case]
    path = pairs / "imagenet16_labels" / "5.npy"
    np.save(path, np.asarray(value))
    assert refused(pairs).startswith(f"{path} {said}")


@pytest.mark.parametrize("value", [3, np.uint8([3]), np.array([[3]], ">i4")])
def test_one_whole_number_of_any_shape_and_type_is_a_label(pairs, value):
    np.save(pairs / "imagenet16_labels" / "5.npy", value)
    store = open_stores(str(pairs))
    assert store.labels.tolist() == [0, 1, 2, 0, 1, 3, 0, 1] and store.labels.dtype == np.int64


WRONG_CODES = {
    "negative": (-CODES[5], "holds code -2"),
    "fractions": (CODES[5] / 2, "holds float64, expected whole numbers"),
    "whole floats": (CODES[5].astype(np.float32), "holds float32, expected whole numbers"),
    "no axis": (np.int64(3), "holds an array of shape (), expected codes of one image"),
    "empty": (CODES[5][:0], "holds an array of shape (0, 16), expected codes of one image"),
    "no tokens": (CODES[5][:, :0], "holds an array of shape (2, 0), expected codes of one image"),
    "several images": (CODES[:2], "holds an array of shape (2, 2, 16), expected codes of one image"),
    "grids": (CODES[5].reshape(2, 4, 4), "holds an array of shape (2, 4, 4), expected codes of one image"),
    "another number of views": (CODES[5][:1], "holds codes of shape (1, 16), the first file (2, 16)"),
    "another number of tokens": (CODES[5][:, :9], "holds codes of shape (2, 9), the first file (2, 16)"),
}


@pytest.mark.parametrize("case", WRONG_CODES)
@pytest.mark.parametrize("layout", ["pairs", "arpg"])
def test_wrong_codes_name_their_file(layout, case, request):
    root = request.getfixturevalue(layout)
    value, said = WRONG_CODES[case]
    path = root / STORE / "5.npy" if layout == "pairs" else root / "2" / "5.npy"
    np.save(path, value)
    assert refused(root, read=True).startswith(f"{path} {said}")


def spoil_header(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new.ljust(len(old))))


@pytest.mark.parametrize("spoil", [
    lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
    lambda path: path.write_bytes(pickle.dumps(Touch(path.with_name("it ran")))),
    lambda path: np.savez(path.open("wb"), np.arange(3)),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-3]),
    lambda path: path.write_bytes(b"\x93NUMPY\x09\x00" + path.read_bytes()[8:]),
    lambda path: spoil_header(path, b"'<i8'", b"'<i8"),
    lambda path: spoil_header(path, b"'<i8'", b"'?!'"),
    lambda path: spoil_header(path, b"{'descr'", b"((((((("),
    lambda path: spoil_header(path, b"), }      ", b"9999999, 9999999), }"[:10]),
], ids=["objects", "pickle", "npz", "empty", "cut", "version", "quote", "type", "brackets", "shape"])
@pytest.mark.parametrize("kind", ["codes", "labels"])
def test_what_is_no_array_is_named_and_not_run(pairs, kind, spoil):
    path = pairs / f"imagenet16_{kind}" / "5.npy"
    spoil(path)
    assert refused(pairs, read=True).startswith(f"{path} is no array of numbers, or cut short")
    assert not (path.parent / "it ran").exists()


def test_arrays_in_fortran_order_are_read_as_they_are_meant(pairs):
    np.save(pairs / STORE / "5.npy", np.asfortranarray(CODES[5]))
    np.testing.assert_array_equal(every_code(open_stores(str(pairs))), CODES)


@pytest.mark.parametrize(("labels", "said"), [
    ([0, 1, -1, *LABELS[3:]], "labels.npy holds label -1, expected 0 to 2: the manifest names 3 classes"),
    ([0, 1, 3, *LABELS[3:]], "labels.npy holds label 3, expected 0 to 2: the manifest names 3 classes"),
    (LABELS / 2, "labels.npy has float64 of shape (8,), expected int64 of (8,)"),
    (LABELS > 0, "labels.npy has bool of shape (8,), expected int64 of (8,)"),
    (LABELS.astype(np.int32), "labels.npy has int32 of shape (8,), expected int64 of (8,)"),
    (LABELS.astype(str), "labels.npy has <U21 of shape (8,), expected int64 of (8,)"),
    (LABELS[:5], "labels.npy has int64 of shape (5,), expected int64 of (8,)"),
    (LABELS[:, None], "labels.npy has int64 of shape (8, 1), expected int64 of (8,)")])
def test_wrong_labels_of_packed_stores_are_named(tmp_path, labels, said):
    good = write_packed(tmp_path / "good", CODES, LABELS, classes=["a", "b", "c"])
    bad = write_packed(tmp_path / "bad", CODES, LABELS, classes=["a", "b", "c"])
    np.save(bad / "labels.npy", labels)
    for paths, weights in ((str(bad), None), (f"{good},{bad}", None), (f"{good},{bad}", (1.0, 1.0))):
        with pytest.raises(ValueError, match=re.escape(f"bad/{said}")):
            open_stores(paths, weights=weights)


@pytest.mark.parametrize("value", [-1, 2**62])
def test_labels_of_packed_stores_without_class_names(tmp_path, value):
    store = write_packed(tmp_path / "bad", CODES, LABELS)
    np.save(store / "labels.npy", np.array([value, *LABELS[1:]]))
    assert f"labels.npy holds label {value}, expected 0 to 16777215" in refused(store)


@pytest.mark.parametrize("mixed", [None, (1.0, 2.0)])
def test_joined_and_mixed_stores_name_the_file_too(pairs, tmp_path, mixed):
    other = write_llamagen(tmp_path / "other", CODES, LABELS)
    np.save(other / "imagenet16_labels" / "5.npy", [-7])
    with pytest.raises(ValueError, match=re.escape(f"{other}/imagenet16_labels/5.npy holds label -7")):
        open_stores(f"{pairs},{other}", weights=mixed)


# ---- gaps and strays


def drop(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number}.npy").unlink()


@pytest.mark.parametrize(("codes", "labels", "said"), [
    ([7], [], "7 codes and 8 labels: imagenet16_codes/7.npy is missing: codes and labels are numbered"),
    ([], [5, 6, 7], "8 codes and 5 labels: imagenet16_labels/5.npy, imagenet16_labels/6.npy, imagenet16_labels/7.npy "
                    "are missing"),
    ([3], [3], "7 codes and 7 labels: imagenet16_codes/3.npy, imagenet16_labels/3.npy are missing"),
    ([0], [7], "7 codes and 7 labels: imagenet16_codes/0.npy, imagenet16_labels/7.npy are missing"),
    ([1, 2, 3, 4, 5, 6], [], "2 codes and 8 labels: imagenet16_codes/1.npy, imagenet16_codes/2.npy, imagenet16_codes/"
                             "3.npy, imagenet16_codes/4.npy and 2 more are missing"),
    (range(8), [], "0 codes and 8 labels"), ([], range(8), "8 codes and 0 labels")])
def test_codes_and_labels_are_counted_against_each_other(pairs, codes, labels, said):
    drop(pairs / STORE, *codes)
    drop(pairs / "imagenet16_labels", *labels)
    assert refused(pairs).startswith(f"{pairs} holds {said}")


def test_a_number_far_beyond_the_others_is_a_gap(pairs):
    """No array of so many numbers is made."""
    (pairs / STORE / "7.npy").rename(pairs / STORE / "999999999999999999.npy")
    said = refused(pairs)
    assert "8 codes and 8 labels: imagenet16_codes/7.npy, imagenet16_codes/8.npy" in said and "more are missing" in said


PASSED = ["._3.npy", ".3.npy.abc.tmp", ".DS_Store", "Thumbs.db", "README.txt", "3.npy.part"]


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("layout", ["pairs", "arpg"])
def test_hidden_files_and_other_kinds_are_passed_over_and_said(layout, index, request, capsys, monkeypatch, own_cache):
    root = request.getfixturevalue(layout)
    if index:
        monkeypatch.setattr(code_index, "INDEXED_FROM", 1)
    for folder in [root / STORE, root / "imagenet16_labels"] if layout == "pairs" else [root / "1"]:
        for name in PASSED:
            (folder / name).write_bytes(b"\0\5\x16\7")
        (folder / ".ipynb_checkpoints").mkdir()
    for folder in [root, *root.iterdir()]:
        os.utime(folder, (10**9, 10**9))
    for _ in range(2):  # said again by an index
        store = open_stores(str(root))
        assert len(store) == 8 and sorted(map(tuple, every_code(store)[:, 0])) == sorted(map(tuple, CODES[:, 0]))
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"note: passed over in {root}: ") and "._3.npy" in said
        assert f"and {10 if layout == 'pairs' else 3} more (hidden, or no .npy)" in said
    monkeypatch.setenv("RANK", "1")
    open_stores(str(root))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["3 (1).npy", "03.npy", "3.0.npy", "-3.npy", "３.npy", "x.npy", "1" * 19 + ".npy"])
@pytest.mark.parametrize("kind", ["codes", "labels"])
def test_other_names_are_refused(pairs, kind, name):
    np.save(pairs / f"imagenet16_{kind}" / name, CODES[0])
    assert refused(pairs) == f"{pairs}/imagenet16_{kind} holds {name}: expected 0.npy … N-1.npy"


@pytest.mark.parametrize("layout", ["pairs", "arpg"])
def test_endings_in_capitals_are_refused(layout, request):
    root = request.getfixturevalue(layout)
    folder = root / STORE if layout == "pairs" else root / "1"
    np.save((folder / "8.NPY").open("wb"), CODES[0])
    assert refused(root) == f"{folder}/8.NPY: expected an ending in small letters, 8.npy"


def test_other_folders_beside_class_folders_are_said(arpg, capsys):
    (arpg / "extra").mkdir()
    (arpg / "classes.json").write_text("[]")
    assert len(open_stores(str(arpg))) == 8
    assert capsys.readouterr().err == f"note: passed over in {arpg}: extra, classes.json (hidden, or no .npy)\n"


@pytest.mark.parametrize("name", ["16777216", "9" * 30])
def test_class_folders_with_numbers_that_no_model_holds(arpg, name):
    (arpg / name).mkdir()
    np.save(arpg / name / "a.npy", CODES[0])
    assert refused(arpg) == f"{arpg / name} is no class folder: expected numbers below 16777216"


def test_each_folder_is_looked_through_once(pairs, arpg, monkeypatch):
    """A pass over 1.28 million files takes seconds."""
    looked, scan = [], os.scandir
    monkeypatch.setattr(code_files.os, "scandir", lambda path: (looked.append(Path(path)), scan(path))[1])
    open_stores(str(pairs))
    assert sorted(path for path in looked if path != pairs) == [pairs / STORE, pairs / "imagenet16_labels"]


def test_an_index_from_before_the_checks_is_not_taken(pairs, monkeypatch, own_cache):
    monkeypatch.setattr(code_index, "INDEXED_FROM", 1)
    path = pairs / "imagenet16_labels" / "5.npy"
    for folder in pairs.iterdir():
        os.utime(folder, (10**9, 10**9))
    open_stores(str(pairs))
    state = path.stat()
    np.save(path, [-1])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert open_stores(str(pairs)).labels[5] == 2  # from the index, which cannot know
    monkeypatch.setattr(code_index, "VERSION", code_index.VERSION + 1)
    assert f"{path} holds label -1" in refused(pairs)
