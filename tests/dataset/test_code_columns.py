"""Columns beside the labels: captions, ragged features; from the writer through joins, URLs and damage to batches."""
import json
import shutil

import fsspec
import numpy as np
import pytest

from dataset.code_manifest import Column
from dataset.codes import CodeBatches, open_stores
from tests.conftest import call
from tests.dataset.codes import every_code, fake_codes, flip_byte, write_llamagen, write_packed
from utils.files import file_hash

CAPTION, FEATURES = Column("caption", "text", "uint8"), Column("t5", "ragged", "float32", (5,))
LABELS = np.arange(14) % 3
CODES = fake_codes(views=2)


def texts(seed: int = 0) -> list[str]:
    return [f"Bild {seed}-{i}: “ü{'€' * (i % 5)}”\n" if i % 6 else "" for i in range(14)]


def features(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=((i + seed) % 4, 5)).astype(np.float32) for i in range(14)]


def write(folder, *, seed: int = 0, columns=(CAPTION, FEATURES), labels=LABELS, **options):
    """A store of 14 images with columns, in files of up to three images."""
    values = {"caption": texts(seed), "t5": features(seed)}
    return write_packed(folder, CODES, labels, rows=3, columns={column: values[column.name] for column in columns},
                        **options)


@pytest.fixture
def packed(tmp_path):
    return write(tmp_path / "packed")


def check(store, rows, *, seed: int = 0, kept=None) -> None:
    """Columns at `rows` are those of the images `kept`."""
    kept = np.arange(14) if kept is None else np.asarray(kept)
    assert store.column("caption", rows) == [texts(seed)[row] for row in kept[rows]]
    for row, found in zip(kept[rows], store.column("t5", rows), strict=True):
        np.testing.assert_array_equal(found, features(seed)[row], strict=True)


def test_columns_are_read_by_row(packed):
    store = open_stores(str(packed), corrupt="refuse")
    assert store.columns == {"caption": CAPTION, "t5": FEATURES}
    for rows in (np.arange(14), np.array([13]), np.array([0, 13, 6, 6, 5]), np.random.default_rng(0).permutation(14)):
        check(store, rows)
    assert store.column("caption", np.array([], dtype=int)) == []
    store.column("t5", np.array([1]))[0][:] = 0  # a copy
    check(store, np.array([1]))
    with pytest.raises(ValueError, match="the store has no column 'text': there is caption, t5"):
        store.column("text", np.arange(3))


def test_readers_that_know_no_columns_need_not(packed, tmp_path):
    plain = write_packed(tmp_path / "plain", CODES, LABELS, rows=3)
    manifest = json.loads((packed / "manifest.json").read_text())
    del manifest["columns"]
    assert manifest == json.loads((plain / "manifest.json").read_text())
    store = open_stores(str(plain))
    assert store.columns == {}
    with pytest.raises(ValueError, match="there is none at all"):
        store.column("caption", np.arange(3))


def test_batches_carry_columns_of_the_drawn_images(packed):
    store = open_stores(str(packed))
    keys = np.array([(2, 5), (0, 13), (7, 0)])
    batch = CodeBatches(store, vocab_size=256, seed=0, columns=("caption", "t5")).__getitems__(keys)
    assert batch["caption"] == [texts()[row] for row in (5, 13, 0)]
    np.testing.assert_array_equal(batch["t5"][1], features()[13])
    plain = CodeBatches(store, vocab_size=256, seed=0).__getitems__(keys)
    assert batch.keys() - plain.keys() == {"caption", "t5"}
    assert (plain["codes"] == batch["codes"]).all()


# ---- damage


def test_a_damaged_file_of_a_column_costs_its_images(packed, capsys):
    flip_byte(packed / "t5-00001.npy")  # images 3, 4, 5
    flip_byte(packed / "shard-00004.npy")  # 12, 13
    with pytest.raises(ValueError, match=r"shard-00004\.npy has changed.*t5-00001\.npy has changed.*--corrupt-"):
        open_stores(str(packed), corrupt="refuse")
    store = open_stores(str(packed), corrupt="skip")
    assert "5 of 14 images are left out" in capsys.readouterr().err
    kept = [0, 1, 2, 6, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(every_code(store), CODES[kept])
    check(store, np.arange(9), kept=kept)
    both = open_stores(f"{packed},{write(packed.parent / 'other')}", corrupt="skip")
    check(both, np.arange(9), kept=kept)


@pytest.mark.parametrize(("name", "damage", "said"), [
    ("caption-offsets.npy", flip_byte, "has changed since it was written"),
    ("caption-offsets.npy", lambda path: path.unlink(), "is missing or cut short"),
    ("caption-offsets.npy", lambda path: np.save(path, np.arange(14)), r"has int64 of shape \(14,\), expected int64"),
])
def test_offsets_cannot_be_skipped(packed, name, damage, said):
    damage(packed / name)
    with pytest.raises(ValueError, match=rf"{name} {said}.*extract the codes again$"):
        open_stores(str(packed), corrupt="skip")


def test_what_does_not_fit_is_seen_at_every_opening(packed):
    values = np.load(packed / "t5-00002.npy")
    np.save(packed / "t5-00002.npy", values[:-1])
    with pytest.raises(ValueError, match=r"t5-00002\.npy has float32 of shape"):
        open_stores(str(packed))


def test_offsets_that_do_not_rise_are_no_sound_store(packed):
    """Written wrongly, with the right hash."""
    path = packed / "t5-offsets.npy"
    offsets = np.load(path)
    offsets[1] = 3  # file 0 holds offsets 0, 0, 1, 3
    np.save(path, offsets)
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["columns"][1]["offsets"]["sha256"] = file_hash(path)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"t5-offsets\.npy holds offsets that do not rise from 0"):
        open_stores(str(packed), corrupt="refuse")


