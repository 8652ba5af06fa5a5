"""The order of samples: every one once per pass, for any number of ranks, from any position, for ever the same."""
import hashlib

import numpy as np
import pytest

from dataset import order as order_module
from dataset.loader import StepSampler
from dataset.order import WINDOW_ROWS, EndlessOrder


def stream(count: int, steps: int, *, batch: int, ranks: int, accumulation: int, seed: int = 0, start: int = 0):
    """What each step visits, whatever rank and micro-batch does it."""
    samplers = [list(StepSampler(count, global_batch=batch, accumulation=accumulation, rank=rank, world_size=ranks,
                                 seed=seed, start_step=start, end_step=steps)) for rank in range(ranks)]
    assert {len(batches) for batches in samplers} == {(steps - start) * accumulation}
    return [sorted((epoch, index) for batches in samplers for micro in batches[s * accumulation:(s + 1) * accumulation]
                   for epoch, index in micro.tolist()) for s in range(steps - start)]


@pytest.mark.parametrize("count", [25, 24, 5], ids=["divides not", "divides", "less than a batch"])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 3), (12, 1), (3, 4)])
def test_every_sample_once_per_epoch_for_any_number_of_ranks(ranks, accumulation, count):
    batch, length = 12, 25  # with 25 samples, epochs meet in the middle of a step
    steps = stream(count, length, batch=batch, ranks=ranks, accumulation=accumulation)
    assert steps == stream(count, length, batch=batch, ranks=1, accumulation=1)
    visited = [key for step in steps for key in step]
    assert len(set(visited)) == len(visited) == 300
    for epoch in range(300 // count):
        assert sorted(index for e, index in visited if e == epoch) == list(range(count))


@pytest.mark.parametrize("start", [1, 2, 7, 24])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 3), (6, 2)])
def test_a_run_goes_on_in_the_middle_of_an_epoch(ranks, accumulation, start):
    """On any number of ranks, whatever it was before; `start` is what a checkpoint knows."""
    whole = stream(25, 25, batch=12, ranks=4, accumulation=1)
    assert stream(25, 25, batch=12, ranks=ranks, accumulation=accumulation, start=start) == whole[start:]


def test_orders_are_those_they_always_were():
    """Runs go on from old checkpoints: the order of a seed is fixed for ever."""
    sampler = StepSampler(25, global_batch=12, accumulation=3, rank=1, world_size=2, seed=5, start_step=3, end_step=9)
    keys = list(sampler)
    assert keys[0].tolist() == [[1, 23], [1, 7]]
    assert keys[0].dtype == np.int64
    assert hashlib.sha256(np.concatenate(keys).tobytes()).hexdigest().startswith("56917f429d07c125")


def test_a_start_deep_in_a_run_costs_nothing(monkeypatch):
    """Nothing of what came before is gone through; each epoch's order is made once."""
    made = []
    real = EndlessOrder.shuffled
    monkeypatch.setattr(EndlessOrder, "shuffled", lambda self, *place: (made.append(place), real(self, *place))[1])
    sampler = StepSampler(1000, global_batch=64, accumulation=1, rank=0, world_size=1, seed=0, start_step=10**12,
                          end_step=10**12 + 40)
    assert len(list(sampler)) == 40
    first = 64 * 10**12 // 1000
    assert made == [(first, 0), (first + 1, 0), (first + 2, 0)]


