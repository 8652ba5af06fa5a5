"""Checkpoints: every container read strictly and safely, ours written whole or not at all."""
import argparse
import gzip
import json
import pickle
import random
import resource
import shutil
import stat
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import TINY_VQ, call
from tests.utils.test_file_kinds import PAGE, POINTER
from tokenizer.build import TokenizerFlags, load_tokenizer
from utils import files
from utils.checkpoints import containers

CPU = torch.device("cpu")


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


CONTAINERS = {
    "ours and LlamaGen's": lambda s: {"model": s, "optimizer": {}, "steps": 3,
                                      "args": argparse.Namespace(lr=1e-4, image_size=256, betas=(0.9, 0.95))},
    "DeepSpeed's": lambda s: {"module": s, "global_steps": 3},
    "ARPG's": lambda s: {"state_dict": s, "epoch": 1},
    "bare": lambda s: s,
    "compiled": lambda s: {"model": prefixed("_orig_mod.", s)},
    "compiled in DDP": lambda s: {"model": prefixed("module._orig_mod.", s)},
    "DDP, compiled": lambda s: prefixed("_orig_mod.module.", s),
    "with EMA": lambda s: {"model": {name: value * 0 for name, value in s.items()}, "ema": s},
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_container_is_read(kind, zipped, tmp_path):
    state = small().state_dict()
    torch.save(CONTAINERS[kind](state), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert equal(containers.weights(containers.read(tmp_path / "x.pt"), "x.pt"), state)


def test_safetensors_are_read(tmp_path):
    state = small().state_dict()
    save_file(state, tmp_path / "x.safetensors")
    assert equal(containers.weights(containers.read(tmp_path / "x.safetensors"), ""), state)


def test_a_real_tokenizer_loads_from_every_container(vq_ckpt, tmp_path):
    content = containers.read(vq_ckpt)
    assert not equal(content["ema"], content["model"])
    for i, kind in enumerate(CONTAINERS):
        torch.save(CONTAINERS[kind](content["model"]), tmp_path / f"{i}.pt")
        flags = TokenizerFlags(vq_ckpt=str(tmp_path / f"{i}.pt"), vq_model="VQ-4-S")
        assert equal(load_tokenizer(flags, device=CPU)[1].state_dict(), content["model"])
    name, model = load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=CPU)  # ours says what it is
    assert name == "VQ-4-S"
    assert equal(model.state_dict(), content["ema"])
    assert not model.training


def test_saving_keeps_preferring_weights_names():
    state = small().state_dict()
    both = {"model": state, "discriminator": small(1).state_dict()}
    assert equal(containers.weights(both, "", prefer=("discriminator",)), both["discriminator"])
    for content in ({}, {"model": {}}, {"steps": 3}, {"model": {"a": [1]}}, {**state, "epoch": 3}):
        with pytest.raises(ValueError, match=r"some\.pt holds no model weights"):
            containers.weights(content, "some.pt")


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda s: s.pop("0.bias"), "missing 0.bias"),
    (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
    (lambda s: s.update({"0.weight": torch.ones(2, 3)}), r"0\.weight is \(2, 3\), expected \(4, 3\)"),
])
def test_keys_that_do_not_fit_are_named_and_nothing_is_copied(spoil, said):
    model, state = small(), small(1).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoil(state)
    with pytest.raises(ValueError, match=r"some\.pt does not fit Sequential: " + said):
        containers.load_strict(model, state, "some.pt")
    assert equal(model.state_dict(), before)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(how, tmp_path):
    path, proof = tmp_path / "x.pt", tmp_path / "ran"
    content = {"model": small().state_dict(), "args": Bomb(proof)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content["args"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"x\.pt is refused: it names \w+\.open, which would run code"):
        containers.read(path)
    assert not proof.exists()
    with open(path, "rb") as file:  # the file is what it claims to be
        torch.load(file, weights_only=False) if how != "pickle" else pickle.load(file)
    assert proof.exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "folder/model.safetensors"])
