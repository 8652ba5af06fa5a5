"""Checkpoint folders: whole or not there, safe, kept as asked, and a killed run goes on as if nothing had been."""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from tests.conftest import ROOT, TINY_GPT, call
from tests.runs import OFTEN, last, rows, same
from utils import files
from utils.checkpoints import containers, sharded
from utils.checkpoints.sharded import DamagedError
from utils.training.trainer import Trainer
from utils.training.writer import CheckpointWriter

RUN = "000-GPT-S"


@pytest.fixture(scope="module")
def command(code_store, vq_ckpt):
    """A training of nine steps with checkpoints after 4, 8 and 9; --results-dir's value is missing."""
    return [*map(str, ["train_gpt", "--code-path", code_store, "--vq-ckpt", vq_ckpt, *TINY_GPT, *OFTEN,
                       "--resume", "auto", "--results-dir"])]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    call(*command, folder)
    return folder / RUN


def assert_same_run(run, whole) -> None:
    assert same(last(run), last(whole))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("0000004.png", "0000008.png", "0000009.png"):
        assert (run / "previews" / name).read_bytes() == (whole / "previews" / name).read_bytes()
    assert not list(run.rglob("*.tmp"))


# ---- killed

DIE = f"""import os, signal, sys, json
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed.checkpoint as dcp
from tests.conftest import call
from utils.checkpoints import sharded
from utils.training import writer
from utils.training.trainer import Trainer
where, argv = sys.argv[1], json.loads(sys.argv[2])
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGNUMBER)
original_step, original_show = Trainer.optimizer_step, Trainer.preview_and_evaluate
def step(self, batches):
    if where == "step" and self.step + 1 == 7:
        die()
    return original_step(self, batches)
def show(self, *args, **kwargs):
    if where == "preview" and self.step == 8:
        self.checkpoints.writer.wait()  # the checkpoint is there, its picture is not
        die()
    return original_show(self, *args, **kwargs)
Trainer.optimizer_step, Trainer.preview_and_evaluate = step, show
if where == "evaluating":
    import time
    def evaluate(model):
        os.kill(os.getpid(), signal.SIGNUMBER)
        time.sleep(1)
        return dict(eval_x=1.0)
    original_fit = Trainer.train
    Trainer.train = lambda self, batches, **others: original_fit(self, batches, evaluate=evaluate, eval_every=6)
if where == "writing":
    dcp.FileSystemWriter.finish = die
if where == "publishing":
    writer._take_place = die
call(*argv)
"""


