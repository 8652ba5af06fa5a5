"""Speed and memory of an ARPG's sampling, against a loop written as ARPG's is (plain_arpg.py) and against a GPT of the
same width.

    python3 benchmarks/bench_arpg.py                                  # all cases: about half an hour on 2 cores
    python3 benchmarks/bench_arpg.py --only 'ARPG-L:64:1:*' --repeats 1 --no-append-rows

A case is model:steps:images:dtype, 256 codes an image, guidance 4.5 that rises linearly, arccos schedule. The three
sides take turns in one process, on random weights. The GPT (GPT-L for ARPG-L)
draws its 256 codes one after the other on our engine. Rows go to benchmarks/results/sample.md one by one.
"""
import contextlib
import ctypes
import fnmatch
import gc
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.arpg import PRESETS, ARPGArgs
from autoregressive.models.base import CodeModel
from autoregressive.models.generate import generate, release
from autoregressive.models.registry import MODELS
from autoregressive.models.schedule import DrawSchedule
from benchmarks.bench_sample import DTYPES, forget_peak, peak_since
from benchmarks.machine import busy_processes
from benchmarks.plain_arpg import PlainARPG, plain_arpg_generate
from benchmarks.roofline import measured_peaks, timed
from benchmarks.sample_rows import RowFlags, add_row, surroundings
from utils import cli, dist
from utils.seeding import sample_generator

STEPS, IMAGES = (16, 32, 64, 256), (1, 8)
CFG_SCALE = 4.5
SIDES = ("plain", "ours", "gpt")


@dataclass(frozen=True)
class ARPGCase:
    """What one row measures."""

    model: str
    steps: int
    images: int
    dtype: str

    @property
    def name(self) -> str:
        """As --only sees it."""
        return f"{self.model}:{self.steps}:{self.images}:{self.dtype}"

    @property
    def gpt(self) -> str:
        """The GPT of the same width."""
        return self.model.replace("ARPG", "GPT")

    def limit(self, bandwidth: float, speed: float) -> float:
        """Seconds that a call must take: for every step the longer of reading the weights once, at `bandwidth` bytes/s,
        and of doing its products and attention for both rows of each image, at `speed` FLOP/s."""
        config = ARPGArgs(**PRESETS[self.model])
        d, layer = config.dim, 3 * config.dim * config.hidden
        first = config.n_layer * (4 * d * d + layer) + 2 * d * d
        second = config.n_query_layer * (2 * d * d + layer) + d * config.vocab_size
        seconds, fed, seen = 0.0, 1, 0
        for asked in DrawSchedule(self.steps).sizes(config.block_size):
            seen += fed
            flops = 2 * (first * fed + second * asked) + 4 * d * seen * (config.n_layer * fed
                                                                         + config.n_query_layer * asked)
            seconds += max((first + second) * DTYPES[self.dtype].itemsize / bandwidth, 2 * self.images * flops / speed)
            fed = asked
        return seconds


def chosen_arpg_cases(patterns: str) -> list[ARPGCase]:
    """The cases whose name holds one of the comma-separated patterns. Raises ValueError if there are none."""
    cases = [ARPGCase("ARPG-L", steps, images, dtype) for dtype, images, steps in
             itertools.product(DTYPES, IMAGES, STEPS)]
    found = [case for case in cases if any(fnmatch.fnmatchcase(case.name, f"*{p}*") for p in patterns.split(","))]
    if not found:
        raise ValueError(f"--only {patterns!r} fits no case, they are named like {cases[0].name}")
    return found


def model_of_case(name: str, case: ARPGCase, device: torch.device) -> CodeModel:
    """With random weights, also in the head."""
    torch.manual_seed(0)
    model = MODELS[name](block_size=256).eval().requires_grad_(False)
    torch.nn.init.normal_(model.get_submodule(model.HEAD).weight, std=0.02)
    return model.to(device=device, dtype=DTYPES[case.dtype])


