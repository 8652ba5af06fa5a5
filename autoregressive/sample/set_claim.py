"""What made a set of images: the name of its settings, the config.json beside it, and who may add to it.

A set is the work of one description: models, settings, seed, engine. Images that another one made are neither completed
nor replaced.
"""
import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoregressive.sample.options import SampleFlags
from utils import dist
from utils.checkpoints.containers import resolve
from utils.checkpoints.hub import hub_name
from utils.files import few, replacing

ENGINE = "engine"  # the key under which a set's description names what drew the images


def checkpoint_name(flags: SampleFlags, *, by_folder: bool = True) -> str:
    """What a set's name calls --gpt-ckpt; with --from-fsdp by its folder's name, since all files are called
    consolidated.pth."""
    if (name := hub_name(flags.gpt_ckpt)) is not None:
        return name.stem
    path = resolve(flags.gpt_ckpt)
    if by_folder and (flags.from_fsdp or path.is_dir()):
        return (path if path.is_dir() else path.absolute().parent).name
    return path.stem


def drawing_name(described: dict[str, Any], flags: SampleFlags) -> str:
    """The part of a set's name, as LlamaGen has it, that says how codes are drawn; with a schedule of ours also which.
    """
    interval = f"-interval-{flags.cfg_interval}" if flags.cfg_interval > -1 else ""
    drawn = (f"-step-{described['steps'] or 'auto'}-{described['sample_schedule']}-{described['cfg_schedule']}-"
             f"{'shared-' * flags.shared_order}{described['order']}"
             f"{'-causal' * (described.get('step_attention') == 'causal')}" if "sample_schedule" in described else "")
    return (f"topk-{flags.top_k}-topp-{flags.top_p}-temperature-{flags.temperature}-cfg-{flags.cfg_scale}{interval}"
            f"{drawn}")


def check_one_engine(engine: str) -> None:
    """Raise ValueError on all processes if they would draw images of one set by another `engine` than this one."""
    engines = dist.gather_lists([engine])
    if len(set(engines)) > 1:
        raise ValueError("the processes would draw images of one set differently, by "
                         f"{few(sorted(set(engines)), between='; ')}: give all of them the same kind of device, a C++ "
                         "compiler and the same LLAMAGEN_NATIVE")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a set's folder, which is made. Raises ValueError if another run holds the lock. No effect on file systems
    without locks."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise ValueError(f"another run is filling {folder}: wait for it or give another --sample-dir") from None
    try:
        yield
    finally:
        os.close(handle)  # this unlocks; so does the end of the process


def config_of(path: Path) -> dict[str, Any] | None:
    """What the config.json of a set says; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def differing(described: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The settings in which two descriptions of a set differ."""
    return [key for key in dict.fromkeys([*described, ENGINE]) if other.get(key) != described.get(key)]


def claim(path: Path, described: dict[str, Any], *, warnings: list[str], folder: Path, foreign: Path | None) -> None:
    """Write the config.json `path` of the set in `folder`: how the images are made, and why they may be bad.

    foreign: where there are images that may be another program's, None if there are none. Raises ValueError if they
    come without a config.json (LlamaGen's sampler gives its sets the same name, and none: they are not ours to complete
    or replace), or if it says that they were made in another way.
    """
    if not path.is_file() and foreign is not None:
        raise ValueError(f"{foreign} holds images, but there is no {path} that says how they were made (LlamaGen "
                         "writes none): give another --sample-dir")
    if path.is_file():
        other = config_of(path)
        if other is None:
            raise ValueError(f"{path} is damaged, so that nothing says how the images there were made: give another "
                             "--sample-dir")
        differs = [key for key in differing(described, other) if key != ENGINE or ENGINE in other]
        if differs:
            engines = "" if ENGINE not in differs else (
                f" ({other[ENGINE]} drew them, here {described[ENGINE]} would: go on where that is so too, with the "
                "same --compile, C++ compiler and LLAMAGEN_NATIVE)")
            raise ValueError(f"{folder} holds images made with another {', '.join(differs)}{engines}: give another "
                             "--sample-dir")
        if other.get("warnings", []) == warnings:
            return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**described, "warnings": warnings}, indent=2) + "\n")
