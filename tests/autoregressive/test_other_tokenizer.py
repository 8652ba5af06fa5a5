"""Another tokenizer of the same codebook size than the one that made the codes: told where pictures are made, refused
where a training would go on with other codes. Copies of one tokenizer are one."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autoregressive.sample import sample_c2i, sample_ddp
from autoregressive.train import export
from tests.conftest import TINY, call, two_processes
from tests.dataset.codes import fake_codes, write_llamagen, write_packed
from tests.runs import QUICK_GPT, rows
from tokenizer.build import TokenizerFlags, describe_tokenizer, load_tokenizer
from utils import cli
from utils.checkpoints import containers

MADE, NOW = "1" * 64, "2" * 64


def described(path) -> dict:
    name, model = load_tokenizer(TokenizerFlags(vq_ckpt=str(path)), device=torch.device("cpu"))
    return describe_tokenizer(name, model)


@pytest.fixture(scope="module")
def other_vq(vq_ckpt, tmp_path_factory):
    """A tokenizer of the same shape with other weights."""
    content = containers.read(vq_ckpt)
    path = tmp_path_factory.mktemp("other") / "other_vq.pt"
    containers.save({"model": {name: value + 0.01 if name.startswith("encoder") else value
                               for name, value in content["ema"].items()}, "config": content["config"]}, path)
    return path


@pytest.fixture(scope="module")
def copies(vq_ckpt, tmp_path_factory):
    """The same tokenizer in other files, by name."""
    folder, content = tmp_path_factory.mktemp("copies"), containers.read(vq_ckpt)
    torch.save({"model": content["ema"]}, folder / "llamagen.pt")
    save_file(content["ema"], folder / "bare.safetensors")
    found = {"EMA weights": vq_ckpt, "LlamaGen's": folder / "llamagen.pt", "safetensors": folder / "bare.safetensors"}
    for dtype in ("fp32", "bf16", "fp16"):
        cli.run(export.main, export.ExportFlags, ["--vq-ckpt", str(vq_ckpt), "--dtype", dtype, "--output",
                                                  str(folder / dtype)])
        found[dtype] = folder / dtype
    cli.run(export.main, export.ExportFlags, ["--vq-ckpt", str(found["bf16"]), "--output", str(folder / "again")])
    found["of a copy"] = folder / "again"
    return found


def sample(gpt, vq, output, *more) -> None:
    cli.run(sample_c2i.main, sample_c2i.GridFlags, ["--gpt-ckpt", str(gpt), "--vq-ckpt", str(vq), "--vq-model",
                                                    "VQ-4-S", "--classes", "0", "--output", str(output), *more])


def test_sampling_warns(gpt_ckpt, vq_ckpt, other_vq, tmp_path, capsys):
    sample(gpt_ckpt, other_vq, tmp_path / "x.png")
    said = capsys.readouterr().err
    assert said.count("warning:") == said.count("\n") == 1
    hashes = [described(path)["weights_sha256"][:12] for path in (vq_ckpt, other_vq)]
    assert all(word in said for word in (str(gpt_ckpt), str(other_vq), *hashes, "--vq-ckpt"))
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("kind", ["EMA weights", "LlamaGen's", "safetensors", "fp32", "bf16", "fp16", "of a copy"])
def test_copies_are_the_same_tokenizer(kind, copies, gpt_ckpt, tmp_path, capsys):
    sample(gpt_ckpt, copies[kind], tmp_path / "x.png")
    assert capsys.readouterr().err == ""


def test_codes_made_with_a_rounded_copy_are_those_of_the_original(copies, vq_ckpt, other_vq, image_folder, tmp_path,
                                                                  capsys):
    call("extract", "--data-path", image_folder, "--code-path", tmp_path, "--vq-ckpt", copies["bf16"], *TINY)
    made = json.loads((tmp_path / "imagenet16_codes" / "manifest.json").read_text())["tokenizer"]
    assert made["weights_sha256"] != made["rounded_from"] == described(vq_ckpt)["weights_sha256"]
    for path in (vq_ckpt, *copies.values()):
        call("verify", "--code-path", tmp_path, "--vq-ckpt", path, "--vq-model", "VQ-4-S")
    with pytest.raises(SystemExit):
        call("verify", "--code-path", tmp_path, "--vq-ckpt", other_vq)
    assert "is not the tokenizer that made the codes" in capsys.readouterr().err


def test_sets_of_samples_and_their_scores_say_it(gpt_ckpt, vq_ckpt, other_vq, stand_in, sets, tmp_path, capsys):
    from evaluations.c2i.evaluator import origin_of

    for vq in (vq_ckpt, other_vq):
        words = ["--gpt-ckpt", gpt_ckpt, "--vq-ckpt", vq, "--num-fid-samples", 3, "--sample-dir", tmp_path / vq.stem]
        for _ in range(2):  # the second time all is there already
            cli.run(sample_ddp.main, sample_ddp.SampleSetFlags, [str(word) for word in words])
    said = capsys.readouterr().err
    assert said.count("warning:") == 2
    npz, = (tmp_path / other_vq.stem).glob("*.npz")
    assert "was trained on codes of tokenizer" in origin_of(npz, "config.json")["warnings"][0]
    plain, = (tmp_path / vq_ckpt.stem).glob("*.npz")
    assert origin_of(plain, "config.json")["warnings"] == []
    for name, path in (("other", npz), ("plain", plain)):
        report = tmp_path / f"{name}.json"
        call("evaluate", sets[0], path, "--metrics", "fid", "--output", report)
        warnings = [text for text in json.loads(report.read_text())["protocol"]["warnings"] if "sampler" in text]
        assert len(warnings) == (name == "other")
    assert "the sampler said: " in capsys.readouterr().err


def test_another_grid_than_the_checkpoints_is_told(gpt_ckpt, vq_ckpt, tmp_path, capsys):
    sample(gpt_ckpt, vq_ckpt, tmp_path / "x.png", "--image-size", "24x16")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--image-size 24x16 is 6x4 tokens" in said and "was trained on 4x4 (16x16 pixels)" in said
    sample(gpt_ckpt, vq_ckpt, tmp_path / "x.png", "--image-size", "16")
    torch.save({"model": containers.read(gpt_ckpt)["ema"]}, tmp_path / "foreign.pt")  # does not say its size
    sample(tmp_path / "foreign.pt", vq_ckpt, tmp_path / "x.png", "--gpt-model", "GPT-S", "--image-size", "24")
    assert capsys.readouterr().err == ""


# ---- training


def store(path, tokenizer: str = MADE, *, seed: int = 0, **tokens):
    """A store of random codes, by a tokenizer of that hash."""
    labels = np.arange(14) % 3
    return write_packed(path, fake_codes(seed=seed, **tokens), labels, classes=["a", "b", "c"], tokenizer=tokenizer)


def train(code_path, results, *more) -> None:
    call("train_gpt", "--code-path", code_path, *QUICK_GPT, "--results-dir", results, *more)


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        train(*words)
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n")) == (2, 1), said
    assert MADE[:12] in said and NOW[:12] in said
    return said


def test_previews_by_another_tokenizer_are_told_once(code_store, other_vq, vq_ckpt, tmp_path, capsys):
    train(code_store, tmp_path, "--vq-ckpt", vq_ckpt)
    assert "warning" not in capsys.readouterr().err
    train(code_store, tmp_path, "--vq-ckpt", other_vq)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and str(other_vq) in said and str(code_store) in said


@pytest.mark.processes
def test_two_processes_tell_it_once(code_store, other_vq, tmp_path):
    said = two_processes([("train_gpt", ["--code-path", code_store, *QUICK_GPT, "--results-dir", tmp_path / "runs",
                                         "--vq-ckpt", other_vq])], tmp_path)
    assert said.count("warning: the codes in") == 1


def test_a_run_does_not_begin_anew_because_codes_were_extracted_by_another_tokenizer(tmp_path, capsys):
    train(store(tmp_path / "a"), tmp_path / "runs", "--resume", "auto")
    capsys.readouterr()
    codes = store(tmp_path / "b", NOW, seed=1)
    said = refused(capsys, codes, tmp_path / "runs", "--resume", "auto")
    assert all(word in said for word in ("000-GPT-S", str(codes), "--results-dir", "--resume auto"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["000-GPT-S"]
    train(codes, tmp_path / "runs")  # a new run, as the message says
    train(codes, tmp_path / "runs", "--resume", "auto", "--epochs", 2)  # which is then gone on with
    train(tmp_path / "a", tmp_path / "runs", "--resume", "auto", "--epochs", 2)  # as is the first
    assert [rows(tmp_path / "runs" / f"00{i}-GPT-S")[-1]["step"] for i in range(2)] == [4, 4]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_other_settings_as_well_are_another_run(tmp_path, capsys):
    train(store(tmp_path / "a"), tmp_path / "runs", "--resume", "auto")
    train(store(tmp_path / "b", NOW), tmp_path / "runs", "--resume", "auto", "--lr", 3e-4)
    assert "000-GPT-S is another run" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_codes_that_do_not_say_their_tokenizer_are_another_run_as_before(tmp_path):
    train(store(tmp_path / "a"), tmp_path / "runs", "--resume", "auto")
    train(write_llamagen(tmp_path / "b", fake_codes(), np.arange(14) % 3), tmp_path / "runs", "--resume", "auto",
          "--vocab-size", 256)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_checkpoint_is_not_gone_on_with_on_other_codes(tmp_path, capsys):
    train(store(tmp_path / "a"), tmp_path / "runs")
    capsys.readouterr()
    run, codes = tmp_path / "runs" / "000-GPT-S", store(tmp_path / "b", NOW)
    for words in (("--resume", run), ("--gpt-ckpt", run), ("--gpt-resume", run)):
        assert "was trained on codes of tokenizer" in refused(capsys, codes, tmp_path / "other", *words)
    assert not (tmp_path / "other").exists()


def test_weights_for_a_new_run_on_other_codes_are_told(tmp_path, capsys):
    train(store(tmp_path / "a"), tmp_path / "runs")
    run, codes = tmp_path / "runs" / "000-GPT-S", store(tmp_path / "b", NOW)
    cli.run(export.main, export.ExportFlags, ["--gpt-ckpt", str(run), "--output", str(tmp_path / "export")])
    for words in (("--init-from", run), ("--gpt-ckpt", tmp_path / "export")):
        capsys.readouterr()
        train(codes, tmp_path / "other", *words)
        said = capsys.readouterr().err
        assert said.count("warning: ") == 1 and MADE[:12] in said and NOW[:12] in said


def test_mixed_stores_record_the_tokenizer_of_those_that_know_it(tmp_path, capsys):
    foreign = write_llamagen(tmp_path / "foreign", fake_codes(14, 10), np.arange(14) % 3)
    packed = write_packed(tmp_path / "packed", fake_codes(), np.arange(14) % 3, tokenizer=MADE)
    for number, names in enumerate((f"{foreign},{packed}", f"{packed},{foreign}")):
        train(names, tmp_path / str(number), "--store-weights", "1,1")
        config = json.loads((tmp_path / str(number) / "000-GPT-S" / "config.json").read_text())
        assert config["model"]["tokenizer"]["weights_sha256"] == MADE
