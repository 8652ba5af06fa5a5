"""The least time that a decoding step can take on this machine: bytes over bandwidth, or operations over speed.

Bandwidth and speed are measured, each as the best of a few simple programs, not taken from a data sheet (the roofline
model, Williams, Waterman, Patterson, CACM 2009).
"""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autoregressive.models.gpt import ModelArgs
from benchmarks.bench_train import product_speed, synchronize
from utils import dist


@dataclass(frozen=True)
class StepCost:
    """Bytes that a decoding step must move, and its operations."""

    weights: float
    cache: float
    logits: float
    flops: float


def step_cost(config: ModelArgs, *, rows: int, bytes_each: int) -> StepCost:
    """The mean step over config.block_size tokens, weights and cache of `bytes_each` bytes a value, logits fp32.

    Every matrix is read once (a row of an embedding is negligible); of N positions the mean step attends to
    (N + 1) / 2.
    """
    used, kv_dim = (config.block_size + 1) / 2, config.dim // config.n_head * config.n_kv_head
    layer = 2 * config.dim**2 + 2 * config.dim * kv_dim + 3 * config.dim * config.hidden
    weights = config.n_layer * layer + config.dim * config.vocab_size
    return StepCost(weights=weights * bytes_each, cache=rows * 2 * config.n_layer * kv_dim * used * bytes_each,
                    logits=4 * rows * config.vocab_size,
                    flops=2 * weights * rows + 4 * config.n_layer * config.dim * rows * used)


def limit_seconds(cost: StepCost, *, bandwidth: float, speed: float) -> float:
    """Seconds at `bandwidth` bytes/s or `speed` FLOP/s, whichever takes longer."""
    return max((cost.weights + cost.cache + cost.logits) / bandwidth, cost.flops / speed)


def measured_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s that all threads read, FLOP/s of products in fp32 or `dtype`), each the best of several tries."""
    values = torch.ones(2**28, device=device)  # 1 GiB
    square = values.view(2**14, -1)
    seconds = [timed(read, device) for read in (values.sum, values.max, lambda: square @ square[0]) for _ in range(5)]
    dtypes = {torch.float32}
    if dtype != torch.float32:
        dtypes.add(dist.compute_dtype("bf16", device))  # fp32 where the CPU would only emulate bf16
    return values.nbytes / min(seconds), max(product_speed(device, dtype) for dtype in dtypes)


def clock(device: torch.device) -> float:
    """Seconds, with the device's work done."""
    synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that work() takes."""
    start = clock(device)
    work()
    return clock(device) - start
