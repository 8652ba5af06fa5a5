"""Training on captions: stored features, one process, two, sharded, cut off; both families; previews, refusals."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import code_writer
from dataset.code_manifest import FORMAT
from dataset.codes import open_store
from dataset.text_batches import TextBatches, TextColumns
from tests.conftest import TINY_GPT, call, two_processes
from tests.language.encoders import write_t5
from tests.runs import QUICK, interrupt, last, rows, same
from utils.checkpoints import containers

WIDTH, COUNT = 8, 24
QUICK_T2I = ["train_t2i", *TINY_GPT, "--dropout-p", 0, "--token-dropout-p", 0, *QUICK, "--cls-token-num", 6]


def write_store(folder, *, width=WIDTH, short=True, count=COUNT):
    """A packed store of 4x4 codes with captions of 1 to 6 words and random features of these."""
    rng = np.random.default_rng(0)
    kinds = {"name": ("text", "uint8", []), "caption": ("text", "uint8", []),
             "features": ("ragged", "float32", [width])}
    if short:
        kinds["short_features"] = kinds["features"]
    code_writer.begin(folder, {
        "format": FORMAT, "dataset": "t2i", "images": count, "image_size": [16, 16], "grid": [4, 4], "views": 1,
        "classes": None, "dtype": "uint16", "tokenizer": {"name": "VQ-4-S", "downsample": 4, "codebook_size": 256,
                                                          "weights_sha256": "1" * 64},
        "columns": [{"name": name, "kind": kind, "dtype": dtype, "shape": shape}
                    for name, (kind, dtype, shape) in kinds.items()]})
    words = [int(n) for n in rng.integers(1, 7, count)]
    values = {"name": [f"a.jsonl:{i}" for i in range(count)],
              "caption": [f"{'word ' * n}{i}" for i, n in enumerate(words)],
              "features": [rng.standard_normal((n, width)).astype(np.float32) for n in words],
              "short_features": [np.full((i % 2, width), i, np.float32) for i in range(count)]}
    codes = rng.integers(0, 256, (count, 1, 16)).astype(np.uint16)
    code_writer.write_part(folder, 0, codes, [0] * count, columns={name: values[name] for name in kinds})
    code_writer.finish(folder, 1)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("codes") / "t2i16_codes")


def write_pairs(folder, *, count):
    """Pictures of random colours, each beside a caption."""
    folder.mkdir()
    for i, colour in enumerate(np.random.default_rng(1).integers(0, 256, (count, 3)).tolist()):
        Image.new("RGB", (20, 20), tuple(colour)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i} {'very ' * (i % 4)}coloured")
    return folder


def losses(folder) -> list[float]:
    return [row["loss"] for row in rows(folder)]


# ---- batches


def test_short_captions_come_as_often_as_asked_where_there_are_some(store):
    opened = open_store(store)
    keys = np.stack([np.repeat(np.arange(200), COUNT), np.tile(np.arange(COUNT), 200)], axis=1)
    text = TextColumns(opened, features=True, short_share=0.3)
    batch = TextBatches(opened, text, vocab_size=256, seed=1).__getitems__(keys)
    plain = TextColumns(opened, features=True).long(np.arange(COUNT))
    taken = np.array([len(found) == 1 and bool((found == i % COUNT).all())
                      for i, found in enumerate(batch["texts"])]).reshape(200, COUNT)
    assert not taken[:, ::2].any()  # an empty short caption: the long one is taken
    assert 0.25 < taken[:, 1::2].mean() < 0.35
    long = [found for i, found in enumerate(batch["texts"]) if not taken.ravel()[i]]
    wanted = [plain[i % COUNT] for i in range(len(keys)) if not taken.ravel()[i]]
    assert all(torch.equal(a, b) for a, b in zip(long, wanted, strict=True))
    again = TextBatches(opened, text, vocab_size=256, seed=1).__getitems__(keys[37:40])  # alone: the same
    assert all(torch.equal(a, b) for a, b in zip(again["texts"], batch["texts"][37:40], strict=True))


# ---- runs


@pytest.mark.parametrize("name", ["GPT-S", "ARPG-S"])
def test_a_run_learns_and_its_checkpoint_says_what_it_takes(name, store, vq_ckpt, tmp_path):
    call(*QUICK_T2I, "--data-path", store, "--gpt-model", name, "--epochs", 12, "--lr", 3e-3, "--results-dir", tmp_path,
         "--short-caption-share", 0, "--vq-ckpt", vq_ckpt, "--class-dropout", 0)
    found = losses(tmp_path / f"000-{name}")
    assert abs(found[0] - np.log(256)) < 1e-4 and found[-1] < found[0] - 0.05
    config = containers.read(tmp_path / f"000-{name}")["config"]
    assert (config["gpt_type"], config["cls_token_num"], config["caption_dim"]) == ("t2i", 6, WIDTH)
    assert (config["num_classes"], config["classes"]) == (None, None)
    assert list((tmp_path / f"000-{name}").rglob("*.png"))  # a preview, of captions


@pytest.fixture(scope="module")
def two(store, tmp_path_factory):
    """Runs on two processes: DDP, FSDP2, in parts."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {"ddp": [], "fsdp": ["--data-parallel", "fsdp"], "parts": ["--gradient-accumulation-steps", 3]}
    two_processes([("train_t2i", [*QUICK_T2I[1:], "--data-path", store, "--epochs", 2, "--results-dir", folder / name,
                                  "--ema", *more, *model])
                   for name, more in jobs.items() for model in ([], ["--gpt-model", "ARPG-S"])], folder)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("name", ["GPT-S", "ARPG-S"])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "parts"])
