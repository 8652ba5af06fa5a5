"""Trainings on one, two and three processes, cut off anywhere: what was written is whole, and they go on as if nothing
had been."""
import os
import random
import shutil
import signal
import time

import pytest
import torch

from tests.conftest import TINY_GPT
from tests.runs import SMALL_VQ16, finish, last, rows, same, start
from utils.checkpoints import containers, sharded

pytestmark = pytest.mark.processes
slow = pytest.mark.slow
VQ = ["--image-size", 32, "--num-workers", 0, "--vq-model", "VQ-16", "--perceptual-weight", 0, "--lr", 1e-3,
      "--global-batch-size", 6, "--epochs", 1, "--ckpt-every", 2, "--log-every", 1, "--mixed-precision", "none",
      "--resume", "auto"]  # 36 images: six steps
EVERYTHING = ["--disc-start", 1, "--dropout-p", 0.1, "--ema"]
PLAIN = ["--disc-weight", 0]
GPT = [*TINY_GPT, "--global-batch-size", 6, "--epochs", 1, "--ckpt-every", 2, "--log-every", 1, "--mixed-precision",
       "none", "--resume", "auto", "--ema"]
CUT = """import os, signal
from utils.training.trainer import Trainer
step = Trainer.optimizer_step
def cut(self, batches):
    if self.step == 4:
        self.checkpoints.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)
Trainer.optimizer_step = cut
"""


def run_of(folder):
    found, = folder.glob("000-*")
    return found