def test_an_endless_order_keeps_what_it_was_asked_to():
    order = EndlessOrder(10, 3, 8, kept=2)
    passes, samples = order.visit(np.arange(35))
    assert passes.tolist() == [i // 10 for i in range(35)]
    for number in range(3):
        assert sorted(samples[10 * number:10 * number + 10].tolist()) == list(range(10))
    assert sorted(order.orders) == [(2, 0), (3, 0)]
    shuffled = np.random.default_rng(0).permutation(35)
    np.testing.assert_array_equal(order.visit(shuffled)[1], samples[shuffled])
    assert not np.array_equal(EndlessOrder(10, 3).visit(np.arange(35))[1], samples)


@pytest.fixture
def small_windows(monkeypatch):
    """Blocks of four samples, windows of three blocks."""
    for name, value in (("BLOCK_ROWS", 4), ("WINDOW_BLOCKS", 3), ("WINDOW_ROWS", 12)):
        monkeypatch.setattr(order_module, name, value)


@pytest.mark.parametrize("count", [13, 16, 24, 25, 47, 48, 49, 100])
def test_windows_hold_every_sample_once_per_pass_at_any_position(small_windows, count):
    order = EndlessOrder(count, 5, kept=3)
    passes, samples = order.visit(np.arange(3 * count))
    assert passes.tolist() == [i // count for i in range(3 * count)]
    orders = samples.reshape(3, count)
    for one in orders:
        assert sorted(one.tolist()) == list(range(count))
    assert len({tuple(one) for one in orders.tolist()}) == 3
    anywhere = np.random.default_rng(0).permutation(3 * count)
    for part in np.array_split(anywhere, 7):  # no state: in any order, by a new object
        np.testing.assert_array_equal(EndlessOrder(count, 5).visit(part)[1], samples[part])
    assert not np.array_equal(EndlessOrder(count, 6).visit(np.arange(count))[1], orders[0])


def test_a_window_is_a_shuffle_of_a_few_shuffled_blocks(small_windows):
    orders = EndlessOrder(49, 0).visit(np.arange(49 * 40))[1].reshape(40, 49)  # 13 blocks, the last of one sample
    whole = [one[:12] // 4 for one in orders if 12 not in one[:12] // 4]
    firsts = [tuple(sorted(set(window.tolist()))) for window in whole]
    assert {len(blocks) for blocks in firsts} == {3}  # three blocks, each whole
    assert len(set(firsts)) > 0.8 * len(firsts)  # other ones in each pass
    assert len({tuple(window) for window in whole}) == len(whole)
    assert not any((window[:-1] <= window[1:]).all() for window in whole)  # not one block after the other
    assert 12 in {block for one in orders for block in (one[:12] // 4).tolist()}  # the short block comes anywhere


def test_orders_of_large_data_sets_are_fixed_too(small_windows):
    assert EndlessOrder(30, 7, 2).visit(np.arange(30, 60))[1].tolist() == [
        10, 12, 8, 2, 15, 1, 9, 14, 11, 0, 3, 13, 25, 22, 28, 27, 23, 26, 20, 21, 24, 29, 16, 4, 19, 17, 18, 6, 7, 5]
    assert EndlessOrder(30, 7, 2, windows=False).visit(np.arange(30, 60))[1].tolist() == [
        0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 24, 25, 26, 27, 16, 17, 18, 19, 4, 5, 6, 7]


def test_an_order_of_50_million_takes_the_memory_of_its_windows():
    order = EndlessOrder(50_000_001, 0)
    for position in (3 * 10**12, 5, 50_000_000, 50_000_000 * 7):
        passes, samples = order.visit(np.arange(position, position + 256))
        assert len(set(zip(passes.tolist(), samples.tolist(), strict=True))) == 256
    assert len(order.orders) == 2
    assert sum(array.nbytes for array in order.orders.values()) <= 2 * 8 * WINDOW_ROWS
    assert sum(array.nbytes for pair in order.passes.values() for array in pair) < 2**19


def test_a_sampler_goes_through_windows_on_any_number_of_ranks(small_windows):
    whole = stream(49, 20, batch=12, ranks=1, accumulation=1)
    assert stream(49, 20, batch=12, ranks=3, accumulation=2, start=7) == whole[7:]
    visited = [key for step in whole for key in step]
    assert sorted(visited)[:196] == [(epoch, index) for epoch in range(4) for index in range(49)]


def test_epochs_and_seeds_have_their_own_order():
    def order(seed, epoch):
        sampler = StepSampler(50, global_batch=50, accumulation=1, rank=0, world_size=1, seed=seed, start_step=epoch,
                              end_step=epoch + 1)
        return next(iter(sampler))[:, 1].tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6
    assert order(1, 2) == orders[-1]


def test_a_batch_larger_than_the_data_set_goes_round():
    step, = stream(3, 1, batch=8, ranks=2, accumulation=2)
    assert step == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), *step[6:]]
    assert len(set(step)) == 8
