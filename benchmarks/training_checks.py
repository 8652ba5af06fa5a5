"""What benchmarks/gpu_check.py tries of training: several cards against one process, compiled against eager. And the
benchmarks' rows.

It was run on CPUs only so far: two processes that talk through gloo there, one process per GPU and nccl here. What is
done where `device.type` is "cuda" was never tried on one.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import bench_train, sample_rows
from benchmarks.check_report import CheckResult, NotTriedError, within
from benchmarks.machine import ROOT
from dataset import code_writer
from dataset.code_manifest import FORMAT
from tests.autoregressive.models import toy_training
from utils.launch import VARIABLES
from utils.training.logger import read_metrics

TRAIN_STEPS, TRAIN_VOCABULARY = 20, 256
LOSS_TOLERANCES = {"fp32": 1e-4, "bf16": 0.02}  # of a loss, and relative of a gradient's norm ten times as much
COMPILED_TOLERANCE = 1e-3  # of any of 200 losses; on a CPU 3e-6
SPEED = {  # device type: a command of benchmarks/ for each table
    "cuda": (("bench_sample.py", "--only", "GPT-B:256:1:2.0:0:bf16,GPT-B:256:8:2.0:0:bf16", "--repeats", "1",
              "--no-append-rows"), ("bench_train.py", "--cases", "GPT-B:256:16", "--no-write")),
    "cpu": (("bench_train.py", "--cases", "GPT-S:16:4", "--sides", "plain,ours", "--timed-steps", "1", "--no-write"),),
}
SPEED_HEADS = {"bench_sample.py": sample_rows.TABLES["Codes and pictures"], "bench_train.py": bench_train.HEADER}
STDERR_KEPT = 4000  # characters of what a failed command said


def failed(what: str, error: subprocess.CalledProcessError) -> CheckResult:
    """A command that ended with an error: its last line, and what it wrote before."""
    lines = error.stderr.strip().splitlines() or ["it said nothing"]
    return CheckResult(False, f"{what} ended with {error.returncode}: {lines[-1]}", "\n".join(lines)[-STDERR_KEPT:])


def write_toy_store(folder: Path, images: int) -> None:
    """Codes that a GPT learns quickly: a label says with which code the count begins."""
    folder.mkdir(parents=True)
    labels = np.random.default_rng(0).integers(10, size=images)
    codes = (labels[:, None] * 17 + np.arange(16)) % TRAIN_VOCABULARY
    code_writer.begin(folder, {"format": FORMAT, "grid": [4, 4], "image_size": [16, 16], "views": 1, "dtype": "uint16",
                               "classes": None, "tokenizer": {"codebook_size": TRAIN_VOCABULARY, "downsample": 4,
                                                              "weights_sha256": ""}})
    code_writer.write_part(folder, 0, codes[:, None].astype(np.uint16), labels.tolist())
    code_writer.finish(folder, 1)


def trained(folder: Path, device: torch.device, *words: str, processes: int, batch: int) -> dict[str, np.ndarray]:
    """Each step's loss and norm of the gradient, of the real command started as scripts/autoregressive/train_c2i.sh
    does."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"nproc_per_node": str(processes), **({} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})}
    results = Path(tempfile.mkdtemp(dir=folder))
    subprocess.run(
        [sys.executable, ROOT / "utils" / "launch.py", ROOT / "autoregressive" / "train" / "train.py", "--code-path",
         folder / "codes", "--results-dir", results, "--gpt-model", "GPT-S", "--epochs", "1", "--global-batch-size",
         str(batch), "--lr", "1e-3", "--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout", "0",
         "--log-every", "1", "--num-workers", "0", *words],
        env=environment, capture_output=True, text=True, check=True)
    rows = read_metrics(next(results.glob("*/metrics.jsonl")))
    return {key: np.array([row[key] for row in rows]) for key in ("loss", "grad_norm")}


