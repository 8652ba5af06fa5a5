"""Training checkpoints: folders that every process writes its part of, in the background.

<folder>/<step>/ holds the shards and index of torch.distributed.checkpoint (DCP), and `state.json`: the step, the
model's description and everything else that is no tensor. It is written as <folder>/.<step>.tmp and takes its name
when it is whole and on the disk, so whatever interrupts the writing leaves the one before. Shards are cut by tensor,
not by process: any number of processes, sharded or not, reads them.

DCP's index is a pickle. It is read by an unpickler that knows the index's own classes and nothing else, and all that is
no tensor is in the JSON, so that a checkpoint cannot run code.
"""
import contextlib
import json
import pickle
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from utils import dist
from utils.checkpoint import file_hash, first_line, replacing, sweep, sync_folder

FORMAT = "llamagen-checkpoint-1"
FACTS = {"steps": int, "config": dict, "files": dict}  # what state.json must have, of which type
MAY_BE = {"flags": dict, "meter": dict, "skipped_in_a_row": int}
STATE, INDEX = "state.json", ".metadata"
PATIENCE = 6 * 3600.0  # seconds that processes wait for one another's disks
INDEX_CLASSES = {  # all that DCP's index of tensors is made of
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class DamagedError(ValueError):
    """A checkpoint is not whole."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in INDEX_CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None),
                                                                                       torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, but its index cannot run code. (DCP itself reads the shards with weights_only.)"""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises ValueError when it is damaged or holds anything else."""
        path = Path(self.path) / INDEX
        try:
            with open(path, "rb") as file:
                index = _IndexUnpickler(file).load()
            assert isinstance(index, Metadata)
            for name, entry in index.state_dict_metadata.items():
                assert isinstance(name, str) and isinstance(entry, TensorStorageMetadata)
                assert isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)
        except Exception as error:  # a damaged pickle raises anything
            raise DamagedError(f"{path} is refused: it is damaged, or holds objects that would run code when loaded "
                             f"({first_line(error)[:160]})") from None
        return index


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, while training goes on. All processes call it alike."""

    def __init__(self, folders: list[Path], *, keep: int, is_main: bool) -> None:
        """The first of `folders` is written, the others get copies; `keep` newest stay in each, 0 keeps all."""
        self.folders, self.keep, self.is_main = folders, keep, is_main
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
        # the writing thread and the training must not meet in one group; and disks may be slow without being dead
        self.group = dist.new_cpu_group(timeout=PATIENCE)
        self.publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.written: Future | None = None
        self.published: Future | None = None

    def sweep(self, step: int) -> None:
        """Before going on from `step`: remove what killed writers left, and what is older than is to be kept.

        Raises OSError where nothing can be written.
        """
        for folder in self.folders if self.is_main else []:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            self.prune(folder, step)

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Begin to write: what `tensors` hold now is what will be read. Waits for the checkpoint before."""
        self.wait()
        target = self.folders[0] / f"{step:07d}"
        temporary = target.with_name(f".{target.name}.tmp")
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        self.written = dcp.async_save(_own_part(tensors), storage_writer=dcp.FileSystemWriter(temporary),
                                      process_group=self.group)
        if self.is_main:
            self.published = self.publisher.submit(self._publish, self.written, temporary, target, facts)

    def _publish(self, written: Future, temporary: Path, target: Path, facts: dict[str, Any]) -> None:
        try:
            written.result()  # all processes have written
            hashes = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
            missing = _shards(SafeReader(temporary).read_metadata()) - hashes.keys()
            if missing:
                raise OSError(f"{', '.join(sorted(missing))} of other processes cannot be seen from here: all machines "
                              "must share this folder")
            with replacing(temporary / STATE) as file:
                file.write_text(json.dumps({"format": FORMAT, "files": hashes, **facts}))
            _take_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.spread(target)
        for folder in self.folders:
            self.prune(folder, int(target.name))

    def prune(self, folder: Path, step: int) -> None:
        """Leave `keep` checkpoints, that of `step` and the ones before it. Nothing goes unless that one is there."""
        found = [path for path in candidates(folder) if int(path.stem) <= step]
        for old in found[self.keep:] if self.keep and found and int(found[0].stem) == step else []:
            if old.is_dir():  # no checkpoint any more from here on, whatever interrupts
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old.tmp")), ignore_errors=True)
            else:
                old.unlink()

    def spread(self, path: Path) -> None:
        """Copy a checkpoint to those of the folders that lack it (after a kill between the copies, say)."""
        for folder in self.folders:
            target, copy = folder / path.name, folder / f".{path.name}.tmp"
            if is_sharded(target) and (target == path or (target / STATE).read_bytes() == (path / STATE).read_bytes()):
                continue
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(path, copy)
            _take_place(copy, target)

    def failed(self) -> bool:
        """Whether this process knows that the last checkpoint could not be written. `wait` says why."""
        return any(future is not None and future.done() and future.exception() is not None
                   for future in (self.written, self.published))

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises OSError, on all processes, when it could not be written."""
        problems = []
        for future in (self.written, self.published):
            try:
                if future is not None:
                    future.result()
            except (dcp.CheckpointException, OSError, RuntimeError) as error:
                failures = getattr(error, "failures", None) or {0: (error, None)}
                problems.append(first_line(next(iter(failures.values()))[0])[:200])
        self.written = self.published = None
        problems = dist.gather_lists(problems, group=self.group)  # the main one publishes: nobody goes on before it has
        if problems:
            raise OSError(f"a checkpoint could not be written to {' or '.join(map(str, self.folders))}: {problems[0]}: "
                          "is the disk full? Earlier checkpoints are untouched")

    def close(self, *, patience: float) -> None:
        """Give what is being written so many seconds to end, without a word to the other processes."""
        wait([future for future in (self.written, self.published) if future is not None], timeout=patience)
        self.publisher.shutdown(wait=False)


def _own_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of what all hold alike, and all that is its own: so many fewer bytes are staged and sent."""
    alike = sorted((name for name, tensor in tensors.items() if not isinstance(tensor, DTensor) and "@" not in name),
                   key=lambda name: (tensors[name].numel(), name))
    others = {name for i, name in enumerate(alike) if i % dist.world_size() != dist.env_rank()}
    return {name: tensor for name, tensor in tensors.items() if name not in others}


def _shards(index: Metadata) -> set[str]:
    """Names of the files that an index speaks of."""
    return {info.relative_path for info in (index.storage_data or {}).values()}


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


# ---- reading


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, unfinished ones left out; .pt files of earlier versions count."""
    files = [path for path in folder.glob("*.pt") if path.stem.isdigit()]
    folders = [path for path in folder.glob("*") if path.name.isdigit() and is_sharded(path)]
    return sorted(files + folders, key=lambda path: (int(path.stem), path.is_dir()), reverse=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that it is no candidate any more."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of this format."""
    return (path / STATE).is_file()


def read_facts(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises DamagedError naming what is wrong with it."""
    try:
        facts = json.loads((path / STATE).read_text())
        for name, kind in {**FACTS, **{name: kind for name, kind in MAY_BE.items() if name in facts}}.items():
            if type(facts[name]) is not kind:
                raise ValueError(f"{name} is {facts[name]!r:.40}")
        if path.name.isdigit() and int(path.name) != facts["steps"]:
            raise ValueError(f"steps is {facts['steps']}, the folder {path.name}")
        if facts.get("format") != FORMAT or not 0 <= facts["steps"] < 2**53 or INDEX not in facts["files"]:
            raise ValueError(f"format {facts.get('format')!r:.40}, step {facts['steps']}, files {[*facts['files']]}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path / STATE} is damaged ({first_line(error)[:200]})") from None
    return facts


def check_files(path: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Raise DamagedError unless every file of a checkpoint is there with the hash it was written with.

    With a world size the processes share the work, and all of them raise.
    """
    problems: list[str] = []
    try:
        for name, expected in sorted(read_facts(path)["files"].items())[rank::world_size]:
            found = file_hash(path / name) if (path / name).is_file() else "missing"
            if found != expected:
                problems.append(f"{path} is damaged: {name} is {'missing' if found == 'missing' else 'changed'}")
        unknown = set() if problems else _shards(SafeReader(path).read_metadata()) - read_facts(path)["files"].keys()
        problems += [f"{path} is damaged: {name} is missing" for name in sorted(unknown)]
    except DamagedError as error:
        problems.append(str(error))
    problems = dist.gather_lists(problems) if world_size > 1 else problems
    if problems:
        raise DamagedError(problems[0])


def sizes_in(path: Path) -> dict[str, torch.Size]:
    """Name → shape of the tensors in a checkpoint."""
    return {name: entry.size for name, entry in SafeReader(path).read_metadata().state_dict_metadata.items()}


def load_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, whole or sharded, in place. All processes call it, each with the tensors it wants."""
    with _damage_named(path):
        dcp.load(tensors, storage_reader=SafeReader(path))


def read_folder(path: Path, *, optimizers: bool = False) -> dict[str, Any]:
    """A checkpoint as one would read it from a file: {"model": {name: tensor}, "ema": …, "config": …, "steps": …}.

    Read by this process alone, on the CPU; without the optimizers' tensors unless asked for.
    """
    check_files(path)
    facts = read_facts(path)
    index = SafeReader(path).read_metadata().state_dict_metadata
    with _damage_named(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()
                   if optimizers or not name.startswith("optimizer")}
        dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
    content: dict[str, Any] = {key: value for key, value in facts.items() if key not in ("format", "files")}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        content.setdefault(part, {})[rest] = tensor
    if "ema" in content:
        content["ema"] = {**content["model"], **content["ema"]}  # buffers, and what is not trained
    return content


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (dcp.CheckpointException, RuntimeError, TypeError, AttributeError, MemoryError) as error:
        cause = next(iter(getattr(error, "failures", {0: (error,)}).values()))[0]
        raise DamagedError(str(cause) if isinstance(cause, DamagedError) else
                           f"{path} cannot be read: {first_line(cause)[:200]}") from None
