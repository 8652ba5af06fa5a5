"""Exports: three layouts that every reader takes, the same pictures as from the training checkpoint."""
import json

import pytest
import torch
from safetensors.torch import load_file

from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_gpt, load_pipeline
from autoregressive.sample.prompts import TextSampleFlags, load_text_pipeline
from autoregressive.train import export
from tests.autoregressive.sample.text import save_text_model
from tests.conftest import call
from tokenizer.build import TokenizerFlags, load_tokenizer
from utils import cli
from utils.checkpoints import containers

CPU = torch.device("cpu")
FORMATS = {"safetensors": "", "llamagen": ".pt", "consolidated": "/consolidated.pth"}  # what is added to --output


def run(*argv) -> None:
    cli.run(export.main, export.ExportFlags, [str(word) for word in argv])


def pictures(gpt_ckpt, vq_ckpt, **flags):
    pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(gpt_ckpt), vq_ckpt=str(vq_ckpt), precision="none", **flags),
                             device=CPU)
    return pipeline([0, 1, 2], seed=3, indices=[0, 1, 2])


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", FORMATS)
def test_an_exported_gpt_draws_the_same_pictures(layout, gpt_ckpt, vq_ckpt, tmp_path):
    run("--gpt-ckpt", gpt_ckpt, "--output", tmp_path / "out", "--format", layout)
    made = f"{tmp_path}/out{FORMATS[layout]}"
    known = {"gpt_model": "GPT-S", "image_size": (16, 16)} if layout == "consolidated" else {}  # a bare state dict
    assert (pictures(made, vq_ckpt, **known) == pictures(gpt_ckpt, vq_ckpt)).all()
    content = containers.read(made)
    assert same(containers.weights(content, made), containers.read(gpt_ckpt)["ema"])
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("layout", FORMATS)
def test_an_export_says_where_the_class_of_an_arpg_lies(layout, arpg_ckpt, tmp_path, capsys):
    content = containers.read(arpg_ckpt)
    for name, config, at_origin in (("named", content["config"], True), ("bare", None, True),
                                    ("earlier", content["config"] | {"class_at_origin": False}, False)):
        torch.save({"model": content["model"]} | ({"config": config} if config else {}), tmp_path / f"{name}.pt")
        argv = "--gpt-ckpt", tmp_path / f"{name}.pt", "--output", tmp_path / layout / name, "--format", layout
        if layout == "consolidated" and not at_origin:
            with pytest.raises(SystemExit):
                run(*argv)
            assert "this one has False: give --format safetensors or llamagen" in capsys.readouterr().err
        else:
            run(*argv)
            flags = SampleFlags(gpt_ckpt=f"{tmp_path / layout / name}{FORMATS[layout]}", precision="none")
            assert load_gpt(flags, device=CPU)[0].config.class_at_origin == at_origin


@pytest.mark.parametrize("layout", FORMATS)
def test_an_exported_tokenizer_is_the_tokenizer(layout, vq_ckpt, tmp_path):
    run("--vq-ckpt", vq_ckpt, "--output", tmp_path / "out", "--format", layout)
    known = {"vq_model": "VQ-4-S"} if layout == "consolidated" else {}
    name, model = load_tokenizer(TokenizerFlags(vq_ckpt=f"{tmp_path}/out{FORMATS[layout]}", **known), device=CPU)
    assert name == "VQ-4-S"
    assert same(model.state_dict(), containers.read(vq_ckpt)["ema"])