def killed(where: str, argv: list, *, by: str = "SIGKILL") -> subprocess.CompletedProcess:
    """Run the training in a process that a signal meets at a certain place."""
    return subprocess.run([sys.executable, "-c", DIE.replace("SIGNUMBER", by), where, json.dumps([*map(str, argv)])],
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_uninterrupted_run(command, whole, tmp_path):
    command = [*command, tmp_path]
    found = []
    for where in ("writing", "publishing", "step", "preview"):
        assert killed(where, command).returncode == -signal.SIGKILL
        found.append([path.name for path in sharded.candidates(tmp_path / RUN / "checkpoints")])
    assert found == [[], [], ["0000004"], ["0000008", "0000004"]]
    call(*command)
    assert_same_run(tmp_path / RUN, whole)


@pytest.mark.processes
def test_sigterm_saves_and_ends_well(command, whole, tmp_path):
    """In the middle of a step; the checkpoint lies between the scheduled ones and is no row of the log."""
    done = killed("step", [*command, tmp_path], by="SIGTERM")
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM at step 7 of 9, all is saved" in done.stdout
    assert sharded.candidates(tmp_path / RUN / "checkpoints")[0].name == "0000007"
    call(*command, tmp_path)
    assert_same_run(tmp_path / RUN, whole)


@pytest.mark.processes
@pytest.mark.slow
def test_sigterm_in_an_evaluation_saves_though_no_checkpoint_was_due(command, whole, tmp_path):
    done = killed("evaluating", [*command, tmp_path], by="SIGTERM")
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM at step 6 of 9, all is saved" in done.stdout
    assert sharded.candidates(tmp_path / RUN / "checkpoints")[0].name == "0000006"
    call(*command, tmp_path)
    assert same(last(tmp_path / RUN), last(whole))


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_stop_together_on_sigterm(command, tmp_path):
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = [*command[1:], str(tmp_path), "--epochs", "100000", "--ckpt-every", "50000"]
    process = subprocess.Popen([sys.executable, str(ROOT / "utils" / "launch.py"),
                                str(ROOT / "autoregressive" / "train" / "train.py"), *argv],
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / RUN / "metrics.jsonl"
    patience = time.monotonic() + 120
    while not (metrics.is_file() and len(rows(tmp_path / RUN)) > 2):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert text.count("stopped by SIGTERM") == 1
    newest = containers.newest(tmp_path / RUN / "checkpoints")
    assert int(newest.name) > 3
    assert sharded.read_facts(newest)["steps"] == int(newest.name)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_leave_an_evaluation_together(command, tmp_path):
    """One has done its share and waits for the other; no checkpoint was due at this step."""
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = tmp_path / "evaluates.py"
    script.write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from autoregressive.train import train
from utils import cli, dist
from utils.training.trainer import Trainer
fit = Trainer.train
def patched(self, batches, **others):
    def evaluate(model):
        Path({str(tmp_path)!r}, f"evaluating{{self.process.rank}}").touch()
        if self.process.rank == 0:
            time.sleep(60)
        return dict(eval_x=float(len(dist.gather_lists([1]))))
    return fit(self, batches, evaluate=evaluate, eval_every=6)
Trainer.train = patched
cli.run(train.main, train.GPTTrainFlags)
""")
    process = subprocess.Popen([sys.executable, str(ROOT / "utils" / "launch.py"), str(script), *command[1:],
                                str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    patience = time.monotonic() + 120
    while not all((tmp_path / f"evaluating{rank}").exists() for rank in range(2)):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=50)
    assert process.returncode == 0 and "Traceback" not in text, text
    assert text.count("stopped by SIGTERM at step 6 of 9, all is saved") == 1
    assert sharded.candidates(tmp_path / RUN / "checkpoints")[0].name == "0000006"


@pytest.mark.processes
@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(command, tmp_path):
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = tmp_path / "dies.py"
    script.write_text(f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from autoregressive.train import train
from utils import cli
from utils.training.trainer import Trainer
step = Trainer.optimizer_step
def patched(self, batches):
    if self.step == 5 and self.process.rank == 1:
        while not (self.folder / "checkpoints" / "0000004").is_dir():
            time.sleep(0.01)  # it is written in the background
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)
Trainer.optimizer_step = patched
cli.run(train.main, train.GPTTrainFlags)
""")
    start = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "utils" / "launch.py"), str(script), *command[1:], str(tmp_path)],
                          env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was killed by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - start < 100
    assert sharded.candidates(tmp_path / RUN / "checkpoints")[0].name == "0000004"


