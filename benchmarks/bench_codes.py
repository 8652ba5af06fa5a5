"""Training batches from packed codes, against one .npy per image as LlamaGen keeps and loads them.

    python3 benchmarks/bench_codes.py                  # 20,000 images, at 256 and at 576 tokens: minutes, 1 GB of disk
    python3 benchmarks/bench_codes.py --bench-images 2000 --bench-order 3000000 --no-record

Both sides hold the same random codes: int64 (1, views, L) in `<i>.npy` beside a label in another file, and our packed
store. Batches are drawn in random order: on the one side by a Dataset that loads the two files of one image, torch's
DataLoader with shuffling and its own collation, no and two workers; on the other by StepSampler and CodeBatches, whose
hashing of views and range checks are included. The sides take turns, first with all files in the page cache, then with
them dropped from it. A row per length, with the medians, goes to benchmarks/results/codes.md.

Then what 50 million images take: their order in windows against one array of all, as it was; a packed store of as many
(sparse files, codes of zero) opened and drawn from.
"""
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import cpu_name
from dataset import code_writer
from dataset.code_manifest import FORMAT
from dataset.codes import CodeBatches, open_store
from dataset.loader import StepSampler, loader
from dataset.order import WINDOW_ROWS, EndlessOrder
from utils import cli
from utils.cli import flag

RESULTS = Path(__file__).parent / "results" / "codes.md"
BATCH, VIEWS, VOCAB = 256, 2, 16384
TOKENIZER = {"codebook_size": VOCAB, "downsample": 16, "weights_sha256": ""}
LENGTHS = (256, 576)
COLD = {"cold files": "files", "cold packed": "packed"}
FILE_BATCHES = 20  # batches of files that are timed, out of a pass
WARM_PASSES = 10  # passes over our store that are timed: one is too short
HEADER = """# Batches of codes

`python3 benchmarks/bench_codes.py`: thousands of samples per second in batches of 256, two views per image. "Files" is
LlamaGen's layout and way, one .npy of codes and one of the label per image, loaded by torch's DataLoader without and
with two workers; "packed" is our store, loaded without workers, as training does. MB is what the file system gives
to the files (blocks, not bytes). Medians of rounds in which the sides take turns; torch on one thread.

How to read it: warm is with all files in the page cache, as from the second epoch on when they fit; "faster" is against
the better of the two ways to load files. Cold is a first pass in random order after the files were dropped from the
page cache, both sides without workers, with what came from the disk for each sample. Inodes stay cached, which helps
the files alone, and the disk is a virtual one, whose host may have a cache of its own. The machine of these rows has
two cores, which others used as well: take the ratios, not the speeds.

| images x views x tokens | CPU | versions | rounds | files: count, MB | packed: count, MB | fewer | smaller | \
warm files, 0 / 2 workers | warm packed | faster | cold files, KB each | cold packed, KB each | faster |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


ORDER_HEADER = """
## Orders of large data sets

The same command: the order of a pass over many images in one array, as it was, against blocks and windows
(`dataset/order.py`), seconds and MB of memory per process. "Start" is what the first batch waits for, wherever a run
begins; a window is made every 2,097,152 samples; "pass" is the sum. A batch is 256 samples of a packed store of that
size, one view of 256 tokens in sparse files, so without a disk: opened (shapes checked, not contents), its order
visited, read.

| images | CPU | versions | rounds | array: s, MB | start: s, MB | window: s | pass: s | store: files, opened in s | \
batches per s |
|---|---|---|---|---|---|---|---|---|---|
"""
WINDOWS_TIMED = 4


@dataclass(kw_only=True)
class BenchCodesFlags:
    """The benchmark of code stores."""

    bench_images: int = flag(20_000, "images in each store")
    bench_order: int = flag(50_000_000, "images of the data set whose order is measured and of a sparse store; 0: none")
    bench_rounds: int = flag(3, "rounds in which the sides take turns")
    bench_folder: str | None = flag(None, "where the stores are written, and removed; None: the system's temporary one")
    record: bool = flag(True, "append the rows to benchmarks/results/codes.md")


class FilePairs(Dataset):
    """One image at a time: a file of codes, a file of its label, one of the views at random."""

    def __init__(self, folder: Path, count: int) -> None:
        self.codes = [folder / "imagenet_codes" / f"{i}.npy" for i in range(count)]
        self.labels = [folder / "imagenet_labels" / f"{i}.npy" for i in range(count)]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = np.load(self.codes[index])  # (1, V, L)
        view = torch.randint(codes.shape[1], (1,)).item()
        return torch.from_numpy(codes[:, view]), torch.from_numpy(np.load(self.labels[index]))


def write_both(root: Path, count: int, length: int) -> None:
    """The same codes in both layouts."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1000, size=count)
    for kind in ("codes", "labels"):
        (root / "files" / f"imagenet_{kind}").mkdir(parents=True)
    side = round(length ** 0.5)
    packed = root / "packed"
    code_writer.begin(packed, {"format": FORMAT, "grid": [side, side], "image_size": [16 * side] * 2, "views": VIEWS,
                               "dtype": "uint16", "classes": None, "tokenizer": TOKENIZER})
    starts = range(0, count, code_writer.PART_ROWS)
    for part, start in enumerate(starts):
        mine = labels[start:start + code_writer.PART_ROWS]
        codes = rng.integers(VOCAB, size=(len(mine), VIEWS, length))
        code_writer.write_part(packed, part, codes.astype(np.uint16), mine.tolist())
        for i, (views, label) in enumerate(zip(codes, mine, strict=True), start):
            np.save(root / "files" / "imagenet_codes" / f"{i}.npy", views[None])
            np.save(root / "files" / "imagenet_labels" / f"{i}.npy", label[None])
    code_writer.finish(packed, len(starts))