@pytest.fixture(scope="module")
def trained(image_folder, code_store, tmp_path_factory):
    """(name, processes) → (command without --results-dir's value, setup, folder of the whole run, of the cut one)."""
    commands = {"everything": ["train_vq", "--data-path", image_folder, *VQ, *EVERYTHING],
                "plain": ["train_vq", "--data-path", image_folder, *VQ, *PLAIN],
                "gpt": ["train_gpt", "--code-path", code_store, *GPT]}
    made = {}

    def train(name, processes):
        if (name, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{name}{processes}")
            command = [*commands[name], "--results-dir"]
            finish(start([*command, folder / "whole"], folder, processes=processes, setup=SMALL_VQ16))
            finish(start([*command, folder / "cut"], folder, processes=processes, setup=SMALL_VQ16 + "\n" + CUT),
                   code=128 + signal.SIGKILL if processes > 1 else -signal.SIGKILL)
            made[name, processes] = (command, SMALL_VQ16, folder / "whole", folder / "cut")
        return made[name, processes]

    return train


def assert_same_run(one, other) -> None:
    assert same(last(run_of(one)), last(run_of(other)))
    for name in ("metrics.jsonl", "previews/0000006.png"):
        if (run_of(other) / name).exists():
            assert (run_of(one) / name).read_bytes() == (run_of(other) / name).read_bytes()
    assert not [path for path in run_of(one).rglob(".*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(("name", "processes"), [("everything", 2), pytest.param("everything", 3, marks=slow),
                                                 pytest.param("plain", 2, marks=slow),
                                                 pytest.param("gpt", 3, marks=slow)])
def test_a_run_cut_off_goes_on_as_the_uninterrupted_one(name, processes, trained, tmp_path):
    command, setup, whole, cut = trained(name, processes)
    shutil.copytree(cut, tmp_path / "cut")
    text = finish(start([*command, tmp_path / "cut"], tmp_path, processes=processes, setup=setup))
    assert "at step 4" in text
    assert_same_run(tmp_path / "cut", whole)
    content = last(run_of(whole))
    if name == "everything":  # what each part consists of, with what only processes beyond the first hold
        parts = set(content)
        assert {"model", "discriminator", "ema", "optimizer", "optimizer_disc", "model@1", "discriminator@1"} <= parts
        assert content["model@1"].keys() == {"quantize.codebook_used"}
        assert len(content["optimizer"]) == 3 * len(content["ema"].keys() - {"quantize.codebook_used"})


@slow
@pytest.mark.parametrize(("name", "processes", "other"), [("everything", 2, 1), ("everything", 3, 2), ("plain", 2, 3),
                                                          ("plain", 2, 1)])
def test_another_number_of_processes_goes_on_from_the_same_state(name, processes, other, trained, tmp_path):
    """What was saved is what is gone on from; the sums of another number of processes differ in the last bits.

    Dropout's masks and the batches that BatchNorm sees hang on the number of processes.
    """
    command, setup, whole, cut = trained(name, processes)
    shutil.copytree(cut, tmp_path / "cut")
    loaded = """import torch
from utils.training.trainer import Trainer
begin = Trainer.begin
def keep(self):
    begin(self)
    if self.process.is_main:
        torch.save(self.state.tensors(), self.folder / "loaded.pt")
Trainer.begin = keep"""
    finish(start([*command, tmp_path / "cut"], tmp_path, processes=other, setup=setup + "\n" + loaded))
    found = torch.load(run_of(tmp_path / "cut") / "loaded.pt")
    saved = sharded.read_folder(run_of(cut) / "checkpoints" / "0000004", optimizers=True)
    for key, value in found.items():
        part, rest = key.split(".", 1)
        assert torch.equal(value, saved[part][rest]), key
    ours, theirs = rows(run_of(tmp_path / "cut")), rows(run_of(whole))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    assert ours[:4] == theirs[:4]
    if name == "plain":
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_checkpoint_that_lacks_a_name_is_not_published(image_folder, tmp_path):
    """Each process believes that the other writes one of the tensors."""
    lose = SMALL_VQ16 + """
from utils.training import writer
share_out = writer.share_out
def losing(tensors):
    mine, expected = share_out(tensors)
    return {name: tensor for name, tensor in mine.items() if name != "model.decoder.conv_out.bias"}, expected
writer.share_out = losing"""
    command = ["train_vq", "--data-path", image_folder, *VQ, *PLAIN, "--results-dir", tmp_path]
    text = finish(start(command, tmp_path, processes=2, setup=lose), code=2)
    assert text.count("error:") == 1
    assert "error: a checkpoint could not be written" in text
    assert "model.decoder.conv_out.bias would be missing" in text
    assert containers.newest(run_of(tmp_path) / "checkpoints") is None


@slow
def test_an_error_of_one_process_is_one_line_of_all(code_store, tmp_path):
    """Reading the checkpoint fails on the second of three processes; the checkpoint stays where it is."""
    command = ["train_gpt", "--code-path", code_store, *GPT, "--results-dir", tmp_path]
    finish(start(command, tmp_path, processes=1))
    broken = """import errno
from utils import dist
from utils.checkpoints import sharded
file_hash = sharded.file_hash
def failing(path):
    if dist.env_rank() == 1:
        raise OSError(errno.EIO, "Input/output error", str(path))
    return file_hash(path)
sharded.file_hash = failing"""
    text = finish(start([*command, "--epochs", 2], tmp_path, processes=3, setup=broken), code=2)
    assert text.count("error: [Errno 5] Input/output error") == 1, text
    assert len(text.splitlines()) == 1 or "[Gloo] " in text, text  # gloo of torch 2.8 to 2.10 says that it is connected
    assert "Traceback" not in text and "Connection" not in text and "set aside" not in text
    assert run_of(tmp_path).joinpath("checkpoints", "0000006").is_dir()
    damaged = """
failing_disk = sharded.file_hash
def changed(path):
    return "0" * 64 if dist.env_rank() == 0 else failing_disk(path)
sharded.file_hash = changed"""  # one finds damage where another cannot read: nothing is set aside
    text = finish(start([*command, "--epochs", 2], tmp_path, processes=2, setup=broken + damaged), code=2)
    assert text.count("error: [Errno 5] Input/output error") == 1 and "set aside" not in text, text
    text = finish(start([*command, "--epochs", 2], tmp_path, processes=3))
    assert "at step 6" in text


@slow
@pytest.mark.parametrize(("name", "processes"), [("everything", 1), ("everything", 2), ("gpt", 1), ("gpt", 2)])
def test_killed_at_random_again_and_again(name, processes, trained, tmp_path):
    """Whatever a kill meets: all that is left goes on to the same end. (The moments differ from run to run.)"""
    command, setup, whole, _ = trained(name, processes)
    slower = setup + """
import time
from utils.training.trainer import Trainer
step = Trainer.optimizer_step
def patient(self, batches):
    time.sleep(0.1)  # so that kills fall everywhere
    return step(self, batches)
Trainer.optimizer_step = patient"""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # pytest shows it when the test fails
    dice, kills = random.Random(seed), 0
    for _ in range(12):
        process = start([*command, tmp_path], tmp_path, processes=processes, setup=slower)
        metrics = [*tmp_path.glob("000-*/metrics.jsonl")]
        before = metrics[0].stat().st_mtime_ns if metrics else 0
        while process.poll() is None and not any(path.stat().st_mtime_ns > before
                                                 for path in tmp_path.glob("000-*/metrics.jsonl")):
            time.sleep(0.02)  # importing takes longer than training
        wait = time.monotonic() + dice.uniform(0, 0.7)
        while process.poll() is None and time.monotonic() < wait:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    finish(start([*command, tmp_path], tmp_path, processes=processes, setup=setup))
    assert kills >= 1
    assert_same_run(tmp_path, whole)
