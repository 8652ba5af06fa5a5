"""Checkpoints in several files with Hugging Face's index: read whole or refused by name."""
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.utils.test_file_kinds import PAGE, POINTER
from utils.checkpoints import containers

STATE = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(5)}
ENDINGS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def write(folder, *, ending: str = "safetensors", homes: dict | None = None):
    """Two files of STATE and their index, in a folder. Returns the index."""
    folder.mkdir(exist_ok=True)
    stem = ENDINGS[ending].split(".")[0]
    names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    found = {name: names[i % 2] for i, name in enumerate(STATE)}
    for name in names:
        part = {tensor: value for tensor, value in STATE.items() if found[tensor] == name}
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
    index = folder / f"{ENDINGS[ending]}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 120}, "weight_map": {**found, **(homes or {})}}))
    return index


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_folder_and_the_index_are_the_checkpoint(ending, tmp_path):
    index = write(tmp_path / "a", ending=ending)
    for path in (index, index.parent):
        found = containers.weights(containers.read(path), path)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], value) for name, value in STATE.items())
    assert containers.content_hash(index) == containers.content_hash(index.parent) == \
        containers.identity_hash(write(tmp_path / "b", ending=ending))
    before = containers.content_hash(index)
    (index.parent / "README.md").write_text("other")
    assert containers.content_hash(index.parent) == before
    part = sorted(index.parent.glob("*-of-*"))[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\x07")
    assert containers.content_hash(index) == containers.content_hash(index.parent) != before


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_file_in_a_folder_is_read(ending, tmp_path):
    path = tmp_path / ENDINGS[ending]
    save_file(STATE, path) if ending == "safetensors" else torch.save(STATE, path)
    assert containers.weights(containers.read(tmp_path), tmp_path).keys() == STATE.keys()


def test_our_description_beside_the_index_is_read(tmp_path):
    index = write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "gpt", "gpt_model": "GPT-S"}))
    assert containers.saved_config(containers.read(index))["gpt_model"] == "GPT-S"


def test_a_part_alone_is_no_checkpoint(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"one of several files of a checkpoint: give .*index\.json"):
        containers.read(tmp_path / "model-00002-of-00002.safetensors")


def test_links_are_followed(tmp_path):
    """Hugging Face's cache holds links to files in another folder."""
    index = write(tmp_path / "blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in index.parent.iterdir():
        (linked / file.name).symlink_to(file)
    assert len(containers.read(linked)) == len(STATE)


@pytest.mark.parametrize("name", ["../model-00001-of-00002.safetensors", "/etc/passwd", "..", "", "a/b.safetensors",
                                  "a\\b", "x\0y"])
def test_a_name_outside_the_folder_is_refused(name, tmp_path):
    index = write(tmp_path, homes={"layers.3.weight": name})
    with pytest.raises(ValueError, match=r"is refused: it says that layers\.3\.weight is in .*expected a file beside"):
        containers.read(index)


def test_a_missing_file_is_named(tmp_path):
    index = write(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    for path in (index, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00002\.safetensors, missing beside it"):
            containers.read(path)


@pytest.mark.parametrize(("homes", "said"), [
    ({"layers.0.weight": "model-00002-of-00002.safetensors"},
     r"layers\.0\.weight is in model-00001-of-00002\.safetensors, expected in model-00002"),
    ({"more": "model-00001-of-00002.safetensors"}, r"more is not in model-00001-of-00002\.safetensors")])
def test_a_tensor_in_the_wrong_file_is_named(homes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        containers.read(write(tmp_path, homes=homes))


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    index = write(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["layers.4.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"layers\.4\.weight is in model-00001\S+, expected in no file"):
        containers.read(index)


@pytest.mark.parametrize(("text", "said"), [
    (POINTER, "Git LFS pointer"), (PAGE, "an HTML page"), ("", "empty"), ("{", "expected"), ("[]", "expected"),
    ("{}", "weight_map"), ('{"weight_map": []}', "expected|weight_map"), ('{"weight_map": {}}', "weight_map"),
    ('{"weight_map": {"a": 3}}', "the name of a file"), ("[" * 100_000, "expected")])
def test_a_wrong_index_is_one_line(text, said, tmp_path):
    index = write(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        containers.read(tmp_path)
    assert str(index) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pointer_in_place_of_a_part_is_named(tmp_path):
    index = write(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is a Git LFS pointer.*git lfs pull"):
        containers.read(index)