# ---- damaged


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def bomb(path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "exploded"),)

    path.write_bytes(pickle.dumps(Bomb()))
    facts = json.loads((path.parent / "state.json").read_text())
    facts["files"][".metadata"] = files.file_hash(path)
    (path.parent / "state.json").write_text(json.dumps(facts))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def odd(**facts):
    def write(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return write


DAMAGES = {"a shard is cut short": ("__0_0.distcp", cut_short, "__0_0.distcp is changed"),
           "a bit is flipped": ("__0_0.distcp", flip, "__0_0.distcp is changed"),
           "the index is changed": (".metadata", flip, ".metadata is changed"),
           "the step is a word": ("state.json", odd(steps="x"), "state.json is damaged"),
           "no files are named": ("state.json", odd(files={}), "state.json is damaged"),
           "a shard is missing": ("__0_0.distcp", lambda path: path.unlink(), "__0_0.distcp is missing"),
           "the index is a bomb": (".metadata", bomb, "would run code"),
           "the state is no JSON": ("state.json", lambda path: path.write_text("{"), "state.json is damaged")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside(damage, command, whole, tmp_path, capsys):
    name, harm, words = DAMAGES[damage]
    call(*command, tmp_path, "--epochs", 2)
    newest = containers.newest(tmp_path / RUN / "checkpoints")
    harm(newest / name)
    with pytest.raises(DamagedError, match=words):
        containers.read(newest)
    capsys.readouterr()
    call(*command, tmp_path)
    out = capsys.readouterr().out
    assert words in out and "continuing from" in out and "at step 8" in out
    assert not (newest.with_name("0000009.damaged") / "exploded").exists()
    assert newest.with_name("0000009.damaged").is_dir()
    assert same(last(tmp_path / RUN), last(whole))


def test_where_nothing_whole_is_left_the_run_begins_again(command, whole, tmp_path, capsys):
    call(*command, tmp_path, "--keep", 1)
    flip(containers.newest(tmp_path / RUN / "checkpoints") / "__0_0.distcp")
    call(*command, tmp_path, "--keep", 0)
    assert "it is set aside" in capsys.readouterr().out
    assert_same_run(tmp_path / RUN, whole)


def test_an_index_cannot_name_functions(tmp_path):
    for harmful in (os.system, eval, torch.load, containers.read):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(harmful))
        with pytest.raises(DamagedError, match=r"would run code.*names \w+\.\w+"):
            sharded.SafeReader(tmp_path).read_metadata()


def test_a_shard_that_torch_cannot_read_is_one_line(whole, tmp_path):
    """Though its hash is right."""
    content = bytearray((containers.newest(whole / "checkpoints") / "__0_0.distcp").read_bytes())
    content[:200] = bytes(200)
    copy = tmp_path / "0000009"
    copy.mkdir()
    for path in containers.newest(whole / "checkpoints").iterdir():
        (copy / path.name).write_bytes(bytes(content) if path.suffix == ".distcp" else path.read_bytes())
    odd(files={path.name: files.file_hash(path) for path in copy.iterdir() if path.name != "state.json"})(
        copy / "state.json")
    with pytest.raises(DamagedError, match="cannot be read"):
        containers.read(copy)


@pytest.mark.parametrize("damage", ["a bit is flipped", "the index is changed"])
def test_a_checkpoint_that_is_named_is_looked_at_too(damage, command, whole, tmp_path, capsys):
    name, harm, words = DAMAGES[damage]
    shutil.copytree(whole / "checkpoints" / "0000008", tmp_path / "0000008")
    harm(tmp_path / "0000008" / name)
    with pytest.raises(SystemExit):
        call(*command, tmp_path, "--resume", tmp_path / "0000008")
    assert words in capsys.readouterr().err and not (tmp_path / RUN).exists()
    shutil.copytree(whole / "checkpoints" / "0000008", tmp_path / "0000004")
    with pytest.raises(DamagedError, match="steps is 8, the folder 0000004"):
        containers.read(tmp_path / "0000004")


# ---- written and kept


def test_shards_that_another_machine_kept_to_itself_are_missed(tmp_path, monkeypatch):
    """Without a folder in common a checkpoint would be published in part."""
    finish = sharded.dcp.FileSystemWriter.finish

    def elsewhere(self, metadata, results):
        finish(self, metadata, results)
        (self.path / "__0_0.distcp").rename(tmp_path / "on another machine")

    monkeypatch.setattr(sharded.dcp.FileSystemWriter, "finish", elsewhere)
    writer = CheckpointWriter([tmp_path / "run"], keep=0, is_main=True)
    writer.save(3, {"model.a": torch.zeros(3)}, {"steps": 3, "config": {}})
    with pytest.raises(OSError, match=r"__0_0.distcp of other processes cannot be seen from here: all machines must"):
        writer.wait()
    assert not list((tmp_path / "run").iterdir())


def test_a_second_folder_is_completed(command, tmp_path):
    """A kill between the folders leaves the newest checkpoint in one of them."""
    here, there = tmp_path / "here", tmp_path / "there"
    call(*command, here, "--cloud-save-path", there)
    names = [path.name for path in (there / RUN / "checkpoints").iterdir()]
    for folder in (there, here):
        shutil.rmtree(folder / RUN / "checkpoints" / "0000009")
        call(*command, here, "--cloud-save-path", there)
        assert sorted(path.name for path in (folder / RUN / "checkpoints").iterdir()) == sorted(names)


def test_what_is_written_is_what_was_there_when_saving_began(tmp_path):
    tensor = torch.arange(2**20, dtype=torch.float32)
    writer = CheckpointWriter([tmp_path], keep=0, is_main=True)
    writer.save(3, {"model.a": tensor}, {"steps": 3, "config": {}})
    tensor.zero_()
    writer.wait()
    assert torch.equal(containers.read(tmp_path / "0000003")["model"]["a"], torch.arange(2**20, dtype=torch.float32))


def test_only_the_newest_are_kept(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    writer = CheckpointWriter([here, there], keep=2, is_main=True)
    for step in (1, 5, 10, 20):
        writer.save(step, {"model.a": torch.full((3,), float(step))}, {"steps": step, "config": {}})
    writer.wait()
    for folder in (here, there):
        assert sorted(path.name for path in folder.iterdir()) == ["0000010", "0000020"]
    writer.save(15, {"model.a": torch.zeros(3)}, {"steps": 15, "config": {}})  # resumed from an older one
    writer.wait()
    assert sorted(path.name for path in here.iterdir()) == ["0000010", "0000015", "0000020"]
    CheckpointWriter([here], keep=1, is_main=True).sweep(17)  # not there
    assert len(list(here.iterdir())) == 3
    CheckpointWriter([here], keep=1, is_main=True).sweep(20)  # on a full disk, this makes room for the next one
    assert [path.name for path in here.iterdir()] == ["0000020"]


def test_a_run_keeps_as_many_as_asked(command, tmp_path):
    call(*command, tmp_path, "--keep", 1)
    assert [path.name for path in (tmp_path / RUN / "checkpoints").iterdir()] == ["0000009"]


def test_a_folder_that_cannot_be_written_is_one_line(command, tmp_path, capsys):
    call(*command, tmp_path, "--ckpt-every", 9)
    shutil.rmtree(tmp_path / RUN / "checkpoints")
    (tmp_path / RUN / "checkpoints").write_text("in the way")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*command, tmp_path)
    assert caught.value.code == 2
    assert "checkpoints" in capsys.readouterr().err.splitlines()[-1]


# ---- what a path may mean


def test_a_run_and_an_old_name_mean_a_checkpoint(whole):
    newest = whole / "checkpoints" / "0000009"
    assert containers.resolve(whole) == newest
    assert containers.resolve(whole / "checkpoints") == newest
    assert containers.resolve(whole / "checkpoints" / "0000008.pt") == whole / "checkpoints" / "0000008"
    assert containers.resolve(whole / "absent.pt") == whole / "absent.pt"


def test_training_goes_on_from_a_file_of_llamagen(command, whole, tmp_path):
    """{"model", "optimizer", "steps", "args"}, moments numbered in the order of its two parameter groups."""
    content = sharded.read_folder(whole / "checkpoints" / "0000008", optimizers=True)
    decayed = [name for name, value in content["model"].items() if value.ndim >= 2]
    names = decayed + [name for name, value in content["model"].items() if value.ndim < 2]
    moments = {i: {key: content["optimizer"][f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
               for i, name in enumerate(names)}
    split = len(decayed)
    optimizer = {"state": moments, "param_groups": [{"lr": 1.0, "params": list(range(split))},
                                                    {"lr": 1.0, "params": list(range(split, len(names)))}]}
    torch.save({"model": content["model"], "ema": content["ema"], "optimizer": optimizer, "steps": 8,
                "args": Namespace(lr=1.0)}, tmp_path / "0000008.pt")
    argv = [word if word != "auto" else "none" for word in command]
    call(*argv, tmp_path, "--gpt-ckpt", tmp_path / "0000008.pt")
    assert same(last(tmp_path / RUN), last(whole))

    optimizer["param_groups"] = [{"params": list(range(len(names)))}]
    torch.save({"model": content["model"], "optimizer": optimizer, "steps": 8}, tmp_path / "other.pt")
    with pytest.raises(SystemExit):
        call(*argv, tmp_path, "--gpt-ckpt", tmp_path / "other.pt")


# ---- what is refused, and what ends no training


@pytest.mark.parametrize("lost", ["exp_avg", "step"])
def test_an_optimizer_without_all_its_moments_is_refused(lost, command, whole, tmp_path, capsys):
    content = sharded.read_folder(whole / "checkpoints" / "0000008", optimizers=True)
    tensors = {f"{part}.{name}": value for part in ("model", "ema", "optimizer")
               for name, value in content[part].items() if not (part == "ema" and f"ema.{name}" not in
                                                                sharded.sizes_in(whole / "checkpoints" / "0000008"))}
    del tensors[f"optimizer.layers.1.attention.wo.weight.{lost}"]
    writer = CheckpointWriter([tmp_path / "spoilt"], keep=0, is_main=True)
    writer.save(8, tensors, {"steps": 8, "config": content["config"], "flags": content["flags"]})
    writer.wait()
    argv = [word if word != "auto" else tmp_path / "spoilt" / "0000008" for word in command]
    with pytest.raises(SystemExit):
        call(*argv, tmp_path / "runs")
    assert f"missing optimizer.layers.1.attention.wo.weight.{lost}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_copy_that_fails_is_told_and_ends_nothing(command, whole, tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    copytree = shutil.copytree

    def failing(source, target):
        if "0000004" in str(target):
            raise OSError(28, "No space left on device")
        return copytree(source, target)

    monkeypatch.setattr(shutil, "copytree", failing)
    call(*command, here, "--cloud-save-path", there)
    err = capsys.readouterr().err
    assert err.count("warning: a checkpoint could not be copied") == 1 and "No space left" in err
    assert same(last(here / RUN), last(whole))
    assert sorted(path.name for path in (there / RUN / "checkpoints").iterdir()) == ["0000008", "0000009"]


def test_what_kills_left_in_a_run_is_swept(command, whole, tmp_path):
    call(*command, tmp_path)
    shutil.rmtree(tmp_path / RUN / "checkpoints" / "0000009")
    for name in ("previews/.0000004.png.abc.tmp", ".metrics.jsonl.abc.tmp", "checkpoints/.0000006.tmp"):
        (tmp_path / RUN / name).write_bytes(b"half")
    call(*command, tmp_path)
    assert_same_run(tmp_path / RUN, whole)


def test_an_error_of_the_program_leaves_its_traceback(command, tmp_path, monkeypatch, capsys):
    """One line says where; a user's mistake leaves none."""
    for kind in (ValueError, RuntimeError, KeyError):
        with monkeypatch.context() as patch:
            def fail(self, batches, kind=kind):
                raise kind("from deep inside")
            patch.setattr(Trainer, "optimizer_step", fail)
            with pytest.raises(SystemExit) as caught:
                call(*command, tmp_path / kind.__name__)
        assert caught.value.code == 2
        path = tmp_path / kind.__name__ / RUN / "traceback-rank0.txt"
        line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "from deep inside" in line and f"(the traceback is in {path})" in line
        assert "in fail" in path.read_text() and "Traceback" in path.read_text()
    with pytest.raises(SystemExit):
        call(*command, tmp_path / "mistake", "--lr", "nan")
    assert "the traceback" not in capsys.readouterr().err and not (tmp_path / "mistake").exists()
