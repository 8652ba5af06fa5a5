"""Which folder a run works in: its own, recognised by what shapes it, and nobody else's at the same time."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from dataset.codes import open_stores
from tests.conftest import ROOT, TINY_VQ, call, entry, write_images
from tests.dataset.codes import fake_codes, write_llamagen
from tests.runs import QUICK_GPT, rows, start
from utils.training import run_folder
from utils.training.run_folder import choose_run, identity_of

IDENTITY = {"lr": 1e-4, "global_batch_size": 8, "data": "a" * 64, "model": {"kind": "gpt", "grid": [4, 4]}}


@pytest.fixture
def flags(tmp_path):
    return entry("train_gpt")[1](code_path="", results_dir=str(tmp_path), resume="auto")


def written(folder, identity=IDENTITY):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"identity": identity}))


def test_runs_are_numbered(flags, tmp_path):
    flags.resume = "none"
    assert choose_run(flags, "GPT-S", IDENTITY).path.name == "000-GPT-S"
    assert not list(tmp_path.iterdir())
    for name in ("003-GPT-S", "007-GPT-B", "notes"):
        (tmp_path / name).mkdir()
    assert choose_run(flags, "GPT-S", IDENTITY).path.name == "008-GPT-S"


def test_auto_goes_on_with_the_newest_run_of_the_same_identity(flags, tmp_path):
    for number in (1, 2, 4):
        written(tmp_path / f"00{number}-GPT-S")
    written(tmp_path / "005-GPT-S", {**IDENTITY, "lr": 3e-4})
    written(tmp_path / "006-GPT-B")
    found = choose_run(flags, "GPT-S", IDENTITY)
    assert (found.path.name, found.known, found.reason) == ("004-GPT-S", True, "")
    (tmp_path / "007-GPT-S").mkdir()  # killed before it could say what it is
    assert choose_run(flags, "GPT-S", IDENTITY).path.name == "004-GPT-S"


@pytest.mark.parametrize(("changed", "words"), [
    ({"lr": 3e-4}, "lr was 0.0001, now 0.0003"), ({"global_batch_size": 9}, "global_batch_size was 8, now 9"),
    ({"data": "b" * 64}, "other data"), ({"model": {"kind": "gpt", "grid": [8, 4]}}, r"grid was [4, 4], now [8, 4]")])
def test_another_run_of_the_model_is_none_to_go_on_with(changed, words, flags, tmp_path):
    written(tmp_path / "000-GPT-S")
    found = choose_run(flags, "GPT-S", {**IDENTITY, **changed})
    assert (found.path.name, found.known) == ("001-GPT-S", False)
    assert f"000-GPT-S is another run ({words}): this one begins in a new folder" in found.reason


def test_what_an_older_version_did_not_record_does_not_count(flags, tmp_path):
    written(tmp_path / "000-GPT-S", {"lr": 1e-4, "model": {"kind": "gpt"}})
    assert choose_run(flags, "GPT-S", IDENTITY).known


def test_what_shapes_a_run(flags):
    def identity(**changes):
        changed = entry("train_gpt")[1](**{**vars(flags), **changes})
        return identity_of(changed, data="x", model={}, start=None)

    plain = identity()
    for shaping in ({"lr": 2e-4}, {"global_batch_size": 512}, {"global_seed": 1}, {"weight_decay": 0.1}, {"beta2": 0.9},
                    {"warmup_steps": 5}, {"lr_schedule": "cosine"}, {"token_dropout_p": 0.2}, {"optimizer": "muon"},
                    {"class_dropout": 0.2}, {"lora_rank": 4}, {"ema": True}, {"max_grad_norm": 2.0}):
        assert identity(**shaping) != plain, shaping
    for other in ({"results_dir": "x"}, {"log_every": 1}, {"ckpt_every": 1}, {"num_workers": 0}, {"keep": 3},
                  {"data_parallel": "fsdp"}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "none"},
                  {"eval_every": 5}, {"vq_ckpt": "x"}, {"code_path": "moved"}, {"cfg_scale": 3.0}, {"compile": True},
                  {"epochs": 7}, {"recipe": "x"}, {"wandb": False}, {"resume": "none"}, {"gpt_model": "GPT-B"}):
        assert identity(**other) == plain, other
    assert identity(lr_schedule="cosine", epochs=7) != identity(lr_schedule="cosine")


def test_a_sweep_trains_each_learning_rate(code_store, tmp_path, capsys):
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--resume", "auto", "--results-dir", tmp_path]
    for lr in (1e-3, 2e-3, 1e-3):
        call(*command, "--lr", lr)
    out = capsys.readouterr().out
    assert "000-GPT-S is another run (lr was 0.001, now 0.002): this one begins in a new folder" in out
    assert out.count("already trained to step 6 of 6") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000-GPT-S", "001-GPT-S"]
    assert [row["lr"] for row in rows(tmp_path / "001-GPT-S")] == [2e-3] * 6


def test_other_images_are_another_run(image_folder, tmp_path, capsys):
    other = write_images(tmp_path / "other", count=11)
    command = ["train_vq", *TINY_VQ, "--epochs", 1, "--resume", "auto", "--results-dir", tmp_path / "runs"]
    for folder in (image_folder, other):
        call(*command, "--data-path", folder)
    assert "000-VQ-4-S is another run (other data)" in capsys.readouterr().out
    moved = other.rename(tmp_path / "moved")
    call(*command, "--data-path", moved)
    assert "already trained" in capsys.readouterr().out


@pytest.mark.processes
def test_trainings_started_together_take_a_folder_each(code_store, tmp_path):
    wait = f"""import time
