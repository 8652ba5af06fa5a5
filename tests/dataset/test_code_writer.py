"""Writing packed stores: kills and full disks at every step, two processes, joined files, columns, older leftovers."""
import json
import os

import numpy as np
import pytest

from dataset import code_check, code_writer
from dataset.code_manifest import FORMAT, Column
from dataset.codes import open_stores
from tests.dataset.codes import content, every_code, fake_codes, write_packed

CODES, LABELS = fake_codes(count=14, views=2), np.arange(14) % 3
CAPTION, FEATURES = Column("caption", "text", "uint8"), Column("t5", "ragged", "float16", (3,))
TEXTS = [f"{'ä' * (i % 4)} picture {i}" if i % 5 else "" for i in range(14)]
ARRAYS = [np.full((i % 4, 3), i, np.float16) for i in range(14)]
SKIPPED = {1: ["broken.png"], 5: ["a.png", "b.png"]}
RECIPE = {"format": FORMAT, "images": 17, "image_size": [16, 16], "grid": [4, 4], "views": 2, "dtype": "uint16",
          "classes": None, "tokenizer": {"codebook_size": 256, "downsample": 4, "weights_sha256": ""},
          "columns": [{**vars(column), "shape": list(column.shape)} for column in (CAPTION, FEATURES)]}
PARTS = 7  # of two images


class Killed(BaseException):
    """Stands in for SIGKILL: nothing that is cleaned up afterwards gets to the disk."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of two images, files of two parts by their bytes, or three by their images; no wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for name, value in (("PART_ROWS", 2), ("SHARD_ROWS", 6), ("SHARD_BYTES", 4 * 2 * 16 * 2)):
        monkeypatch.setattr(code_writer, name, value)


def write(folder, *, workers: int = 1) -> list[int]:
    """Write the store, as an extraction does: what is not there yet, joined by `workers` → the parts written."""
    code_writer.begin(folder, RECIPE)
    if (folder / "manifest.json").is_file():
        return []
    written = [part for part in range(PARTS) if not code_writer.is_done(folder, part)]
    for part in written:
        mine = slice(2 * part, 2 * part + 2)
        code_writer.write_part(folder, part, CODES[mine].astype(np.uint16), LABELS[mine], SKIPPED.get(part, []),
                               columns={"caption": TEXTS[mine], "t5": ARRAYS[mine]})
    for rank in reversed(range(workers)):
        code_writer.join(folder, PARTS, rank=rank, workers=workers)
    code_writer.finish(folder, PARTS)
    return written


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """What the store consists of."""
    write(tmp_path / "whole")
    return content(tmp_path / "whole")


def test_parts_are_joined_within_the_limits(tmp_path, whole):
    folder = tmp_path / "whole"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 4, 2]  # by bytes
    by_name = {column["name"]: column for column in manifest["columns"]}
    assert sum(file["rows"] for file in by_name["caption"]["files"]) == 14
    assert max(file["rows"] for file in by_name["caption"]["files"]) == 6  # by rows
    assert manifest["skipped"] == ["broken.png", "a.png", "b.png"]
    assert set(whole) == {"manifest.json", "labels.npy", "caption-offsets.npy", "t5-offsets.npy",
                          *(f"shard-0000{i}.npy" for i in range(4)),
                          *(file["file"] for column in by_name.values() for file in column["files"])}
    store = open_stores(str(folder), corrupt="refuse")
    np.testing.assert_array_equal(every_code(store), CODES)
    np.testing.assert_array_equal(store.labels, LABELS)
    rows = np.random.default_rng(0).permutation(14)
    assert store.column("caption", rows) == [TEXTS[row] for row in rows]
    for row, found in zip(rows, store.column("t5", rows), strict=True):
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, ARRAYS[row])


@pytest.mark.parametrize("workers", [2, 3, 20])
def test_any_number_of_processes_join_to_the_same(tmp_path, whole, workers):
    write(tmp_path / "shared", workers=workers)
    assert content(tmp_path / "shared") == whole


def test_a_kill_at_any_step_costs_one_part_at_most(tmp_path, whole, monkeypatch):
    """Dies before each change that is made to the folder, then goes on."""
    calls = ("replace", "unlink", "rename", "rmdir", "mkdir")
    real = {name: getattr(os, name) for name in calls}
    for step in range(1000):
        folder, left = tmp_path / f"cut{step}", [step]

        def change(name, *args, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real[name](*args, **options)

        folder.mkdir()
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, lambda *args, name=name, **options: change(name, *args, **options))
            try:
                write(folder)
            except Killed:
                pass
            else:
                break
        done = [part for part in range(PARTS) if code_writer.is_done(folder, part)]
        again = write(folder)
        assert not set(again) & set(done)
        assert content(folder) == whole, step
    assert step > 60  # steps there were


def test_a_full_disk_is_told_and_costs_one_part_at_most(tmp_path, whole, monkeypatch):
    for step in range(0, 40, 3):
        left = [step]

        def fsync(handle, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")

        folder = tmp_path / f"full{step}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match="No space left"):
                write(folder)
        assert not list(folder.rglob("*.tmp"))
        write(folder)
        assert content(folder) == whole


def test_a_part_that_was_damaged_is_made_anew(tmp_path, whole, monkeypatch):
    folder = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(code_writer, "finish", lambda *args: None)
        patch.setattr(code_writer, "join", lambda *args, **options: None)
        write(folder)
    path = code_writer.part_path(folder, 3, "caption")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"000003-caption\.npy was damaged after it was written: run the extraction"):
        write(folder)
    assert write(folder) == [3]
    assert content(folder) == whole


def test_limits_may_change_between_runs(tmp_path, whole, monkeypatch):
    folder = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(code_writer, "finish", lambda *args: None)
        write(folder)
    monkeypatch.setattr(code_writer, "SHARD_ROWS", 1)
    write(folder)
    assert content(folder) == whole


def test_what_an_earlier_version_left_unfinished_is_gone_on_with(tmp_path):
    """It named parts as the finished store's shards."""
    recipe = {key: value for key, value in RECIPE.items() if key != "columns"}
    expected = write_packed(tmp_path / "expected", CODES, LABELS, rows=4)
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    for shard in (0, 2):
        mine = slice(2 * shard, 2 * shard + 2)
        sha256 = code_writer.save_array(folder / f"shard-0000{shard}.npy", CODES[mine].astype(np.uint16))
        (folder / f"shard-0000{shard}.json").write_text(json.dumps({
            "file": f"shard-0000{shard}.npy", "rows": 2, "sha256": sha256, "labels": LABELS[mine].tolist(),
            "skipped": []}))
    code_writer.begin(folder, recipe)
    assert [part for part in range(PARTS) if code_writer.is_done(folder, part)] == [0, 2]
    for part in (1, 3, 4, 5, 6):
        mine = slice(2 * part, 2 * part + 2)
        code_writer.write_part(folder, part, CODES[mine].astype(np.uint16), LABELS[mine])
    code_writer.finish(folder, PARTS)
    made = content(folder)
    assert {name: made[name] for name in made if name.endswith(".npy")} == {
        name: data for name, data in content(expected).items() if name.endswith(".npy")}
    assert set(made) == set(content(expected))
    assert code_check.verify(folder) == []


