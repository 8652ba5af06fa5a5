"""The order of an endless stream of passes over a data set: a function of (seed, pass, position), with no state.

Up to WINDOW_ROWS samples (two million; ImageNet has 1.28), a pass is a permutation of all. Beyond that (50 million
pairs would take 0.4 GB and seconds per pass and process) the samples are cut into blocks of BLOCK_ROWS neighbours, the
blocks are shuffled, and so are the samples inside each window of WINDOW_BLOCKS blocks that follow each other in the
shuffled order. Every sample still comes exactly once per pass; any position can be asked for without a look at what
came before; 16 MB per window are held, and the files that are read from at a time stay few.
"""
import numpy as np

from utils.seeding import derive_seed

BLOCK_ROWS = 2**12
WINDOW_BLOCKS = 2**9
WINDOW_ROWS = BLOCK_ROWS * WINDOW_BLOCKS  # 2,097,152


class EndlessOrder:
    """Samples 0 … count-1 pass after pass, each pass in its own order, fixed by (seed, pass, *key).

    `kept` permutations are held in memory: as many as are visited in turns. Without `windows`, blocks of a large data
    set are shuffled but not the samples inside: for positions that come in a shuffled order already.
    """

    def __init__(self, count: int, seed: int, *key: int, kept: int = 2, windows: bool = True) -> None:
        self.count, self.seed, self.key, self.kept, self.windows = count, seed, key, kept, windows
        self.passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of large data sets: blocks in order, their starts
        self.orders: dict[tuple[int, int], np.ndarray] = {}  # (pass, window) → samples

    def visit(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (B,) in the endless stream → (passes, samples), both (B,) int64."""
        passes, places = np.divmod(positions, self.count)
        samples = np.empty_like(places)
        for number in np.unique(passes).tolist():
            mine = np.flatnonzero(passes == number)
            samples[mine] = self.of_pass(number, places[mine])
        return passes, samples

    def of_pass(self, number: int, places: np.ndarray) -> np.ndarray:
        """The samples at places (B,) of one pass, (B,)."""
        if self.count <= WINDOW_ROWS:
            return self.order(number)[places]
        blocks, starts = self.block_order(number)
        if not self.windows:
            at = np.searchsorted(starts, places, side="right") - 1
            return blocks[at] * BLOCK_ROWS + places - starts[at]
        bounds = starts[:-1:WINDOW_BLOCKS]
        homes = np.searchsorted(bounds, places, side="right") - 1
        samples = np.empty_like(places)
        for window in np.unique(homes).tolist():
            mine = homes == window
            samples[mine] = self.order(number, window)[places[mine] - bounds[window]]
        return samples

    def order(self, number: int, window: int = 0) -> np.ndarray:
        """The samples of one window of a pass, in order; a small data set is one window."""
        if (number, window) not in self.orders:
            forget_oldest(self.orders, self.kept)
            self.orders[number, window] = self.shuffled(number, window)
        return self.orders[number, window]

    def shuffled(self, number: int, window: int) -> np.ndarray:
        """`order`, made."""
        seed = derive_seed(self.seed, number, *self.key)
        if self.count <= WINDOW_ROWS:
            return np.random.default_rng(seed).permutation(self.count)
        blocks, _ = self.block_order(number)
        mine = blocks[window * WINDOW_BLOCKS:(window + 1) * WINDOW_BLOCKS]
        samples = (mine[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
        samples = samples[samples < self.count]  # the last block of the data set may be short
        np.random.default_rng((seed, window + 1)).shuffle(samples)
        return samples

    def block_order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in the order of a pass, where each starts in it and, at the end, the count)."""
        if number not in self.passes:
            forget_oldest(self.passes, self.kept)
            rng = np.random.default_rng(derive_seed(self.seed, number, *self.key))
            blocks = rng.permutation(-(-self.count // BLOCK_ROWS))
            rows = np.minimum(BLOCK_ROWS, self.count - blocks * BLOCK_ROWS)
            self.passes[number] = blocks, np.concatenate([[0], np.cumsum(rows)])
        return self.passes[number]


def forget_oldest(made: dict, kept: int) -> None:
    """Make room for one more among `kept`."""
    if len(made) >= kept:
        del made[min(made)]