from pathlib import Path
from utils.training.trainer import Trainer
begin = Trainer.begin
def together(self):  # both have chosen a number, neither has taken it
    Path({str(tmp_path)!r}, f"ready{{__import__('os').getpid()}}").touch()
    while len(list(Path({str(tmp_path)!r}).glob("ready*"))) < 2:
        time.sleep(0.02)
    begin(self)
Trainer.begin = together"""
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--results-dir", tmp_path / "runs"]
    both = [start(command, tmp_path, setup=wait) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["000-GPT-S", "001-GPT-S"]
    for folder in (tmp_path / "runs").iterdir():
        assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.processes
def test_trainings_that_resume_together_do_not_share_a_folder(code_store, tmp_path):
    """Both have seen that the folder is free; one of them goes on in it."""
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--resume", "auto", "--results-dir",
               tmp_path / "runs"]
    call(*command)
    wait = f"""import time
from pathlib import Path
from utils.training import run_folder
from utils.training.trainer import Trainer
run_folder.LOCK_PATIENCE = 1.0
choose = run_folder.RunFolder.claim
def together(self, flags):
    Path({str(tmp_path)!r}, f"ready{{__import__('os').getpid()}}").touch()
    while len(list(Path({str(tmp_path)!r}).glob("ready*"))) < 2:
        time.sleep(0.02)
    choose(self, flags)
run_folder.RunFolder.claim = together
step = Trainer.optimizer_step
def slower(self, batches):
    time.sleep(1)
    return step(self, batches)
