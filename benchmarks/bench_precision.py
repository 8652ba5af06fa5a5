"""Is bf16 faster than fp32 on this CPU? For training and running tokenizers and GPTs, step by step in turns.

    python3 benchmarks/bench_precision.py                                       # all cases: minutes
    python3 benchmarks/bench_precision.py --precision-cases train:VQ-4-S:48:8 --precision-results ""   # print only

A case is what:model:size:batch. What: train (a step of ours: `Trainer.optimizer_step`), adversarial (a tokenizer's
with its discriminator), decode and encode (tokenizers, by our fp32 kernels or by PyTorch's), sample (a GPT, by our
kernels or by PyTorch's). Size: pixels for tokenizers, image tokens for GPTs. Both types run in one process, in
turns, and processor time is counted, so that other work on the machine matters little. `dist.compute_dtype` follows
these rows.
"""
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.train.config import GPTTrainFlags
from benchmarks import bench_train
from benchmarks.machine import cpu_name
from tokenizer.build import decode_images, encode_images
from tokenizer.tokenizer_image.layers import to_channels_last
from tokenizer.tokenizer_image.vq_loss import VQLoss, build_discriminator
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.tokenizer_image.vq_train import TokenizerTask, VQTrainFlags
from utils import cli, dist
from utils.cli import flag
from utils.seeding import sample_generator
from utils.training.trainer import Trainer

CPU = torch.device("cpu")
TRAINS = ("train", "adversarial")
DTYPES = (torch.float32, torch.bfloat16)
HEADER = """# bf16 against fp32 on a CPU

`python3 benchmarks/bench_precision.py`: seconds of processor time, all threads together, that a step takes (median,
fastest in brackets) in fp32 and in bf16, in turns in one process after one step of each that is not timed, and how many
times as fast bf16 is by the medians. "train" is a training step of ours, "adversarial" a tokenizer's with the PatchGAN
(neither has a perceptual loss), "decode" and "encode" a tokenizer's halves, "sample" a GPT's codes with guidance;
"kernels": our C++ ones or PyTorch's. The tokenizer's bf16 is PyTorch's, but for AMX: there ours keep 16 bits.

| what | model | size x batch | device, threads | versions | steps | kernels | fp32 s | bf16 s | bf16 is faster |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(kw_only=True)
class BenchPrecisionFlags:
    """The benchmark of compute types."""

    precision_cases: str = flag(
        "train:VQ-4-S:48:8,adversarial:VQ-4-S:48:8,train:VQ-16:64:4,adversarial:VQ-16:64:4,train:GPT-S:144:16,"
        "train:GPT-B:256:2,decode:VQ-4-S:48:8,encode:VQ-4-S:48:8,decode:VQ-16:64:8,encode:VQ-16:64:8,"
        "sample:GPT-S:144:16,sample:GPT-B:64:8", "what:model:size:batch, comma-separated")
    precision_steps: int = flag(5, "timed steps of each type, after one that is not")
    precision_threads: int = flag(1, "threads; with more than one, their waiting counts too")
    precision_results: str = flag(str(Path(__file__).parent / "results" / "precision.md"), "file for the rows, or \"\"")


def train_step(name: str, size: int, count: int, dtype: torch.dtype, *, adversarial: bool) -> Callable[[], object]:
    """One training step of a tokenizer (images of `size` pixels) or a GPT (`size` tokens), batch `count`."""
    process, random = dist.Process(0, 1, CPU), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    precision = "none" if dtype == torch.float32 else "bf16"
    if name in GPT_models:
        flags = GPTTrainFlags(code_path="", global_batch_size=count, mixed_precision=precision)
        model = GPT_models[name](block_size=size, vocab_size=256 if name == "GPT-S" else 16384)
        step, data = bench_train.our_step(model, flags, process, dtype), bench_train.batches(model, count, CPU)
        return lambda: step(next(data))
    flags = VQTrainFlags(data_path="", global_batch_size=count, mixed_precision=precision, perceptual_weight=0.0,
                         disc_start=0, disc_weight=0.5 if adversarial else 0.0, image_size=(size, size))
    model = to_channels_last(VQ_models[name]())
    critic = to_channels_last(build_discriminator(flags, image_size=(size, size))) if adversarial else None
    images = torch.rand(count, 3, size, size, generator=random) * 2 - 1
    task = TokenizerTask(model, critic, VQLoss(flags, device=CPU), dtype=dtype, samples=images)
    trainer = Trainer(task, flags, process, Path(tempfile.gettempdir()), steps=10**6, saved_config={})

    def step() -> None:
        trainer.optimizer_step(iter([{"images": images, "broken": []}]))
        trainer.step += 1
        trainer.handle_step_flags(drain=False)

    return step


def run_step(what: str, name: str, size: int, count: int, dtype: torch.dtype) -> Callable[[], object]:
    """Decoding or encoding `count` images of `size` pixels, or sampling `count` rows of `size` tokens."""
    torch.manual_seed(0)
    if what == "sample":
        gpt = GPT_models[name](block_size=size, vocab_size=256 if name == "GPT-S" else 16384).eval()
        torch.nn.init.normal_(gpt.output.weight, std=0.02)
        gpt, labels = gpt.requires_grad_(False).to(dtype), torch.arange(count)
        return lambda: generate(gpt, labels, size, cfg_scale=2.0,
                                generators=[sample_generator(0, i) for i in range(count)])
    model = to_channels_last(VQ_models[name]().eval().requires_grad_(False))
    if what == "encode":
        images = torch.rand(count, 3, size, size) * 2 - 1

        def encode() -> None:
            with dist.autocast(CPU, dtype):
                encode_images(model, images)

        return encode
    side = size // model.downsample
    codes = torch.randint(model.codebook_size, (count, side * side))
    return lambda: decode_images(model, codes, (side, side), dtype=dtype)


def case_row(config: BenchPrecisionFlags, case: str, *, native: bool) -> str:
    """The table's row for one case, with our C++ kernels or without."""
    what, name, size, count = case.split(":")
    os.environ["LLAMAGEN_NATIVE"] = "1" if native else "0"
    shape = name, int(size), int(count)
    steps = {dtype: train_step(*shape, dtype, adversarial=what == "adversarial") if what in TRAINS
             else run_step(what, *shape, dtype) for dtype in DTYPES}
    for step in steps.values():  # not timed: memory is new, kernels are made
        step()
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    for turn in range(config.precision_steps):
        for dtype in DTYPES if turn % 2 == 0 else reversed(DTYPES):
            start = time.process_time()
            steps[dtype]()
            seconds[dtype].append(time.process_time() - start)
    median = [statistics.median(seconds[dtype]) for dtype in DTYPES]
    cells = [what, name, f"{size} x {count}", f"{cpu_name()}, {config.precision_threads}", f"torch {torch.__version__}",
             str(config.precision_steps), "ours" if native else "PyTorch's",
             *(f"{middle:.3f} ({min(seconds[dtype]):.3f})" for middle, dtype in zip(median, DTYPES, strict=True)),
             f"{median[0] / median[1]:.2f}×"]
    return f"| {' | '.join(cells)} |\n"


def main(config: BenchPrecisionFlags) -> None:
    torch.set_num_threads(config.precision_threads)
    for case in config.precision_cases.split(","):
        for native in (False,) if case.startswith(TRAINS) else (True, False):
            line = case_row(config, case, native=native)
            print(line, end="", flush=True)
            if config.precision_results:
                with Path(config.precision_results).open("a") as file:
                    file.write(line if file.tell() else HEADER + line)


if __name__ == "__main__":
    cli.run(main, BenchPrecisionFlags)
