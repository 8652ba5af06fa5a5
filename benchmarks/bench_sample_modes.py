"""What the ways of decoding beside plain sequential decoding bring: Jacobi's windows, quantised weights. And what the
Python around a step takes.

    python3 benchmarks/bench_sample_modes.py --gpt-ckpt gpt.pt --vq-ckpt vq.pt    # Jacobi
    python3 benchmarks/bench_sample_modes.py --mode quantized                      # int8, int4
    python3 benchmarks/bench_sample_modes.py --mode overhead                       # with kernels that do nothing
    python3 benchmarks/bench_sample_modes.py --mode units --only 'GPT-B:256:*:2.0:0:*'  # the processor's, and PyTorch

How many codes a Jacobi pass decides depends on the distribution, so random weights say nothing about it: it needs a
trained model. Quantised weights are measured on random ones: their error is that of the logits of one forward pass over
random codes, in fp32 arithmetic. Rows go to benchmarks/results/sample.md.
"""
import itertools
import os
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.engines import engine_for
from autoregressive.models.generate import Statistics, generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.native_engine import NativeEngine
from autoregressive.models.plan import Raster, Request
from autoregressive.models.quantized import quantize_
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_pipeline
from benchmarks.bench_sample import IMAGES, case_labels, chosen_cases, our_codes, random_gpt
from benchmarks.machine import busy_processes
from benchmarks.roofline import clock, timed
from benchmarks.sample_rows import RowFlags, add_row, surroundings
from native import build
from utils import cli, dist
from utils.cli import flag
from utils.dist import Precision
from utils.seeding import sample_generator

MANY_IMAGES = 1, 8, 32, 64


@dataclass(kw_only=True)
class BenchModesFlags(SampleFlags, RowFlags):
    """The benchmark of ways of decoding. --only is for quantised weights, models and drawing are for Jacobi."""

    precision: Precision = "none"
    only: str = "GPT-?:256:1:2.0:0:fp32"
    mode: Literal["jacobi", "quantized", "overhead", "units"] = flag(
        "jacobi", "what to measure", choices=("jacobi", "quantized", "overhead", "units"))


def measure_jacobi(config: BenchModesFlags, device: torch.device) -> None:
    """A row for each number of images, by the models of --gpt-ckpt and --vq-ckpt."""
    pipeline = load_pipeline(config, device=device)
    gpt, settings, described = pipeline.gpt, pipeline.settings, pipeline.described
    tokens = gpt.config.block_size
    for images in tqdm(IMAGES, unit="case", mininterval=1.0):
        labels = torch.arange(images, device=device) % gpt.config.num_classes
        spans: dict[str, list[float]] = {"sequential": [], "jacobi": []}
        speeds, equal = [], []
        for seed in range(config.repeats + 1):  # the first warms up
            codes, statistics_of = {}, {}
            for decode, seconds in spans.items():
                generators = [sample_generator(seed, i) for i in range(images)]
                statistics_of[decode] = Statistics()
                start = clock(device)
                codes[decode] = generate(gpt, labels, tokens, generators=generators, decode=decode,
                                         statistics=statistics_of[decode], **settings)
                seconds.append(clock(device) - start)
            speeds.append(statistics_of["jacobi"].tokens_per_step)
            equal.append((codes["sequential"] == codes["jacobi"]).float().mean().item())
        sequential, jacobi = (statistics.median(seconds[1:]) for seconds in spans.values())
        add_row("Jacobi decoding", [
            described["gpt_model"], f"{tokens} x {images}", described["dtype"].removeprefix("torch."),
            f"{settings['cfg_scale']}, {settings['top_k']}, {settings['temperature']}",
            *surroundings(device, load=config.load),
            str(config.repeats), f"{sequential:.2f}", f"{jacobi:.2f}", f"{sequential / jacobi:.2f}×",
            f"{statistics.mean(speeds[1:]):.2f}", f"{statistics.mean(equal):.1%}"], write=config.append_rows)


