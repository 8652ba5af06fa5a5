"""What counts as a damaged checkpoint: content that is wrong.

A disk that fails, a lack of memory and a wrong call of ours are none: a checkpoint is only set aside for what it holds.
"""
import pickle
import struct
import traceback
import zipfile
from pathlib import Path

import torch

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
