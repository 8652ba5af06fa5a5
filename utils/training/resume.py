"""The checkpoints of one run: where they lie, and which one a training goes on from."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import cli, dist, files
from utils.checkpoints import containers, sharded
from utils.checkpoints.damage import DamagedError
from utils.training.flags import TrainFlags
from utils.training.run_folder import RunFolder
from utils.training.state import FRESH_START, TrainingState
from utils.training.writer import CheckpointWriter


class RunCheckpoints:
    """All processes call it alike, and raise together. `claim` comes before anything is written.

    It must not refer back to the trainer: in a circle the writer's process group would live until the interpreter ends,
    which aborts some processes (5 of 90 trainings on two processes did).
    """

    writer: CheckpointWriter  # from `claim` on

    def __init__(self, run: RunFolder, flags: TrainFlags, process: dist.Process, state: TrainingState) -> None:
        self.run, self.flags, self.process, self.state = run, flags, process, state

    def claim(self) -> None:
        """Take the run's folder for this training alone, if that is not done yet: from here on it may be written to."""
        if self.run.lock is not None:
            return
        self.run.claim(self.flags)
        self.writer = CheckpointWriter(self.folders(), keep=self.flags.keep, is_main=self.process.is_main)
        if self.process.is_main:
            for folder in (self.run.path, self.run.path / "previews"):
                files.sweep(folder)

    def folders(self) -> list[Path]:
        """Where checkpoints go; the first is written, the others get copies."""
        local = [self.run.path / "checkpoints"] if self.flags.local_save else []
        cloud = self.flags.cloud_save_path
        return local + ([Path(cloud) / self.run.path.name / "checkpoints"] if cloud else [])

    def newest(self) -> Path | None:
        """The newest checkpoint of this run, wherever it lies."""
        found = [path for path in map(containers.newest, self.folders()) if path is not None]
        return max(found, key=lambda path: int(path.stem), default=None)

    def to_resume(self) -> Path | None:
        """The checkpoint that --resume means: the one it names, or the newest of this run that is whole; None: none.

        With --resume auto the folder is claimed, and damaged checkpoints are set aside.
        """
        if self.flags.resume == "none" or (self.flags.resume == "auto" and not self.run.known):
            return None
        if self.flags.resume != "auto":
            path = containers.resolve(self.flags.resume)
            self.check_whole(path)
            return path
        self.claim()
        while (path := dist.broadcast_object(self.newest() if self.process.is_main else None)) is not None:
            try:
                self.check_whole(path)
            except DamagedError as error:
                cli.say(f"warning: {error}; it is set aside, looking for the one before")
                with dist.failing_together():
                    if self.process.is_main:
                        sharded.set_aside(path)
            else:
                return path
        return None

    def check_whole(self, path: Path) -> None:
        """Raise DamagedError, on all processes, where a checkpoint is not as it was written. (Files have no hashes.)"""
        if sharded.is_sharded(path):
            sharded.check_files(path, rank=self.process.rank, world_size=self.process.world_size)

    def complete_copies(self, path: Path) -> None:
        """Copy a checkpoint of this run, from which it goes on, to those of its folders that lack it."""
        if self.flags.resume == "auto" and self.process.is_main and sharded.is_sharded(path):
            self.writer.copy_to_others(path)

    def load(self, path: Path, *, check: Callable[[dict[str, Any], Path], None]) -> dict[str, Any]:
        """Fill the state from a training checkpoint → what else it holds. check(facts, path) may refuse it."""
        with dist.failing_together():
            facts = sharded.read_facts(path) if sharded.is_sharded(path) else {}
            trained_with = facts.get("flags", {}).get("optimizer", "adamw")
            if trained_with != self.flags.optimizer:
                raise ValueError(f"{path} was trained with --optimizer {trained_with}, not {self.flags.optimizer} "
                                 f"({FRESH_START})")
            check(facts, path)
        return self.state.load(path)
