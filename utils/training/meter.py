"""Means of a run's numbers since the last look, its speed and its memory."""
import resource
import time
from typing import Any

import torch
from torch import Tensor

from utils import dist


class Meter:
    """Sums scalars on the device and looks at them only when read, so that steps do not wait for the host."""

    def __init__(self, device: torch.device, *, samples_per_step: int) -> None:
        self.device, self.samples_per_step = device, samples_per_step
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.skipped = torch.zeros((), device=device)
        self.clocked, self.start = 0, time.perf_counter()

    def add(self, sums: dict[str, Tensor], *, weight: Tensor, bad: Tensor) -> None:
        """Count one step's scalars, each times `weight`; a `bad` step (bool, on the device) does not count."""
        counted = torch.where(bad, 0.0, weight)
        for name, value in sums.items():
            value = torch.where(bad, 0.0, value.float())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts[name] + counted if name in self.counts else counted
        self.skipped = self.skipped + bad
        self.clocked += 1

    def restart_clock(self) -> None:
        """Leave out of the speed what has just happened (a checkpoint)."""
        self.clocked, self.start = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """Weighted means over steps and processes since the last read, and the number of skipped steps if any were."""
        names = sorted(self.sums)
        sums, counts = dist.total(torch.stack([torch.stack([kept[name] for name in names])
                                               for kept in (self.sums, self.counts)]))
        row = dict(zip(names, (sums / counts).tolist(), strict=True))
        skipped = int(self.skipped)
        self.sums, self.counts, self.skipped = {}, {}, torch.zeros((), device=self.device)
        return {**{name: value for name, value in row.items() if value == value}, **({"skipped_steps": skipped}
                                                                                     if skipped else {})}

    def read_clock(self) -> dict[str, float]:
        """Speed since the last read, and peak memory of this process."""
        seconds = time.perf_counter() - self.start
        speed = {"images_per_second": self.clocked * self.samples_per_step / seconds} if self.clocked else {}
        self.restart_clock()
        return {**speed, "memory_gib": peak_memory(self.device)}

    def state(self) -> dict[str, Any]:
        """The sums of all processes, JSON-ready, so that a resumed run logs the same means. All must ask at once."""
        mine = {"sums": {name: value.item() for name, value in self.sums.items()},
                "counts": {name: value.item() for name, value in self.counts.items()}, "skipped": self.skipped.item()}
        return {"ranks": dist.gather_lists([mine])}

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Take over this rank's sums. Of another number of processes rank 0 takes all, so that means stay the same."""
        ranks = state.get("ranks", [])
        if ranks:
            mine = [ranks[rank]] if len(ranks) == dist.world_size() else ranks if rank == 0 else []
            self.sums, self.counts = (
                {name: torch.tensor(float(sum(one[key].get(name, 0.0) for one in mine)), device=self.device)
                 for name in {name for one in ranks for name in one[key]}} for key in ("sums", "counts"))
            self.skipped = torch.tensor(ranks[0]["skipped"], device=self.device)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on the GPU if it uses one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
