"""Read every checkpoint container in the wild, strictly and without running its code; write files atomically.

Files: {"model": …} (LlamaGen), {"module": …} (DeepSpeed), {"state_dict": …} (ARPG), a bare state dict, .safetensors.
Folders: the sharded checkpoints of our training (utils/checkpoints/sharded.py), LlamaGen's with consolidated.pth,
exports with model.safetensors and config.json, Hugging Face's with an index of several files, and a run's folder, which
stands for its newest checkpoint. Where there is none of a name, it may be one of the hub (utils/checkpoints/hub.py).
"""
import argparse
import hashlib
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoints import hub, sharded
from utils.checkpoints.damage import is_damage, unreadable
from utils.checkpoints.file_index import INDEX_END, check_file, homes_of, index_of, index_over
from utils.checkpoints.lora import merge_lora
from utils.files import exists, few, file_hash, first_line, replacing, what_it_is
from utils.finite import check_finite

SINGLE = ("model.safetensors", "consolidated.pth", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
CONFIG_VALUES = {  # what a config in our form may say, and a stranger may have written
    **dict.fromkeys(("gpt_model", "vq_model"), ("a name", lambda value: isinstance(value, str))),
    **dict.fromkeys(("codebook_size", "codebook_embed_dim"),
                    ("a whole number", lambda value: type(value) is int and value > 0)),
    "grid": ("two whole numbers", lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(
        type(side) is int and side > 0 for side in value)),
    "control": ("the settings of an adapter", lambda value: isinstance(value, dict)),
    "class_at_origin": ("true or false", lambda value: isinstance(value, bool)),
    "classes": ("a list of names", lambda value: isinstance(value, list) and all(
        isinstance(name, str) for name in value)),
}
CARD = "README.md"  # the hub's model card
WEIGHT_KEYS = ("ema", "model", "module", "state_dict")  # in order of preference

# Checkpoints of old pytorch-lightning (taming-transformers') name this class as a key. An empty one stands in for it.
LIGHTNING_CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: a run's folder means its newest one, step.pt the folder of that step, a name of
    the hub the copy of it here, which is fetched if need be."""
    name = hub.hub_name(path)
    path = Path(path) if name is None else hub.local_copy(name)
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
    given, path = path, resolve(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {given}{hub.hint(given)}")
    if path.is_dir():
        if sharded.is_sharded(path):
            return with_sound_config(sharded.read_folder(path), path)
        inside = single_file(path) or index_of(path)
        if inside is None:
            raise FileNotFoundError(f"no checkpoint in the folder {path}: expected {sharded.STATE}, {SINGLE[0]}, "
                                    f"{', '.join(SINGLE[1:])} or *{INDEX_END}, or a run's folder")
        path = inside
    if path.name.endswith(INDEX_END):
        return with_sound_config(described(path, read_files_of(path)), path)
    index = index_over(path)
    if index is not None:
        raise ValueError(f"{path} is one of several files of a checkpoint: give {index}")
    return with_sound_config(read_file(path), path)


def with_sound_config(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content. Raises ValueError if its config, where it is in our form, has values that can mean nothing."""
    config = saved_config(content)
    for key in CONFIG_VALUES.keys() & config.keys() if "kind" in config else ():
        expected, is_sound = CONFIG_VALUES[key]
        if config[key] is not None and not is_sound(config[key]):
            raise ValueError(f"the config of {path} says that its {key} is {config[key]!r:.60}, expected {expected}")
    return content


def single_file(folder: Path) -> Path | None:
    """The one file of a folder that holds all weights."""
    return next((folder / name for name in SINGLE if (folder / name).is_file()), None)


def read_files_of(index: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint in several files. Raises an error naming what is missing, or in the wrong file."""
    homes, state = homes_of(index), {}
    for name in sorted(set(homes.values())):
        path = index.with_name(name)
        content = read_file(path)
        found = content["model"] if isinstance(content.get("model"), dict) else content
        refuse(check_file(homes, name, found.keys()), index, "the files beside it")
        state |= found
    return state


def read_file(path: Path) -> dict[str, Any]:
    """The content of one file, safely. A config.json of ours beside a .safetensors file describes it."""
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file
            return described(path, load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace, LIGHTNING_CALLBACK]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below, in one line
            mapped = _can_be_mapped(path)  # tensors stay in the file until they are used: no copy in memory
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if type(error).__name__ != "SafetensorError" and not is_damage(error) and not isinstance(error, MemoryError):
            raise
        raise ValueError(unreadable(path, error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a checkpoint")
    return content


def is_safetensors(path: Path) -> bool:
    """Whether a file is in that format: by its name, or by how it begins where the name says another."""
    with open(path, "rb") as file:
        start = file.read(10)
    length = int.from_bytes(start[:8], "little")
    return path.suffix == ".safetensors" or (start[8:] == b'{"' and length <= path.stat().st_size)


def described(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict with what a config.json of ours beside its file says of it."""
    beside = path.with_name("config.json")
    try:
        config = json.loads(beside.read_text()) if beside.is_file() else {}
    except (ValueError, RecursionError) as error:
        found = what_it_is(beside) or f"damaged ({first_line(error)})"
        raise ValueError(f"{beside}, which describes {path.name}, is {found}") from None
    return {"model": state, "config": config} if isinstance(config, dict) and "kind" in config else state


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is a zip archive, as torch writes them, whose entries lie there as they are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def weights(content: dict[str, Any], source: str | Path, *, prefer: tuple[str, ...] = WEIGHT_KEYS) -> dict[str, Tensor]:
    """The state dict inside a container, wrapper prefixes removed, LoRA merged. ValueError when there is none."""
    inner: Any = next((content[key] for key in prefer if isinstance(content.get(key), dict)), content)
    state = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
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
    """Copy `state` into `module`; a missing, extra, mis-shaped or not finite tensor is a ValueError that names it.

    `module.stored_types` tells afterwards which types the tensors had, by name."""
    check_fit(module.state_dict(), state, source, type(module).__name__)
    check_finite(state, source)
    module.load_state_dict(state)
    module.stored_types = {name: value.dtype for name, value in state.items()}


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
        raise ValueError(f"{source} does not fit {target}: {few(problems, between='; ')}")


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
    """SHA-256 of a checkpoint: of the file, or of a folder's files in the order of their names.

    With Hugging Face's index, of what belongs to it, whether the folder or the index is given. A model card does not
    count, which may be written anew.
    """
    path = resolve(path)
    index = index_of(path) if path.is_dir() and not sharded.is_sharded(path) and single_file(path) is None else path
    if index is not None and index.name.endswith(INDEX_END):
        names = {index.name, "config.json", *homes_of(index).values()}
        files = [index.with_name(name) for name in sorted(names) if exists(index.with_name(name))]
    elif path.is_file():
        return file_hash(path)
    else:
        files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name != CARD]
    return hashlib.sha256("\n".join(f"{file.name} {file_hash(file)}" for file in files).encode()).hexdigest()