def test_the_layouts_are_what_others_expect(gpt_ckpt, tmp_path):
    for layout in FORMATS:
        run("--gpt-ckpt", gpt_ckpt, "--output", tmp_path / layout, "--format", layout)
    averaged = containers.read(gpt_ckpt)["ema"]
    assert same(load_file(tmp_path / "safetensors" / "model.safetensors"), averaged)
    assert same(torch.load(tmp_path / "llamagen.pt", weights_only=True)["model"], averaged)
    assert same(torch.load(tmp_path / "consolidated" / "consolidated.pth", weights_only=True), averaged)
    config = json.loads((tmp_path / "safetensors" / "config.json").read_text())
    assert config.pop("measured")["step"] == int(gpt_ckpt.name)
    assert config == {"kind": "gpt", "gpt_model": "GPT-S", "gpt_type": "c2i", "grid": [4, 4], "vocab_size": 256,
                      "num_classes": 3, "cls_token_num": 1, "classes": ["blue", "green", "red"], "weights": "ema",
                      "dtype": "fp32", "source": gpt_ckpt.name, "source_sha256": containers.content_hash(gpt_ckpt),
                      "tokenizer": config["tokenizer"], "image_size": [16, 16]}
    assert config["tokenizer"]["name"] == "VQ-4-S"


def test_half_the_size_and_what_a_foreign_file_is(gpt_ckpt, vq_ckpt, tmp_path):
    """A bare file and two flags become an export that needs none."""
    torch.save(containers.read(gpt_ckpt)["model"], tmp_path / "foreign.pth")
    run("--gpt-ckpt", tmp_path / "foreign.pth", "--gpt-model", "GPT-S", "--image-size", "8x16", "--downsample-size", 4,
        "--dtype", "bf16", "--output", tmp_path / "out")
    assert pictures(tmp_path / "out", vq_ckpt).shape == (3, 8, 16, 3)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["weights"] == "model"
    run("--vq-ckpt", vq_ckpt, "--dtype", "fp16", "--output", tmp_path / "vq.pt", "--format", "llamagen")
    state = containers.read(tmp_path / "vq.pt")["model"]
    assert state["encoder.conv_in.weight"].dtype == torch.float16
    assert state["quantize.codebook_used"].dtype != torch.float16  # numbers of codes: a buffer


@pytest.mark.parametrize(("argv", "said"), [
    ([], "Give --gpt-ckpt or --vq-ckpt"), (["--gpt-ckpt", "a", "--vq-ckpt", "b"], "Give --gpt-ckpt or --vq-ckpt"),
    (["--gpt-ckpt", "absent.pt"], "no checkpoint at absent.pt")])
def test_mistakes_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_tokenizer_is_no_gpt(vq_ckpt, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--gpt-ckpt", vq_ckpt, "--output", tmp_path / "out")
    assert "it looks like a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_can_be_trained_on(gpt_ckpt, code_store, tmp_path):
    run("--gpt-ckpt", gpt_ckpt, "--output", tmp_path / "out")
    call("train_gpt", "--code-path", code_store, "--init-from", tmp_path / "out", "--lr", 0, "--epochs", 1,
         "--num-workers", 0, "--global-batch-size", 36, "--results-dir", tmp_path / "runs")
    content = containers.read(tmp_path / "runs" / "000-GPT-S")
    assert same(content["model"], containers.read(gpt_ckpt)["ema"])


@pytest.mark.parametrize("layout", FORMATS)
def test_a_text_model_is_exported_with_what_its_pictures_need(layout, vq_ckpt, tmp_path):
    path, made = save_text_model(tmp_path / "gpt.pt"), f"{tmp_path}/out{FORMATS[layout]}"
    run("--gpt-ckpt", path, "--gpt-type", "t2i", "--output", tmp_path / "out", "--format", layout)
    codes = [load_text_pipeline(TextSampleFlags(gpt_ckpt=str(file), vq_ckpt=str(vq_ckpt), precision="none",
                                                image_size=(16, 16)), device=CPU).sample_codes(
        [torch.ones(3, 8)], seed=0, indices=[0]) for file in (path, made)]
    assert torch.equal(*codes)
    if layout == "safetensors":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["num_classes"] is None and (config["caption_dim"], config["cls_token_num"]) == (8, 6)
        assert config["gpt_type"] == "t2i" and config["text_encoder"]["name"] == "stand-in"
