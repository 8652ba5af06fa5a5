"""Batches whose content depends on (seed, epoch, index) only: not on ranks, workers, or where a run was cut."""
import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.augmentation import center_crop, train_view
from dataset.build import ImageDataset
from dataset.order import EndlessOrder
from dataset.pictures import UnreadableError
from utils.images import to_float
from utils.seeding import derive_seed

MAX_BROKEN_RUN = 100  # more unreadable images in a row than this is no accident


class Batched(Protocol):
    """A data set that makes a whole batch (a dict) from its keys (B, 2) int64: an epoch and an index each."""

    def __getitems__(self, keys: np.ndarray) -> dict[str, Any]: ...


class StepSampler(Sampler[np.ndarray]):
    """This rank's micro-batches of keys (B, 2), an epoch and an index each, from `start_step` to `end_step`.

    Samples are visited epoch after epoch, each epoch in its own order, without a gap: every sample exactly once per
    epoch for any number of ranks. Step s takes positions [s * G, (s + 1) * G) of that stream, so a run goes on anywhere
    without a look at what came before.
    """

    def __init__(self, count: int, *, global_batch: int, accumulation: int, rank: int, world_size: int, seed: int,
                 start_step: int, end_step: int) -> None:
        self.count, self.global_batch, self.accumulation = count, global_batch, accumulation
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_step, self.end_step = start_step, end_step

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[np.ndarray]:
        micro = self.global_batch // (self.world_size * self.accumulation)
        order = EndlessOrder(self.count, self.seed)
        for part in range(self.start_step * self.accumulation, self.end_step * self.accumulation):
            first = (part * self.world_size + self.rank) * micro
            yield np.stack(order.visit(np.arange(first, first + micro)), axis=1)


class TrainImages(Dataset):
    """Randomly cropped and flipped images, a batch at a time. An unreadable one is replaced by the next that is not."""

    def __init__(self, images: ImageDataset, size: tuple[int, int], *, seed: int) -> None:
        self.images, self.size, self.seed = images, size, seed

    def __getitems__(self, keys: np.ndarray) -> dict[str, Any]:
        """{"images" float (B, 3, H, W) in [-1, 1], "labels" (B,), "broken": names of unreadable files and why}."""
        views, labels, broken = [], [], []
        for epoch, index in np.asarray(keys).tolist():
            image, found = self.readable(index, broken)
            views.append(train_view(image, self.size, np.random.default_rng(derive_seed(self.seed, epoch, index))))
            labels.append(self.images.labels[found])
        return {"images": to_float(np.stack(views)), "labels": torch.tensor(np.array(labels)), "broken": broken}

    def readable(self, index: int, broken: list[str]) -> tuple[Image, int]:
        """Image `index`, or the next readable one, and its index; names of those passed over go to `broken`."""
        for found in range(index, index + MAX_BROKEN_RUN):
            found %= len(self.images)
            try:
                return self.images.image(found), found
            except UnreadableError as error:
                broken.append(str(error))
        raise ValueError(f"{MAX_BROKEN_RUN} images in a row cannot be read, from {self.images.name(index)} on")


class CentreCrops(Dataset):
    """Image i → (i, its centre crop (H, W, 3) uint8, or the reason, a text, why it cannot be read)."""

    def __init__(self, data: ImageDataset, indices: Sequence[int], size: tuple[int, int]) -> None:
        self.data, self.indices, self.size = data, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | str]:
        index = self.indices[place]
        try:
            return index, center_crop(self.data.image(index), self.size)
        except UnreadableError as error:
            return index, str(error)


def loader(dataset: Batched, sampler: Sampler[np.ndarray], *, num_workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over whole batches made by `dataset.__getitems__`."""
    atexit.register(_end_workers)  # runs before multiprocessing's own, which would wait for them
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_is, num_workers=worker_count(num_workers),
                      pin_memory=pin_memory, worker_init_fn=_ignore_sigterm)


def worker_count(asked: int) -> int:
    """Loading processes: as asked, but none where there is one core, and at most one per core."""
    cores = os.cpu_count() or 1
    return 0 if cores == 1 else min(asked, cores)


def _ignore_sigterm(worker: int) -> None:
    """A request to stop often goes to the whole process group: the training saves, and needs its workers until then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit, end the workers that an unfinished iteration has left: they ignore the signal that others send then."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def _as_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
