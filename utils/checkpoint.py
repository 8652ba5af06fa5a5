"""Read every checkpoint container in the wild, strictly and without running its code; write ours atomically.

Containers: {"model": …} (LlamaGen, ours), {"module": …} (DeepSpeed), {"state_dict": …} (ARPG), a bare state dict
(FSDP's consolidated.pth), and .safetensors. Ours adds "ema", optimizers, "steps" and "config".
"""
import argparse
import contextlib
import hashlib
import os
import pickle
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_KEYS = ("ema", "model", "module", "state_dict")  # in order of preference
DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, ArithmeticError, AssertionError, AttributeError,
           MemoryError, struct.error)  # what torch.load has been seen to raise for files cut short or with flipped bits

# Checkpoints of old pytorch-lightning (taming-transformers') name this class as a key. An empty one stands in for it.
LIGHTNING_CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def read(path: str | Path) -> dict[str, Any]:
    """The file's content on the CPU. Raises FileNotFoundError, or ValueError for a file that is no safe checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace, LIGHTNING_CALLBACK]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below, in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_line(error).rstrip(". ")
        raise ValueError(f"{path} is refused: it is damaged, or it holds objects that would run code when loaded "
                         f"({reason[:160]})") from None
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)[:200]}") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a checkpoint")
    return content


def weights(content: dict[str, Any], source: str | Path, *, prefer: tuple[str, ...] = WEIGHT_KEYS) -> dict[str, Tensor]:
    """The state dict inside a container, wrapper prefixes removed. Raises ValueError when there is none."""
    inner: Any = next((content[key] for key in prefer if isinstance(content.get(key), dict)), content)
    state = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not state or len(state) != len(inner):
        raise ValueError(f"{source} holds no model weights: its keys are {', '.join(map(str, list(content)[:8]))}")
    for prefix in ("module.", "_orig_mod.", "module."):  # DDP, compile, and the one in the other
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def saved_config(content: dict[str, Any]) -> dict[str, Any]:
    """What one of our checkpoints says about its model; empty for other files."""
    config = content.get("config")
    return dict(config) if isinstance(config, dict) else {}


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `module`; a missing, extra or mis-shaped key is a ValueError that names it."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                 for name in own if name in state and state[name].shape != own[name].shape]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:4])}{more}")
    module.load_state_dict(state)


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the file is either whole or not there, whatever happens meanwhile."""
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch's zip writer reports a full disk
            raise OSError(f"could not write {path}: {first_line(error)}: is the disk full? "
                          "Earlier checkpoints are untouched") from None


def copy(source: Path, target: Path) -> None:
    """Copy a file as `save` writes one."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced to disk, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder of which we are the only writer."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a folder, None if there is none. Unfinished files do not count."""
    found = sorted(path for path in folder.glob("*.pt") if path.stem.isdigit())
    return found[-1] if found else None


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
