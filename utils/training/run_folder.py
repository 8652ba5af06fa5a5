"""Which folder a run works in: a new one, claimed by this training alone, or with --resume auto that of the same run.

A run is recognised by its identity: what shapes its result (model, data, optimiser, schedule, seed), not where it lies,
how it is spread over processes, or how often it logs.
"""
import dataclasses
import fcntl
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import dist
from utils.checkpoints import containers, sharded
from utils.cli import declaring_class
from utils.files import names_in
from utils.training.flags import TrainFlags

LOCK_PATIENCE = 120.0  # seconds in which a killed training ends, and NFS gives up the locks of a lost machine


def identity_of(flags: TrainFlags, *, data: str, model: dict[str, Any], start: str | None,
                covered: tuple[str, ...] = ()) -> dict[str, Any]:
    """What shapes a run, JSON-ready: flags of the classes with `shapes_run`, the data's hash, the model, its start.

    `start` is the file or folder whose weights the run begins with. `covered` are flags that data, model and start
    already say all about. All processes call this together; what process 0 finds counts.
    """
    names = [field.name for field in dataclasses.fields(flags)
             if vars(declaring_class(type(flags), field.name)).get("shapes_run", True)]
    shaping = {name: getattr(flags, name) for name in names if name not in covered}
    if flags.lr_schedule == "constant":
        del shaping["epochs"]  # more of them are more of the same
    with dist.failing_together():
        started = containers.identity_hash(start) if start is not None and dist.env_rank() == 0 else None
    return dist.broadcast_object(json.loads(json.dumps({**shaping, "data": data, "model": model, "start": started})))


@dataclasses.dataclass
class RunFolder:
    """Where a run works. Before `claim` it may write nothing."""

    path: Path
    identity: dict[str, Any]
    known: bool  # it is there, and this run goes on in it
    reason: str = ""  # why --resume auto does not go on with the newest run of the model's name
    lock: "Lock | None" = None

    def claim(self, flags: TrainFlags) -> None:
        """Make the folder of a new run, or take a known one, for this training alone.

        A number that another training has taken meanwhile is passed over. All processes call this together. Raises
        ValueError when another training, or what is left of one, still works in a known folder.
        """
        rank = dist.env_rank()
        with dist.failing_together():
            if rank == 0:
                self.path = self.path if self.known else _make_new(flags, self.path)
                self.lock = Lock(self.path, rank)
                self.lock.take(patience=LOCK_PATIENCE)
        self.path = dist.broadcast_object(self.path)
        with dist.failing_together():
            if rank > 0:
                self.lock = Lock(self.path, rank)
                self.lock.take(patience=0.0)
        self.known = True


def choose_run(flags: TrainFlags, model_name: str, identity: dict[str, Any], *,
               refuse: Callable[[dict[str, Any], Path], None] = lambda recorded, folder: None) -> RunFolder:
    """The folder for a run; nothing is created. All processes call this together and get the same.

    With --resume auto it is the newest run of this identity, else one of a free number. Before a new one is begun,
    refuse(identity of another run, its folder) may raise ValueError where the difference must be a mistake.
    """
    with dist.failing_together():
        chosen = _choose(flags, model_name, identity, refuse) if dist.env_rank() == 0 else None
    return dist.broadcast_object(chosen)


def _choose(flags: TrainFlags, model_name: str, identity: dict[str, Any],
            refuse: Callable[[dict[str, Any], Path], None]) -> RunFolder:
    results = Path(flags.results_dir)
    reason, others = "", []
    for name in reversed(_taken(flags)) if flags.resume == "auto" else ():
        if name.split("-", 1)[1] == model_name:
            recorded = _recorded_identity(flags, name)
            unknown = ["nothing in it tells what it was"]
            differences = unknown if recorded is None else differences_of(recorded, identity)
            if not differences:
                return RunFolder(results / name, identity, known=True)
            reason = reason or f"{name} is another run ({'; '.join(differences[:3])}): this one begins in a new folder"
            others += [(recorded, results / name)] if recorded is not None else []
    for recorded, folder in others:
        refuse(recorded, folder)
    return RunFolder(results / _free_name(flags, model_name), identity, known=False, reason=reason)


