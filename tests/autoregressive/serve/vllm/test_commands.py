"""The commands that draw grids with vLLM, from checkpoints to PNG; what they refuse."""
import json

import numpy as np
import pytest

from autoregressive.sample import prompts
from tests.autoregressive.sample.text import install
from tests.autoregressive.serve.vllm.tiny import save_models
from tests.conftest import call
from utils.images import load_png

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def drawn(name: str, path, *argv) -> np.ndarray:
    call(name, *argv, "--precision", "none", "--output", path)
    return load_png(path)


def test_a_grid_of_classes(models, tmp_path, capsys):
    common = ["--gpt-ckpt", models["gpt"], "--vq-ckpt", models["vq"], "--classes", "red,2,blue,green,red"]
    first = drawn("served_grid", tmp_path / "a.png", *common)
    assert "5 images of 16x16" in capsys.readouterr().out
    assert np.array_equal(drawn("served_grid", tmp_path / "b.png", *common, "--max-num-seqs", 2), first)
    assert not np.array_equal(drawn("served_grid", tmp_path / "c.png", *common, "--seed", 1), first)
    other_size = drawn("served_grid", tmp_path / "d.png", *common, "--image-size", "8x24")
    assert other_size.shape != first.shape


def test_a_grid_of_prompts(models, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "load_text_encoder", None)
    install()
    common = ["--gpt-ckpt", models["text"], "--vq-ckpt", models["vq"], "--prompt", "a red cat", "--prompt", ""]
    first = drawn("served_prompts", tmp_path / "a.png", *common, "--images-per-prompt", 2)
    again = drawn("served_prompts", tmp_path / "b.png", *common, "--images-per-prompt", 2, "--max-num-seqs", 3)
    assert np.array_equal(first, again)
    assert json.loads((tmp_path / "a.json").read_text())["prompts"] == ["a red cat", ""]


@pytest.mark.parametrize(("flags", "said"), [
    (["--temperature", "2.5"], "vLLM takes 0, or 0.01 to 2"), (["--cfg-scale", "101"], "at most 100"),
    (["--cfg-scale", "nan"], "at most 100"), (["--quantize", "int8"], "--quantize int8 is not for vLLM"),
    (["--decode", "jacobi"], "--decode jacobi is not for vLLM"), (["--max-num-seqs", "0"], "expected 1 or more"),
    (["--image-size", "512x2048"], "too large for vLLM"), (["--step", "4"], "--step is for ARPG"),
])
def test_refusals_take_one_line(models, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        call("served_grid", "--gpt-ckpt", models["gpt"], "--vq-ckpt", models["vq"], *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ") and said in lines[-1]


def test_padding_after_a_text_is_refused(models, capsys):
    with pytest.raises(SystemExit):
        call("served_prompts", "--gpt-ckpt", models["text"], "--vq-ckpt", models["vq"], "--no-left-padding")
    assert "--no-left-padding is not for vLLM" in capsys.readouterr().err
