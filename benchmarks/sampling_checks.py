"""What benchmarks/gpu_check.py tries of models and sampling: parity, CUDA graphs, half precision, batches.

Each check compares what the device computes with known numbers (tests/data) or with another way to compute the same. On
a CPU the same code runs on small models. It was run on CPUs only so far: what is done where `device.type` is "cuda" was
never tried on one.
"""
import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.base import CodeModel
from autoregressive.models.generate import generate
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.registry import MODELS
from autoregressive.models.schedule import DrawSchedule
from benchmarks.check_report import CheckResult, within
from benchmarks.roofline import timed
from tests.data import references
from tokenizer.build import decode_images
from tokenizer.tokenizer_image.layers import to_channels_last
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.finite import NotFiniteError
from utils.images import to_uint8
from utils.seeding import sample_generator

GPU_FACTOR = 5  # how much further off than the tests allow on a CPU: other sums, other convolutions
HALVES = {torch.bfloat16: 0.05, torch.float16: 0.01}  # allowed RMS error of logits, relative; their steps: 2^-9, 2^-12
IMAGES = 8
GRAPH_CALLS = {  # name: (family, dtype, settings of `generate`)
    "fp32": ("GPT", torch.float32, {}),
    "bf16, top-k 50, top-p 0.95": ("GPT", torch.bfloat16, {"top_k": 50, "top_p": 0.95}),
    "ARPG, bf16": ("ARPG", torch.bfloat16, {"schedule": DrawSchedule(8)}),
}
LARGE = {"GPT": "GPT-B", "ARPG": "ARPG-L"}  # on a GPU


# ---- what the checks run on


def random_model(device: torch.device, dtype: torch.dtype = torch.float32, *, family: str = "GPT") -> CodeModel:
    """GPT-B or ARPG-L for 256 tokens, on a CPU GPT-S or ARPG-S for 16, with random weights, those of the head too."""
    torch.manual_seed(0)
    model = (MODELS[f"{family}-S"](block_size=16, vocab_size=256) if device.type == "cpu" else
             MODELS[LARGE[family]](block_size=256)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.get_submodule(model.HEAD).weight, std=0.02)
    return model.to(device=device, dtype=dtype)


def drawn(model: CodeModel, images: range, **settings) -> Tensor:
    """Codes (len(images), L) of some images of seed 0, with guidance; one code a step, or what `settings` say."""
    labels = torch.tensor(images, device=next(model.parameters()).device) * 111 % 1000
    return generate(model, labels, model.config.block_size, cfg_scale=2.0, **{"decode": "sequential", **settings},
                    generators=[sample_generator(0, i) for i in images])


def same_share(one: Tensor, other: Tensor) -> float:
    """Which share of the elements is equal."""
    return (one == other).float().mean().item()


# ---- the checks


def check_device(device: torch.device) -> Iterator[CheckResult]:
    """Does every card compute? Products in fp32 against the CPU's in double precision."""
    if device.type == "cpu":
        yield CheckResult(None, "no GPU was used: this is the CPU form, with small models")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        left, right = (torch.randn(512, 512, generator=torch.Generator().manual_seed(i)) for i in range(2))
        exact = left.double() @ right.double()
        error = (left.to(f"cuda:{index}") @ right.to(f"cuda:{index}")).cpu().double() - exact
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        yield within(f"card {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
                     f"{free:.1f} of {total:.1f} GiB free; error of a product, relative",
                     (error.norm() / exact.norm()).item(), 1e-5)


def check_parity(device: torch.device) -> Iterator[CheckResult]:
    """The reference implementation's numbers in fp32: tokenizers, teacher-forced logits, greedy codes."""
    factor = GPU_FACTOR if device.type == "cuda" else 1
    for file in references.TOKENIZERS:
        numbers = references.tokenizer_differences(file, device)
        yield within(f"{file}, before quantisation", numbers["before quantisation"], 1e-4 * factor)
        yield within(f"{file}, pixels", numbers["pixels"], 1e-3 * factor)
        yield within(f"{file}, share of wrong codes among the {numbers['clear codes']:.1%} that are clear",
                     numbers["wrong codes"], 0.0)
    for file in references.GPTS:
        gpt = references.load_gpt(file, device)
        numbers = references.teacher_forced_differences(gpt)
        for name, bound in (("logits", 2e-4), ("logits in training", 2e-4), ("loss", 1e-5)):
            yield within(f"{file}, {name}", numbers[name], bound * factor)
        wrong, clear = references.wrong_greedy_codes(gpt)
        yield within(f"{file}, share of wrong greedy codes among the {clear:.1%} that are clear", wrong, 0.0)
        wrong, compared = references.generated_codes(gpt)
        yield CheckResult(wrong == 0, f"{file}, first codes of `generate`: {wrong} of {compared} wrong")
    model, numbers = references.load_arpg(device)
    for name, value in references.arpg_teacher_forced_differences(model, numbers).items():
        yield within(f"ARPG-L, {name}", value, {"logits": 2e-4, "loss": 1e-5}[name] * factor)
    wrong, compared = references.wrong_arpg_codes(model, numbers, references.ARPG_DRAWS[0])
    yield CheckResult(wrong == 0, f"ARPG-L, a whole decoding: {wrong} wrong of the {compared:.1%} that are clear")