def side(name: str, case: ARPGCase, model: CodeModel, device: torch.device) -> Callable[[], Tensor]:
    """A call of one side, all codes of the case's images."""
    labels, schedule = torch.arange(case.images, device=device) * 111 % 1000, DrawSchedule(case.steps)
    if name == "plain":
        plain = PlainARPG(model)
        return lambda: plain_arpg_generate(plain, labels, schedule, cfg_scale=CFG_SCALE, order=torch.randperm(256))
    how = {"schedule": schedule} if name == "ours" else {"decode": "sequential"}
    return lambda: generate(model, labels, 256, cfg_scale=CFG_SCALE, **how,
                            generators=[sample_generator(0, i) for i in range(case.images)])


def check_same_codes(case: ARPGCase, model: CodeModel, device: torch.device) -> None:
    """Both loops must choose the same best codes of a few steps, in fp32; both are warm after it."""
    schedule, order = DrawSchedule(case.steps), torch.arange(256)
    labels = torch.arange(case.images, device=device)
    plain = plain_arpg_generate(PlainARPG(model), labels, schedule, cfg_scale=CFG_SCALE, order=order, greedy=True)
    ours = generate(model, labels, 256, cfg_scale=CFG_SCALE, schedule=schedule, orders=order, sample_logits=False)
    agree = (plain == ours).float().mean().item()
    assert case.dtype != "fp32" or agree > 0.9, f"{case.name}: {agree:.0%} of the codes are those of the plain loop"


def give_freed_memory_back() -> None:
    """Let glibc return what Python has freed, so that a call's own memory can be seen; nothing elsewhere."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def measured_sides(case: ARPGCase, device: torch.device, *, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Of each side: median seconds of a call, in turns; GiB that a call needs at its peak; GiB of the weights."""
    model, gpt = model_of_case(case.model, case, device), model_of_case(case.gpt, case, device)
    check_same_codes(case, model, device)
    spans, peaks = {name: [] for name in SIDES}, {name: [] for name in SIDES}
    for _ in range(repeats):
        for name in SIDES:
            owner = gpt if name == "gpt" else model
            call = side(name, case, owner, device)
            give_freed_memory_back()
            forget_peak(device)
            before = peak_since(device)
            spans[name].append(timed(call, device))
            peaks[name].append(peak_since(device) - before)
            release(owner)  # each call makes its caches anew
    weights = {name: sum(p.nbytes for p in (gpt if name == "gpt" else model).parameters()) / 2**30 for name in SIDES}
    return {name: (statistics.median(spans[name]), max(peaks[name]), weights[name]) for name in SIDES}


def main(config: RowFlags) -> None:
    dist.ask_for_huge_pages()
    with busy_processes(config.load):
        measure_arpg(config, dist.setup(config.device).device)


def measure_arpg(config: RowFlags, device: torch.device) -> None:
    """A row for each case."""
    cases = chosen_arpg_cases(config.only)
    for case in tqdm(cases, unit="case"):
        bandwidth, speed = measured_peaks(device, DTYPES[case.dtype])
        sides = measured_sides(case, device, repeats=config.repeats)
        seconds = {name: values[0] for name, values in sides.items()}
        gc.collect()
        limit = case.limit(bandwidth, speed)
        add_row("ARPG", [
            case.name, *surroundings(device, load=config.load), str(config.repeats),
            *(f"{seconds[name]:.2f}" for name in SIDES),
            f"{seconds['plain'] / seconds['ours']:.2f}×", f"{seconds['gpt'] / seconds['ours']:.2f}×",
            f"{bandwidth / 1e9:.1f}, {speed / 1e9:.0f}", f"{limit:.2f}, {limit / seconds['ours']:.0%}",
            *(f"{weights + peak:.2f} ({peak:.2f})" for _, peak, weights in sides.values())], write=config.append_rows)


if __name__ == "__main__":
    cli.run(main, RowFlags)
