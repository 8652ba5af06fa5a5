"""Time and memory of the metrics from given features, against ADM's way of computing them in numpy and scipy.

    python3 benchmarks/bench_metrics.py                                # 50,000 samples, 10,000 references: minutes
    python3 benchmarks/bench_metrics.py --sample-count 5000 --reference-count 2000 --no-append

Measured: mean and covariance of both sets, Fréchet distance, precision and recall, on a CPU. Each side runs in a
process of its own, in turns, on the same features: made up, non-negative, correlated, of about the length of
Inception's. Both sides must agree. A row with the medians is appended to benchmarks/results/metrics.md.

ADM's way: np.cov, scipy's general matrix square root, distances in blocks of 10,000 x 10,000 gathered into rows of all
distances, np.partition of these on all threads; float16 rounding between float32 products, as float16 ones have no fast
kernel on a CPU. The features are in memory beforehand; memory is the peak of the whole process, torch included, which
both sides import.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import cpu_name
from evaluations.c2i.metrics import FeatureStatistics, frechet_distance, precision_recall
from utils import cli
from utils.cli import flag

RESULTS = Path(__file__).parent / "results" / "metrics.md"
HEADER = """# Metrics from features

`python3 benchmarks/bench_metrics.py`: seconds and peak memory (GiB, whole process) of statistics, Fréchet distance,
precision and recall. "ADM" is ADM's way in numpy and scipy (see the script), "ours" is `evaluations/c2i/metrics.py`.
Products: the seconds that the matrix products of our side alone take at the speed measured for one block of each kind.
Medians of the runs, sides in turns.

How to read it: fp16 is what ADM computes; more than half of its time there is numpy's float16 arithmetic, which has no
fast instructions on this CPU. fp32 is the same work on both sides, less what symmetry saves; most of ours is products,
so little is left to gain without leaving pairs out. The partition of the rows runs on all threads, ADM's on one.

| features | distances | CPU, threads | versions | runs | ADM: statistics + Fréchet + P/R = s | ours | products | \
faster | ADM GiB | ours GiB | memory |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
TUNED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # not passed on: set for other programs, they may slow numpy down
PHASES = ("statistics", "frechet", "precision_recall")


@dataclass(kw_only=True)
class BenchMetricsFlags:
    """The benchmark of metrics."""

    reference_count: int = flag(10_000, "rows of reference features")
    sample_count: int = flag(50_000, "rows of sample features")
    feature_dim: int = flag(2048, "columns of features")
    distance_dtype: str = flag("fp16", "rounding of distances; fp16 is ADM's", choices=("fp16", "fp32"))
    threads: int = flag(os.cpu_count() or 1, "threads of each side")
    runs: int = flag(3, "runs of each side, in turns")
    side: str | None = flag(None, "run this side once and print JSON (for the benchmark itself)",
                            choices=("adm", "ours"))
    append: bool = flag(True, "append the row to benchmarks/results/metrics.md")


