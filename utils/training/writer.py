"""Writing training checkpoints, by all processes together, in the background (utils/checkpoints/sharded.py reads them).

A checkpoint is written as <folder>/.<step>.tmp and takes its name when it is whole and on the disk, so whatever
interrupts the writing leaves the one before.
"""
import json
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from utils import dist
from utils.checkpoints.sharded import FORMAT, STATE, SafeReader, candidates, is_sharded, shard_files
from utils.files import file_hash, first_line, replacing, sweep, sync_folder

PATIENCE = 6 * 3600.0  # seconds that processes wait for one another's disks


class UnwrittenError(OSError):
    """A checkpoint could not be written; the message says all there is to say."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, while training goes on. All processes call it alike."""

    def __init__(self, folders: list[Path], *, keep: int, is_main: bool) -> None:
        """The first of `folders` is written, the others get copies; `keep` newest stay in each, 0 keeps all."""
        self.folders, self.keep, self.is_main = folders, keep, is_main
        # DCP's own: with torch <= 2.10, and where one process is meant
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated|torch.distributed is disabled")
        # the writing thread and the training must not meet in one group; and disks may be slow without being dead
        self.group = dist.new_cpu_group(timeout=PATIENCE)
        self.publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.written: Future | None = None
        self.published: Future | None = None
        self.failed_copies: list[str] = []

    def sweep(self, step: int) -> None:
        """Before going on from `step`: remove what killed writers left, and what is older than is to be kept.

        Raises OSError where nothing can be written.
        """
        with dist.failing_together():
            for folder in self.folders if self.is_main else []:
                folder.mkdir(parents=True, exist_ok=True)
                sweep(folder)
                self.prune(folder, step)

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Begin to write: what `tensors` hold now is what will be read. Waits for the checkpoint before.

        `tensors` are all that this process holds; those of one name are alike on all processes, or parts of one
        sharded tensor.
        """
        self.wait()
        target = self.folders[0] / f"{step:07d}"
        temporary = target.with_name(f".{target.name}.tmp")
        with dist.failing_together():
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        mine, expected = share_out(tensors)
        self.written = dcp.async_save(mine, storage_writer=dcp.FileSystemWriter(temporary), process_group=self.group)
        if self.is_main:
            self.published = self.publisher.submit(self._publish, self.written, temporary, target, facts, expected)

    def _publish(self, written: Future, temporary: Path, target: Path, facts: dict[str, Any],
                 expected: dict[str, torch.Size]) -> None:
        """Give the checkpoint its name, once all processes have written and nothing of what they hold is missing."""
        try:
            written.result()
            hashes = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
            index = SafeReader(temporary).read_metadata()
            missing = shard_files(index) - hashes.keys()
            if missing:
                raise OSError(f"{', '.join(sorted(missing))} of other processes cannot be seen from here: all machines "
                              "must share this folder")
            check_complete(index, expected)
            with replacing(temporary / STATE) as file:
                file.write_text(json.dumps({"format": FORMAT, "files": hashes, **facts}))
            _take_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.prune(self.folders[0], int(target.name))
        self.copy_to_others(target)

    def prune(self, folder: Path, step: int) -> None:
        """Leave `keep` checkpoints, that of `step` and the ones before it. Nothing goes unless that one is there."""
        found = [path for path in candidates(folder) if int(path.stem) <= step]
        for old in found[self.keep:] if self.keep and found and int(found[0].stem) == step else []:
            if old.is_dir():  # no checkpoint any more from here on, whatever interrupts
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old.tmp")), ignore_errors=True)
            else:
                old.unlink()

    def copy_to_others(self, path: Path) -> None:
        """Copy a checkpoint to those of the folders that lack it (after a kill between the copies, say).

        A copy that fails is told by `wait`, and is no failure of the checkpoint, which is written already.
        """
        for folder in self.folders:
            target, copy = folder / path.name, folder / f".{path.name}.tmp"
            try:
                if is_sharded(target) and (target == path
                                           or (target / STATE).read_bytes() == (path / STATE).read_bytes()):
                    continue
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(path, copy)
                _take_place(copy, target)
                self.prune(folder, int(target.name))
            except OSError as error:  # shutil.Error is one
                shutil.rmtree(copy, ignore_errors=True)
                self.failed_copies.append(f"{target} ({first_line(error)[:200]})")

    def failed(self) -> bool:
        """Whether this process knows that the last checkpoint could not be written. `wait` says why."""
        return any(future is not None and future.done() and future.exception() is not None
                   for future in (self.written, self.published))

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises UnwrittenError, on all processes, when it is not."""
        problems = []
        for future in (self.written, self.published):
            try:
                if future is not None:
                    future.result()
            except (dcp.CheckpointException, OSError, RuntimeError, ValueError) as error:
                failures = getattr(error, "failures", None) or {0: (error, None)}
                problems.append(first_line(next(iter(failures.values()))[0])[:200])
        self.written = self.published = None
        problems = dist.gather_lists(problems, group=self.group)  # all wait until process 0 has published
        if problems:
            raise UnwrittenError(f"a checkpoint could not be written to {' or '.join(map(str, self.folders))}: "
                                 f"{problems[0]}: is the disk full? Earlier checkpoints are untouched")
        while self.failed_copies:
            print(f"warning: a checkpoint could not be copied to {self.failed_copies.pop(0)}; it is in "
                  f"{self.folders[0]}, and training goes on", file=sys.stderr, flush=True)

    def close(self, *, patience: float) -> bool:
        """Give what is being written so many seconds to end, without a word to the other processes. Whether it has."""
        waiting = wait([future for future in (self.written, self.published) if future is not None], timeout=patience)
        self.publisher.shutdown(wait=False)
        return not waiting.not_done


def share_out(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, torch.Size]]:
    """(what this process writes, name → shape of all that the checkpoint must hold). All processes call it together.

    A name is written by one of the processes that hold it, so that each has about as many bytes to stage and to send.
    Of sharded tensors each process writes its own part.
    """
    held = {name: (tensor.shape, tensor.nbytes, isinstance(tensor, DTensor)) for name, tensor in tensors.items()}
    everyones = dist.gather_lists([held])
    expected = {name: shape for one in everyones for name, (shape, _, _) in one.items()}
    whole = {name: size for one in everyones for name, (_, size, sharded) in one.items() if not sharded}
    bytes_of = [0] * len(everyones)
    owners = {}
    for name in sorted(whole, key=lambda name: (-whole[name], name)):
        owners[name] = min((rank for rank, one in enumerate(everyones) if name in one), key=lambda rank: bytes_of[rank])
        bytes_of[owners[name]] += whole[name]
    mine = {name: tensor for name, tensor in tensors.items() if owners.get(name, dist.env_rank()) == dist.env_rank()}
    return mine, expected


def check_complete(index: Metadata, expected: dict[str, torch.Size]) -> None:
    """Raise OSError unless a written index holds every name, with its shape and all of its elements."""
    for name, shape in expected.items():
        entry = index.state_dict_metadata.get(name)
        if entry is None or entry.size != shape or sum(chunk.sizes.numel() for chunk in entry.chunks) != shape.numel():
            raise OSError(f"{name} would be missing from the checkpoint")


def _take_place(temporary: Path, target: Path) -> None:
    """Give a written folder its name, replacing one of that name (of an earlier run of the same step)."""
    if target.exists():
        old = target.with_name(f".{target.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
    sync_folder(target.parent)


