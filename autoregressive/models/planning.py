"""From the settings of a call of `generate` to a plan for each image; what is wrong with them."""
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.base import CodeModel
from autoregressive.models.plan import Groups, Raster
from autoregressive.models.ridge import WINDOWS, best_window
from autoregressive.models.schedule import DrawSchedule, cell_order, known_first

Decode = Literal["auto", "sequential", "jacobi"]


def raster_plans(model: CodeModel, given: Tensor, *, decode: Decode, window: int | None, scales: list[float],
                 guided_steps: int | None) -> list[Raster | None]:
    """Plans of a GPT, given (B, L) bool: which cells are known; None for an image of which nothing is left to draw.

    Raises ValueError where cells are known after one that is to be drawn.
    """
    batch, length = given.shape
    known = given.sum(1).tolist()
    for image, count in enumerate(known):
        if not given[image, :count].all():
            first = int((~given[image]).nonzero()[0])
            raise ValueError(f"of image {image} cell {first} is to be drawn and a later one is known: a GPT draws row "
                             "by row, so that it can redraw everything from a cell on; an ARPG redraws any cells")
    rows, price = batch + sum(scale > 1 for scale in scales), 0.0
    if decode == "auto":
        window, price = best_window(model, rows=rows, windows=WINDOWS if window is None else [window])
    elif decode == "jacobi" and window is None:
        window = max(2, best_window(model, rows=rows)[0])
    window = 1 if decode == "sequential" else max(1, min(window, length - 1))
    plans = []
    for scale, count in zip(scales, known, strict=True):
        strength = np.full(length, scale)
        if guided_steps is not None:
            strength[count + guided_steps:] = 1
        plans.append(Raster(strength, known=count, window=window, price=price) if count < length else None)
    return plans


def any_order_plans(model: CodeModel, schedule: DrawSchedule, given: Tensor, *, orders: Tensor | None,
                    generators: Sequence[torch.Generator | None], scales: list[float],
                    guided_steps: int | None) -> list[Groups | None]:
    """Plans of an ARPG; given, and None among what is returned: as above. orders (L,) or (B, L): instead of the
    schedule's. Raises ValueError for what is no order."""
    grid, (batch, length), plans = model.config.grid, given.shape, []
    schedule.check(length)
    if orders is not None and (orders.shape not in ((length,), (batch, length)) or not torch.equal(
            orders.cpu().long().sort(-1).values, torch.arange(length).expand(orders.shape))):
        raise ValueError(f"orders are {tuple(orders.shape)}, expected ({length},) or ({batch}, {length}) with every "
                         "cell of the grid once")
    for image, (scale, generator) in enumerate(zip(scales, generators, strict=True)):
        if orders is None:
            order = cell_order(schedule.order, grid, generator)
        else:
            order = orders.expand(batch, length)[image].cpu().long().numpy()
        known = int(given[image].sum())
        plans.append(None if known == length else schedule.plan(
            known_first(order, given[image]), cfg_scale=scale, guided_steps=guided_steps, known=known))
    return plans


def check_call(model: CodeModel, cond: Tensor, length: int, emb_masks: Tensor | None, *, decode: str,
                window: int | None, schedule: DrawSchedule | None, orders: Tensor | None) -> None:
    """Raise ValueError for what `generate` cannot do with this model; arguments as there."""
    config = model.config
    if model.any_order and (decode == "jacobi" or window is not None):
        raise ValueError("windows of drafts (--decode jacobi) are for a GPT; an ARPG draws --step groups of codes")
    if not model.any_order and (schedule is not None or orders is not None):
        raise ValueError("schedules and orders are for an ARPG: a GPT draws row by row")
    if model.any_order and length != config.block_size:
        raise ValueError(f"max_new_tokens is {length}: an ARPG draws all {config.block_size} codes of its grid")
    if not 0 < length <= config.block_size:
        raise ValueError(f"max_new_tokens is {length}, but the model's grid holds 1 to {config.block_size}")
    if len(cond) == 0:
        raise ValueError("the batch is empty: nothing to generate")
    if config.model_type == "c2i" and (int(cond.min()) < 0 or int(cond.max()) > config.num_classes):
        raise ValueError(f"class labels lie in [{int(cond.min())}, {int(cond.max())}], the model has classes "
                         f"0 to {config.num_classes - 1} (and {config.num_classes} for none)")
    if config.model_type == "t2i" and cond.shape[1:] != (config.cls_token_num, config.caption_dim):
        raise ValueError(f"text features are {tuple(cond.shape)}, the model takes (batch, {config.cls_token_num}, "
                         f"{config.caption_dim})")
    if emb_masks is not None and (cond.ndim < 2 or emb_masks.shape != cond.shape[:2]):
        raise ValueError(f"emb_masks is {tuple(emb_masks.shape)}, expected {tuple(cond.shape[:2])} as the features")
    if decode not in ("auto", "sequential", "jacobi"):
        raise ValueError(f"--decode is {decode!r}, expected auto, sequential or jacobi")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}, expected 1 or more")


def per_image(name: str, value: float | Sequence[float] | Tensor, batch: int, *, whole: bool = False) -> list:
    """A number, or one per image, of Python, NumPy or PyTorch → a list of `batch` finite numbers."""
    values = torch.as_tensor(value, dtype=torch.float64).tolist()
    values = values if isinstance(values, list) else [values] * batch
    if len(values) != batch:
        raise ValueError(f"{len(values)} values of {name} for {batch} samples")
    for number in values:
        if not math.isfinite(number) or (whole and number != int(number)):
            kind = "whole" if whole else "finite"
            raise ValueError(f"--{name.replace('_', '-')} is {number}, expected a {kind} number")
    return [int(number) for number in values] if whole else values
