"""Sample image codes from a GPT with a KV cache and classifier-free guidance, one after the other or in windows."""
import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.gpt import Transformer
from autoregressive.models.plan import Raster, Request
from autoregressive.models.ridge import WINDOWS, best_window
from autoregressive.models.sampling import check_sampling
from utils.compatible import missing_names
from utils.finite import NotFiniteError

Decode = Literal["auto", "sequential", "jacobi"]

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


def generate(model: Transformer, cond: Tensor, max_new_tokens: int, emb_masks: Tensor | None = None,
             cfg_scale: float | Sequence[float] = 1.0, cfg_interval: float = -1,
             temperature: float | Sequence[float] = 1.0, top_k: int | Sequence[int] = 0,
             top_p: float | Sequence[float] = 1.0, sample_logits: bool = True,
             generators: list[torch.Generator] | None = None, decode: Decode = "auto", window: int | None = None,
             statistics: Statistics | None = None) -> Tensor:
    """Generate codes (B, max_new_tokens) int64 in raster order, in eval mode.

    cond: labels (B,) or (B, 1), or text features (B, N, caption_dim); emb_masks (B, N): 1 where the prefix is text, 0
    where it is padding, which is hidden from attention. cfg_scale <= 1 runs one stream. cfg_interval i > -1 guides only
    while the index of the decoding step (0 is the first after the prefill) is <= i, then uses conditional logits alone.
    cfg_scale, temperature, top_k and top_p may be sequences, one value per image. generators: one per sample, from
    which its key is drawn; without them keys come from torch's global state. sample_logits=False takes the best code
    instead of drawing. decode: one code per step, windows of `window` drafts, or auto: windows while they pay. The
    codes are the same. statistics: receives the counts. Raises ValueError for labels, lengths or settings out of
    range, NotFiniteError, at the end, for logits that were not finite.
    """
    batch = len(cond)
    if model.config.model_type == "c2i" and cond.ndim == 2 and cond.shape[1] == 1:
        cond = cond[:, 0]
    _check_call(model, cond, max_new_tokens, emb_masks, decode=decode, window=window)
    scales, temperatures, ks, ps = (_per_image(name, value, batch, whole=name == "top_k") for name, value in (
        ("cfg_scale", cfg_scale), ("temperature", temperature), ("top_k", top_k), ("top_p", top_p)))
    for values in zip(temperatures, ks, ps, strict=True):
        check_sampling(temperature=values[0], top_k=values[1], top_p=values[2])
    if generators is None:
        keys = torch.randint(2**62, (batch,)).tolist()
    elif len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples")
    else:
        keys = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generators]

    with _evaluating(model):
        rows, price = batch + sum(scale > 1 for scale in scales), 0.0
        if decode == "auto":
            window, price = best_window(model, rows=rows, windows=WINDOWS if window is None else [window])
        elif decode == "jacobi" and window is None:
            window = max(2, best_window(model, rows=rows)[0])
        window = 1 if decode == "sequential" else max(1, min(window, max_new_tokens - 1))
        until = math.floor(cfg_interval) + 2 if -1 < cfg_interval < max_new_tokens else max_new_tokens
        strengths = np.ones((batch, max_new_tokens))
        strengths[:, :until] = np.array(scales)[:, None]
        plans = [Raster(strength, window=window, price=price) for strength in strengths]
        conditions = cond.tolist() if cond.ndim == 1 else cond
        visible = [None] * batch if emb_masks is None else emb_masks.cpu()

        decoder, made, steps = take_decoder(model), {}, 0
        decoder.reserve(batch, length=max_new_tokens, guided=max(scales) > 1)
        slots = [decoder.join(Request(*one, greedy=not sample_logits)) for one in zip(
            conditions, plans, keys, temperatures, ks, ps, visible, strict=True)]
        while decoder.active:
            made.update((done.slot, done) for done in decoder.step())
            steps += 1
        check_logits([made[slot].broken for slot in slots])
    give_back(model, decoder)  # only after success: after an error its memory is free
    if statistics is not None:
        statistics.steps, statistics.tokens = steps - 1, max_new_tokens - 1
        statistics.window = sorted(plan.window for plan in plans)[batch // 2]
    return torch.stack([made[slot].codes for slot in slots])


# ---- idle decoders: one for each model, with its caches, for the next call

_IDLE: WeakKeyDictionary[Transformer, CodeDecoder] = WeakKeyDictionary()
_CALLS: WeakKeyDictionary[Transformer, list[list[nn.Module]]] = WeakKeyDictionary()  # in progress: modules to train on
_LOCK = threading.Lock()


def take_decoder(model: Transformer) -> CodeDecoder:
    """The model's idle decoder, or a new one: two threads that generate at once have one each."""
    with _LOCK:
        return _IDLE.pop(model, None) or CodeDecoder(model)


def give_back(model: Transformer, decoder: CodeDecoder) -> None:
    """Keep a decoder for the next call; one at most."""
    with _LOCK:
        _IDLE[model] = decoder


def release(model: Transformer) -> None:
    """Free the memory that the model's idle decoder holds."""
    with _LOCK:
        _IDLE.pop(model, None)


def check_logits(broken: list[int | None]) -> None:
    """Raise NotFiniteError for images that have a code, the first is `broken[i]`, drawn from NaN or infinite logits."""
    images = [i for i, position in enumerate(broken) if position is not None]
    if images:
        raise NotFiniteError(
            f"the GPT's logits are not finite, from code {broken[images[0]]} on, in {len(images)} of {len(broken)} "
            f"images (the first is number {images[0]} of the batch): its weights diverged, or overflow: try "
            "--precision none")


@contextlib.contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
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


def _check_call(model: Transformer, cond: Tensor, length: int, emb_masks: Tensor | None, *, decode: str,
           window: int | None) -> None:
    config = model.config
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


def _per_image(name: str, value: float | Sequence[float] | Tensor, batch: int, *, whole: bool = False) -> list:
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

__getattr__ = missing_names(__name__)  # LlamaGen's other names: sample, …