def synthetic_features(count: int, dim: int, *, seed: int, spread: float) -> np.ndarray:
    """(count, dim) float32, non-negative: 64 common directions of falling weight, and noise."""
    directions = np.random.default_rng(0).standard_normal((64, dim), dtype=np.float32)
    directions *= 0.3 / np.sqrt(1 + np.arange(64, dtype=np.float32))[:, None]
    rng = np.random.default_rng(seed)
    features = np.empty((count, dim), dtype=np.float32)
    for rows in np.array_split(features, -(-count // 1000)):
        rows[:] = spread * rng.standard_normal((len(rows), 64), dtype=np.float32) @ directions
        rows += 0.1 * rng.standard_normal(rows.shape, dtype=np.float32) + 0.3
        np.maximum(rows, 0, out=rows)
    return features


def adm_frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance with the matrix square root itself."""
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    if not np.isfinite(root).all():
        jitter = 1e-6 * np.eye(len(cov_a))
        root = scipy.linalg.sqrtm((cov_a + jitter) @ (cov_b + jitter))
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root.real))


def adm_distances(u: np.ndarray, v: np.ndarray, *, half: bool) -> np.ndarray:
    """Squared distances (R, C) of one block, float32; half: rounded to float16 unless one of them overflows."""
    if half:
        with np.errstate(over="ignore", invalid="ignore"):
            u16, v16 = u.astype(np.float16), v.astype(np.float16)
            norms_u, norms_v = (np.square(x).sum(1, dtype=np.float32).astype(np.float16) for x in (u16, v16))
            products = (u16.astype(np.float32) @ v16.astype(np.float32).T).astype(np.float16)
            block = np.maximum(norms_u[:, None] - 2 * products + norms_v, 0)
        if np.isfinite(block).all():
            return block.astype(np.float32)
    return np.maximum(np.square(u).sum(1)[:, None] - 2 * (u @ v.T) + np.square(v).sum(1), 0)


def adm_radii(features: np.ndarray, *, k: int, half: bool, block: int, pool: ThreadPool) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour, (N,) float32."""
    count = len(features)
    radii = np.zeros(count, dtype=np.float32)
    held = np.zeros((min(block, count), count), dtype=np.float32)
    for start in range(0, count, block):
        rows = features[start:start + block]
        for column in range(0, count, block):
            columns = features[column:column + block]
            held[:len(rows), column:column + block] = adm_distances(rows, columns, half=half)
        chunks = np.array_split(held[:len(rows)], pool._processes)
        parts = pool.map(lambda chunk: np.partition(chunk, np.arange(k + 1), axis=1), chunks)
        radii[start:start + block] = np.concatenate([part[:, k] for part in parts])
    return radii


def adm_precision_recall(reference: np.ndarray, sample: np.ndarray, *, half: bool, threads: int, k: int = 3,
                         block: int = 10_000) -> tuple[float, float]:
    """Precision and recall in blocks of `block` x `block`."""
    with ThreadPool(threads) as pool:
        reference_radii = adm_radii(reference, k=k, half=half, block=block, pool=pool)
        sample_radii = adm_radii(sample, k=k, half=half, block=block, pool=pool)
    recalled, precise = np.zeros(len(reference), dtype=bool), np.zeros(len(sample), dtype=bool)
    for row in range(0, len(reference), block):
        rows = slice(row, row + block)
        for column in range(0, len(sample), block):
            columns = slice(column, column + block)
            distances = adm_distances(reference[rows], sample[columns], half=half)
            recalled[rows] |= (distances <= sample_radii[columns]).any(1)
            precise[columns] |= (distances <= reference_radii[rows, None]).any(0)
    return float(precise.mean()), float(recalled.mean())


def run_side(config: BenchMetricsFlags) -> dict[str, float]:
    """Seconds of each phase, peak memory in GiB and results of one side, run in this process."""
    sets = [synthetic_features(config.reference_count, config.feature_dim, seed=1, spread=1.0),
            synthetic_features(config.sample_count, config.feature_dim, seed=2, spread=0.97)]
    torch.set_num_threads(config.threads)
    times = [time.perf_counter()]
    if config.side == "adm":
        moments = [value for x in sets for value in (x.mean(0), np.cov(x, rowvar=False))]
        times.append(time.perf_counter())
        distance = adm_frechet(*moments)
        times.append(time.perf_counter())
        shares = adm_precision_recall(*sets, half=config.distance_dtype == "fp16", threads=config.threads)
    else:
        sets = [torch.from_numpy(x) for x in sets]
        moments = []
        for x in sets:
            moments_of = FeatureStatistics(config.feature_dim)
            moments_of.update(x)
            moments += [moments_of.mean(), moments_of.covariance()]
        times.append(time.perf_counter())
        distance = frechet_distance(*moments)
        times.append(time.perf_counter())
        shares = precision_recall(*sets, pr_dtype=config.distance_dtype)
    times.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return {**dict(zip(PHASES, np.diff(times), strict=True)), "total": times[-1] - times[0], "memory": peak,
            "distance": distance, "precision": shares[0], "recall": shares[1]}


def product_seconds(config: BenchMetricsFlags) -> float:
    """Seconds of our side's matrix products at the measured speed of one block: distances fp32, covariances float64."""
    torch.set_num_threads(config.threads)

    def seconds(left: torch.Tensor, right: torch.Tensor) -> float:  # per multiply-add
        spans = []
        for _ in range(5):
            start = time.perf_counter()
            left @ right
            spans.append(time.perf_counter() - start)
        return statistics.median(spans) / (left.shape[0] * left.shape[1] * right.shape[1])

    n, m, dim = config.reference_count, config.sample_count, config.feature_dim
    rows, wide = torch.rand(1000, dim), torch.rand(4096, dim, dtype=torch.float64)
    pairs = (n * n + m * m) / 2 + n * m  # a set against itself is symmetric
    return pairs * dim * seconds(rows, rows.T) + (n + m) * dim * dim / 2 * seconds(wide.T, wide)


def in_own_process(config: BenchMetricsFlags, side: str) -> dict[str, float]:
    """run_side in a fresh process with the threads asked for."""
    environment = {name: value for name, value in os.environ.items() if name not in TUNED}
    environment |= {f"{library}_NUM_THREADS": str(config.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in
             ("reference_count", "sample_count", "feature_dim", "distance_dtype", "threads")]
    output = subprocess.run([sys.executable, __file__, "--side", side, *flags], env=environment, check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main(config: BenchMetricsFlags) -> None:
    warnings.filterwarnings("ignore")
    if config.side:
        print(json.dumps(run_side(config)))
        return
    results: dict[str, list[dict[str, float]]] = {"adm": [], "ours": []}
    for run in range(config.runs):
        for side in sorted(results, reverse=bool(run % 2)):
            results[side].append(in_own_process(config, side))
            print(side, {name: round(value, 5) for name, value in results[side][-1].items()}, flush=True)
    adm, ours = ({name: statistics.median(run[name] for run in runs) for name in runs[0]} for runs in results.values())
    for name, tolerance in (("distance", 1e-5 * abs(adm["distance"])), ("precision", 5e-4), ("recall", 5e-4)):
        assert abs(adm[name] - ours[name]) <= tolerance, f"{name}: ADM's way {adm[name]}, ours {ours[name]}"
    seconds = [" + ".join(f"{side[name]:.1f}" for name in PHASES) + f" = {side['total']:.1f}" for side in (adm, ours)]
    row = [f"{config.sample_count} / {config.reference_count} x {config.feature_dim}", config.distance_dtype,
           f"{cpu_name()}, {config.threads}",
           f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}", str(config.runs),
           *seconds, f"{product_seconds(config):.1f}", f"{adm['total'] / ours['total']:.2f}×", f"{adm['memory']:.2f}",
           f"{ours['memory']:.2f}", f"{ours['memory'] / adm['memory']:.2f}×"]
    line = f"| {' | '.join(row)} |\n"
    print(line)
    if config.append:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(line if file.tell() else HEADER + line)


if __name__ == "__main__":
    cli.run(main, BenchMetricsFlags)