def test_two_processes_train_as_one(how, name, two, store, tmp_path):
    """Captions of different length on each process."""
    call(*QUICK_T2I, "--data-path", store, "--epochs", 2, "--results-dir", tmp_path, "--gpt-model", name, "--ema")
    run = next((two / how).glob(f"*-{name}"))
    np.testing.assert_allclose(losses(run), losses(tmp_path / f"000-{name}"), atol=2e-5)
    one, other = (containers.read(folder)["ema"] for folder in (tmp_path / f"000-{name}", run))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-4, rtol=0, msg=key)


def test_a_run_cut_off_goes_on_as_the_uninterrupted_one(store, tmp_path, monkeypatch):
    command = [*QUICK_T2I, "--data-path", store, "--epochs", 3, "--ema", "--resume", "auto", "--results-dir"]
    call(*command, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt(patched, at=6)
        with pytest.raises(SystemExit):
            call(*command, tmp_path / "cut")
    call(*command, tmp_path / "cut")
    assert same(last(tmp_path / "cut" / "000-GPT-S"), last(tmp_path / "whole" / "000-GPT-S"))


def test_stage_two_begins_with_the_weights_of_stage_one(store, tmp_path, capsys):
    call(*QUICK_T2I, "--data-path", store, "--results-dir", tmp_path / "one")
    larger = tmp_path / "larger_codes"
    manifest = json.loads((write_store(larger) / "manifest.json").read_text())
    manifest["grid"], manifest["image_size"] = [2, 8], [8, 32]
    (larger / "manifest.json").write_text(json.dumps(manifest))
    call(*QUICK_T2I, "--data-path", larger, "--init-from", tmp_path / "one" / "000-GPT-S", "--lr", 0, "--results-dir",
         tmp_path / "two")
    assert "starting from the weights of" in capsys.readouterr().out
    one, other = (containers.read(tmp_path / part / "000-GPT-S") for part in ("one", "two"))
    assert other["config"]["grid"] == [2, 8] and same(one["model"], other["model"])


def test_codes_and_features_made_in_the_loop_give_the_losses_of_stored_ones(vq_ckpt, tmp_path, capsys):
    """Of pictures beside captions; one that cannot be read is told and carries no loss, and is in no store."""
    write_t5(tmp_path / "encoders" / "tiny")
    data = write_pairs(tmp_path / "data", count=12)
    encoder = ["--t5-model-type", "tiny"]
    common = ["--vq-ckpt", vq_ckpt, "--image-size", 16, "--num-workers", 0]
    call("extract_t2i", "--data-path", data, *common, "--code-path", tmp_path)
    codes, features = ["--data-path", tmp_path / "t2i16_codes"], ["--t5-feat-path", tmp_path / "features"]
    call("extract_t5", *codes, "--t5-path", tmp_path / "features", "--precision", "none", "--t5-model-path",
         tmp_path / "encoders", *encoder)
    training = [*QUICK_T2I, "--vq-ckpt", vq_ckpt, "--ckpt-every", 100, "--results-dir"]
    pictures = ["--data-path", data, "--image-size", 16]
    online = ["--text-features", "online", "--t5-path", tmp_path / "encoders", *encoder]
    for name, sources in (("stored", codes + features), ("named", pictures + features), ("captions", codes + online),
                          ("online", pictures + online)):
        call(*training, tmp_path / name, *sources)
    runs = [losses(tmp_path / name / "000-GPT-S") for name in ("stored", "named", "captions", "online")]
    assert len(runs[0]) == 2 and all(run == runs[0] for run in runs)

    (data / "0.png").write_bytes(b"no picture")
    capsys.readouterr()
    call(*training, tmp_path / "broken", *pictures, *online)
    assert "passed over: " in capsys.readouterr().err
    assert losses(tmp_path / "broken" / "000-GPT-S") != runs[0]


def test_llamagens_codes_and_features_of_lines(store, tmp_path):
    """Codes and features in a file for each line; one without features is left out."""
    (tmp_path / "data").mkdir()
    kept = open_store(store)
    lines = [json.dumps({"image_path": f"{i}.png", "text": [f"short {i}", text]})
             for i, text in enumerate(kept.column("caption", np.arange(COUNT)))]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    for kind, values in (("codes", kept.read(np.arange(COUNT), np.zeros(COUNT, int))[:, None]),
                         ("features", [one[None] for one in kept.column("features", np.arange(COUNT))])):
        (tmp_path / kind / "a").mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(tmp_path / kind / "a" / f"{i}.npy", value)
    command = [*QUICK_T2I, "--data-path", tmp_path / "data", "--code-path", tmp_path / "codes", "--vocab-size", 256,
               "--t5-feat-path", tmp_path / "features", "--results-dir"]
    call(*command, tmp_path / "files")
    call(*QUICK_T2I, "--data-path", store, "--short-caption-share", 0, "--results-dir", tmp_path / "packed")
    np.testing.assert_allclose(losses(tmp_path / "files" / "000-GPT-S"), losses(tmp_path / "packed" / "000-GPT-S"))
    (tmp_path / "features" / "a" / "3.npy").unlink()
    (tmp_path / "features" / "a" / "4.npy").write_bytes(b"damaged")
    call(*command, tmp_path / "fewer")
    assert last(tmp_path / "fewer" / "000-GPT-S")["steps"] == (COUNT - 1) // 6


# ---- refusals


def said(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        call(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_features_of_another_width_are_refused_with_both_widths(store, tmp_path, capsys):
    call(*QUICK_T2I, "--data-path", store, "--results-dir", tmp_path / "run")
    wide = write_store(tmp_path / "wide_codes", width=12)
    message = said(capsys, *QUICK_T2I, "--data-path", wide, "--init-from", tmp_path / "run" / "000-GPT-S",
                   "--results-dir", tmp_path / "other")
    assert "12" in message and "8" in message and "text features" in message


def test_what_does_not_fit_is_one_line(store, code_store, tmp_path, capsys):
    command = [*QUICK_T2I, "--results-dir", tmp_path]
    assert "--t5-feat-path is missing" in said(capsys, *command, "--data-path", code_store)
    assert "train.py on classes" in said(capsys, *command, "--data-path", store, "--gpt-type", "c2i")
    assert "expected a share from 0 to 1" in said(capsys, *command, "--data-path", store, "--short-caption-share", 2)
    assert "give --vq-ckpt" in said(capsys, *command, "--data-path", tmp_path)
    assert "--data-path is missing" in said(capsys, *command)
    assert "for models of classes" in said(capsys, *command, "--data-path", store, "--control", "canny")
    assert "--data-start and --data-end choose" in said(capsys, *command, "--data-path", store, "--data-start", 1)
    assert "there is no --data-path nowhere" in said(capsys, *command, "--data-path", "nowhere")
    assert "train_t2i.py takes captions" in said(capsys, "train_gpt", *QUICK_T2I[1:-2], "--code-path", code_store,
                                                 "--gpt-type", "t2i", "--results-dir", tmp_path)
