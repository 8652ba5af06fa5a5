"""Speed and memory of sampling, against a loop written as LlamaGen's is (plain_sampler.py).

    python3 benchmarks/bench_sample.py                                      # all cases: hours on 2 cores
    python3 benchmarks/bench_sample.py --only 'GPT-B:576:8:*' --repeats 1 --no-append-rows
    python3 benchmarks/bench_sample.py --only GPT-B:256:8:2.0:0:fp32 --load 3    # beside three busy processes

A case is model:image tokens:images:guidance:top-k:dtype, e.g. GPT-B:576:8:2.0:0:fp32. Both sides take turns in one
process, on the same random weights; memory is measured in a process per side. The plain loop takes minutes for a
picture and the same time for every step, as it attends to the whole padded cache: without --whole it is timed at the
start, in the middle and at the end of the sequence. Ours always runs as a whole. Rows go to
benchmarks/results/sample.md one by one.
"""
import fnmatch
import gc
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.generate import generate
from autoregressive.models.gpt import PRESETS, GPT_models, ModelArgs, Transformer
from benchmarks.bench_tokenizer import PlainTokenizer
from benchmarks.machine import busy_processes
from benchmarks.plain_sampler import (
    PlainSampler,
    PlainSettings,
    plain_decode,
    plain_generate,
    plain_prefill,
    plain_uint8,
    png_files,
)
from benchmarks.roofline import clock, limit_seconds, measured_peaks, step_cost, timed
from benchmarks.sample_rows import RowFlags, add_row, surroundings
from tokenizer.build import decode_images
from tokenizer.tokenizer_image.layers import to_channels_last
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import cli, dist
from utils.cli import flag
from utils.images import to_uint8
from utils.seeding import sample_generator
from utils.training.meter import peak_memory

MODELS, TOKENS, IMAGES = ("GPT-B", "GPT-L"), (256, 576), (1, 8)
GUIDANCE = ((2.0, 0), (4.0, 2000))  # (scale, top-k)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GROUP = 4  # steps of the plain loop that are timed together
CHECKED = 4  # codes that must agree before anything is timed


