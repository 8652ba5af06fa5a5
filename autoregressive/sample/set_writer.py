"""Writing a set of images while the model samples: decoding, PNGs and shards happen on other threads."""
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.sample_store import SampleStore
from evaluations.t2i.layouts import Layout, PromptJob
from utils import images

AHEAD = 2  # batches that wait to be written; sampling waits when there are more
SHARD_BYTES = 2**28  # a shard is closed at this size, or
SHARD_SECONDS = 60.0  # after a minute, or 1 % of the run's time if that is longer: what a kill costs
MAX_PNG_THREADS = 8  # Pillow releases the interpreter lock while it compresses


class BatchWriter:
    """Takes batches as they are made. An error in one of them is raised by a later `add`, or at the end of the block.

    When the block ends, also by an exception, all batches that were taken are written.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.jobs: deque[Future] = deque()

    def __enter__(self) -> "BatchWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        self.thread.shutdown()
        for job in self.jobs:
            job.result()

    def add(self, items: Sequence, make: Callable[[], np.ndarray]) -> None:
        """Take a batch: `make` is called on the writer's thread and returns the images of `items`, uint8 (B, H, W, 3).
        """
        while self.jobs and (len(self.jobs) >= AHEAD or self.jobs[0].done()):
            self.jobs.popleft().result()
        self.jobs.append(self.thread.submit(self.write, items, make))

    def write(self, items: Sequence, make: Callable[[], np.ndarray]) -> None:
        """Write a batch, on the writer's thread."""
        raise NotImplementedError


class SetWriter(BatchWriter):
    """Writes images, by their indices, as PNGs and shards."""

    def __init__(self, store: SampleStore, *, png: bool) -> None:
        super().__init__()
        self.store, self.png = store, png
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.png_threads = ThreadPoolExecutor(max(1, min(MAX_PNG_THREADS, cores)))
        self.png_jobs: list[Future] = []  # PNGs of the newest batch that are being written
        self.made: list[tuple[int, np.ndarray]] = []  # images that are in no shard yet
        self.started = self.closed = time.monotonic()

    def __exit__(self, *raised: object) -> None:
        self.thread.shutdown()
        self.png_threads.shutdown()
        try:
            self.close_shard()
        finally:
            for job in [*self.jobs, *self.png_jobs]:
                job.result()

    def write(self, items: Sequence[int], make: Callable[[], np.ndarray]) -> None:
        """Start the PNGs of a batch that have none, and close the shard if it is large or old enough."""
        batch = list(zip(items, make(), strict=True))
        self.made += batch
        for job in self.png_jobs:
            job.result()
        self.png_jobs = [self.png_threads.submit(images.save_png, self.store.png(index), picture)
                         for index, picture in batch if self.png and not self.store.png(index).exists()]
        now = time.monotonic()
        large = len(self.made) * self.made[0][1].nbytes >= SHARD_BYTES
        if large or now - self.closed >= max(SHARD_SECONDS, (now - self.started) / 100):
            self.close_shard()
            self.closed = now

    def close_shard(self) -> None:
        """Write the images that are in no shard yet as one shard."""
        if self.made:
            self.store.add(self.made)
            self.made = []


class LayoutWriter(BatchWriter):
    """Writes images, by their jobs, to where a benchmark's scorer looks for them."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def write(self, items: Sequence[PromptJob], make: Callable[[], np.ndarray]) -> None:
        """Write the images of a batch."""
        for job, picture in zip(items, make(), strict=True):
            self.layout.write(job, picture)


def decoding(pipeline: Pipeline, codes: Tensor, *, size: tuple[int, int],
             stream: torch.cuda.Stream | None) -> Callable[[], np.ndarray]:
    """A function that returns the images of `codes`, for another thread to call.

    On a GPU it decodes, on a `stream` of its own beside the sampling of the next batch. On a CPU, which has no core to
    spare, the images are decoded at once.
    """
    if stream is None:
        return partial(np.asarray, pipeline.to_pixels(codes, size=size))
    sampled = torch.cuda.current_stream().record_event()

    def decode() -> np.ndarray:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            stream.wait_event(sampled)
            return pipeline.to_pixels(codes, size=size)

    return decode
