"""Speed, memory and exactness of the tokenizer on a CPU, against code written as LlamaGen's is.

    python3 benchmarks/bench_tokenizer.py                                        # all cases: about half an hour
    python3 benchmarks/bench_tokenizer.py --tokenizer-cases VQ-16:256:1 --tokenizer-results ""   # print only

The sides run in turns in one process, with the same weights, in fp32:
  plain       NCHW, codebook normalised in every call, x * sigmoid(x), attention by two batched products
  ours        what sampling and code extraction run: `decode_images`, `encode_images`
  ours-bf16   where kernels keep 16 bits for models in bf16 (AMX): `decode_images` so
Peak memory is that of a process of its own for each side. What the weights are does not matter for speed; they are the
first ones of training. Rows go to benchmarks/results/tokenizer.md.
"""
import copy
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_train import product_speed
from benchmarks.machine import cpu_name
from tokenizer.build import decode_images, encode_images
from tokenizer.tokenizer_image import convolution
from tokenizer.tokenizer_image.layers import AttnBlock, Decoder, Encoder, ResnetBlock, to_channels_last
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils import cli, images
from utils.cli import flag

CPU = torch.device("cpu")
HEADER = """# Tokenizer

`python3 benchmarks/bench_tokenizer.py`: "plain" is the tokenizer written as LlamaGen's, "ours" what sampling and code
extraction run, "ours-bf16" what sampling with a bf16 model runs on CPUs with AMX (16 bits of numbers are kept); the
same weights, fp32, in turns in one process; medians (fastest in brackets). GFLOP/s count the
convolutions as defined, whoever computes them how; "of peak" compares that with the best matrix product measured in the
same run, "done" only what is really multiplied (Winograd's 3x3 convolutions: a quarter). Memory is that of a process of
its own, weights included. "apart": largest difference between the two sides' pictures in [-1, 1], their PSNR in dB over
a range of 2, and uint8 values that differ; for encoding, codes that differ.

| model | what | pixels x images | device, threads | versions | rounds | side | s | images/s | faster | GFLOP/s | \
of peak | done | GiB | apart |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(kw_only=True)
class BenchTokenizerFlags:
    """The benchmark of the tokenizer."""

    tokenizer_cases: str = flag("VQ-16:256:1,VQ-16:256:8,VQ-16:384:1,VQ-16:384:8,VQ-8:256:1,VQ-8:256:8,VQ-8:384:1,"
                                "VQ-8:384:8", "preset:pixels:images, comma-separated")
    tokenizer_rounds: int = flag(3, "timed calls of each side, after one that is not")
    tokenizer_threads: int = flag(os.cpu_count() or 1, "threads")
    tokenizer_side: str | None = flag(None, "print the peak memory of one side (for the benchmark itself)",
                                      choices=("plain decode", "plain encode", "ours decode", "ours encode",
                                               "ours-bf16 decode"))
    tokenizer_results: str = flag(str(Path(__file__).parent / "results" / "tokenizer.md"), "file for the rows, or \"\"")
    bfloat16_deviation: bool = flag(False, "also print how far decoding in bf16 is from fp32 (slow)")


# ---- the plain side


class PlainTokenizer:
    """Decoding and encoding as the original does it, around copies of a model's layers; counts the multiply-adds."""

    def __init__(self, model: VQModel) -> None:
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.flops = self.reduced = 0  # of convolutions by their definition; with Winograd's F(4x4, 3x3) where possible

    def conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        y = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        flops = 2 * y.numel() * layer.weight[0].numel()
        self.flops += flops
        self.reduced += flops / 4 if layer.kernel_size == (3, 3) and layer.stride == (1, 1) else flops
        return y

    def resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        h = block.norm1(x)
        h = self.conv(block.conv1, h * torch.sigmoid(h))
        h = block.norm2(h)
        h = self.conv(block.conv2, h * torch.sigmoid(h))
        same = isinstance(block.nin_shortcut, nn.Identity)
        return (x if same else self.conv(block.nin_shortcut, x)) + h

    def attention(self, block: AttnBlock, x: Tensor) -> Tensor:
        normed = block.norm(x)
        q, k, v = (self.conv(layer, normed).flatten(2) for layer in (block.q, block.k, block.v))  # (B, C, h*w)
        weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k) * q.shape[1]**-0.5, dim=2)
        mixed = torch.bmm(v, weights.permute(0, 2, 1)).reshape(x.shape)
        return x + self.conv(block.proj_out, mixed)

    def levels(self, part: Encoder | Decoder, x: Tensor) -> Tensor:
        x = self.conv(part.conv_in, x)
        blocks = [part.conv_blocks, part.mid] if isinstance(part, Encoder) else [part.mid, part.conv_blocks]
        for block in [block for group in blocks for block in group]:
            if isinstance(block, ResnetBlock):
                x = self.resnet(block, x)
            elif isinstance(block, AttnBlock):
                x = self.attention(block, x)
            else:
                for i, inner in enumerate(block.res):
                    x = self.resnet(inner, x)
                    if block.attn:
                        x = self.attention(block.attn[i], x)
                if block.downsample is not None:
                    x = self.conv(block.downsample.conv, F.pad(x, (0, 1, 0, 1)))
                if block.upsample is not None:
                    x = self.conv(block.upsample.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = part.norm_out(x)
        return self.conv(part.conv_out, x * torch.sigmoid(x))

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes (B, h*w) → images (B, 3, H, W)."""
        vectors = F.normalize(self.model.quantize.embedding.weight, dim=-1)[codes.view(-1)]
        vectors = vectors.view(len(codes), *grid, -1).permute(0, 3, 1, 2).contiguous()
        return self.levels(self.model.decoder, self.conv(self.model.post_quant_conv, vectors))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) → codes (B, h*w)."""
        z = self.conv(self.model.quant_conv, self.levels(self.model.encoder, pixels)).permute(0, 2, 3, 1).contiguous()
        z = F.normalize(z, dim=-1).view(-1, z.shape[-1])
        book = F.normalize(self.model.quantize.embedding.weight, dim=-1)
        distances = z.square().sum(1, keepdim=True) + book.square().sum(1) - 2 * z @ book.t()
        return distances.argmin(1).view(len(pixels), -1)


# ---- measuring


def build_case(case: str) -> tuple[VQModel, Tensor, Tensor, tuple[int, int]]:
    """"VQ-16:256:8" → (model, codes (B, h*w), images, grid). Raises ValueError for another form."""
    name, *numbers = case.split(":")
    if name not in VQ_models or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--tokenizer-cases has {case!r}, expected preset:pixels:images such as VQ-16:256:8")
    torch.manual_seed(0)
    model = to_channels_last(VQ_models[name]().eval().requires_grad_(False))
    side, count = map(int, numbers)
    grid = (side // model.downsample,) * 2
    smooth = sum(F.interpolate(torch.randn(count, 3, size, size), size=(side, side), mode="bicubic") * 0.3
                 for size in (4, 16, 64)).clamp(-1, 1)
    return model, torch.randint(model.codebook_size, (count, grid[0] * grid[1])), smooth, grid


def sides_of(case: str, what: str) -> tuple[dict[str, Callable[[], Tensor]], PlainTokenizer]:
    """(side → a call that returns pictures or codes, the plain side: it counts its FLOPs)."""
    model, codes, pixels, grid = build_case(case)
    plain = PlainTokenizer(model)
    if what == "decode":
        calls = {"plain": lambda: plain.decode(codes, grid), "ours": lambda: decode_images(model, codes, grid)}
        if convolution.can_keep_16_bits():
            calls["ours-bf16"] = lambda: decode_images(model, codes, grid, dtype=torch.bfloat16)
        return calls, plain
    return {"plain": lambda: plain.encode(pixels), "ours": lambda: encode_images(model, pixels)}, plain


def memory_in_fresh_process(config: BenchTokenizerFlags, case: str, side: str) -> float:
    """Peak GiB of a process that does nothing but `side`."""
    words = [sys.executable, __file__, "--tokenizer-cases", case, "--tokenizer-side", side, "--tokenizer-threads",
             str(config.tokenizer_threads)]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def peak_resident() -> float:
    """Peak GiB of this process since the peak was reset (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def deviation(found: Tensor, expected: Tensor) -> str:
    """How far two sides' pictures or codes are from each other."""
    if not found.is_floating_point():
        return f"{int((found != expected).sum())} of {found.numel()} codes"
    difference = (found - expected).double()
    decibels = 10 * math.log10(4 / max(difference.square().mean().item(), 1e-30))
    changed = (images.to_uint8(found) != images.to_uint8(expected)).mean()
    return f"{difference.abs().max():.1e}, {decibels:.0f} dB, {changed:.4%}"


def case_rows(config: BenchTokenizerFlags, case: str, what: str) -> list[str]:
    """The table's rows for one case."""
    calls, counter = sides_of(case, what)
    results = {side: call() for side, call in calls.items()}  # not timed: first calls are slower
    flops, reduced = counter.flops, counter.reduced
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(config.tokenizer_rounds):
        for side in calls if turn % 2 == 0 else reversed(calls):
            start = time.perf_counter()
            calls[side]()
            seconds[side].append(time.perf_counter() - start)
    peak = product_speed(CPU, torch.float32)
    name, size, count = case.split(":")
    median = {side: statistics.median(values) for side, values in seconds.items()}
    lines = []
    for side, values in seconds.items():
        done = {"plain": flops, "ours": reduced}.get(side)  # the third multiplies numbers of another type
        row = [name, what, f"{size} x {count}", f"{cpu_name()}, {config.tokenizer_threads}",
               f"torch {torch.__version__}", str(len(values)), side, f"{median[side]:.2f} ({min(values):.2f})",
               f"{int(count) / median[side]:.2f}", f"{median['plain'] / median[side]:.2f}×",
               f"{flops / median[side] / 1e9:.0f}", f"{flops / median[side] / peak:.0%}",
               f"{done / median[side] / peak:.0%}" if done else "",
               f"{memory_in_fresh_process(config, case, f'{side} {what}'):.2f}",
               deviation(results[side], results["plain"]) if side != "plain" else ""]
        lines.append(f"| {' | '.join(row)} |\n")
    return lines


def main(config: BenchTokenizerFlags) -> None:
    torch.set_num_threads(config.tokenizer_threads)
    cases = config.tokenizer_cases.split(",")
    if config.tokenizer_side:
        side, what = config.tokenizer_side.split()
        call = sides_of(cases[0], what)[0][side]
        Path("/proc/self/clear_refs").write_text("5")  # building models takes more memory than running
        call()
        print(peak_resident())
        return
    for case in cases:
        for what in ("decode", "encode"):
            for line in case_rows(config, case, what):
                print(line, end="", flush=True)
                if config.tokenizer_results:
                    with Path(config.tokenizer_results).open("a") as file:
                        file.write(line if file.tell() else HEADER + line)
        if config.bfloat16_deviation:
            model, codes, _, grid = build_case(case)
            low = decode_images(model, codes[:1], grid, dtype=torch.bfloat16)
            print(f"{case} bf16:", deviation(low, decode_images(model, codes[:1], grid)), flush=True)


if __name__ == "__main__":
    cli.run(main, BenchTokenizerFlags)