@dataclass(kw_only=True)
class BenchSampleFlags(RowFlags):
    """The benchmark of sampling."""

    whole: bool = flag(False, "time and measure the plain loop over the whole sequence too")
    memory_of: str | None = flag(None, "run this side of one case once and print its peak memory (for the benchmark "
                                       "itself)", choices=("plain", "ours"))


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    model: str
    tokens: int
    images: int
    cfg_scale: float
    top_k: int
    dtype: str

    @property
    def name(self) -> str:
        """As --only sees it."""
        return f"{self.model}:{self.tokens}:{self.images}:{self.cfg_scale}:{self.top_k}:{self.dtype}"

    @property
    def rows(self) -> int:
        """Rows of a step: guidance doubles them."""
        return self.images * (2 if self.cfg_scale > 1 else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Of its tokens."""
        return ModelArgs(block_size=self.tokens).grid

    def limit(self, bandwidth: float, speed: float) -> float:
        """Seconds that a step must take at `bandwidth` bytes/s and `speed` FLOP/s."""
        config = ModelArgs(**PRESETS[self.model], block_size=self.tokens)
        return limit_seconds(step_cost(config, rows=self.rows, bytes_each=DTYPES[self.dtype].itemsize),
                             bandwidth=bandwidth, speed=speed)


def chosen_cases(patterns: str, *, images: Sequence[int] = IMAGES) -> list[Case]:
    """The cases whose name holds one of the comma-separated patterns. Raises ValueError if there are none."""
    cases = [Case(model, tokens, count, *guidance, dtype) for model, tokens, dtype, count, guidance in
             itertools.product(MODELS, TOKENS, DTYPES, images, GUIDANCE)]
    found = [case for case in cases if any(fnmatch.fnmatchcase(case.name, f"*{p}*") for p in patterns.split(","))]
    if not found:
        raise ValueError(f"--only {patterns!r} fits no case, they are named like {cases[0].name}")
    return found


# ---- both sides


def random_gpt(case: Case, device: torch.device) -> Transformer:
    """The model of a case with random weights, and a head that has some too."""
    torch.manual_seed(0)
    model = GPT_models[case.model](block_size=case.tokens).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model.to(device=device, dtype=DTYPES[case.dtype])


def random_tokenizer(device: torch.device) -> torch.nn.Module:
    """VQ-16 with random weights."""
    torch.manual_seed(0)
    return VQ_models["VQ-16"]().eval().requires_grad_(False).to(device)


def case_labels(case: Case, device: torch.device) -> Tensor:
    """Classes, (images,)."""
    return torch.arange(case.images, device=device) * 111 % 1000


def our_codes(model: Transformer, case: Case, device: torch.device) -> Tensor:
    """The codes of a case as our `generate` makes them, one per step."""
    return generate(model, case_labels(case, device), case.tokens, cfg_scale=case.cfg_scale, top_k=case.top_k,
                    generators=[sample_generator(0, i) for i in range(case.images)], decode="sequential")


def plain_run(sampler: PlainSampler, case: Case, device: torch.device, *, whole: bool) -> tuple[float, int]:
    """(seconds of a whole call, steps whose probabilities were not kept meanwhile) of the plain loop.

    Without `whole` it is run in groups of steps at the start, in the middle and at the end: the time of a step does not
    depend on what the cache holds.
    """
    labels, settings = case_labels(case, device), PlainSettings(cfg_scale=case.cfg_scale, top_k=case.top_k)
    if whole:
        return timed(lambda: plain_generate(sampler, labels, case.tokens, settings), device), 0
    steps, results, spans = case.tokens - 1, [], []
    start = clock(device)
    token = plain_prefill(sampler, labels, case.tokens, settings)
    first = clock(device) - start
    for begin in (0, (steps - GROUP) // 2, steps - GROUP):
        start = clock(device)
        results.append(plain_decode(sampler, token, range(begin, begin + GROUP), settings))
        spans.append(clock(device) - start)
    timed_steps = GROUP * len(spans)
    return first + steps * sum(spans) / timed_steps, steps - timed_steps


def check_first_codes(model: Transformer, sampler: PlainSampler, case: Case, device: torch.device) -> None:
    """Both sides must choose the same first codes, in fp32; both are warm after it."""
    labels = case_labels(case, device)
    plain = plain_generate(sampler, labels, CHECKED, PlainSettings(cfg_scale=case.cfg_scale, sample_logits=False))
    ours = generate(model, labels, CHECKED, cfg_scale=case.cfg_scale, sample_logits=False)
    assert case.dtype != "fp32" or torch.equal(plain, ours), f"{case.name}: plain {plain}, ours {ours}"


def our_pictures(tokenizer: torch.nn.Module, codes: Tensor, grid: tuple[int, int]) -> list[bytes]:
    """PNG files of codes, decoded by our tokenizer."""
    return png_files(to_uint8(decode_images(tokenizer, codes, grid)))


def picture_seconds(case: Case, device: torch.device, *, repeats: int) -> tuple[float, float]:
    """Seconds from codes to PNG files: (plain, ours)."""
    plain, tokenizer = PlainTokenizer(random_tokenizer(device)), to_channels_last(random_tokenizer(device))
    codes = torch.randint(tokenizer.codebook_size, (case.images, case.tokens), device=device)
    few = codes[:1, :16]
    difference = plain.decode(few, (4, 4)).cpu() - decode_images(tokenizer, few, (4, 4))  # this also warms both up
    assert difference.abs().mean() < 0.02, f"pixels differ by {difference.abs().mean()} in the mean"
    spans: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        spans[0].append(timed(lambda: png_files(plain_uint8(plain.decode(codes, case.grid))), device))
        spans[1].append(timed(lambda: our_pictures(tokenizer, codes, case.grid), device))
    return statistics.median(spans[0]), statistics.median(spans[1])


def code_seconds(case: Case, device: torch.device, *, repeats: int, whole: bool) -> tuple[float, float]:
    """Seconds from labels to codes: (plain, ours)."""
    model = random_gpt(case, device)
    sampler = PlainSampler(model)
    check_first_codes(model, sampler, case, device)
    spans: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        spans[0].append(plain_run(sampler, case, device, whole=whole)[0])
        spans[1].append(timed(lambda: our_codes(model, case, device), device))
    return statistics.median(spans[0]), statistics.median(spans[1])


# ---- memory, in a process of its own


def peak_of_side(side: str, case: Case, device: torch.device, *, whole: bool) -> list[float]:
    """GiB at the peak of one side in this process: while codes are made, while pixels are."""
    model = random_gpt(case, device)
    forget_peak(device)
    if side == "plain":
        sampler = PlainSampler(model)  # holds its caches, as LlamaGen's model does
        _, missing = plain_run(sampler, case, device, whole=whole)
        codes_peak = peak_since(device) + missing * case.images * model.config.vocab_size * 4 / 2**30
    else:
        our_codes(model, case, device)
        codes_peak = peak_since(device)
    tokenizer = random_tokenizer(device)
    tokenizer = PlainTokenizer(tokenizer) if side == "plain" else to_channels_last(tokenizer)
    codes = torch.randint(model.config.vocab_size, (case.images, case.tokens), device=device)
    forget_peak(device)
    if side == "plain":
        png_files(plain_uint8(tokenizer.decode(codes, case.grid)))
    else:
        our_pictures(tokenizer, codes, case.grid)
    return [codes_peak, peak_since(device)]


def forget_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_since(device: torch.device) -> float:
    """GiB at the peak since the reset. On a CPU the kernel's VmHWM: getrusage's peak begins with the parent's size."""
    if device.type == "cuda":
        return peak_memory(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))


