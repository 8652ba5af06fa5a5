"""What callers give as numbers, in any form: lists, NumPy arrays, tensors on any device."""
import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def integers(name: str, value: ArrayLike) -> Tensor:
    """An int64 tensor on the CPU. Raises ValueError for all but integers: fractions would be cut off. `name` begins the
    sentence of the error, "known codes are", say."""
    return torch.from_numpy(_array(name, value, kinds="iu", expected="integers").astype(np.int64, order="C"))


def floats(name: str, value: ArrayLike) -> Tensor:
    """The same for numbers of any kind, float64."""
    return torch.from_numpy(_array(name, value, kinds="iuf", expected="numbers").astype(np.float64, order="C"))


def per_image(name: str, value: ArrayLike, batch: int, *, whole: bool = False) -> list:
    """A number, or one per image → a list of `batch` finite numbers; whole: of integers. name: of the setting."""
    flag = f"--{name.replace('_', '-')} is"
    values = floats(flag, value)
    if values.ndim > 1:
        raise ValueError(f"{flag} of shape {tuple(values.shape)}, expected a number, or one for each image")
    numbers = values.expand(batch).tolist() if values.ndim == 0 else values.tolist()
    if len(numbers) != batch:
        raise ValueError(f"{len(numbers)} values of {name} for {batch} samples")
    for number in numbers:
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError(f"{flag} {number}, expected a {'whole' if whole else 'finite'} number")
    return [int(number) for number in numbers] if whole else numbers


def _array(name: str, value: ArrayLike, *, kinds: str, expected: str) -> np.ndarray:
    """kinds: what NumPy calls the kinds of types that are taken; an empty list has no type."""
    try:
        kind = getattr(value, "dtype", None)
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value  # NumPy knows no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} no list, array or tensor of {expected}") from None
    if array.dtype.kind not in kinds and array.size:
        raise ValueError(f"{name} of type {kind or array.dtype}, expected {expected}")
    return array
