"""A user's mistake: one line on stderr that starts with "error: ", exit code 2, and nothing written."""
import importlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.sample.sample_c2i import GridFlags
from autoregressive.sample.sample_ddp import SampleSetFlags
from autoregressive.sample.sample_t2i import PromptGridFlags
from autoregressive.sample.sample_t2i_ddp import PromptSetFlags
from tests.conftest import ENTRIES as ENTRIES_BY_NAME
from tests.conftest import ROOT, TINY, TINY_GPT, TINY_VQ, call, entry, write_images
from tests.house.test_architecture import ENTRIES
from tokenizer.reconstruct import ReconstructFlags
from utils.checkpoints import containers
from utils.cli import build_parser, image_size

VQ, GPT = [*TINY_VQ, "--epochs", 1], [*TINY_GPT, "--epochs", 1]


def tree(folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refuse(tmp_path, capsys, monkeypatch):
    """refuse(command, flags…) → the one line; nothing below the test's folder has changed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *argv) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call(name, *argv)
        lines = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert tree(tmp_path) == before
        return lines[0]

    return run


# ---- data


def test_data_paths(refuse, tmp_path, vq_ckpt):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    splits = tmp_path / "splits"
    for name in ("train", "val"):
        write_images(splits / name, count=1)
    for name, argv in (("train_vq", VQ), ("extract", [*TINY, "--vq-ckpt", vq_ckpt, "--code-path", "codes"])):
        assert "--data-path" in refuse(name, *argv)
        assert "absent is not a folder" in refuse(name, *argv, "--data-path", "absent")
        assert "file is not a folder" in refuse(name, *argv, "--data-path", "file")
        assert "no class folders" in refuse(name, *argv, "--data-path", "empty")
        assert "point --data-path at one, such as splits/train" in refuse(name, *argv, "--data-path", "splits")
        assert "--dataset nope is unknown" in refuse(name, *argv, "--data-path", "splits", "--dataset", "nope")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_data_path(refuse, tmp_path):
    root = write_images(tmp_path / "images", count=1)
    root.chmod(0)
    assert "check its permissions" in refuse("train_vq", *VQ, "--data-path", root)
    root.chmod(0o755)


def test_images_that_are_all_broken(refuse, tmp_path, vq_ckpt):
    for i in range(3):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(b"no image")
    (tmp_path / "codes").mkdir()
    assert "can be read" in refuse("train_vq", *VQ, "--data-path", "images")
    command = ["extract", *TINY, "--vq-ckpt", vq_ckpt, "--code-path", "codes", "--data-path", "images"]
    with pytest.raises(SystemExit):
        call(*command)
    assert not list((tmp_path / "codes").iterdir())
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a" / "0.png")
    call(*command)  # mended, it goes through
    assert (tmp_path / "codes" / "imagenet16_codes" / "manifest.json").is_file()


def test_image_sizes(refuse, image_folder, vq_ckpt):
    data = ["--data-path", image_folder]
    assert "not divisible by 4" in refuse("train_vq", *VQ, *data, "--image-size", "18")
    extract = ["extract", *data, "--num-workers", 0, "--vq-ckpt", vq_ckpt, "--code-path", "codes"]
    assert "16x18 is not divisible by 4" in refuse(*extract, "--image-size", "16x18")
    assert "--crop-range" in refuse(*extract, *TINY, "--crop-range", 0.9)
    assert "from 24 pixels" in refuse("train_vq", *VQ, *data, "--disc-weight", "0.5")
    for text in ("0", "x", "16x", "1x2x3", "-16", "big", ""):
        assert "--image-size" in refuse("train_vq", *VQ, *data, f"--image-size={text}")
    assert image_size("256X384") == (256, 384)


# ---- checkpoints


def test_checkpoints_of_the_wrong_kind(refuse, image_folder, code_store, vq_ckpt, gpt_ckpt):
    data, codes = ["--data-path", image_folder], ["--code-path", code_store]
    extract = ["extract", *data, *TINY, "--code-path", "codes"]
    assert "looks like a GPT" in refuse(*extract, "--vq-ckpt", gpt_ckpt)
    assert "--vq-ckpt is missing" in refuse(*extract)
    assert "no checkpoint at" in refuse(*extract, "--vq-ckpt", "absent.pt")
    assert "VQModel: missing encoder" in refuse("train_vq", *VQ, *data, "--finetune", "--vq-ckpt", gpt_ckpt)
    assert "does not fit" in refuse("train_vq", *VQ, *data, "--resume", gpt_ckpt)
    assert "looks like a GPT" in refuse("train_gpt", *GPT, *codes, "--vq-ckpt", gpt_ckpt)
    assert "it looks like a tokenizer" in refuse("train_gpt", *GPT, *codes, "--gpt-ckpt", vq_ckpt)
    assert "it looks like a tokenizer" in refuse("train_gpt", *GPT, *codes, "--resume", vq_ckpt)
    assert "looks like a GPT" in refuse("verify", "--code-path", code_store / "imagenet16_codes", "--vq-ckpt", gpt_ckpt)


def test_checkpoints_that_do_not_fit_or_are_damaged(refuse, tmp_path, image_folder, vq_ckpt):
    extract = ["extract", "--data-path", image_folder, *TINY, "--code-path", "codes", "--vq-ckpt"]
    content = containers.read(vq_ckpt)
    state = content["model"]
    spoilt = {"missing decoder.conv_out.bias": {k: v for k, v in state.items() if k != "decoder.conv_out.bias"},
              "unexpected extra": {**state, "extra": torch.ones(1)},
              "quant_conv.weight is (2, 2), expected (8, 32, 1, 1)": {**state, "quant_conv.weight": torch.ones(2, 2)}}
    for i, (said, weights) in enumerate(spoilt.items()):
        torch.save({"model": weights, "config": content["config"]}, tmp_path / f"{i}.pt")
        assert said in refuse(*extract, f"{i}.pt")
    assert "does not fit VQModel" in refuse(*extract, vq_ckpt, "--codebook-size", 512)
    torch.save({"model": state}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-5000])
    assert "cut.pt cannot be read as a checkpoint" in refuse(*extract, "cut.pt")
    assert "cut.pt" in refuse("train_vq", *VQ, "--data-path", image_folder, "--resume", "cut.pt")
    (tmp_path / "run.pt").write_bytes(pickle.dumps(os.system))
    assert "is refused" in refuse(*extract, "run.pt")


def spoil(source, target, name: str, value: float = float("nan")):
    """Write the weights of a checkpoint with one of them spoilt; averages are left out."""
    content = containers.read(source)
    content["model"][name].view(-1)[-1] = value
    torch.save({"model": content["model"], "config": content["config"]}, target)
    return target


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (float("-inf"), "inf")])
def test_weights_that_are_not_finite(refuse, tmp_path, image_folder, code_store, vq_ckpt, gpt_ckpt, value, said):
    vq = spoil(vq_ckpt, tmp_path / "vq.pt", "decoder.conv_in.weight", value)
    gpt = spoil(gpt_ckpt, tmp_path / "gpt.pt", "output.weight", value)
    data, codes = ["--data-path", image_folder], ["--code-path", code_store]
    sampling = ["--num-fid-samples", 3, "--sample-dir", "samples", "--precision", "none"]
    tensor = f"vq.pt holds weights that are not finite: decoder.conv_in.weight ({said}): "
    for command in (["train_vq", *VQ, *data, "--finetune", "--vq-ckpt", vq],
                    ["extract", *TINY, *data, "--code-path", "codes", "--vq-ckpt", vq],
                    ["verify", "--code-path", code_store / "imagenet16_codes", "--vq-ckpt", vq],
                    ["train_gpt", *GPT, *codes, "--vq-ckpt", vq],
                    ["sample", *sampling, "--gpt-ckpt", gpt_ckpt, "--vq-ckpt", vq],
                    ["reconstruct", *TINY, *data, "--vq-ckpt", vq]):
        assert tensor in refuse(*command)
    tensor = f"gpt.pt holds weights that are not finite: output.weight ({said}): "
    for command in (["train_gpt", *GPT, *codes, "--init-from", gpt], ["train_gpt", *GPT, *codes, "--gpt-ckpt", gpt],
                    *(["sample", *sampling, *quantized, "--gpt-ckpt", gpt, "--vq-ckpt", vq_ckpt]
                      for quantized in ([], ["--quantize", "int8"], ["--quantize", "int4"]))):
        assert tensor in refuse(*command)


def test_pixels_and_logits_that_are_not_finite(tmp_path, capsys, monkeypatch, image_folder, vq_ckpt, gpt_ckpt):
    """Finite weights whose products are not: found while sampling, and no picture is written."""
    vq = spoil(vq_ckpt, tmp_path / "vq.pt", "decoder.conv_out.bias", 3e38)
    content = torch.load(vq, weights_only=True)
    content["model"]["decoder.conv_out.weight"][-1] = 3e38
    torch.save(content, vq)
    content = containers.read(gpt_ckpt)
    content["model"]["output.weight"][5] = 3e38
    torch.save({"model": content["model"], "config": content["config"]}, tmp_path / "gpt.pt")
    sampling = ["--num-fid-samples", 3, "--sample-dir", tmp_path / "samples", "--precision", "none"]
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    scoring = ["--fid-reference", tmp_path / "reference.npz", "--metrics", "frechet_distance", "--features",
               "tests.evaluations.stand_ins:tiny_network"]
    monkeypatch.setitem(ENTRIES_BY_NAME, "grid", ("autoregressive.sample.sample_c2i", "GridFlags"))
    monkeypatch.setitem(ENTRIES_BY_NAME, "score", ("autoregressive.sample.sample_and_score", "SampleAndScoreFlags"))
    grid = ["grid", "--precision", "none", "--output", tmp_path / "grid.png"]
    for command, said in (*(([*command, "--gpt-ckpt", gpt, "--vq-ckpt", tokenizer], said)
                            for command in (["sample", *sampling], ["score", *sampling, *scoring], grid)
                            for gpt, tokenizer, said in ((gpt_ckpt, vq, "gave images that are not"),
                                                         (tmp_path / "gpt.pt", vq_ckpt, "logits"))),
                          (["reconstruct", *TINY, "--data-path", image_folder, "--vq-ckpt", vq, "--sample-dir",
                            tmp_path / "samples"], "VQ-4-S gave images that are not finite")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call(*command)
        assert caught.value.code == 2 and not [*tmp_path.rglob("*.png"), *(tmp_path / "samples").rglob("*.npz")]
        shown = capsys.readouterr().err  # a progress bar may stand before it
        assert shown.count("error: ") == 1 and said in shown.partition("error: ")[2] and "Traceback" not in shown, shown


# ---- training flags


@pytest.mark.parametrize(("flags", "said"), [
    (["--global-batch-size", 7, "--gradient-accumulation-steps", 2], "7 is not divisible by 1 processes x"),
    (["--global-batch-size", 0], "--global-batch-size 0"),
    (["--gradient-accumulation-steps", 0], "--gradient-accumulation-steps 0"),
    (["--epochs", 0], "--epochs"),
    (["--ckpt-every", 0], "--ckpt-every"),
    (["--resume", "absent.pt"], "--resume absent.pt: no such checkpoint"),
    (["--no-local-save"], "--cloud-save-path"),
    (["--lr", "fast"], "argument --lr"),
    (["--mixed-precision", "int8"], "argument --mixed-precision"),
    (["--spam"], "unrecognized arguments: --spam"),
    (["--glob", 8], "unrecognized arguments: --glob"),  # no abbreviations: a new flag could change their meaning
])
def test_training_flags(refuse, image_folder, code_store, flags, said):
    assert said in refuse("train_gpt", *GPT, "--code-path", code_store, *flags)
    assert said in refuse("train_vq", *VQ, "--data-path", image_folder, *flags)


def test_tokenizer_flags(refuse, image_folder, tmp_path, vq_ckpt):
    data = ["--data-path", image_folder]
    assert "--finetune needs --vq-ckpt" in refuse("train_vq", *VQ, *data, "--finetune")
    assert "has classes" in refuse("train_vq", *VQ, *data, "--data-face-path", image_folder)
    torch.save({"model": containers.read(vq_ckpt)["model"]}, tmp_path / "released.pt")
    assert "see --finetune" in refuse("train_vq", *VQ, *data, "--vq-ckpt", "released.pt")  # has no optimizer


# ---- codes


def test_code_paths(refuse, tmp_path, code_store, vq_ckpt):
    def codes(path, *argv):
        return refuse("train_gpt", *GPT, "--code-path", path, *argv)

    (tmp_path / "empty").mkdir()
    assert "the following arguments are required: --code-path" in refuse("train_gpt", *GPT)
    assert "absent is not a folder" in codes("absent")
    assert "holds no code store" in codes("empty")
    for name in ("a_codes", "b_codes"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(code_store / "imagenet16_codes")
    assert "several stores (a_codes, b_codes)" in codes("two")
    assert "--image-size is (32, 32)" in codes(code_store, "--image-size", 32)
    assert "--downsample-size is 16" in codes(code_store, "--downsample-size", 16)
    assert "--vocab-size is 128" in codes(code_store, "--vocab-size", 128)
    assert "--num-classes is 2" in codes(code_store, "--num-classes", 2)
    assert "--gpt-type t2i" in codes(code_store, "--gpt-type", "t2i")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.json").write_text("{}")
    assert "run the extraction again" in codes("unfinished")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"format": "other"}')
    assert "of another format" in codes("foreign")
    (tmp_path / "foreign" / "manifest.json").write_text('{"format')
    assert "is damaged" in codes("foreign")


def test_codes_beyond_the_vocabulary(tmp_path, capsys):
    """Found where batches are made, here in a loading process: still one line."""
    for name, content in (("codes", np.full((1, 1, 16), 300)), ("labels", np.zeros(1, np.int64))):
        (tmp_path / f"x16_{name}").mkdir()
        for i in range(8):
            np.save(tmp_path / f"x16_{name}" / f"{i}.npy", content)
    with pytest.raises(SystemExit) as caught:
        call("train_gpt", *GPT, "--code-path", tmp_path, "--vocab-size", 256, "--results-dir", tmp_path / "results",
             "--num-workers", 1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    said = last.rpartition("error: ")[2]
    assert said.startswith(f"{tmp_path / 'x16_codes'}/")
    assert ".npy holds code 300, but the model's vocabulary is 256" in said


# ---- processes


@pytest.mark.processes
def test_one_line_and_exit_code_2_from_two_processes(tmp_path, code_store):
    process = subprocess.run(
        ["bash", ROOT / "scripts" / "autoregressive" / "train_c2i.sh",
         *map(str, ["--code-path", code_store, *GPT, "--global-batch-size", 7])], cwd=tmp_path, text=True,
        env={**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
             "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}, capture_output=True)
    assert process.returncode == 2
    lines = process.stderr.splitlines()
    assert lines[0].startswith("error: --global-batch-size 7 is not divisible by 2 processes")
    assert sum("error: " in line for line in lines) == 1
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())


def test_only_rank_0_speaks(refuse, monkeypatch, capsys):
    assert "required: --code-path" in refuse("train_gpt")
    monkeypatch.setenv("RANK", "1")
    for argv in ([], ["--code-path", "absent"]):
        with pytest.raises(SystemExit) as caught:
            call("train_gpt", *argv)
        assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_mistake_has_no_traceback_unless_asked_for(refuse, monkeypatch):
    assert "absent is not a folder" in refuse("train_gpt", *GPT, "--code-path", "absent")
    monkeypatch.setenv("LLAMAGEN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        call("train_gpt", *GPT, "--code-path", "absent")


@pytest.mark.parametrize(("module", "flags"), ENTRIES, ids=[module for module, _ in ENTRIES])
def test_seeds_are_refused_where_they_would_repeat_others(module, flags, capsys):
    parser = build_parser(getattr(importlib.import_module(module), flags), described_in=module)
    actions = [action for action in parser._actions if action.dest in ("seed", "global_seed")]
    for action in actions:
        action.required = False
        assert [action.type(str(seed)) for seed in (0, 2**32 - 1)] == [0, 2**32 - 1]
        for seed in (-1, 2**32, 2**32 + 1, 2**64, "1.5", "", "²"):
            with pytest.raises(SystemExit):
                parser.parse_args([f"--{action.dest}={seed}"])
            line, = capsys.readouterr().err.splitlines()
            assert f"--{action.dest.replace('_', '-')}: {seed!r} is no seed: expected a whole number from 0 to " \
                   f"{2**32 - 1}" in line
    if module.endswith((".train", "sample_ddp", "sample_c2i", "extract_codes", "class_accuracy", "reconstruct")):
        assert len(actions) == 1


# ---- the flags that users' scripts already contain: name → default, "!" required there, "sw" a switch

TRAINING = {
    "cloud-save-path": "!", "no-local-save": "sw", "ema": "sw", "weight-decay": 0.05, "beta1": 0.9, "beta2": 0.95,
    "max-grad-norm": 1.0, "lr": 1e-4, "global-seed": 0, "log-every": 100, "ckpt-every": 5000,
    "gradient-accumulation-steps": 1, "mixed-precision": "bf16",
}
TOKENIZER = {"vq-model": "VQ-16", "vq-ckpt": None, "codebook-size": 16384, "codebook-embed-dim": 8}
SAMPLING = {
    **TOKENIZER, "gpt-model": "GPT-B", "gpt-ckpt": None, "gpt-type": "c2i", "from-fsdp": "sw", "cls-token-num": 1,
    "precision": "bf16", "compile": "sw", "image-size": (384, 384), "downsample-size": 16, "num-classes": 1000,
    "cfg-interval": -1, "temperature": 1.0, "top-p": 1.0,
}
TEXT_SAMPLING = {
    **SAMPLING, "gpt-model": "GPT-XL", "gpt-type": "t2i", "cls-token-num": 120, "image-size": (512, 512),
    "cfg-scale": 7.5, "top-k": 1000, "t5-path": "pretrained_models/t5-ckpt", "t5-model-type": "flan-t5-xl",
    "t5-feature-max-len": 120, "t5-feature-dim": 2048, "no-left-padding": "sw",
}
FLAGS = {
    "train_vq": {
        **TRAINING, **TOKENIZER, "data-path": "!", "data-face-path": None, "finetune": "sw", "codebook-l2-norm": True,
        "codebook-weight": 1.0, "entropy-loss-ratio": 0.0, "commit-loss-beta": 0.25, "reconstruction-weight": 1.0,
        "reconstruction-loss": "l2", "perceptual-weight": 1.0, "disc-weight": 0.5, "disc-start": 20000,
        "disc-type": "patchgan", "disc-loss": "hinge", "gen-loss": "hinge", "compile": "sw", "dropout-p": 0.0,
        "results-dir": "results_tokenizer_image", "dataset": "imagenet", "image-size": (256, 256), "epochs": 40,
        "global-batch-size": 128, "num-workers": 16},
    "extract": {
        **TOKENIZER, "data-path": "!", "code-path": "!", "dataset": "imagenet", "image-size": (256, 256),
        "ten-crop": "sw", "crop-range": 1.1, "global-seed": 0, "num-workers": 24, "debug": "sw"},
    "train_gpt": {
        **TRAINING, "code-path": "!", "gpt-model": "GPT-B", "gpt-ckpt": None, "gpt-type": "c2i", "vocab-size": 16384,
        "cls-token-num": 1, "dropout-p": 0.1, "token-dropout-p": 0.1, "drop-path-rate": 0.0, "no-compile": "sw",
        "results-dir": "results", "dataset": "imagenet_code", "image-size": (256, 256), "downsample-size": 16,
        "num-classes": 1000, "epochs": 300, "global-batch-size": 256, "num-workers": 24},
    ReconstructFlags: {
        **TOKENIZER, "data-path": "!", "dataset": "imagenet", "image-size": (256, 256), "image-size-eval": (256, 256),
        "sample-dir": "reconstructions", "per-proc-batch-size": 32, "global-seed": 0, "num-workers": 4},
    GridFlags: {**SAMPLING, "cfg-scale": 4.0, "seed": 0, "top-k": 2000},
    SampleSetFlags: {
        **SAMPLING, "image-size-eval": (256, 256), "cfg-scale": 1.5, "sample-dir": "samples",
        "per-proc-batch-size": 32, "num-fid-samples": 50000, "global-seed": 0, "top-k": 0},
    PromptGridFlags: {**TEXT_SAMPLING, "seed": 0},
    PromptSetFlags: {
        **TEXT_SAMPLING, "prompt-csv": "evaluations/t2i/PartiPrompts.tsv", "sample-dir": "samples_parti",
        "per-proc-batch-size": 32, "num-fid-samples": 30000, "global-seed": 0},
}


@pytest.mark.parametrize("command", FLAGS, ids=str)
def test_flags_of_llamagen_are_understood_with_their_defaults(command):
    config_class = entry(command)[1] if isinstance(command, str) else command
    parser = build_parser(config_class)
    ours = {word: action for action in parser._actions for word in action.option_strings}
    for name, default in FLAGS[command].items():
        action = ours.get(f"--{name}")
        assert action is not None, f"--{name} is not understood"
        if default == "sw":  # given alone it is understood, and it is off by default (or off when asked)
            assert action.nargs == 0
            assert action.default is (name in ("no-local-save", "no-left-padding"))
        elif default != "!":
            assert action.default in (default, None), f"--{name} is {action.default}, LlamaGen's {default}"
    words = [word for name, default in FLAGS[command].items() for word in
             ([f"--{name}"] if default == "sw" or default is True else [f"--{name}", typed(default)])]
    parsed = vars(parser.parse_args(words))
    for name, default in FLAGS[command].items():
        if default not in ("!", "sw", None):
            assert parsed[name.replace("-", "_")] == default


def typed(default) -> str:
    """A default as a user's script has it: one number for a square."""
    return str(default[0]) if isinstance(default, tuple) else "x" if default in ("!", None) else str(default)


@pytest.mark.parametrize("command", FLAGS, ids=str)
def test_every_flag_has_help(command, capsys):
    parser = build_parser(entry(command)[1] if isinstance(command, str) else command)
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    assert "--image-size" in capsys.readouterr().out