def test_no_readable_image_at_all_leaves_nothing(tmp_path):
    folder = tmp_path / "store"
    code_writer.begin(folder, RECIPE)
    nothing = np.empty((0, 2, 16), np.uint16)
    for part in range(2):
        code_writer.write_part(folder, part, nothing, [], ["broken.png"] * 2, columns={"caption": [], "t5": []})
    with pytest.raises(ValueError, match=r"none of the 4 images could be read, among them broken\.png"):
        code_writer.finish(folder, 2)
    assert not folder.exists()


def test_columns_that_are_not_as_declared_are_refused(tmp_path):
    code_writer.begin(tmp_path, RECIPE)
    codes, good = CODES[:2].astype(np.uint16), {"caption": TEXTS[:2], "t5": ARRAYS[:2]}
    for wrong in ({"caption": TEXTS[:2]}, {**good, "t5": ARRAYS[:1]}, {**good, "other": TEXTS[:2]},
                  {**good, "t5": [array.astype(np.float32) for array in ARRAYS[:2]]},
                  {**good, "t5": [array[:, :2] for array in ARRAYS[:2]]}):
        with pytest.raises(AssertionError):
            code_writer.write_part(tmp_path, 0, codes, LABELS[:2], columns=wrong)
    assert not code_writer.is_done(tmp_path, 0)
    for wrong in (("Caption", "text", "uint8"), ("a", "text", "uint16"), ("a", "list", "uint8"),
                  ("../a", "ragged", "int8"), ("shard", "ragged", "int8"), ("a", "ragged", "object"),
                  ("a", "ragged", "int8", (0,))):
        with pytest.raises(ValueError, match="is no column"):
            Column(*wrong)
    with pytest.raises(ValueError, match="already holds codes made with another columns"):
        code_writer.begin(tmp_path, {**RECIPE, "columns": RECIPE["columns"][:1]})


def test_a_damaged_recipe_is_named(tmp_path):
    for text in ("{", "[1]", '"a"', "7"):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.json is damaged .*: remove .*, extract again"):
            code_writer.begin(tmp_path, RECIPE)
