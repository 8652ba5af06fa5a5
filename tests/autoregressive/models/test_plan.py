"""Plans, without a model: what is fed and asked for when, and how a step becomes flat."""
import numpy as np
import pytest
import torch

from autoregressive.models.batch import StepLayout, Turn
from autoregressive.models.plan import TRIAL, Groups, Raster

CPU = torch.device("cpu")


def test_a_raster_goes_one_by_one():
    plan, steps = Raster(np.ones(4)), []
    while not plan.finished:
        steps.append((plan.seen, *plan.next()))
        plan.settle(1)
    assert steps == [(0, 0, 0, 1), (0, 1, 1, 1), (1, 2, 2, 1), (2, 3, 3, 1)]


def test_windows_go_on_after_the_first_wrong_draft_and_end_at_the_last_cell():
    plan, steps = Raster(np.ones(9), window=4), []
    for right in (1, 2, 4, 1, 1):
        steps.append((plan.seen, *plan.next()))
        plan.settle(right)
    assert steps == [(0, 0, 0, 1), (0, 4, 1, 4), (2, 6, 3, 4), (6, 8, 7, 2), (7, 8, 8, 1)] and plan.finished


@pytest.mark.parametrize(("right", "window"), [(1, 1), (2, 4)])
def test_windows_that_bring_less_than_they_cost_are_given_up(right, window):
    plan = Raster(np.ones(100), window=4, price=1.5)
    plan.settle(1)
    for i in range(TRIAL):
        assert plan.next()[2] == 4, i
        plan.settle(right)
    assert plan.window == window and plan.next()[2] == window


def test_known_codes_are_fed_first():
    plan = Raster(np.ones(9), known=3, window=2)
    assert (plan.seen, *plan.next()) == (0, 3, 3, 1)
    plan.settle(1)
    assert (plan.seen, *plan.next()) == (3, 5, 4, 2)
    groups = Groups(np.array([3, 1, 0, 2, 4]), np.ones(5), [1, 2], known=2)
    assert (groups.seen, *groups.next()) == (0, 2, 2, 1)
    groups.settle(1)
    assert (groups.seen, *groups.next()) == (2, 3, 3, 2) and not groups.finished
    groups.settle(2)
    assert groups.finished


def test_guidance_ends_with_the_last_scale_above_one():
    for scales, until in (([1, 1, 1], 0), ([3, 1, 1], 1), ([1, 0.5, 2], 3), ([2, 1, 1.5], 3)):
        assert Raster(np.array(scales)).guided_until == until


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Groups(np.array([0, 1, 1]), np.ones(3), [3]), "every cell once"),
    (lambda: Groups(np.array([0, 1, 3]), np.ones(3), [3]), "every cell once"),
    (lambda: Groups(np.arange(3), np.ones(2), [3]), "2 scales"), (lambda: Raster(np.ones(3), known=3), "3 known codes"),
    (lambda: Raster(np.ones(0)), "0 cells"), (lambda: Raster(np.ones(3), known=-1), "-1 known"),
    (lambda: Raster(np.ones(3), window=0), "window is 0"),
    (lambda: Raster(np.array([1.0, np.nan])), "not finite"),
    (lambda: Groups(np.arange(3), np.ones(3), [1, 1]), "do not make up the 3"),
    (lambda: Groups(np.arange(3), np.ones(3), [3, 0]), "do not make up the 3"),
    (lambda: Groups(np.arange(3), np.ones(3), [3], known=1), "do not make up the 2"),
    (lambda: Groups(np.arange(3), np.ones(3), []), "do not make up the 3")])
def test_plans_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_is_flat():
    """A window of an image in raster order, a group of another order, and a new one whose prefix has two tokens."""
    orders = np.array([[0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [0, 1, 2, 3, 4]])
    scales = np.array([[2, 2, 2, 1, 1], [3, 3, 3, 3, 3], [1, 1, 1, 1, 1]], np.float32)
    turns = (Turn(0, 1, False, 0, 3, 3, False, False, True, 0), Turn(1, 1, False, 0, 2, 2, True, True, True, 1),
             Turn(2, 2, True, 2, 2, 1, False, False, False, 2))
    layout = StepLayout(turns, slots=3, prefix_rows=2, width=5)
    batch = layout.batch([0, 1, -2], [1, 3, 0], orders, scales, device=CPU)
    code, rope, row, slot, sees = batch.fed.tolist()
    assert row == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4] and batch.rows.tolist() == [0, 1, 2, 3, 4]
    assert batch.sizes.tolist() == [3, 2, 2, 3, 2] and batch.counts.tolist() == [3, 2, 1, 3, 2]
    assert code == [0, 1, 2, 7, 5, -1, -1, 0, 1, 2, 7, 5]  # places in (3, 5) codes
    assert rope == [2, 3, 4, 4, 2, 0, 0, 2, 3, 4, 4, 2]
    assert slot == [1, 2, 3, 2, 3, 0, 1, 1, 2, 3, 2, 3] and sees == [2, 3, 4, 4, 4, 1, 2, 2, 3, 4, 4, 4]
    causal = StepLayout((turns[0], turns[1]._replace(block=False), turns[2]), slots=3, prefix_rows=2, width=5)
    other = causal.batch([0, 1, -2], [1, 3, 0], orders, scales, device=CPU)
    assert other.fed[4].tolist() == [2, 3, 4, 3, 4, 1, 2, 2, 3, 4, 3, 4] and torch.equal(other.asks, batch.asks)
    assert torch.equal(other.draws, batch.draws) and torch.equal(other.fed[:4], batch.fed[:4])
    token, rope, row, sees = batch.asks.tolist()
    assert row == [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4] and token == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert rope == [3, 4, 5, 3, 5, 2, 3, 4, 5, 3, 5] and sees == [4, 4, 4, 4, 4, 2, 4, 4, 4, 4, 4]
    conditional, unconditional, image, cell, place, position, window = batch.draws.tolist()
    assert conditional == [0, 1, 2, 3, 4, 5] and unconditional == [6, 7, -1, 9, 10, -1]
    assert image == [0, 0, 0, 1, 1, 2] and cell == [1, 2, 3, 1, 3, 0] and place == [1, 2, 3, 6, 8, 10]
    assert position == [1, 2, 3, 3, 4, 0] and window == [0, 0, 0, 3, 4, 5]
    assert batch.scale.tolist() == [2, 2, 1, 3, 3, 1] and batch.longest == 4 and batch.fresh and batch.drafts
    assert batch.shape(64) is None
