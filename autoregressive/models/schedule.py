"""How a model that draws in any order does it: which cells first, how many in each step, how strong the guidance.

Schedules of "Autoregressive Image Generation with Randomized Parallel Decoding" (arXiv 2503.10568).
"""
import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.plan import Groups

SampleSchedule = Literal["arccos", "cosine"]
CfgSchedule = Literal["linear", "constant"]
StepAttention = Literal["block", "causal"]
Order = Literal["random", "raster", "spiral", "spiral-in", "spiral-out", "z-curve", "alternate"]
STEPS = 64


@dataclass(frozen=True)
class DrawSchedule:
    """The choices for an image. steps: for a whole image, at most one per code (None: 64, or the codes of a smaller
    grid); of an image that is known in part, the same share of the steps. step_attention: the codes of a step see each
    other ("block"), or only those before them, as in training ("causal"; None: the model's own)."""

    steps: int | None = None
    sample_schedule: SampleSchedule = "arccos"
    cfg_schedule: CfgSchedule = "linear"
    order: Order = "random"
    step_attention: StepAttention | None = None

    def check(self, length: int) -> None:
        """Raise ValueError for what makes no sense for a grid of `length` cells."""
        for flag, value, known in (("--sample-schedule", self.sample_schedule, SampleSchedule),
                                   ("--cfg-schedule", self.cfg_schedule, CfgSchedule), ("--order", self.order, Order),
                                   ("--step-attention", self.step_attention or "block", StepAttention)):
            if value not in get_args(known):
                raise ValueError(f"{flag} is {value!r}, expected one of {', '.join(get_args(known))}")
        if self.steps is not None and not (isinstance(self.steps, Integral) and 1 <= self.steps <= length):
            raise ValueError(f"--step is {self.steps!r}, expected 1 to {length}, the codes of an image: every step "
                             "draws one at least")

    def resolved(self, step_attention: StepAttention) -> "DrawSchedule":
        """With a model's own `step_attention` where none was chosen."""
        return self if self.step_attention else replace(self, step_attention=step_attention)

    def sizes(self, length: int, *, known: int = 0) -> list[int]:
        """How many codes each step draws of an image of `length`, of which `known` are given."""
        steps, left = min(STEPS, length) if self.steps is None else self.steps, length - known
        return group_sizes(left, max(1, round(steps * left / length)), self.sample_schedule)

    def plan(self, order: np.ndarray, *, cfg_scale: float, guided_steps: int | None = None, known: int = 0) -> Groups:
        """The plan for `order` (L,), whose first `known` cells hold codes already; guidance only in the first
        `guided_steps` (None: all)."""
        sizes = self.sizes(len(order), known=known)
        scales = np.concatenate([np.ones(known), guidance(cfg_scale, sizes, self.cfg_schedule, known=known)])
        if guided_steps is not None:
            scales[known + sum(sizes[:guided_steps]):] = 1
        return Groups(order, scales, sizes, known=known, block=self.step_attention != "causal")


def group_sizes(count: int, steps: int, schedule: SampleSchedule) -> list[int]:
    """How many of `count` codes each of 1 to `count` steps draws: at least one, `count` in all."""
    sizes, left = [], count
    for step in range(1, steps + 1):
        # evaluated in this order, so that the floor below is ARPG's
        share = 2 / math.pi * math.acos(step / steps) if schedule == "arccos" else math.cos(math.pi / 2 * step / steps)
        after = max(steps - step, min(left - 1, math.floor(count * share)))  # every later step needs one
        sizes.append(left - after)
        left = after
    return sizes


def guidance(scale: float, sizes: list[int], schedule: CfgSchedule, *, known: int = 0) -> np.ndarray:
    """The scale for each of the codes that are drawn in groups of these sizes: constant, or rising linearly with the
    share of the image that is there after the group, from 1 to `scale`."""
    if schedule == "constant" or scale <= 1:
        return np.full(sum(sizes), scale)
    share = (known + np.cumsum(sizes)) / (known + sum(sizes))
    return np.repeat(1 + (scale - 1) * share, sizes)


def cell_order(order: Order, grid: tuple[int, int], generator: torch.Generator | None = None) -> np.ndarray:
    """The cells of a grid (h, w) in an order by name, (h*w,) int64; "random" is drawn from `generator`, or from torch's
    global state; "spiral" is "spiral-in"."""
    h, w = grid
    if order == "random":
        device = "cpu" if generator is None else generator.device
        return torch.randperm(h * w, generator=generator, device=device).cpu().numpy()
    cells = np.arange(h * w).reshape(h, w)
    if order == "alternate":  # rows from the left and from the right by turns
        cells[1::2] = cells[1::2, ::-1].copy()
    if order in ("raster", "alternate"):
        return cells.ravel()
    if order == "z-curve":  # by the bits of row and column, in turns (Morton's order)
        rows, columns = np.divmod(np.arange(h * w), w)
        bits = range(max(h, w).bit_length())
        return np.argsort(sum((rows >> b & 1) << (2 * b + 1) | (columns >> b & 1) << (2 * b) for b in bits))
    turns = []
    while cells.size:  # the top row, then the rest turned so that its next side is on top
        turns.append(cells[0])
        cells = np.rot90(cells[1:])
    inwards = np.concatenate(turns)
    return inwards[::-1].copy() if order == "spiral-out" else inwards


def known_first(order: np.ndarray, known: Tensor) -> np.ndarray:
    """The order (L,) with the cells where `known` (L,) bool is true moved to its begin."""
    given = known.cpu().numpy()[order]
    return np.concatenate([order[given], order[~given]])
