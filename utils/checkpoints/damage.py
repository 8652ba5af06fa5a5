"""What counts as a damaged checkpoint: content that is wrong. And what to say of a file that cannot be read.

A disk that fails, a lack of memory and a wrong call of ours are none: a checkpoint is only set aside for what it holds.
"""
import pickle
import re
import struct
import traceback
import zipfile
from pathlib import Path

import torch

from utils.files import few, first_line, plain, what_it_is
from utils.pickles import suspicious_names

# What torch has been seen to raise for files cut short or with flipped bits.
WRONG_CONTENT = (RuntimeError, EOFError, LookupError, ValueError, ArithmeticError, AssertionError, struct.error,
                 pickle.UnpicklingError, zipfile.BadZipFile)
UNPICKLING_FILES = {"_weights_only_unpickler.py", "serialization.py", "_utils.py", "_tensor.py", "storage.py"}


class DamagedError(ValueError):
    """A checkpoint does not hold what was written."""


def is_damage(error: BaseException) -> bool:
    """Whether an error that was raised while a checkpoint was read comes from what the checkpoint holds.

    A TypeError or AttributeError does only if torch raised it while unpickling; elsewhere it is a mistake in our call.
    """
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError)
                                                     and "can't allocate memory" in str(error)):
        return False
    if isinstance(error, TypeError | AttributeError):
        frames = traceback.extract_tb(error.__traceback__)
        return bool(frames) and Path(frames[-1].filename).name in UNPICKLING_FILES
    return isinstance(error, WRONG_CONTENT)


def unreadable(path: Path, error: Exception) -> str:
    """Why a file could not be read as a checkpoint: code in it, another kind of file, or damage."""
    names = suspicious_names(path)
    if names:
        return (f"{path} is refused: it names {few(names)}, which would run code when loaded; expected a state dict: "
                "tensors and plain values")
    found = what_it_is(path)
    if found is not None and "zip archive" in found:
        found = _kind_of_archive(path)
    if found is not None:
        return f"{path} is {found}"
    if isinstance(error, pickle.UnpicklingError):
        said = re.split(r"error:\s*", str(error))[-1].split(" Please use ")[0]  # torch's advice is to trust the file
        reason = first_line(ValueError(said)).rstrip(".")[:160]
        return f"{path} is refused: it is damaged, or no checkpoint ({reason})"
    return f"{path} cannot be read as a checkpoint: {first_line(error)[:200]}"


def _kind_of_archive(path: Path) -> str | None:
    """What a zip archive is that torch did not write; None for torch's own, and for a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    if any(name.endswith("data.pkl") for name in inside):
        wrong_name = path.suffix == ".safetensors"
        return "a file of torch.save, no safetensors: rename it to .pt" if wrong_name else None
    return f"a zip archive of {plain(few(inside)) or 'nothing'}: unpack it and give what is in it"
