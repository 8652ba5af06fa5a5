"""The file of results that the benchmarks of sampling share: a table for each kind of row, rows added one by one."""
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.machine import cpu_name
from utils.cli import flag
from utils.files import replacing
from utils.options import DeviceFlags

RESULTS = Path(__file__).parent / "results" / "sample.md"
HEADER = """# Sampling

Ours against a loop written as LlamaGen's (`benchmarks/plain_sampler.py`) and against itself. The sides take turns in
one process, on the same weights; medians of the repeats; nothing is timed before a short warm-up.
"""
TABLES = {
    "Codes and pictures": """`python3 benchmarks/bench_sample.py`: GPT and VQ-16 with random weights. A case is
model:image tokens:images:guidance:top-k:dtype.

How to read it: ms/step is the time of a whole call over its image tokens, images/s goes from labels to PNG files in
memory. The limit is what a mean step takes if it reads the weights, the used half of the cache and the logits once, or
makes its products, at the bandwidth and speed measured in the same run; "of limit" is the share that was reached. GiB:
peak of the process, libraries and weights included, while codes / pixels are made (on a GPU: of what torch allocates);
"memory" compares the larger ones. "sampled": the plain loop was timed over 12 of its steps, four each at the start, in
the middle and at the end, and the probabilities that it keeps of every other one are added to its memory; "whole": over
all of them. Ours always ran as a whole. Beside busy processes (`--load`) all is measured beside them, the limit too.

| case | device, threads | versions, date | repeats, plain | plain ms/step | ours ms/step | faster | GB/s, GFLOP/s | \
limit ms/step | plain, ours of limit | plain images/s | ours images/s | faster | plain GiB | ours GiB | memory |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
""",
    "ARPG": """`python3 benchmarks/bench_arpg.py`: random weights, 256 codes an image. A case is
model:steps:images:dtype.
Plain: a loop written as ARPG's (`benchmarks/plain_arpg.py`); ours: `generate`; GPT: the GPT of the same width, its 256
codes one after the other on our engine. Seconds are of a whole call, from labels to codes. The limit adds up, step by
step, the longer of reading the weights once and of doing the products, at the bandwidth and speed measured in the same
run; the share of it that was reached. GiB: weights, and in brackets alone what a call needs besides at its peak.

| case | device, threads | versions, date | repeats | plain s | ours s | GPT s | faster than plain | than the GPT | \
GB/s, GFLOP/s | limit s, share | plain GiB | ours GiB | GPT GiB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
""",
    "Jacobi decoding": """`python3 benchmarks/bench_sample_modes.py --gpt-ckpt gpt.pt --vq-ckpt vq.pt`: a trained model.
Both ways draw with the same seeds. Codes per pass: what an image gets of a forward pass of `decode="jacobi"`, mean.

| model | tokens x images | dtype | guidance, top-k, temperature | device, threads | versions, date | repeats | \
sequential s | jacobi s | faster | codes per pass | equal codes |
|---|---|---|---|---|---|---|---|---|---|---|---|
""",
    "Quantised weights": """`python3 benchmarks/bench_sample_modes.py --mode quantized`: random weights, not exact.
Errors are those of the logits of a forward pass over random codes, over their root mean square; same best: the share of
positions whose best code stays. ms/step as above, against the weights of the case.

| case | weights | device, threads | versions, date | repeats | ms/step as they are | ms/step | faster | \
largest error | RMS error | same best |
|---|---|---|---|---|---|---|---|---|---|---|
""",
    "Units of the processor": """`python3 benchmarks/bench_sample_modes.py --mode units`: random weights; ms/step of
ours by the processor's units (`LLAMAGEN_NATIVE=avx2`, …) and by PyTorch's kernels (`LLAMAGEN_NATIVE=0`); faster: the
last unit that the processor has over PyTorch's kernels.

| case | device, threads | versions, date | repeats | avx2 | avx512 | bf16dot | amx | PyTorch | faster |
|---|---|---|---|---|---|---|---|---|---|
""",
    "Python around a step": """`python3 benchmarks/bench_sample_modes.py --mode overhead`: what a step takes beside its
layers: plans, the flat batch, embeddings, the call of kernels (which do nothing here), and drawing among 64 codes.

| images | guidance | device, threads | versions, date | repeats | median ms | least ms |
|---|---|---|---|---|---|---|
""",
}


@dataclass(kw_only=True)
class RowFlags(DeviceFlags):
    """Which rows are measured."""

    only: str = flag("*", "the cases whose name holds one of these patterns, comma-separated")
    repeats: int = flag(3, "timed runs of each side, in turns")
    load: int = flag(0, "measure beside so many other processes that keep a core busy each")
    append_rows: bool = flag(True, "add the rows to benchmarks/results/sample.md")

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats is {self.repeats}, expected 1 or more")
        if self.load < 0:
            raise ValueError(f"--load is {self.load}, expected 0 or more")


def surroundings(device: torch.device, *, load: int = 0) -> list[str]:
    """Table cells: device, threads (and how many busy processes ran beside), versions, date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    beside = f", beside {load} busy processes" if load else ""
    return [f"{name}, {torch.get_num_threads()}{beside}", f"torch {torch.__version__}, {date.today()}"]


def with_row(text: str, title: str, cells: list[str]) -> str:
    """The results with one more row at the end of the table `title`; an empty text becomes a new file."""
    if not text:
        text = HEADER + "".join(f"\n## {name}\n\n{table}" for name, table in TABLES.items())
    if f"## {title}\n" not in text:  # a table that is newer than the file
        text = f"{text}\n## {title}\n\n{TABLES[title]}"
    lines = text.splitlines(keepends=True)
    start = lines.index(f"## {title}\n") + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
    last = max(i for i in range(start, end) if lines[i].startswith("|"))
    assert lines[last].count("|") == len(cells) + 1, (title, cells)
    return "".join([*lines[:last + 1], f"| {' | '.join(cells)} |\n", *lines[last + 1:]])


def add_row(title: str, cells: list[str], *, write: bool) -> None:
    """Show a row, and put it into the results at once: a benchmark that is stopped keeps what it has measured."""
    tqdm.write(f"{title}: {' | '.join(cells)}")
    if write:
        with replacing(RESULTS) as temporary:
            temporary.write_text(with_row(RESULTS.read_text() if RESULTS.exists() else "", title, cells))
