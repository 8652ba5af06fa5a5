"""Build a reference for the evaluator from any images: statistics of all of them, and some or all of the images.

    python3 evaluations/c2i/reference.py --data-path my_images/train --image-size 256 --output my_reference.npz

The file is like ADM's VIRTUAL_imagenet256_labeled.npz: `mu`, `sigma`, `mu_s`, `sigma_s` of the whole set for FID and
sFID, `arr_0` for precision and recall, `arr_1` the labels. How it was made is written to my_reference.config.json.
Start it with torchrun to use several GPUs.
"""
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.augmentation import center_crop
from dataset.build import DataFlags, ImageDataset, flagged_dataset
from dataset.loader import CentreCrops, worker_count
from dataset.unreadable import PassedOver, split_readable
from evaluations.c2i.features import inception_network, measure
from evaluations.c2i.image_sets import MADE_WITH, STATISTICS, Batch, ImageSet
from evaluations.c2i.inception_weights import InceptionFlags
from utils import cli, dist
from utils.cli import flag
from utils.images import save_npz
from utils.options import BatchFlags, DeviceFlags, OutputFlags, SeedFlags, WorkerFlags
from utils.seeding import derive_seed


@dataclass(kw_only=True)
class ReferenceFlags(DataFlags, InceptionFlags, BatchFlags, SeedFlags, WorkerFlags, OutputFlags, DeviceFlags):
    """The reference command."""

    keep_images: int = flag(10_000, "at most so many images in the file, chosen by --global-seed; statistics: of all")
    output: str = "reference.npz"
    per_proc_batch_size: int = 64


class DatasetImages(ImageSet):
    """Centre crops of a data set as an image set. Unreadable ones are left out and named in `broken`."""

    def __init__(self, data: ImageDataset, size: tuple[int, int], *, name: str, num_workers: int) -> None:
        super().__init__(name, len(data), size)
        self.data, self.num_workers = data, num_workers
        self.broken: list[int] = []
        self.passed_over = PassedOver()

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Read, cropped and joined by worker processes."""
        mine = [range(start, min(start + size, self.count))
                for start in range(rank * size, self.count, size * world_size)]
        crops = CentreCrops(self.data, range(self.count), self.size)
        for batch in DataLoader(crops, batch_sampler=mine, collate_fn=list, num_workers=worker_count(self.num_workers)):
            indices, pictures, unreadable = split_readable(batch, self.passed_over)
            self.broken += unreadable
            if indices:
                yield np.array(indices), np.stack(pictures)


def main(flags: ReferenceFlags) -> None:
    """Measure all images, then write the file."""
    process = dist.setup(flags.device)
    output = Path(flags.output)
    if output.suffix != ".npz":
        raise ValueError(f"--output {output}: expected a name that ends in .npz")
    if min(flags.keep_images, flags.per_proc_batch_size) < 1:
        raise ValueError("--keep-images and --per-proc-batch-size must be at least 1")
    data = flagged_dataset(flags)
    network = inception_network(flags.inception, device=process.device)
    images = DatasetImages(data, flags.image_size, name=flags.data_path or flags.dataset, num_workers=flags.num_workers)
    measured = measure(images, network, process, wanted={"pooled", "spatial"}, batch=flags.per_proc_batch_size,
                       title="statistics")
    broken = set(dist.gather_lists(images.broken))
    if not process.is_main:
        return
    readable = np.array([index for index in range(len(data)) if index not in broken])
    kept = np.sort(np.random.default_rng(derive_seed(flags.global_seed)).permutation(readable)[:flags.keep_images])
    values = [value.cpu().numpy() for name in ("pooled", "spatial") for value in measured.statistics[name]]
    extra = {**dict(zip(STATISTICS, values, strict=True)), MADE_WITH: np.array(network.described[MADE_WITH])}
    save_npz(output, (center_crop(data.image(int(index)), flags.image_size) for index in kept), count=len(kept),
             shape=flags.image_size, labels=data.labels[kept], extra=extra)
    notes = output.with_suffix(".config.json")
    cli.save_config(notes, flags, images=measured.count, kept=len(kept),
                    network=network.described, unreadable=[data.name(index) for index in sorted(broken)])
    print(f"{output}: statistics of {measured.count} images, {len(kept)} of them inside"
          f"{f'; {len(broken)} could not be read and are named in {notes.name}' if broken else ''}")


if __name__ == "__main__":
    cli.run(main, ReferenceFlags)
