"""Seeds derived from what they are for, so that a result never depends on how the work was split."""
import re
from numbers import Integral

import numpy as np
import torch


def seed_number(text: str) -> int:
    """Parse the value of a seed flag."""
    return check_seed(int(text) if re.fullmatch("-?[0-9]{1,40}", text) else text)


def check_seed(seed: int | str) -> int:
    """The seed of a run, if it is one: 0 to 2^32 - 1.

    A larger one would repeat streams of smaller ones: PyTorch's generator of the CPU reads 32 bits, and `derive_seed`
    would take (2^32, 0) for (0, 1). Raises ValueError.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"{seed!r} is no seed: expected a whole number from 0 to {2**32 - 1}")
    return int(seed)


def derive_seed(*key: int) -> int:
    """A 62-bit seed for a key of numbers below 2^32, e.g. (seed, index), by SeedSequence mixing.

    The last may have 64 bits, and the first be a derived seed. Trailing zeros do not count: (0, 5) and (0, 5, 0) are
    one key. Raises ValueError for negative and larger numbers, which have no words of their own.
    """
    if not all(0 <= value < 2**64 for value in key):
        raise ValueError(f"no seed can be derived from {key}: expected numbers from 0 to {2**64 - 1}")
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2))


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of sample `index` of run `seed` (see `check_seed`); on the CPU, so that it is the same for
    every device."""
    return torch.Generator().manual_seed(derive_seed(check_seed(seed), index))


def hash_choice(seed: int, epoch: np.ndarray, index: np.ndarray, *, options: int) -> np.ndarray:
    """For each (epoch, index) a number in [0, options), fixed by (seed, epoch, index); vectorised (splitmix64)."""
    with np.errstate(over="ignore"):
        state = np.uint64(derive_seed(seed)) + epoch.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for value in (index.astype(np.uint64), np.uint64(0)):
            state = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state % np.uint64(options)).astype(np.int64)
