"""Writing a sample set while the GPT samples: decoding, PNGs and shards happen on other threads."""
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from autoregressive.sample.sample_store import SampleStore
from utils import images

AHEAD = 2  # batches that wait to be written; sampling waits when there are more
SHARD_BYTES = 2**28  # a shard is closed at this size, or
SHARD_SECONDS = 60.0  # after a minute, or 1 % of the run's time if that is longer: what a kill costs
MAX_PNG_THREADS = 8  # Pillow releases the interpreter lock while it compresses


class SetWriter:
    """Takes batches as they are made. An error in one of them is raised by a later `add`, or at the end of the block.

    When the block ends, also by an exception, all batches that were taken are written.
    """

    def __init__(self, store: SampleStore, *, png: bool) -> None:
        self.store, self.png = store, png
        self.thread = ThreadPoolExecutor(1)
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.png_threads = ThreadPoolExecutor(max(1, min(MAX_PNG_THREADS, cores)))
        self.jobs: deque[Future] = deque()
        self.png_jobs: list[Future] = []  # PNGs of the newest batch that are being written
        self.made: list[tuple[int, np.ndarray]] = []  # images that are in no shard yet
        self.started = self.closed = time.monotonic()

    def __enter__(self) -> "SetWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        self.thread.shutdown()
        self.png_threads.shutdown()
        try:
            self.close_shard()
        finally:
            for job in [*self.jobs, *self.png_jobs]:
                job.result()

    def add(self, indices: list[int], make: Callable[[], np.ndarray]) -> None:
        """Take a batch: `make` is called on the writer's thread and returns images `indices`, uint8 (B, H, W, 3)."""
        while self.jobs and (len(self.jobs) >= AHEAD or self.jobs[0].done()):
            self.jobs.popleft().result()
        self.jobs.append(self.thread.submit(self.write, indices, make))

    def write(self, indices: list[int], make: Callable[[], np.ndarray]) -> None:
        """Start the PNGs of a batch that have none, and close the shard if it is large or old enough."""
        batch = list(zip(indices, make(), strict=True))
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