def peak_in_own_process(side: str, case: Case, config: BenchSampleFlags) -> list[float]:
    """peak_of_side in a fresh process."""
    words = [sys.executable, __file__, "--memory-of", side, "--only", case.name, "--device", config.device,
             "--whole" if config.whole else "--no-whole"]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


# ---- rows


def measure_codes(config: BenchSampleFlags, device: torch.device) -> None:
    """A row for each case."""
    cases = chosen_cases(config.only)
    peaks = {name: measured_peaks(device, DTYPES[name]) for name in sorted({case.dtype for case in cases})}
    for name, (bandwidth, speed) in peaks.items():
        tqdm.write(f"measured, {name}: {bandwidth / 1e9:.1f} GB/s, {speed / 1e9:.0f} GFLOP/s")
    pictures: dict[tuple[int, int], tuple[float, float]] = {}
    shares = [case.limit(*peaks[case.dtype]) * case.tokens for case in cases]  # each case's share of the whole time
    with tqdm(total=sum(shares), bar_format="{l_bar}{bar}| {elapsed}, {remaining} to go", mininterval=1.0) as bar:
        for case, share in zip(cases, shares, strict=True):
            bar.set_description(case.name)
            shape = (case.tokens, case.images)
            again = measured_peaks(device, DTYPES[case.dtype])  # measured again: a shared machine is slower at times
            peaks[case.dtype] = bandwidth, speed = tuple(map(max, peaks[case.dtype], again))
            if shape not in pictures:
                pictures[shape] = picture_seconds(case, device, repeats=config.repeats)
            codes = code_seconds(case, device, repeats=config.repeats, whole=config.whole)
            gc.collect()
            memory = [peak_in_own_process(side, case, config) for side in ("plain", "ours")]
            limit = case.limit(bandwidth, speed)
            steps = [seconds / case.tokens for seconds in codes]
            speeds = [case.images / (a + b) for a, b in zip(codes, pictures[shape], strict=True)]
            add_row("Codes and pictures", [
                case.name, *surroundings(device, load=config.load),
                f"{config.repeats}, {'whole' if config.whole else 'sampled'}",
                *(f"{1e3 * step:.1f}" for step in steps), f"{steps[0] / steps[1]:.2f}×",
                f"{bandwidth / 1e9:.1f}, {speed / 1e9:.0f}", f"{1e3 * limit:.1f}",
                ", ".join(f"{limit / step:.0%}" for step in steps),
                *(f"{each:.4f}" for each in speeds), f"{speeds[1] / speeds[0]:.2f}×",
                *(" / ".join(f"{peak:.2f}" for peak in peaks) for peaks in memory),
                f"{max(memory[1]) / max(memory[0]):.2f}×"], write=config.append_rows)
            bar.update(share)


def main(config: BenchSampleFlags) -> None:
    dist.ask_for_huge_pages()
    device = dist.setup(config.device).device
    if config.memory_of:
        case, = chosen_cases(config.only)
        print(json.dumps(peak_of_side(config.memory_of, case, device, whole=config.whole)))
    else:
        with busy_processes(config.load):
            measure_codes(config, device)


if __name__ == "__main__":
    cli.run(main, BenchSampleFlags)
