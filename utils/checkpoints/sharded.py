"""Reading training checkpoints: folders that all processes of a training have written (utils/training/writer.py).

<folder>/<step>/ holds the shards and index of torch.distributed.checkpoint (DCP), and `state.json`: the step, the
model's description and everything else that is no tensor, with a hash of each file. Shards are cut by tensor, not by
process: any number of processes, sharded or not, reads them.

DCP's index is a pickle. It is read by an unpickler that knows the index's own classes and nothing else, and all that is
no tensor is in the JSON, so that a checkpoint cannot run code.
"""
import contextlib
import json
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from utils import dist
from utils.checkpoints.damage import DamagedError, is_damage
from utils.files import exists, file_hash, first_line, names_in, what_it_is

FORMAT = "llamagen-checkpoint-1"
FACTS = {"steps": int, "config": dict, "files": dict}  # what state.json must have, of which type
MAY_BE = {"flags": dict, "identity": dict, "meter": dict, "skipped_in_a_row": int}
STATE, INDEX = "state.json", ".metadata"
CONSOLIDATED = "consolidated.pth"  # the whole model in a folder of LlamaGen's (utils/checkpoints/llamagen_fsdp.py)
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
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise DamagedError(f"{path} is refused: it is damaged, or holds objects that would run code when loaded "
                             f"({first_line(error)[:160]})") from None
        return index


def shard_files(index: Metadata) -> set[str]:
    """Names of the files that an index speaks of."""
    return {info.relative_path for info in (index.storage_data or {}).values()}


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, unfinished ones left out.

    .pt files of earlier versions count, and so do folders that LlamaGen's FSDP wrote.
    """
    names = names_in(folder)
    files = [folder / name for name in names if name.endswith(".pt") and name.removesuffix(".pt").isdigit()]
    folders = [folder / name for name in names if name.isdigit() and (
        is_sharded(folder / name) or exists(folder / name / CONSOLIDATED))]
    return sorted(files + folders, key=lambda path: (int(path.stem), path.is_dir()), reverse=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that it is no candidate any more."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of this format."""
    return exists(path / STATE)


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
    except FileNotFoundError:
        raise DamagedError(f"{path / STATE} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # odd JSON raises any of them
        reason = _what_became(path / STATE, first_line(error)[:200])
        raise DamagedError(f"{path / STATE} is damaged ({reason})") from None
    return facts


def _what_became(path: Path, otherwise: str = "changed") -> str:
    """What a damaged file is now, where that says more: files of a repository may be Git LFS pointers."""
    found = what_it_is(path) or ""
    return found if found.startswith(("a Git LFS", "an HTML", "empty", "nothing but")) else otherwise


def check_files(path: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Raise DamagedError unless every file of a checkpoint is there with the hash it was written with.

    With a world size the processes share the work and raise together, an OSError of one of them included.
    """
    with dist.failing_together() if world_size > 1 else contextlib.nullcontext():
        recorded = read_facts(path)["files"]
        for name, expected in sorted(recorded.items())[rank::world_size]:
            if not exists(path / name):
                raise DamagedError(f"{path} is damaged: {name} is missing")
            if file_hash(path / name) != expected:
                raise DamagedError(f"{path} is damaged: {name} is {_what_became(path / name)}")
        unknown = shard_files(SafeReader(path).read_metadata()) - recorded.keys()
        if unknown:
            raise DamagedError(f"{path} is damaged: {min(unknown)} is missing")


def sizes_in(path: Path) -> dict[str, torch.Size]:
    """Name → shape of the tensors in a checkpoint."""
    return {name: entry.size for name, entry in SafeReader(path).read_metadata().state_dict_metadata.items()}


def load_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, whole or sharded, in place. All processes call it, each with the tensors it wants."""
    with _damage_named(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
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
    """Within the block, what torch raises for a checkpoint's wrong content becomes a DamagedError that names it."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # the second is no Exception; it has {rank: (cause, stack)}
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        disk = next((cause for cause in causes if isinstance(cause, OSError)), None)
        if disk is not None:
            raise OSError(disk.errno, f"{path} could not be read: {first_line(disk)}") from None
        if dist.lost_contact(causes[0]) or not all(map(is_damage, causes)):
            raise causes[0] from None
        raise DamagedError(str(causes[0]) if isinstance(causes[0], DamagedError) else
                           f"{path} cannot be read: {first_line(causes[0])[:200]}") from None
