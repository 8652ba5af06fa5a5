"""Which folder a run works in: a new one, claimed by this training alone, or with --resume auto that of the same run.

A run is recognised by its identity: what shapes its result (model, data, optimiser, schedule, seed), not where it lies,
how it is spread over processes, or how often it logs.
"""
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind: two trainings in one folder are not noticed there
    fcntl = None

from utils import dist
from utils.checkpoints import sharded
from utils.cli import declaring_class
from utils.training.flags import TrainFlags

LOCK_PATIENCE = 20.0  # seconds in which what is left of a killed training ends


def identity_of(flags: TrainFlags, *, data: str, model: dict[str, Any], start: str | None) -> dict[str, Any]:
    """What shapes a run, JSON-ready: flags of the classes with `shapes_run`, the data's hash, the model, its start.

    `start` names the checkpoint whose weights the run begins with.
    """
    names = [field.name for field in dataclasses.fields(flags)
             if vars(declaring_class(type(flags), field.name)).get("shapes_run", True)]
    shaping = {name: getattr(flags, name) for name in names}
    if flags.lr_schedule == "constant":
        del shaping["epochs"]  # more of them are more of the same
    return json.loads(json.dumps({**shaping, "data": data, "model": model, "start": start}))


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
        with dist.failing_together():
            if dist.env_rank() == 0:
                if self.known:
                    _wait_until_free(self.path)
                else:
                    self.path = _make_new(flags, self.path)
        self.path = dist.broadcast_object(self.path)
        self.known, self.lock = True, Lock(self.path, dist.env_rank())


def choose_run(flags: TrainFlags, model_name: str, identity: dict[str, Any]) -> RunFolder:
    """The folder for a run; nothing is created. All processes call this together and get the same.

    With --resume auto it is the newest run of this identity, else one of a free number.
    """
    with dist.failing_together():
        chosen = _choose(flags, model_name, identity) if dist.env_rank() == 0 else None
    return dist.broadcast_object(chosen)


def _choose(flags: TrainFlags, model_name: str, identity: dict[str, Any]) -> RunFolder:
    results = Path(flags.results_dir)
    reason = ""
    for name in reversed(_taken(flags)) if flags.resume == "auto" else ():
        if name[4:] == model_name:
            recorded = _recorded_identity(flags, name)
            differences = ["nothing in it tells what it was"] if recorded is None else _differences(recorded, identity)
            if not differences:
                return RunFolder(results / name, identity, known=True)
            reason = reason or f"{name} is another run ({'; '.join(differences[:3])}): this one begins in a new folder"
    return RunFolder(results / _free_name(flags, model_name), identity, known=False, reason=reason)


class Lock:
    """Held by a process as long as it may write into a run's folder; the system gives it up when the process ends."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = None
        if fcntl is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / f".lock-{rank}", "a")  # noqa: SIM115 (kept open)
            _try_lock(self.file)

    def release(self) -> None:
        """Let other trainings have the folder."""
        if self.file is not None:
            self.file.close()
            self.file = None


def _make_new(flags: TrainFlags, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            folder = folder.with_name(_free_name(flags, folder.name[4:]))
        else:
            return folder


def _wait_until_free(folder: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE
    while any(_is_locked(path) for path in folder.glob(".lock-*")):
        if time.monotonic() > deadline:
            raise ValueError(f"{folder} is in use: another training, or a process that an interrupted one has left, "
                             "still works in it; end that one, or start without --resume auto for a new run")
        time.sleep(0.2)


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
    return sorted({path.name for root in roots for path in root.glob("[0-9][0-9][0-9]-*")})


def _free_name(flags: TrainFlags, model_name: str) -> str:
    taken = _taken(flags)
    return f"{int(taken[-1][:3]) + 1 if taken else 0:03d}-{model_name}"


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
        if isinstance(config, dict) and isinstance(config.get("identity"), dict):
            return config["identity"]
    return None


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What two runs differ in, in words. What one of them does not record (an older version) does not count."""
    found = []
    for name in ours.keys() & theirs.keys():
        before, now = theirs[name], ours[name]
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now)
        elif before != now:
            short = all(len(str(value)) <= 40 for value in (before, now)) and name != "data"
            found.append(f"{name} was {before}, now {now}" if short else f"other {name}")
    return sorted(found)
