"""Manifests that are not what they should be: one line that names the file, whatever is wrong."""
import json

import numpy as np
import pytest

from dataset.code_manifest import Column
from dataset.codes import open_stores
from tests.conftest import call
from tests.dataset.codes import every_code, fake_codes, write_packed

WRONG = [None, True, -1, 0, 1.5, float("nan"), 10**30, "", "7", "../x", "a\0b", [], [1], ["x"], [[]], {}, {"a": 1}]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A store with classes and two columns."""
    arrays = [np.zeros((i % 3, 2), np.float16) for i in range(14)]
    columns = {Column("caption", "text", "uint8"): ["a", ""] * 7, Column("t5", "ragged", "float16", (2,)): arrays}
    return write_packed(tmp_path_factory.mktemp("packed") / "store", fake_codes(views=2), np.arange(14) % 3,
                        classes=["x", "y", "z"], columns=columns)


@pytest.fixture
def tried(packed):
    """tried(manifest) opens, reads and verifies the store under another manifest."""
    path = packed / "manifest.json"
    sound = path.read_text()

    def run(manifest) -> None:
        path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        store = open_stores(str(packed), corrupt="refuse", remembered=False)
        every_code(store)
        for name in store.columns:
            store.column(name, np.arange(len(store)))
        assert len(store) == 14
        assert store.num_classes == 3

    yield run
    path.write_text(sound)


def places(value, *place):
    """Every place in nested lists and dictionaries."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(inner, *place, key)


def changed(manifest, place, *new):
    """The manifest with another value at a place, or without it."""
    copy = json.loads(json.dumps(manifest))
    *above, last = place
    inner = copy
    for key in above:
        inner = inner[key]
    if new:
        inner[last], = new
    else:
        del inner[last]
    return copy


def refusal(tried, manifest) -> str | None:
    """The one line that is said, None where nothing is wrong."""
    try:
        tried(manifest)
    except ValueError as error:
        said = error
    else:
        return None
    assert type(said) is ValueError, type(said)
    assert len(str(said).splitlines()) == 1
    return str(said)


def test_a_manifest_without_any_one_key(packed, tried):
    manifest = json.loads((packed / "manifest.json").read_text())
    tried(manifest)
    harmless = {("images",), ("skipped",), ("columns",), ("tokenizer", "name"), ("columns", 0), ("columns", 1)}
    count = 0
    for place in places(manifest):
        said = refusal(tried, changed(manifest, place))
        if place in harmless or place in [("classes", i) for i in range(3)]:
            continue
        assert said is not None, place
        assert str(packed) in said, (place, said)
        count += 1
    assert count > 40


def test_a_manifest_with_anything_in_any_place(packed, tried):
    manifest = json.loads((packed / "manifest.json").read_text())
    required = set(manifest) - {"images", "classes"}
    for place in places(manifest):
        said = [refusal(tried, changed(manifest, place, value)) for value in WRONG]
        assert all(str(packed) in line for line in said if line is not None), place
        if len(place) == 1 and place[0] in required:
            assert sum(line is None for line in said) <= (place[0] in ("skipped", "columns")) * 2, (place, said)


@pytest.mark.parametrize("text", ["", "{", "null", "7", "[]", '"x"', "{}", "[" * 100_000, "\udcff", '{"format": 1}',
                                  '{"format": "llamagen-codes-1"}', '{"format": "llamagen-codes-9"}'])
def test_what_is_no_manifest_at_all(packed, tried, text, capsys):
    path = packed / "manifest.json"
    sound = path.read_text()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as caught:
        call("verify", "--code-path", packed)
    error, = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert error.startswith(f"error: {path} is ")
    path.write_text(sound)


def test_a_manifest_without_shards_names_itself(packed, tried, capsys):
    """It was a KeyError and its traceback."""
    manifest = json.loads((packed / "manifest.json").read_text())
    del manifest["shards"]
    (packed / "manifest.json").write_text(json.dumps(manifest))
    for command in (["verify"], ["train_gpt", "--gpt-model", "GPT-S"]):
        with pytest.raises(SystemExit):
            call(*command, "--code-path", packed)
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {packed / 'manifest.json'} is damaged: shards is missing, expected a list of {{file, rows, "
            "sha256}; extract the codes again")


def test_nothing_is_named_twice(packed, tried):
    manifest = json.loads((packed / "manifest.json").read_text())
    first, second = manifest["columns"]
    twice = [changed(manifest, ("columns", 1), {**second, "name": first["name"]}),
             changed(manifest, ("columns", 1, "offsets", "file"), first["offsets"]["file"]),
             changed(manifest, ("shards", 1, "file"), manifest["shards"][0]["file"])]
    for wrong in twice:
        assert "it names a file or a column twice" in refusal(tried, wrong)


def test_labels_beyond_the_classes_are_told(packed, tried):
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["classes"].pop()
    assert "labels.npy holds label 2, expected 0 to 1: the manifest names 2 classes" in refusal(tried, manifest)
