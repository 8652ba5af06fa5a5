"""Sample image codes with a KV cache and classifier-free guidance: from a GPT one after the other or in windows of
drafts, from an ARPG in any order and many at once."""
import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from autoregressive.models.arguments import floats, integers, per_image
from autoregressive.models.base import CodeModel
from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.plan import Request
from autoregressive.models.planning import (
    Decode,
    any_order_plans,
    check_call,
    draw_keys,
    raster_plans,
    read_conditions,
    read_known,
)
from autoregressive.models.sampling import check_sampling, check_strength
from autoregressive.models.schedule import DrawSchedule
from utils.compatible import missing_names
from utils.finite import NotFiniteError


@dataclass
class Statistics:
    """What a call of `generate` did."""

    steps: int = 0  # forward passes after the prefill
    tokens: int = 0  # codes of each image that came from these steps
    window: int = 1  # codes tried at once, as chosen in the end for most images

    @property
    def tokens_per_step(self) -> float:
        """Mean number of codes that an image gets in a forward pass."""
        return self.tokens / max(1, self.steps)


def generate(model: CodeModel, cond: ArrayLike, max_new_tokens: int, emb_masks: ArrayLike | None = None,
             cfg_scale: ArrayLike = 1.0, cfg_interval: float = -1, temperature: ArrayLike = 1.0, top_k: ArrayLike = 0,
             top_p: ArrayLike = 1.0, sample_logits: bool = True, generators: Sequence[torch.Generator] | None = None,
             decode: Decode = "auto", window: int | None = None, statistics: Statistics | None = None, *,
             schedule: DrawSchedule | None = None, orders: ArrayLike | None = None, known: ArrayLike | None = None,
             control: Sequence[ArrayLike | None] | Tensor | None = None, control_strength: ArrayLike = 1.0) -> Tensor:
    """Generate codes (B, max_new_tokens) int64 in raster order, in eval mode, on the device of cond if that is a
    tensor, else of the model. What is an ArrayLike may be a list, a NumPy array or a tensor on any device.

    cond: labels (B,) or (B, 1), or text features (B, N, caption_dim); emb_masks (B, N): 1 where the prefix is text, 0
    where it is padding, which is hidden from attention. cfg_scale <= 1 runs one stream. cfg_interval i > -1 guides only
    while the index of the decoding step (0 is the first after the prefill) is <= i, then uses conditional logits alone.
    cfg_scale, temperature, top_k and top_p may hold one value per image. generators: one per sample, from
    which its key is drawn, and its order; without them they come from torch's global state. sample_logits=False takes
    the best code instead of drawing. statistics: receives the counts.

    known (B, L): codes that are given, -1 where one is to be drawn; they are returned as they are. A GPT draws what
    comes after the known ones in raster order, an ARPG any cells.
    Of a GPT, decode: one code per step, windows of `window` drafts, or auto: windows while they pay. The codes are the
    same. Of an ARPG, schedule: how many codes in which step; orders (L,) or (B, L): cells in the order in which they
    are drawn, instead of the schedule's; max_new_tokens is L. What is for the other kind of model is refused.
    Of a model with a control adapter, control: a picture (C, H, W) in [-1, 1] of the image's size, or None, for each
    image; what it adds is multiplied by control_strength, 0 is the same as no picture.
    Raises ValueError for labels, lengths or settings out of range, NotFiniteError, at the end, for logits that were not
    finite.
    """
    device = cond.device if isinstance(cond, Tensor) else next(model.parameters()).device
    with _evaluating(model):
        requests = requests_for(
            model, cond, max_new_tokens, emb_masks, cfg_scale=cfg_scale, cfg_interval=cfg_interval,
            temperature=temperature, top_k=top_k, top_p=top_p, sample_logits=sample_logits, generators=generators,
            decode=decode, window=window, schedule=schedule, orders=orders, known=known, control=control,
            control_strength=control_strength)
        known = read_known(model, known, (len(requests), int(max_new_tokens)))
        codes, broken, homes = known.to(device, copy=True), [None] * len(requests), {}
        decoder, steps = take_decoder(model), 0
        wanted = [request for request in requests if request is not None]
        decoder.reserve(len(requests), length=max_new_tokens, guided=any(one.plan.guided_until for one in wanted))
        for image, request in enumerate(requests):
            if request is not None:
                homes[decoder.join(request)] = image
        while decoder.active:
            for done in decoder.step():
                codes[homes[done.slot]], broken[homes[done.slot]] = done.codes, done.broken
            steps += 1
        check_logits(broken)
    give_back(model, decoder)  # only after success: after an error its memory is free
    if statistics is not None:
        drawn = int((known < 0).sum(1).max())
        statistics.steps, statistics.tokens = max(0, steps - 1), max(0, drawn - 1)
        statistics.window = sorted(one.plan.window for one in wanted)[len(wanted) // 2] if wanted else 1
    return codes


def requests_for(model: CodeModel, cond: ArrayLike, max_new_tokens: int, emb_masks: ArrayLike | None = None, *,
                 cfg_scale: ArrayLike = 1.0, cfg_interval: float = -1, temperature: ArrayLike = 1.0,
                 top_k: ArrayLike = 0, top_p: ArrayLike = 1.0, sample_logits: bool = True,
                 generators: Sequence[torch.Generator] | None = None, decode: Decode = "auto",
                 window: int | None = None, schedule: DrawSchedule | None = None, orders: ArrayLike | None = None,
                 known: ArrayLike | None = None, control: Sequence[ArrayLike | None] | Tensor | None = None,
                 control_strength: ArrayLike = 1.0, beside: int = 0) -> list[Request | None]:
    """What a `CodeDecoder` is asked for each image of a call of `generate`, whose arguments these are; None for an
    image of which all codes are known. beside: rows of other images in the decoder, for the choice of windows.
    Raises ValueError for what makes no sense. The model must be in eval mode.
    """
    cond = read_conditions(model, cond)
    orders = None if orders is None else integers("orders are", orders)
    emb_masks = None if emb_masks is None else torch.as_tensor(emb_masks).cpu()
    check_call(model, cond, max_new_tokens, emb_masks, cfg_interval=cfg_interval, decode=decode, window=window,
               schedule=schedule, orders=orders)
    batch = len(cond)
    known = read_known(model, known, (batch, int(max_new_tokens)))
    given = known >= 0
    scales, temperatures, ks, ps = (per_image(name, value, batch, whole=name == "top_k") for name, value in (
        ("cfg_scale", cfg_scale), ("temperature", temperature), ("top_k", top_k), ("top_p", top_p)))
    for values in zip(temperatures, ks, ps, strict=True):
        check_sampling(temperature=values[0], top_k=values[1], top_p=values[2])
    keys = draw_keys(generators, batch)
    steps = math.floor(cfg_interval) + 2 if cfg_interval > -1 else None  # that are guided, the prefill's included
    if model.any_order:
        plans = any_order_plans(model, schedule or DrawSchedule(), given, orders=orders,
                                generators=generators or [None] * batch, scales=scales, guided_steps=steps)
    else:
        plans = raster_plans(model, given, decode=decode, window=window, scales=scales, guided_steps=steps,
                             beside=beside)
    terms = control_of(model, control, per_image("control_strength", control_strength, batch))
    conditions = cond.tolist() if cond.ndim == 1 else cond
    visible = [None] * batch if emb_masks is None else emb_masks
    return [None if plan is None else Request(condition, plan, *settings, greedy=not sample_logits,
                                              known=image[plan.order[:plan.known]], control=control_terms)
            for condition, plan, image, control_terms, *settings in zip(
                conditions, plans, known, terms, keys, temperatures, ks, ps, visible, strict=True)]


def control_of(model: CodeModel, pictures: Sequence[ArrayLike | None] | Tensor | None,
               strengths: list[float]) -> list[Tensor | None]:
    """What the control picture of each image adds (places, L, D). Each goes through the adapter alone, so that it does
    not depend on the batch. Raises ValueError for a model without an adapter, for pictures that do not fit and for
    strengths that are huge."""
    if pictures is None:
        return [None] * len(strengths)
    if len(pictures) != len(strengths):
        raise ValueError(f"{len(pictures)} control pictures for {len(strengths)} samples")
    for strength in strengths:
        check_strength(strength)
    pictures = [None if picture is None else floats("a control picture is", picture).float() for picture in pictures]
    for picture in pictures:
        if picture is not None and picture.numel() and not picture.abs().max() <= 1:
            raise ValueError(f"a control picture has values in [{picture.min():g}, {picture.max():g}], expected -1 to "
                             "1")
    return [None if picture is None or strength == 0 else strength * model.control_terms(picture[None])[:, 0]
            for picture, strength in zip(pictures, strengths, strict=True)]


# ---- idle decoders: one for each model, with its caches, for the next call

_IDLE: WeakKeyDictionary[CodeModel, CodeDecoder] = WeakKeyDictionary()
_CALLS: WeakKeyDictionary[CodeModel, list[list[nn.Module]]] = WeakKeyDictionary()  # in progress: modules to train on
_LOCK = threading.Lock()


def take_decoder(model: CodeModel) -> CodeDecoder:
    """The model's idle decoder, or a new one: two threads that generate at once have one each."""
    with _LOCK:
        return _IDLE.pop(model, None) or CodeDecoder(model)


def give_back(model: CodeModel, decoder: CodeDecoder) -> None:
    """Keep a decoder for the next call; one at most."""
    with _LOCK:
        _IDLE[model] = decoder


def release(model: CodeModel) -> None:
    """Free the memory that the model's idle decoder holds."""
    with _LOCK:
        _IDLE.pop(model, None)


def check_logits(broken: list[int | None]) -> None:
    """Raise NotFiniteError for images that have a code, the first is `broken[i]`, drawn from NaN or infinite logits."""
    images = [i for i, position in enumerate(broken) if position is not None]
    if images:
        raise NotFiniteError(
            f"the model's logits are not finite, from code {broken[images[0]]} on, in {len(images)} of {len(broken)} "
            f"images (the first is number {images[0]} of the batch): its weights diverged, or overflow: try "
            "--precision none")


@contextlib.contextmanager
def _evaluating(model: CodeModel) -> Iterator[None]:
    """Within the block the model is in eval mode, until the last of several threads has left it; tensors made there may
    be used in any mode later."""
    with _LOCK:
        calls = _CALLS.setdefault(model, [])
        calls.append([module for module in model.modules() if module.training])
        model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        with _LOCK:
            training = calls.pop()
            if calls:
                calls[0] += training
            else:
                del _CALLS[model]
                for module in training:
                    module.training = True


__getattr__ = missing_names(__name__)  # LlamaGen's other names: sample, …
