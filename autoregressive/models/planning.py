"""From the settings of a call of `generate` to a plan for each image; what is wrong with them."""
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from autoregressive.models.arguments import floats, integers
from autoregressive.models.base import CodeModel
from autoregressive.models.plan import Groups, Raster
from autoregressive.models.ridge import WINDOWS, best_window
from autoregressive.models.schedule import DrawSchedule, cell_order, known_first

Decode = Literal["auto", "sequential", "jacobi"]


def raster_plans(model: CodeModel, given: Tensor, *, decode: Decode, window: int | None, scales: list[float],
                 guided_steps: int | None, beside: int = 0) -> list[Raster | None]:
    """Plans of a GPT, given (B, L) bool: which cells are known; None for an image of which nothing is left to draw.
    beside: rows of other images that are decoded at the same time.

    Raises ValueError where cells are known after one that is to be drawn.
    """
    batch, length = given.shape
    known = given.sum(1).tolist()
    for image, count in enumerate(known):
        if not given[image, :count].all():
            first = int((~given[image]).nonzero()[0])
            raise ValueError(f"of image {image} cell {first} is to be drawn and a later one is known: a GPT draws row "
                             "by row, so that it can redraw everything from a cell on; an ARPG redraws any cells")
    rows, price = beside + batch + sum(scale > 1 for scale in scales), 0.0
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
    schedule = schedule.resolved(model.step_attention)
    if orders is not None and (orders.shape not in ((length,), (batch, length)) or not torch.equal(
            orders.sort(-1).values, torch.arange(length).expand(orders.shape))):
        raise ValueError(f"orders are of shape {tuple(orders.shape)}, expected ({length},) or ({batch}, {length}) with "
                         "every cell of the grid once")
    for image, (scale, generator) in enumerate(zip(scales, generators, strict=True)):
        if orders is None:
            order = cell_order(schedule.order, grid, generator)
        else:
            order = orders.expand(batch, length)[image].numpy()
        known = int(given[image].sum())
        plans.append(None if known == length else schedule.plan(
            known_first(order, given[image]), cfg_scale=scale, guided_steps=guided_steps, known=known))
    return plans


def read_conditions(model: CodeModel, cond: ArrayLike) -> Tensor:
    """What `generate` takes as conditions, in any form → labels (B,) int64, or text features (B, N, caption_dim).

    Raises ValueError for what the model does not take.
    """
    config = model.config
    if config.model_type == "c2i":
        labels = integers("class labels are", cond)
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.ndim != 1:
            raise ValueError(f"class labels are of shape {tuple(labels.shape)}, expected (batch,)")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= config.num_classes:
            raise ValueError(f"class labels lie in [{int(labels.min())}, {int(labels.max())}], the model has classes "
                             f"0 to {config.num_classes - 1} (and {config.num_classes} for none)")
    else:
        labels = cond if isinstance(cond, Tensor) else floats("text features are", cond).float()
        if labels.ndim != 3 or labels.shape[1:] != (config.cls_token_num, config.caption_dim):
            raise ValueError(f"text features are {tuple(labels.shape)}, the model takes (batch, "
                             f"{config.cls_token_num}, {config.caption_dim})")
    if len(labels) == 0:
        raise ValueError("the batch is empty: nothing to generate")
    return labels


def read_known(model: CodeModel, known: ArrayLike | None, shape: tuple[int, int]) -> Tensor:
    """Known codes (B, L) int64 on the CPU, -1 where one is to be drawn. Raises ValueError for others."""
    if known is None:
        return torch.full(shape, -1)
    known, vocab = integers("known codes are", known), model.config.vocab_size
    if known.shape != shape:
        raise ValueError(f"known codes are of shape {tuple(known.shape)}, expected {shape}: the codes of images")
    if not -1 <= int(known.min()) <= int(known.max()) < vocab:
        raise ValueError(f"known codes lie in [{int(known.min())}, {int(known.max())}], expected codes 0 to "
                         f"{vocab - 1}, or -1 where one is to be drawn")
    return known


def draw_keys(generators: Sequence[torch.Generator] | None, batch: int) -> list[int]:
    """The key of each image, drawn from its generator, or all from torch's global state."""
    if generators is None:
        return torch.randint(2**62, (batch,)).tolist()
    if not isinstance(generators, Sequence):
        raise ValueError(f"generators is a {type(generators).__name__}, expected a list of {batch}, one for each image")
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples")
    for generator in generators:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generators hold a {type(generator).__name__}, expected torch.Generator")
    return [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generators]


def check_call(model: CodeModel, cond: Tensor, length: int, emb_masks: Tensor | None, *, cfg_interval: float,
               decode: str, window: int | None, schedule: DrawSchedule | None, orders: Tensor | None) -> None:
    """Raise ValueError for what `generate` cannot do with this model; arguments as there."""
    config = model.config
    if model.any_order and (decode == "jacobi" or window is not None):
        raise ValueError("windows of drafts (--decode jacobi) are for a GPT; an ARPG draws --step groups of codes")
    if not model.any_order and (schedule is not None or orders is not None):
        raise ValueError("schedules and orders are for an ARPG: a GPT draws row by row")
    if model.any_order and length != config.block_size:
        raise ValueError(f"max_new_tokens is {length}: an ARPG draws all {config.block_size} codes of its grid")
    if not isinstance(length, Integral) or not 0 < length <= config.block_size:
        raise ValueError(f"max_new_tokens is {length}, but the model's grid holds 1 to {config.block_size}")
    if not math.isfinite(cfg_interval):
        raise ValueError(f"--cfg-interval is {cfg_interval}, expected a number of steps, or -1")
    if emb_masks is not None and (cond.ndim < 2 or emb_masks.shape != cond.shape[:2]):
        raise ValueError(f"emb_masks is {tuple(emb_masks.shape)}, expected {tuple(cond.shape[:2])} as the features")
    if decode not in ("auto", "sequential", "jacobi"):
        raise ValueError(f"--decode is {decode!r}, expected auto, sequential or jacobi")
    if window is not None and (not isinstance(window, Integral) or window < 1):
        raise ValueError(f"the window is {window}, expected 1 or more")