def check_training(device: torch.device) -> Iterator[CheckResult]:
    """The losses of the training command under DDP and FSDP2, a process per card, against one process."""
    cards = torch.cuda.device_count() if device.type == "cuda" else 2
    batch = cards * max(1, 8 // cards)
    ways = {"one process": (1, "ddp"), f"DDP, processes: {cards}": (cards, "ddp"),
            f"FSDP2, processes: {cards}": (cards, "fsdp")}
    if cards == 1:
        yield CheckResult(None, "DDP was not tried: it needs two cards or more. FSDP2 runs as a group of one")
        del ways["DDP, processes: 1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_toy_store(folder / "codes", TRAIN_STEPS * batch)
        for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
            one, bound = None, LOSS_TOLERANCES[precision]
            for way, (processes, kind) in ways.items():
                what = f"{precision}, {way}"
                try:
                    run = trained(folder, device, "--mixed-precision", precision, "--data-parallel", kind,
                                  processes=processes, batch=batch)
                except subprocess.CalledProcessError as error:
                    yield failed(what, error)
                    continue
                losses, norms = run["loss"], run["grad_norm"]
                yield CheckResult(len(losses) == TRAIN_STEPS and bool(losses[-1] < 0.9 * losses[0]),
                                  f"{what}: {len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")
                one = run if way == "one process" else one
                if one is not None and run is not one:
                    yield within(f"{what} against one, loss", float(np.abs(losses - one["loss"]).max()), bound)
                    yield within(f"{what} against one, norm of the gradient, relative",
                                 float(np.abs(norms / one["grad_norm"] - 1).max()), 10 * bound)


def check_compile(device: torch.device) -> Iterator[CheckResult]:
    """200 steps compiled by inductor against eager ones: step by step without dropout, the ends with it."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise NotTriedError("torch.compile needs the package triton on a GPU")
    compilers = (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "g++", "clang", "cc", "c++")
    if not any(shutil.which(name) for name in compilers if name):
        raise NotTriedError("torch.compile needs a C and C++ compiler, such as gcc and g++")
    eager, compiled = (toy_training.losses(toy_training.gpt(dropout=0.0, compiled=on, device=device), seed=0,
                                           steps=toy_training.STEPS) for on in (False, True))
    functions = torch._dynamo.utils.counters["frames"]["ok"]
    yield CheckResult(functions > 0, f"functions that were compiled: {functions}")
    yield CheckResult(bool(eager[-1] < 0.6 * eager[0]), f"loss from {eager[0]:.4f} to {eager[-1]:.4f}, eager")
    yield within(f"loss without dropout, {len(eager)} steps", (eager - compiled).abs().max().item(), COMPILED_TOLERANCE)
    eager, compiled = (toy_training.ends(toy_training.gpt(dropout=0.1, compiled=on, device=device))
                       for on in (False, True))
    yield within(f"last losses with dropout 0.1, mean of {len(eager)} seeds, {eager.mean():.4f} eager and "
                 f"{compiled.mean():.4f} compiled", (eager.mean() - compiled.mean()).abs().item(),
                 toy_training.allowed_difference(eager, compiled))


def check_benchmarks(device: torch.device) -> Iterator[CheckResult]:
    """Rows of the benchmarks of sampling and training."""
    for script, *words in SPEED[device.type]:
        try:
            done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *words, "--device", device.type],
                                  capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            yield failed(script, error)
            continue
        heads = SPEED_HEADS[script].splitlines()[-2]
        rows = [line for line in done.stdout.splitlines() if line.startswith(("| ", "Codes and pictures: "))]
        for row in rows:
            pairs = zip(*([cell.strip() for cell in line.removeprefix("Codes and pictures: ").strip("| ").split("|")]
                          for line in (heads, row)), strict=True)
            yield CheckResult(None, "; ".join(f"{head}: {cell}" for head, cell in pairs))
        if not rows:
            yield CheckResult(False, f"{script} printed no rows", done.stdout[-STDERR_KEPT:])
