"""Seeds derived from what they are for, so that a result never depends on how the work was split."""
import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """A 62-bit seed for a key of numbers below 2^32, e.g. (seed, index), by SeedSequence mixing.

    Trailing zeros do not count: (0, 5) and (0, 5, 0) are one key.
    """
    return int(np.random.SeedSequence([value % 2**64 for value in key]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of sample `index` of run `seed`; on the CPU, so that it is the same for every device."""
    return torch.Generator().manual_seed(derive_seed(seed, index))


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