def file_batches(root: Path, count: int, *, workers: int) -> Iterable:
    """The first batches of a pass over the pairs of files."""
    return itertools.islice(DataLoader(FilePairs(root / "files", count), batch_size=BATCH, shuffle=True, drop_last=True,
                                       num_workers=workers), FILE_BATCHES)


def packed_batches(root: Path, count: int, *, passes: int) -> DataLoader:
    """Passes over the packed store, opened anew."""
    sampler = StepSampler(count, global_batch=BATCH, accumulation=1, rank=0, world_size=1, seed=0, start_step=0,
                          end_step=passes * count // BATCH)
    return loader(CodeBatches(open_store(root / "packed"), vocab_size=VOCAB, seed=0), sampler, num_workers=0,
                  pin_memory=False)


def speed(batches: Iterable, *, skipped: int) -> tuple[float, float]:
    """(thousands of samples per second, KB read from the disk for each) after some batches."""
    steps = iter(batches)
    for _ in range(skipped):
        next(steps)
    start, before, count = time.perf_counter(), disk_reads(), 0
    for _ in steps:
        count += BATCH
    return count / (time.perf_counter() - start) / 1000, (disk_reads() - before) / count / 1000


def drop_from_cache(folder: Path) -> None:
    """Drop the files of a folder, none of which may be mapped, from the page cache, so that they are read from disk."""
    os.sync()
    for path in files_of(folder):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def disk_reads() -> int:
    """Bytes that this process has read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [Path(where) / name for where, _, names in os.walk(folder) for name in names]


def disk_use(folder: Path) -> tuple[int, float]:
    """(number of files, MB that they take up on the file system)."""
    files = files_of(folder)
    return len(files), sum(path.stat().st_blocks * 512 for path in files) / 1e6


def check_equal(root: Path, count: int) -> None:
    """Check that both sides hold the same codes."""
    pairs, store = FilePairs(root / "files", count), open_store(root / "packed")
    for row in np.random.default_rng(1).integers(count, size=50):
        views = np.arange(VIEWS)
        assert np.array_equal(np.load(pairs.codes[row])[0], store.read(np.full(VIEWS, row), views)), row
        assert np.load(pairs.labels[row])[0] == store.labels[row], row


def measure_length(flags: BenchCodesFlags, root: Path, length: int) -> str:
    """Write, time, compare: one line of the table."""
    count = flags.bench_images
    write_both(root, count, length)
    check_equal(root, count)
    (many, large), (few, small) = (disk_use(root / side) for side in ("files", "packed"))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("files 0", "packed", "files 2", *COLD)}
    for _ in range(flags.bench_rounds):  # all files are in memory, as they have just been written
        runs["files 0"].append(speed(file_batches(root, count, workers=0), skipped=1))
        runs["packed"].append(speed(packed_batches(root, count, passes=WARM_PASSES), skipped=1))
        runs["files 2"].append(speed(file_batches(root, count, workers=2), skipped=1))  # the first starts the workers
    for _ in range(flags.bench_rounds):
        for name, side in COLD.items():
            drop_from_cache(root / side)
            batches = file_batches(root, count, workers=0) if side == "files" else packed_batches(root, count, passes=1)
            runs[name].append(speed(batches, skipped=0))
    for name, values in runs.items():
        print(length, name, ", ".join(f"{rate:.2f}/ms {kilobytes:.1f} KB" for rate, kilobytes in values), flush=True)
    middle, read = ({name: statistics.median(value[i] for value in values) for name, values in runs.items()}
                    for i in (0, 1))
    row = [f"{count} x {VIEWS} x {length}", cpu_name(), f"torch {torch.__version__}, numpy {np.__version__}",
           str(flags.bench_rounds), f"{many}, {large:.0f}", f"{few}, {small:.0f}", f"{many / few:.0f}×",
           f"{large / small:.1f}×", f"{middle['files 0']:.1f} / {middle['files 2']:.1f}", f"{middle['packed']:.0f}",
           f"{middle['packed'] / max(middle['files 0'], middle['files 2']):.0f}×",
           f"{middle['cold files']:.1f}, {read['cold files']:.1f}",
           f"{middle['cold packed']:.0f}, {read['cold packed']:.1f}",
           f"{middle['cold packed'] / middle['cold files']:.0f}×"]
    return f"| {' | '.join(row)} |\n"


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MB at most) that `work` takes."""
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 1e6


def sparse_store(folder: Path, count: int) -> Path:
    """A packed store of `count` images in one view of 256 tokens, all codes and labels 0, of files without blocks."""
    folder.mkdir()
    rows = code_writer.SHARD_BYTES // 512

    def write(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        with open(folder / name, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False,
                                                        "shape": shape})
            file.truncate(file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)

    write("labels.npy", (count,), np.int64)
    shards = [{"file": f"shard-{i:05d}.npy", "rows": min(rows, count - start), "sha256": ""}
              for i, start in enumerate(range(0, count, rows))]
    for shard in shards:
        write(shard["file"], (shard["rows"], 1, 256), np.uint16)
    (folder / "manifest.json").write_text(json.dumps({
        "format": FORMAT, "count": count, "views": 1, "grid": [16, 16], "image_size": [256, 256], "dtype": "uint16",
        "classes": None, "tokenizer": TOKENIZER, "labels_sha256": "", "shards": shards}))
    return folder


def measure_order(flags: BenchCodesFlags, root: Path) -> str:
    """One line of the table of orders."""
    count, found = flags.bench_order, []
    folder = sparse_store(root / "sparse", count)
    windows = -(-count // WINDOW_ROWS)
    for _ in range(flags.bench_rounds):
        array = measured(lambda: np.random.default_rng(0).permutation(count))
        started = measured(lambda: EndlessOrder(count, 0).visit(np.arange(count, count + BATCH)))
        order = EndlessOrder(count, 0)
        order.block_order(0)
        clock = time.perf_counter()
        for window in range(min(WINDOWS_TIMED, windows)):
            order.order(0, window)
        window = (time.perf_counter() - clock) / min(WINDOWS_TIMED, windows)
        clock = time.perf_counter()
        store = open_store(folder)
        opened = time.perf_counter() - clock
        sampler = StepSampler(count, global_batch=BATCH, accumulation=1, rank=0, world_size=1, seed=0, start_step=10**6,
                              end_step=10**6 + 400)
        batches = loader(CodeBatches(store, vocab_size=VOCAB, seed=0), sampler, num_workers=0, pin_memory=False)
        rate = speed(batches, skipped=1)[0] * 1000 / BATCH
        found.append((*array, *started, window, opened, rate))
        print(count, ", ".join(f"{value:.3f}" for value in found[-1]), flush=True)
    array_s, array_mb, start_s, start_mb, window, opened, rate = (statistics.median(values)
                                                                  for values in zip(*found, strict=True))
    row = [f"{count}", cpu_name(), f"torch {torch.__version__}, numpy {np.__version__}", str(flags.bench_rounds),
           f"{array_s:.2f}, {array_mb:.0f}", f"{start_s:.2f}, {start_mb:.0f}", f"{window:.3f}",
           f"{window * windows:.2f}", f"{len(files_of(folder))}, {opened:.2f}", f"{rate:.0f}"]
    return f"| {' | '.join(row)} |\n"


def main(flags: BenchCodesFlags) -> None:
    """Measure each length and record what was found."""
    torch.set_num_threads(1)
    for length in LENGTHS:
        with tempfile.TemporaryDirectory(dir=flags.bench_folder) as root:
            write_row(flags, measure_length(flags, Path(root), length), HEADER)
    if flags.bench_order:
        with tempfile.TemporaryDirectory(dir=flags.bench_folder) as root:
            write_row(flags, measure_order(flags, Path(root)), ORDER_HEADER)


def write_row(flags: BenchCodesFlags, line: str, header: str) -> None:
    """Print a row, and put it below the others of its table."""
    print(line)
    if not flags.record:
        return
    text = RESULTS.read_text() if RESULTS.is_file() else ""
    if header not in text:
        text += header
    end = text.index(header) + len(header)
    while text[end:end + 1] == "|":
        end = text.index("\n", end) + 1
    RESULTS.write_text(text[:end] + line + text[end:])


if __name__ == "__main__":
    cli.run(main, BenchCodesFlags)