class Lock:
    """Held by a process as long as it may write into a run's folder; the system gives it up when the process ends."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f".lock-{rank}"
        self.file = open(self.path, "a")  # noqa: SIM115 (kept open)

    def take(self, *, patience: float) -> None:
        """Wait `patience` seconds for it; process 0's is had when no other process holds one of the folder's either.

        Raises ValueError when somebody still does.
        """
        deadline = time.monotonic() + patience
        while not (_try_lock(self.file) and (self.path.name != ".lock-0" or not self.others())):
            if time.monotonic() > deadline:
                self.release()
                raise ValueError(f"{self.folder} is in use: another training, or a process that an interrupted one has "
                                 "left, still works in it. End that one, or start without --resume auto for a new run; "
                                 "if nothing works there any more, remove its .lock files")
            time.sleep(0.2)

    def others(self) -> list[Path]:
        """Locks of the folder that other processes hold."""
        return [path for path in self.folder.glob(".lock-*") if path != self.path and _is_locked(path)]

    def release(self) -> None:
        """Let other trainings have the folder."""
        self.file.close()


def _make_new(flags: TrainFlags, folder: Path) -> Path:
    """Make the folder, here and in --cloud-save-path, under the next number that nobody has."""
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            if flags.cloud_save_path is not None:
                Path(flags.cloud_save_path).mkdir(parents=True, exist_ok=True)
                (Path(flags.cloud_save_path) / folder.name).mkdir()
        except FileExistsError as error:
            taken = Path(error.filename)
            if taken.name != folder.name:  # what is in the way is no run
                raise
            if taken != folder:
                folder.rmdir()
            folder = folder.with_name(_free_name(flags, folder.name.split("-", 1)[1]))
        else:
            return folder


def _is_locked(path: Path) -> bool:
    with open(path, "a") as file:
        return not _try_lock(file)


def _try_lock(file: Any) -> bool:
    """Whether nobody else holds the lock; from then on this process does, until it closes the file."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _taken(flags: TrainFlags) -> list[str]:
    """Names of the run folders in --results-dir and --cloud-save-path, in the order of their numbers."""
    roots = [Path(root) for root in (flags.results_dir, flags.cloud_save_path) if root]
    names = {name for root in roots for name in names_in(root) if re.match(r"\d{3,}-.", name)}
    return sorted(names, key=lambda name: (int(name.split("-", 1)[0]), name))


def _free_name(flags: TrainFlags, model_name: str) -> str:
    taken = _taken(flags)
    return f"{int(taken[-1].split('-', 1)[0]) + 1 if taken else 0:03d}-{model_name}"


def _recorded_identity(flags: TrainFlags, name: str) -> dict[str, Any] | None:
    """What a run says it is: in its newest checkpoint that can be read, else in its config.json; None: nothing."""
    places = [Path(root) / name for root in (flags.results_dir, flags.cloud_save_path) if root]
    for folder in places:
        for path in sharded.candidates(folder / "checkpoints"):
            if sharded.is_sharded(path):
                try:
                    facts = sharded.read_facts(path)
                except sharded.DamagedError:
                    continue
                return facts.get("identity") or {**facts.get("flags", {}), "model": facts["config"]}
        try:
            config = json.loads((folder / "config.json").read_text())
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(config, dict):
            return config["identity"] if isinstance(config.get("identity"), dict) else config
    return None


def differences_of(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What two runs differ in, in words. What one of them does not record (an older version) does not count."""
    found = []
    for name in ours.keys() & theirs.keys():
        before, now = theirs[name], ours[name]
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences_of(before, now)
        elif before != now:
            short = all(len(str(value)) <= 40 for value in (before, now)) and name not in ("data", "start")
            found.append(f"{name} was {before}, now {now}" if short else f"other {name}")
    return sorted(found)
