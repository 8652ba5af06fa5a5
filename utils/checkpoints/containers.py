"""Read every checkpoint container in the wild, strictly and without running its code; write files atomically.

Files: {"model": …} (LlamaGen), {"module": …} (DeepSpeed), {"state_dict": …} (ARPG), a bare state dict, .safetensors.
Folders: the sharded checkpoints of our training (utils/checkpoints/sharded.py), LlamaGen's with consolidated.pth,
exports with model.safetensors and config.json, and a run's folder, which stands for its newest checkpoint.
"""
import argparse
import hashlib
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoints import sharded
from utils.checkpoints.damage import is_damage
from utils.checkpoints.lora import merge_lora
from utils.files import file_hash, first_line, replacing
from utils.finite import check_finite

WEIGHT_KEYS = ("ema", "model", "module", "state_dict")  # in order of preference

# Checkpoints of old pytorch-lightning (taming-transformers') name this class as a key. An empty one stands in for it.
LIGHTNING_CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: a run's folder means its newest one, step.pt the folder of that step."""
    path = Path(path)
    if not path.exists() and path.suffix == ".pt" and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    if path.is_dir():
        for folder in (path, path / "checkpoints"):
            found = newest(folder)
            if found is not None:
                return found
    return path


def read(path: str | Path) -> dict[str, Any]:
    """The content on the CPU. Raises FileNotFoundError, or ValueError for what is no safe checkpoint."""
    path = resolve(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        if sharded.is_sharded(path):
            return sharded.read_folder(path)
        names = ("model.safetensors", "consolidated.pth")
        inside = next((path / name for name in names if (path / name).is_file()), None)
        if inside is None:
            raise FileNotFoundError(f"no checkpoint in the folder {path}: expected {sharded.STATE}, {names[0]} or "
                                    f"{names[1]}, or a run's folder")
        return read_file(inside)
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """The content of one file, safely. A config.json of ours beside a .safetensors file describes it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            described = path.with_name("config.json")
            config = json.loads(described.read_text()) if described.is_file() else {}
            ours = isinstance(config, dict) and "kind" in config
            return {"model": load_file(path), "config": config} if ours else load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace, LIGHTNING_CALLBACK]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below, in one line
            mapped = _can_be_mapped(path)  # tensors stay in the file until they are used: no copy in memory
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = first_line(error).rstrip(". ")
        raise ValueError(f"{path} is refused: it is damaged, or it holds objects that would run code when loaded "
                         f"({reason[:160]})") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError" and not is_damage(error) and not isinstance(error, MemoryError):
            raise
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)[:200]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a checkpoint")
    return content


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is a zip archive, as torch writes them, whose entries lie there as they are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def weights(content: dict[str, Any], source: str | Path, *, prefer: tuple[str, ...] = WEIGHT_KEYS) -> dict[str, Tensor]:
    """The state dict inside a container, wrapper prefixes removed, LoRA merged. ValueError when there is none."""
    inner: Any = next((content[key] for key in prefer if isinstance(content.get(key), dict)), content)
    state = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not state or len(state) != len(inner):
        raise ValueError(f"{source} holds no model weights: its keys are {', '.join(map(str, list(content)[:8]))}")
    for prefix in ("module.", "_orig_mod.", "module."):  # DDP, compile, and the one in the other
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return merge_lora(state, saved_config(content), source=source)


def saved_config(content: dict[str, Any]) -> dict[str, Any]:
    """What one of our checkpoints says about its model; empty for other files."""
    config = content.get("config")
    return dict(config) if isinstance(config, dict) else {}


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `module`; a missing, extra, mis-shaped or not finite tensor is a ValueError that names it."""
    check_fit(module.state_dict(), state, source, type(module).__name__)
    check_finite(state, source)
    module.load_state_dict(state)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], source: str | Path, target: str) -> None:
    """Raise ValueError unless `state` has the names and shapes of `own`."""
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                 for name in own if name in state and state[name].shape != own[name].shape]
    refuse(problems, source, target)


def refuse(problems: list[str], source: str | Path, target: str) -> None:
    """Raise ValueError if there are problems, naming the first four."""
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{source} does not fit {target}: {'; '.join(problems[:4])}{more}")


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the file is either whole or not there, whatever happens meanwhile."""
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch's zip writer reports a full disk
            raise OSError(f"could not write {path}: {first_line(error)}: is the disk full? "
                          "Earlier checkpoints are untouched") from None


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a folder, None if there is none. Unfinished ones do not count."""
    return next(iter(sharded.candidates(folder)), None)


def identity_hash(path: str | Path) -> str:
    """A hash that tells checkpoints apart: of a training checkpoint's state.json, which has those of its files."""
    path = resolve(path)
    return file_hash(path / sharded.STATE) if sharded.is_sharded(path) else content_hash(path)


def content_hash(path: str | Path) -> str:
    """SHA-256 of a checkpoint: of the file, or of a folder's files in the order of their names."""
    path = resolve(path)
    if path.is_file():
        return file_hash(path)
    parts = [f"{file.name} {file_hash(file)}" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
