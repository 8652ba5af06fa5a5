"""The training loop: a resumed run is the uninterrupted one, two processes and accumulation are one batch."""
import gc
import json
import math
import shutil
import sys
import types
import weakref

import pytest
import torch
from torch import nn

from dataset import code_writer
from tests.conftest import TINY, TINY_GPT, call, entry, two_processes, write_images
from tests.runs import OFTEN, QUICK_GPT, QUICK_VQ, interrupt, last, rows, same
from utils import cli
from utils.checkpoints import containers
from utils.training.ema import EMA
from utils.training.logger import MetricsLogger, read_metrics
from utils.training.optim import adamw, learning_rate
from utils.training.writer import CheckpointWriter

# ---- resuming

ADVERSARIAL = ["--image-size", 24, "--num-workers", 0, "--vq-model", "VQ-4-S", "--perceptual-weight", 0, "--disc-start",
               2, "--dropout-p", 0.1, "--disc-adaptive-weight"]


@pytest.mark.parametrize(("name", "model"), [pytest.param("train_vq", "VQ-4-S", marks=pytest.mark.slow),
                                             ("train_gpt", "GPT-S"), ("train_gpt", "ARPG-S")])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name, model, image_folder, code_store, vq_ckpt, tmp_path,
                                                            monkeypatch, capsys):
    own = ["--data-path", image_folder, *ADVERSARIAL] if name == "train_vq" else \
        ["--code-path", code_store, "--vq-ckpt", vq_ckpt, *TINY_GPT, "--drop-path-rate", 0.1,
         "--gradient-accumulation-steps", 2, "--gpt-model", model]
    command = [name, *own, *OFTEN, "--resume", "auto", "--results-dir"]
    call(*command, tmp_path / "whole")  # nothing to resume: starts
    whole = tmp_path / "whole" / f"000-{model}"
    with monkeypatch.context() as patch:
        interrupt(patch, at=7)
        with pytest.raises(SystemExit) as caught:
            call(*command, tmp_path / "cut")
    assert caught.value.code == 130
    cut = tmp_path / "cut" / f"000-{model}"
    assert containers.newest(cut / "checkpoints").stem == "0000004"  # within the first epoch
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # what a kill may leave
    call(*command, tmp_path / "cut")
    assert "continuing from" in capsys.readouterr().out
    assert same(last(cut), last(whole))
    assert {"model", "optimizer", "ema", "steps", "config"} <= last(whole).keys()
    assert ("discriminator" in last(whole)) == (name == "train_vq")
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in rows(whole)] == [1, 3, 4, 6, 8, 9]
    for path in ("previews/0000008.png", "previews/0000009.png"):
        assert (cut / path).read_bytes() == (whole / path).read_bytes()

    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "cut").rglob("*")}
    call(*command, tmp_path / "cut")
    assert "already trained to step 9 of 9: nothing to do" in capsys.readouterr().out
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "cut").rglob("*")} == before

    command[command.index("auto")] = cut / "checkpoints" / "0000004"  # a file, into a run of its own
    call(*command, tmp_path / "file")
    assert same(last(tmp_path / "file" / f"000-{model}"), last(whole))


@pytest.mark.processes
def test_two_processes_and_accumulation_are_one_batch(image_folder, code_store, vq_ckpt, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "WARNING")  # utils/launch.py hides what torch's C++ code warns of
    vq, gpt = ["--data-path", image_folder, *QUICK_VQ], ["--code-path", code_store, *QUICK_GPT]
    extract = ["--data-path", image_folder, "--vq-ckpt", vq_ckpt, *TINY, "--code-path"]
    said = two_processes([("train_vq", [*vq, "--results-dir", tmp_path / "two"]),
                          ("train_gpt", [*gpt, "--results-dir", tmp_path / "two"]),
                          ("extract", [*extract, tmp_path / "two"])], tmp_path,
                         setup="from dataset import code_writer; code_writer.PART_ROWS, code_writer.SHARD_ROWS = 5, 10")
    assert "reducer.cpp" in said and "strides" not in said, said  # it warns of find_unused_parameters, nothing else
    for name, flags, model in (("train_vq", vq, "VQ-4-S"), ("train_gpt", gpt, "GPT-S")):
        call(name, *flags, "--results-dir", tmp_path / "one")
        call(name, *flags, "--results-dir", tmp_path / "parts", "--gradient-accumulation-steps", 2)
        number = {"VQ-4-S": "000", "GPT-S": "001"}[model]
        one, two, parts = (tmp_path / side / f"{number}-{model}" for side in ("one", "two", "parts"))
        assert len(rows(one)) == 6
        for other in (two, parts):
            assert [row["step"] for row in rows(other)] == [1, 2, 3, 4, 5, 6]
            for ours, theirs in zip(rows(other), rows(one), strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
            theirs = last(other)["model"]
            for key, value in last(one)["model"].items():
                if "codebook_used" not in key:  # the last assignments this process has seen
                    torch.testing.assert_close(theirs[key], value, atol=3e-4, rtol=0)

    stores_made = [tmp_path / side / "imagenet16_codes" for side in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_writer, "PART_ROWS", 5)
        patch.setattr(code_writer, "SHARD_ROWS", 10)
        call("extract", *extract, tmp_path / "one")
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in stores_made)
    assert len(one) == 6
    assert one == two