Trainer.optimizer_step = slower"""
    both = [start([*command, "--epochs", 2], tmp_path, setup=wait) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], texts
    assert any("000-GPT-S is in use" in text for text in texts)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["000-GPT-S"]


def test_a_number_is_taken_in_the_second_folder_too(flags, tmp_path):
    """Two machines with a --results-dir each and one --cloud-save-path."""
    flags.cloud_save_path = str(tmp_path / "cloud")
    chosen = []
    for machine in ("a", "b"):
        flags.results_dir = str(tmp_path / machine)
        chosen.append(choose_run(flags, "GPT-S", IDENTITY))
    for machine, run in zip(("a", "b"), chosen, strict=True):
        flags.results_dir = str(tmp_path / machine)
        run.claim(flags)
    assert [run.path.name for run in chosen] == ["000-GPT-S", "001-GPT-S"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["001-GPT-S"]


def test_numbers_go_beyond_999(flags, tmp_path):
    for number in ("999", "1000"):
        written(tmp_path / f"{number}-GPT-S")
    assert choose_run(flags, "GPT-S", IDENTITY).path.name == "1000-GPT-S"
    assert choose_run(flags, "GPT-S", {**IDENTITY, "lr": 1.0}).path.name == "1001-GPT-S"


def test_a_run_of_an_older_version_is_known_by_its_config(flags, tmp_path):
    (tmp_path / "000-GPT-S").mkdir()
    (tmp_path / "000-GPT-S" / "config.json").write_text(json.dumps({"lr": 1e-4, "steps": 5, "model": {"kind": "gpt"}}))
    assert choose_run(flags, "GPT-S", IDENTITY).known
    assert not choose_run(flags, "GPT-S", {**IDENTITY, "lr": 1.0}).known


def test_where_a_run_starts_is_known_by_content(flags, gpt_ckpt, tmp_path):
    shutil.copytree(gpt_ckpt, tmp_path / "copy" / gpt_ckpt.name)
    places = [gpt_ckpt, f"{gpt_ckpt}/", gpt_ckpt.parents[1], tmp_path / "copy" / gpt_ckpt.name]
    found = [identity_of(flags, data="", model={}, start=str(place))["start"] for place in places]
    assert len(set(found)) == 1 and len(found[0]) == 64


def test_data_are_known_by_what_they_hold(tmp_path):
    """Codes of the same labels and views from other tokenizers, in other shares, or with another second store."""
    labels = [0, 1, 2, 0]
    made = [write_llamagen(tmp_path / str(seed), fake_codes(4, 2, seed=seed), labels) for seed in range(3)]
    names = [f"{made[0]}", f"{made[1]}", f"{made[0]},{made[1]}", f"{made[0]},{made[2]}"]
    prints = [open_stores(name).fingerprint() for name in names]
    prints += [open_stores(names[2], weights=weights).fingerprint() for weights in ((1.0, 2.0), (2.0, 1.0))]
    assert len(set(prints)) == 6
    shutil.copytree(made[0], tmp_path / "moved")
    assert open_stores(f"{tmp_path / 'moved'}").fingerprint() == prints[0]


HOLD = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from utils.training.run_folder import Lock
lock = Lock(Path(sys.argv[1]), int(sys.argv[2]))
lock.take(patience=0)
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 3])
def test_a_run_that_is_still_worked_on_is_left_alone(rank, code_store, tmp_path, capsys, monkeypatch):
    """By another training, or by a process of a launcher that was killed."""
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.5)
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--resume", "auto", "--results-dir", tmp_path]
    call(*command)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "000-GPT-S"), str(rank), "600"],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if ".lock" not in path.name)
    with pytest.raises(SystemExit) as caught:
        call(*command, "--epochs", 2)
    assert caught.value.code == 2
    assert "000-GPT-S is in use" in capsys.readouterr().err
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")
                            if ".lock" not in path.name)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    call(*command, "--epochs", 2)
    assert rows(tmp_path / "000-GPT-S")[-1]["step"] == 12


@pytest.mark.processes
def test_what_is_left_of_a_killed_training_is_waited_for(code_store, tmp_path):
    command = ["train_gpt", "--code-path", code_store, *QUICK_GPT, "--resume", "auto", "--results-dir", tmp_path]
    call(*command)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "000-GPT-S"), "1", "2"],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    call(*command, "--epochs", 2)
    assert holder.wait(timeout=60) == 0
    assert rows(tmp_path / "000-GPT-S")[-1]["step"] == 12