@torch.no_grad()
def measure_quantized(config: BenchModesFlags, device: torch.device) -> None:
    """A row for each case and number of bits, against the same model as it is."""
    for case, bits in tqdm(list(itertools.product(chosen_cases(config.only), (8, 4))), unit="case", mininterval=1.0):
        models = [random_gpt(case, device) for _ in range(2)]
        quantize_(models[1], bits)
        codes = torch.randint(models[0].config.vocab_size, (case.images, case.tokens - 1), device=device)
        largest, rms, same = logit_error(*(model(codes, case_labels(case, device))[0] for model in models))
        spans: tuple[list[float], list[float]] = ([], [])
        for _ in range(config.repeats + 1):  # the first warms up
            for model, seconds in zip(models, spans, strict=True):
                seconds.append(timed(partial(our_codes, model, case, device), device))
        steps = [1e3 * statistics.median(seconds[1:]) / case.tokens for seconds in spans]
        add_row("Quantised weights", [
            case.name, f"int{bits}", *surroundings(device, load=config.load), str(config.repeats),
            *(f"{step:.1f}" for step in steps), f"{steps[0] / steps[1]:.2f}×", f"{largest:.2%}", f"{rms:.2%}",
            f"{same:.1%}"], write=config.append_rows)


def measure_overhead(config: BenchModesFlags, device: torch.device) -> None:
    """A row for each number of images: steps of a small model whose layers are left out, on a CPU with kernels."""
    model, steps = GPT_models["GPT-S"](vocab_size=64).eval(), 255
    if device.type != "cpu" or type(engine_for(model)) is not NativeEngine:
        raise ValueError("--mode overhead needs a CPU and C++ kernels")
    torch.set_num_threads(1)
    for images, scale in itertools.product((1, 8, 32), (1.0, 2.0)):
        decoder, spans = CodeDecoder(model), []
        for _ in range(10 * config.repeats):
            decoder.reserve(images)
            for i in range(images):
                decoder.join(Request(i, Raster(np.full(steps + 1, scale)), key=i))
            decoder.step()
            kernels = decoder.engine.kernels
            decoder.engine.kernels = SimpleNamespace(step=lambda *_: None, scratch_size=kernels.scratch_size)
            spans.append(timed(lambda decoder=decoder: [decoder.step() for _ in range(steps)], device) / steps)
            decoder.engine.kernels = kernels
        add_row("Python around a step", [
            str(images), str(scale), *surroundings(device, load=config.load), str(len(spans)),
            f"{1e3 * statistics.median(spans):.3f}", f"{1e3 * min(spans):.3f}"], write=config.append_rows)


def measure_units(config: BenchModesFlags, device: torch.device) -> None:
    """A row for each case, of up to 64 images: by each unit that the processor has (see native/build.py), and by
    PyTorch's kernels."""
    names = [*list(build.UNITS)[:build.units()], "0"]
    if len(names) == 1:
        raise ValueError("--mode units needs a processor with AVX2 and C++ kernels")
    for case in tqdm(chosen_cases(config.only, images=MANY_IMAGES), unit="case", mininterval=1.0):
        model, spans = random_gpt(case, device), {name: [] for name in names}
        for _ in range(config.repeats + 1):  # the first warms up
            for name, seconds in spans.items():
                os.environ["LLAMAGEN_NATIVE"] = name
                seconds.append(timed(partial(our_codes, model, case, device), device))
        steps = {name: 1e3 * statistics.median(seconds[1:]) / case.tokens for name, seconds in spans.items()}
        best, last = names[-2:]
        add_row("Units of the processor", [
            case.name, *surroundings(device, load=config.load), str(config.repeats),
            *(f"{steps[name]:.2f}" if name in steps else "-" for name in (*build.UNITS, "0")),
            f"{steps[last] / steps[best]:.2f}×"], write=config.append_rows)


def logit_error(exact: Tensor, changed: Tensor) -> tuple[float, float, float]:
    """Of logits (…, V): the largest and the RMS difference, over the RMS of `exact`; the share of equal best codes."""
    exact, changed = exact.double(), changed.double()
    difference, scale = (changed - exact), exact.square().mean().sqrt()
    return ((difference.abs().max() / scale).item(), (difference.square().mean().sqrt() / scale).item(),
            (exact.argmax(-1) == changed.argmax(-1)).double().mean().item())


def main(config: BenchModesFlags) -> None:
    dist.ask_for_huge_pages()
    device = dist.setup(config.device).device
    with busy_processes(config.load):
        {"jacobi": measure_jacobi, "quantized": measure_quantized, "overhead": measure_overhead,
         "units": measure_units}[config.mode](config, device)


if __name__ == "__main__":
    cli.run(main, BenchModesFlags)