# ---- rows


def test_rows_are_means_since_the_last_row(code_store, tmp_path):
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--lr", 1e-2, "--epochs", 2, "--results-dir"]
    call(*command, tmp_path / "each")
    call(*command, tmp_path / "fifth", "--log-every", 5)
    each, fifth = rows(tmp_path / "each" / "000-GPT-S"), rows(tmp_path / "fifth" / "000-GPT-S")
    assert [row["step"] for row in fifth] == [1, 5, 10, 12]
    for row, window in zip(fifth, ((0, 1), (1, 5), (5, 10), (10, 12)), strict=True):
        part = [other["loss"] for other in each[slice(*window)]]
        assert row["loss"] == pytest.approx(sum(part) / len(part), abs=1e-6)
    assert each[0]["loss"] == pytest.approx(math.log(256), abs=1e-4)  # the head starts at zero
    assert each[-1]["loss"] < each[0]["loss"] - 0.5
    assert each[3].keys() == {"step", "loss", "lr", "grad_norm"}
    speed = read_metrics(tmp_path / "each" / "000-GPT-S" / "speed.jsonl")
    assert [row.keys() for row in speed] == [{"step", "images_per_second", "memory_gib"}] * 12


def test_the_config_is_kept_beside_the_run(code_store, tmp_path):
    call("train_gpt", "--code-path", code_store, *QUICK_GPT, "--results-dir", tmp_path)
    config = json.loads((tmp_path / "000-GPT-S" / "config.json").read_text())
    assert (config["lr"], config["global_batch_size"], config["steps"], config["images"]) == (1e-4, 6, 6, 36)
    assert config["model"]["classes"] == ["blue", "green", "red"]


def test_unreadable_images_are_told_once_and_counted(tmp_path, capsys):
    root = write_images(tmp_path / "images", count=4)
    (root / "red" / "01.png").write_bytes(b"no image")
    call("train_vq", "--data-path", root, *QUICK_VQ, "--epochs", 2, "--results-dir", tmp_path / "results")
    assert capsys.readouterr().err.count("passed over: ") == 1
    shares = [row["unreadable"] for row in rows(tmp_path / "results" / "000-VQ-4-S")]
    assert len(shares) == 4
    assert sum(share > 0 for share in shares) == 2  # met once in each epoch of two steps


def test_images_of_a_second_folder_are_joined(image_folder, tmp_path):
    call("train_vq", *QUICK_VQ, "--dataset", "coco", "--data-path", image_folder / "red", "--data-face-path",
         image_folder / "blue", "--results-dir", tmp_path)
    assert json.loads((tmp_path / "000-VQ-4-S" / "config.json").read_text())["images"] == 24


def test_metrics_are_cut_where_a_run_goes_on(tmp_path):
    logger = MetricsLogger(tmp_path, enabled=True)
    for step in (1, 2, 3):
        logger.log(step, {"loss": float(step)})
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    logger = MetricsLogger(tmp_path, enabled=True, start_step=2)
    logger.log(3, {"loss": 9.0})
    logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0},
                                                        {"step": 3, "loss": 9.0}]
    MetricsLogger(tmp_path / "other", enabled=False).log(1, {"loss": 1.0})
    assert not (tmp_path / "other").exists()


def test_a_resumed_run_goes_on_in_weights_and_biases(tmp_path, monkeypatch):
    runs = []

    class Run:
        def log(self, values, step):
            self.step = step

        def finish(self):
            pass

    def init(**options):
        runs.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    for start in (0, 2, 0):
        logger = MetricsLogger(tmp_path, enabled=True, start_step=start, wandb_project="emoji")
        logger.log(start + 1, {"loss": 1.0})
        logger.close()
    assert [run["resume"] for run in runs] == ["allow"] * 3 and runs[0]["project"] == "emoji"
    assert runs[0]["id"] == runs[1]["id"] != runs[2]["id"]  # a run that begins again is another


# ---- where checkpoints go