@contextlib.contextmanager
def graphs_used(*, on: bool) -> Iterator[dict[str, Any]]:
    """Turn graphs on or off for the block; afterwards: how many were captured and replayed, what was said of them."""
    seen: dict[str, Any] = {"capture_begin": 0, "replay": 0}
    said = io.StringIO()

    def counted(name: str) -> Callable:
        original = getattr(torch.cuda.CUDAGraph, name)

        def call(graph: torch.cuda.CUDAGraph, *args, **options) -> object:
            seen[name] += 1
            return original(graph, *args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("capture_begin", "replay"):
            stack.enter_context(mock.patch.object(torch.cuda.CUDAGraph, name, counted(name)))
        stack.enter_context(mock.patch.object(StepGraphs, "broken", False))  # each block is asked for itself
        stack.enter_context(mock.patch.dict(os.environ, {"LLAMAGEN_GRAPHS": "0"}))
        if on:
            del os.environ["LLAMAGEN_GRAPHS"]
        stack.enter_context(contextlib.redirect_stderr(said))
        yield seen
    seen["said"] = [line for line in said.getvalue().splitlines() if line.startswith("note:")]


def milliseconds(model: CodeModel, count: int, device: torch.device, *, on: bool, **settings) -> float:
    """What a code takes of a call for `count` images, with graphs on or off. The call was made before."""
    with graphs_used(on=on):
        return 1e3 * timed(lambda: drawn(model, range(count), **settings), device) / model.config.block_size


def check_graphs(device: torch.device) -> Iterator[CheckResult]:
    """The same call with CUDA graphs and without: codes, speed, and whether graphs were given up."""
    if device.type == "cpu":
        yield CheckResult(None, "graphs are for GPUs: on a CPU both calls are the same eager one")
    for name, (family, dtype, settings) in GRAPH_CALLS.items():
        model = random_model(device, dtype, family=family)
        with graphs_used(on=False) as off:
            eager = {count: drawn(model, range(count), **settings) for count in (1, IMAGES)}
        rounds = []  # sizes alternate: what a graph is captured for was seen before, so from the third on none is
        for _ in range(3):
            with graphs_used(on=True) as seen:
                equal = [same_share(drawn(model, range(count), **settings), codes) for count, codes in eager.items()]
            rounds.append(seen)
            yield CheckResult(min(equal) == 1, f"{name}: {min(equal):.2%} of the codes are those without graphs")
        if device.type == "cuda":
            yield CheckResult(not off["replay"], f"{name}: LLAMAGEN_GRAPHS=0 replayed graphs {off['replay']} times")
            captured, replayed = ([seen[what] for seen in rounds] for what in ("capture_begin", "replay"))
            yield CheckResult(min(replayed) > 0 and not captured[-1],
                              f"{name}: calls for 1 and {IMAGES} images, three times in turns, captured {captured} "
                              f"graphs (expected 0 at last) and replayed {replayed} times")
        said = "; ".join(dict.fromkeys(line for seen in rounds for line in seen["said"]))
        yield CheckResult(not said, f"{name}: said of graphs: {said or 'nothing'}")
        for count in eager if device.type == "cuda" else ():
            slow, fast = (milliseconds(model, count, device, on=on, **settings) for on in (False, True))
            yield CheckResult(None, f"{name}, images: {count}: {slow:.2f} ms a code without graphs, {fast:.2f} with, "
                                    f"{slow / fast:.1f} times as fast")


def check_half(device: torch.device) -> Iterator[CheckResult]:
    """bf16 and fp16 weights: errors of the logits against fp32, and whether images can be drawn."""
    exact = random_model(device)
    labels = torch.arange(2, device=device)
    codes = torch.randint(exact.config.vocab_size, (2, exact.config.block_size), device=device)
    for dtype, bound in HALVES.items():
        name, model = str(dtype).removeprefix("torch."), copy.deepcopy(exact).to(dtype)
        with torch.no_grad():
            wanted, logits = (each(codes[:, :-1], labels)[0].float() for each in (exact, model))
        yield within(f"{name}: RMS error of the logits, relative",
                     ((logits - wanted).norm() / wanted.norm()).item(), bound)
        try:
            kinds = drawn(model, range(IMAGES)).unique().numel()
            yield CheckResult(kinds > 1, f"{name}: {IMAGES} images were drawn, of {kinds} different codes")
        except NotFiniteError as error:
            yield CheckResult(False, f"{name}: {error}")


def check_batches(device: torch.device) -> Iterator[CheckResult]:
    """The same images alone, in batches and in windows. Batches are promised on CPUs; on GPUs last bits may differ."""
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-16" if device.type == "cuda" else "VQ-4-S"]().eval().requires_grad_(False).to(device)
    tokenizer = to_channels_last(tokenizer)
    promised = () if device.type == "cuda" else ("in batches of 3", f"in a batch of {IMAGES}")
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        model, name, made = random_model(device, dtype), str(dtype).removeprefix("torch."), {}
        ways = {"alone": (1, {}), "in batches of 3": (3, {}), f"in a batch of {IMAGES}": (IMAGES, {}),
                "alone in windows of 4": (1, {"decode": "jacobi", "window": 4})}
        for way, (size, settings) in ways.items():
            parts = [drawn(model, range(start, min(start + size, IMAGES)), **settings)
                     for start in range(0, IMAGES, size)]
            pixels = [to_uint8(decode_images(tokenizer, part, model.config.grid)) for part in parts]
            made[way] = torch.cat(parts), torch.as_tensor(np.concatenate(pixels))
        alone = made.pop("alone")
        for way, other in made.items():
            codes, pixels = (same_share(*pair) for pair in zip(alone, other, strict=True))
            whole = (alone[0] == other[0]).all(1).sum().item()
            yield CheckResult(codes == pixels == 1 if way in promised else None,
                              f"{name}, {way}, against alone: {codes:.2%} of the codes and {pixels:.2%} of the pixels "
                              f"are equal, all codes of {whole} of {IMAGES} images")