def test_verification_shows_columns(packed, capsys):
    call("verify", "--code-path", packed)
    out = capsys.readouterr().out
    assert f"column caption, text, such as {texts()[1]!r}" in out
    assert "column t5, float32 arrays nx5, n from 0 to 3 in 14 rows" in out
    flip_byte(packed / "caption-00000.npy")
    with pytest.raises(SystemExit):
        call("verify", "--code-path", packed)
    assert "caption-00000.npy has changed" in capsys.readouterr().err


# ---- elsewhere


@pytest.mark.usefixtures("own_cache")
def test_columns_are_fetched(packed):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in packed.iterdir():
        with fsspec.open(f"memory://bucket/codes/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    store = open_stores("memory://bucket/codes", corrupt="refuse")
    assert {path.name for path in store.folder.iterdir()} == {path.name for path in packed.iterdir()}
    check(store, np.arange(14))
    memory.store.clear()


# ---- joins


def test_other_crops_have_the_columns_of_either(packed, tmp_path):
    bare = write_packed(tmp_path / "bare", CODES, LABELS)
    with_text = write(tmp_path / "text", columns=(CAPTION,))
    llamagen = write_llamagen(tmp_path / "old", CODES, LABELS)
    for paths in ((packed, bare), (bare, packed), (llamagen, with_text, packed)):
        store = open_stores(",".join(map(str, paths)))
        assert set(store.columns) == {"caption", "t5"}
        check(store, np.array([13, 0, 6]))


@pytest.mark.parametrize("other", [
    lambda folder: write(folder, seed=1),
    lambda folder: respell(write(folder)),
], ids=["other lengths", "other values of the same lengths"])
def test_other_crops_must_say_the_same(packed, tmp_path, other):
    with pytest.raises(ValueError, match=r"other has another column '(caption|t5)' of the same images than .*packed"):
        open_stores(f"{packed},{other(tmp_path / 'other')}")


def respell(folder):
    """The same lengths, another letter."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["columns"][0]["files"][0]["sha256"] = "1" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_same_letters_for_other_images_are_another_column(tmp_path):
    for name, values in (("a", ["ab", "c"] * 7), ("b", ["a", "bc"] * 7)):
        write_packed(tmp_path / name, CODES, LABELS, columns={CAPTION: values})
    with pytest.raises(ValueError, match="b has another column 'caption' of the same images than"):
        open_stores(f"{tmp_path / 'a'},{tmp_path / 'b'}")


def test_a_column_cut_otherwise_is_the_same(packed, tmp_path):
    values = {CAPTION: texts(), FEATURES: features()}
    other = write_packed(tmp_path / "other", CODES, LABELS, rows=7, columns=values)
    check(open_stores(f"{packed},{other}"), np.arange(14))


def test_mixtures_have_the_columns_of_all(packed, tmp_path):
    other = write(tmp_path / "other", seed=1, columns=(FEATURES, CAPTION))
    store = open_stores(f"{packed},{other}", weights=(1.0, 2.0))
    assert store.columns == {"caption": CAPTION, "t5": FEATURES}
    rows = np.random.default_rng(0).permutation(28)
    found, arrays = store.column("caption", rows), store.column("t5", rows)
    for row, text, array in zip(rows.tolist(), found, arrays, strict=True):
        assert text == texts(row // 14)[row % 14]
        np.testing.assert_array_equal(array, features(row // 14)[row % 14])
    keys = np.array([(epoch, index) for epoch in range(2) for index in range(42)])
    batch = CodeBatches(store, vocab_size=256, seed=3, columns=("caption", "t5")).__getitems__(keys)
    pairs = {(text, array.tobytes()) for text, array in zip(batch["caption"], batch["t5"], strict=True)}
    assert pairs <= {(text, array.tobytes()) for seed in (0, 1)
                     for text, array in zip(texts(seed), features(seed), strict=True)}
    half = open_stores(f"{packed},{write(tmp_path / 'half', columns=(CAPTION,))}", weights=(1.0, 1.0))
    assert set(half.columns) == {"caption"}
    with pytest.raises(ValueError, match="no column 't5': there is caption"):
        half.column("t5", np.arange(2))


def test_a_mixture_leaves_damaged_rows_of_columns_out(packed, tmp_path):
    other = shutil.copytree(packed, tmp_path / "other")
    flip_byte(other / "caption-00000.npy")  # images 0, 1, 2
    store = open_stores(f"{packed},{other}", weights=(1.0, 1.0), corrupt="skip")
    assert len(store.labels) == 25
    assert store.column("caption", np.array([13, 14, 24])) == [texts()[13], texts()[3], texts()[13]]