def test_checkpoints_in_a_second_folder(code_store, tmp_path):
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--ckpt-every", 3, "--results-dir",
               tmp_path / "here", "--cloud-save-path", tmp_path / "cloud"]
    call(*command)
    ours, theirs = (tmp_path / side / "000-GPT-S" / "checkpoints" for side in ("here", "cloud"))
    assert sorted(path.name for path in theirs.iterdir()) == ["0000003", "0000006"]
    assert all((ours / path.name / file.name).read_bytes() == file.read_bytes()
               for path in theirs.iterdir() for file in path.iterdir())

    shutil.rmtree(tmp_path / "here")  # another machine: the cloud knows the run, and its number is taken
    call(*command, "--resume", "auto", "--epochs", 2)
    assert containers.newest(theirs).stem == "0000012"
    shutil.rmtree(tmp_path / "here")
    call(*command, "--no-local-save")
    assert containers.newest(tmp_path / "cloud" / "001-GPT-S" / "checkpoints").stem == "0000006"
    assert not (tmp_path / "here" / "001-GPT-S" / "checkpoints").exists()


def test_training_goes_on_from_a_gpt_checkpoint(code_store, gpt_ckpt, tmp_path):
    """A training checkpoint brings its step along, weights alone start at step 0; the file says which model it is."""
    quick = QUICK_GPT[2:]  # no --gpt-model
    call("train_gpt", "--code-path", code_store, *quick, "--epochs", 2, "--gpt-ckpt", gpt_ckpt, "--results-dir",
         tmp_path / "a")
    assert [row["step"] for row in rows(tmp_path / "a" / "000-GPT-S")] == [10, 11, 12]
    content = containers.read(gpt_ckpt)
    weights = {"model": content["ema"], "config": content["config"]}
    torch.save(weights, tmp_path / "weights.pt")
    call("train_gpt", "--code-path", code_store, *quick, "--lr", 0, "--gpt-ckpt", tmp_path / "weights.pt",
         "--results-dir", tmp_path / "b")
    assert same(last(tmp_path / "b" / "000-GPT-S")["model"], content["ema"])


# ---- parts


def test_ema_follows_the_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = EMA(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        model[1].running_mean.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # ramps up: 0.1, 0.18, …
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        torch.testing.assert_close(average.averages["0.weight"], expected)
    own = model[0].weight.detach().clone()
    with average.shown():
        torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].weight, own)
    average.restart()
    assert torch.equal(average.averages["0.weight"], own)
    assert EMA(model).decay == 0.9999


def test_learning_rates():
    def rates(schedule, warmup):
        return [learning_rate(step, peak=2.0, total_steps=10, warmup_steps=warmup, schedule=schedule)
                for step in range(10)]

    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 4) == [0.5, 1.0, 1.5, *[2.0] * 7]
    cosine = rates("cosine", 2)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(2.0 * (0.02 + 0.98 / 2))
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert learning_rate(10, peak=2.0, total_steps=10, warmup_steps=2, schedule="cosine") == pytest.approx(0.04)


def test_only_matrices_embeddings_and_convolutions_decay():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 1))
    model[1].weight.requires_grad_(False)
    decayed, plain = adamw(model, lr=1.0, weight_decay=0.05, betas=(0.9, 0.95)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert {id(p) for p in plain["params"]} == {id(p) for p in (model[1].bias, *model[2].parameters(), model[3].bias)}


def test_a_subclass_changes_defaults_and_keeps_the_rest():
    _, flags = entry("train_vq")
    actions = {action.dest: action for action in cli.build_parser(flags)._actions}
    assert actions["epochs"].default == 40
    assert actions["epochs"].help.startswith("passes over the data")
    parsed = cli.build_parser(flags).parse_args(["--image-size", "24x32", "--no-local-save", "--beta1", "0.5"])
    assert (parsed.image_size, parsed.local_save, parsed.beta1) == ((24, 32), False, 0.5)
    assert cli.as_dict(flags(**vars(parsed)))["image_size"] == [24, 32]


def test_a_worker_traceback_is_cut_to_its_message():
    wrapped = ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last)"
                         ':\n  File "x.py", line 1, in f\n    raise\nValueError: the store holds: code 3\n')
    assert cli.message(wrapped) == "the store holds: code 3"
    assert cli.message(ValueError("plain")) == "plain"
    assert cli.message(OSError()) == "OSError"


def test_nothing_of_a_training_outlives_it(code_store, tmp_path, monkeypatch):
    """Not even until the next garbage collection: a process group that is left may abort its process at the end."""
    made, create = [], CheckpointWriter.__init__

    def noted(self, *args, **options):
        made.append(weakref.ref(self))
        create(self, *args, **options)

    monkeypatch.setattr(CheckpointWriter, "__init__", noted)
    gc.disable()
    try:
        call("train_gpt", "--code-path", code_store, *QUICK_GPT, "--results-dir", tmp_path)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()
