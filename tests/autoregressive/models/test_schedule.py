"""ARPG's schedules, orders and guidance: the tables of its code, and what holds for any length."""
import math
from typing import get_args

import numpy as np
import pytest
import torch

from autoregressive.models.schedule import (
    DrawSchedule,
    Order,
    SampleSchedule,
    cell_order,
    group_sizes,
    guidance,
    known_first,
)

TABLES = {  # of 256 codes
    ("arccos", 8): "21 21 21 23 25 28 35 82",
    ("arccos", 16): "11 10 10 11 10 11 11 12 12 13 13 15 16 19 25 57",
    ("arccos", 24): "7 7 7 7 7 7 7 7 7 8 7 8 8 8 9 8 10 10 10 12 13 15 20 47",
    ("arccos", 32): "6 5 5 5 5 5 5 6 5 5 6 5 6 5 6 6 6 6 6 7 6 7 7 8 8 8 9 10 11 14 17 40",
    ("cosine", 32): "1 1 1 2 3 4 3 5 5 6 6 7 7 8 8 8 10 9 10 10 11 11 11 12 11 12 12 13 12 12 13 12",
    ("arccos", 256): " ".join(["1"] * 256), ("cosine", 256): " ".join(["1"] * 256),
}


def as_specified(count: int, steps: int, schedule: str) -> list[int]:
    """The formula, word for word."""
    sizes, done = [], 0
    for step in range(1, steps):
        u = step / steps
        rho = 2 / math.pi * math.acos(u) if schedule == "arccos" else math.cos(math.pi / 2 * step / steps)
        left = max(1, min(count - done - 1, math.floor(count * rho)))
        sizes.append(count - done - left)
        done = count - left
    return [*sizes, count - done]


@pytest.mark.parametrize(("schedule", "steps"), TABLES)
def test_tables(schedule, steps):
    assert group_sizes(256, steps, schedule) == [int(word) for word in TABLES[schedule, steps].split()]


def test_64_steps_of_256():
    arccos, cosine = (group_sizes(256, 64, schedule) for schedule in ("arccos", "cosine"))
    assert arccos[:6] == [3, 3, 2, 3, 2, 3] and arccos[-12:] == [5, 4, 5, 5, 6, 5, 7, 7, 7, 10, 12, 28]
    assert cosine[:14] == [1] * 13 + [2] and cosine[-9:] == [7, 6, 6, 6, 6, 7, 6, 6, 6]


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_every_length_and_number_of_steps(schedule):
    for count in (*range(1, 65), 144, 256):
        for steps in range(1, count + 1):
            sizes = group_sizes(count, steps, schedule)
            assert len(sizes) == steps and sum(sizes) == count and min(sizes) >= 1
            assert sizes == as_specified(count, steps, schedule)


@pytest.mark.parametrize("known", [0, 5])
def test_guidance_rises_to_its_scale_or_stays(known):
    rising = guidance(4.0, [1, 2, 4], "linear", known=known)
    length = known + 7
    assert rising.tolist() == pytest.approx([1 + 3 * (known + done) / length for done in (1, 3, 3, 7, 7, 7, 7)])
    assert rising[-1] == 4.0
    assert guidance(4.0, [1, 2, 4], "constant").tolist() == [4.0] * 7
    assert guidance(1.0, [1, 2], "linear").tolist() == [1.0] * 3 and guidance(0.0, [3], "linear").max() == 0


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 4), (4, 4), (5, 3), (16, 16)])
@pytest.mark.parametrize("name", get_args(Order))
def test_every_order_holds_every_cell_once(name, grid):
    assert sorted(cell_order(name, grid).tolist()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("name", get_args(Order))
@pytest.mark.parametrize("sample_schedule", get_args(SampleSchedule))
def test_every_plan_draws_every_cell_once(sample_schedule, name):
    """For every length up to 64, on a grid of that many cells, and every number of steps; a fifth known beforehand."""
    for length in range(1, 65):
        h = max(side for side in range(1, 9) if length % side == 0)
        for steps in range(1, length + 1):
            schedule = DrawSchedule(steps, sample_schedule, order=name)
            schedule.check(length)
            given = torch.arange(length) % 5 == 4
            known = int(given.sum()) if steps % 2 else 0
            order = cell_order(name, (h, length // h))
            plan = schedule.plan(known_first(order, given) if known else order, cfg_scale=2.0, known=known)
            drawn, groups = [], 0
            while not plan.finished:
                end, first, count = plan.next()
                assert end == first == plan.decided and count >= 1  # all that is decided is fed
                drawn += plan.order[first:first + count].tolist()
                groups += 1
                plan.settle(count)
            whole = range(length) if known == 0 else (~given).nonzero().flatten().tolist()
            assert sorted(drawn) == list(whole) and (groups == steps or known)


def test_orders_by_name():
    assert cell_order("raster", (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert cell_order("alternate", (3, 3)).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    for name in ("spiral", "spiral-in"):
        assert cell_order(name, (3, 4)).tolist() == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]
    assert cell_order("spiral-out", (3, 3)).tolist() == [4, 3, 6, 7, 8, 5, 2, 1, 0]
    assert cell_order("z-curve", (4, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    one, same, other = (cell_order("random", (4, 4), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_a_plan_of_an_image_that_is_known_in_part():
    """The known share of the image takes its share of the steps; guidance goes on where it would be."""
    order = known_first(np.arange(8)[::-1], torch.tensor([True, False, False, True, False, False, False, False]))
    assert order.tolist() == [3, 0, 7, 6, 5, 4, 2, 1]
    plan = DrawSchedule(4).plan(order, cfg_scale=3.0, known=2)
    assert len(plan.ends) == 3 and plan.known == 2 and plan.scales[-1] == 3.0 and plan.scales[2] > 1 + 2 * 2 / 8
    assert DrawSchedule(1).plan(order, cfg_scale=3.0, known=7).ends == [8]
    assert len(DrawSchedule().sizes(10)) == 10 and len(DrawSchedule().sizes(256)) == 64
    early = DrawSchedule(4).plan(order, cfg_scale=3.0, known=2, guided_steps=1)
    assert (early.scales[2:early.ends[0]] > 1).all() and (early.scales[early.ends[0]:] == 1).all()