@pytest.mark.parametrize(("content", "said"), [
    (POINTER.encode(), "a Git LFS pointer.*git lfs pull"), (PAGE.encode(), "an HTML page"), (b"", "empty"),
    (b'{"error": "Entry not found"}', "a JSON text"), (b"<?xml version='1.0'?><Error>", "an XML text"),
    (b"Forbidden", "a text file"), (gzip.compress(b"x" * 100), "compressed by gzip"),
    (bytes(5000), "nothing but zeros"),
    (b"config\nname\n", "a text file")])
def test_a_file_that_is_something_else_is_called_that(name, content, said, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is {said}"):
        containers.read(path if path.parent == tmp_path else path.parent)


@pytest.mark.parametrize(("content", "said"), [
    (pickle.dumps({"a": 1}, protocol=4), "Unsupported operand"), (b"\xd5" * 99, "Unsupported operand 213")])
def test_the_reason_is_torchs_own_without_its_advice(content, said, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.pt is refused: it is damaged, or no checkpoint \({said}"):
        containers.read(tmp_path / "x.pt")
    torch.save({"model": np.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"GLOBAL numpy.*_reconstruct was not an allowed global by default\)$"):
        containers.read(tmp_path / "x.pt")


@pytest.mark.parametrize(("content", "said"), [(POINTER, "a Git LFS pointer"), (PAGE, "an HTML page"), ("", "empty")])
def test_of_a_checkpoint_in_a_folder_the_wrong_file_is_named(content, said, vq_ckpt, tmp_path):
    exported, trained = tmp_path / "exported", shutil.copytree(vq_ckpt, tmp_path / vq_ckpt.name)
    exported.mkdir()
    save_file(small().state_dict(), exported / "model.safetensors")
    (exported / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json, which describes model\.safetensors, is {said}"):
        containers.read(exported)
    shard = min(trained.glob("*.distcp"))
    shard.write_text(content)
    with pytest.raises(ValueError, match=rf"{shard.name} is {said}"):
        containers.read(trained)
    (trained / "state.json").write_text(content)
    with pytest.raises(ValueError, match=rf"state\.json is damaged \({said}"):
        containers.read(trained)


@pytest.mark.parametrize(("key", "value"), [
    ("codebook_size", "x"), ("codebook_embed_dim", -8), ("vq_model", 5), ("gpt_model", ["GPT-S"]), ("grid", "x"),
    ("grid", [6]), ("grid", [6, 6.5]), ("grid", 5), ("classes", 5), ("classes", [1, 2])])
def test_a_config_that_can_mean_nothing_is_refused(key, value, tmp_path):
    save_file(small().state_dict(), tmp_path / "model.safetensors")
    torch.save({"model": small().state_dict(), "config": {"kind": "gpt", key: value}}, tmp_path / "x.pt")
    for content in ({key: value}, {"kind": "gpt", key: None}):  # no config of ours, and nothing said
        (tmp_path / "config.json").write_text(json.dumps(content))
        containers.read(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"kind": "gpt", key: value}))
    for path in (tmp_path / "model.safetensors", tmp_path / "x.pt"):
        with pytest.raises(ValueError, match=rf"the config of .*{path.name} says that its {key} is .*, expected"):
            containers.read(path)


def test_names_that_are_no_texts_are_no_weights():
    with pytest.raises(ValueError, match=r"x holds no model weights: its keys are 3"):
        containers.weights({3: torch.ones(1)}, "x")


def test_an_archive_of_something_else_is_called_that(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("weights/vq.pt", "x")
    with pytest.raises(ValueError, match=r"x\.pt is a zip archive of weights/vq\.pt: unpack it"):
        containers.read(tmp_path / "x.pt")


def test_the_content_says_whether_a_file_is_safetensors(tmp_path):
    state = small().state_dict()
    save_file(state, tmp_path / "x.pt")
    assert equal(containers.read(tmp_path / "x.pt"), state)
    torch.save(state, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"y\.safetensors is a file of torch\.save.*rename it to \.pt"):
        containers.read(tmp_path / "y.safetensors")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_one_line_errors(kind, tmp_path):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    state = small().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    whole, dice = path.read_bytes(), random.Random(0)
    damaged = [b"", b"hello", whole[:-1], *(whole[:dice.randrange(len(whole))] for _ in range(60))]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
        damaged.append(bytes(flipped))
    messages = []
    for content in damaged:
        path.write_bytes(content)
        try:
            containers.read(path)
        except ValueError as error:
            messages.append(str(error).strip())
    assert len(messages) >= 60  # a flipped bit may fall where it does not matter, a cut never does
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_missing_file_and_wrong_content_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        containers.read(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint in the folder"):
        containers.read(tmp_path)
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        containers.read(tmp_path / "tensor.pt")


# ---- writing


@pytest.fixture
def no_space():
    """A limit of 64 KiB per file, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_old_file_and_no_other(tmp_path, no_space):
    path = tmp_path / "0000001.pt"
    containers.save({"model": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="is the disk full"):
        containers.save({"model": {"a": torch.rand(2**18)}}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_full_disk_while_training_keeps_the_last_good_checkpoint(vq_ckpt, image_folder, tmp_path, capsys):
    command = ["train_vq", "--data-path", image_folder, *TINY_VQ, "--results-dir", tmp_path, "--resume", "auto",
               "--ckpt-every", 2]
    call(*command, "--epochs", 1)
    folder = tmp_path / "000-VQ-4-S" / "checkpoints"
    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
    try:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call(*command, "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 2
    assert "error: a checkpoint could not be written" in capsys.readouterr().err
    assert contents(folder) == before
    call(*command, "--epochs", 3)
    assert containers.newest(folder).stem == "0000013"


def test_replacing_is_atomic_and_readable_by_others(tmp_path):
    path = tmp_path / "deep" / "x.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def fail_halfway():
        with files.replacing(path) as temporary:
            temporary.write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_newest_counts_whole_checkpoints_only(tmp_path):
    assert containers.newest(tmp_path) is None
    assert containers.newest(tmp_path / "absent") is None
    for name in ("0000002.pt", "0000010.pt", ".0000011.pt.abc.tmp", "best.pt", "0000012.txt"):
        (tmp_path / name).touch()
    assert containers.newest(tmp_path).name == "0000010.pt"


def test_checkpoints_say_what_they_are(vq_ckpt, gpt_ckpt):
    assert containers.read(vq_ckpt)["config"] == {
        "kind": "tokenizer", "vq_model": "VQ-4-S", "codebook_size": 256, "codebook_embed_dim": 8,
        "codebook_l2_norm": True, "image_size": [16, 16]}
    config = containers.read(gpt_ckpt)["config"]
    assert config["classes"] == ["blue", "green", "red"]
    assert (config["gpt_model"], config["grid"], config["vocab_size"]) == ("GPT-S", [4, 4], 256)
    assert config["num_classes"] == 3


def test_finetuning_takes_the_model_from_the_file(vq_ckpt, image_folder, tmp_path):
    """No --vq-model: the file says VQ-4-S. A released file (weights only) serves as well as a training checkpoint."""
    command = ["train_vq", "--data-path", image_folder, "--image-size", 24, "--num-workers", 0, "--epochs", 1,
               "--perceptual-weight", 0, "--global-batch-size", 18, "--finetune", "--disc-start", 0, "--lr", 0, "--ema"]
    call(*command, "--results-dir", tmp_path / "a", "--vq-ckpt", vq_ckpt)
    released = tmp_path / "released.pt"
    torch.save({"model": containers.read(vq_ckpt)["ema"]}, released)
    call(*command, "--results-dir", tmp_path / "b", "--vq-ckpt", released, "--vq-model", "VQ-4-S")
    made = [containers.read(tmp_path / side / "000-VQ-4-S" / "checkpoints" / "0000002.pt") for side in "ab"]
    start = containers.read(vq_ckpt)["ema"]
    for content in made:
        assert content["steps"] == 2  # fresh counters
        for name, value in content["ema"].items():  # at learning rate 0 the start stays
            assert name == "quantize.codebook_used" or torch.allclose(value, start[name], atol=1e-6), name
    assert equal(made[0]["discriminator"], made[1]["discriminator"])


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / ".0000004.pt.abc.tmp").write_bytes(b"half")
    containers.save({"steps": 4}, tmp_path / "0000004.pt")
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000004.pt"]
