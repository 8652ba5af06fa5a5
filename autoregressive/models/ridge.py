"""How many tokens a step may hold before it takes longer than one: measured once for each machine and size of model.

Reading the weights takes most of a small step's time, so more tokens cost little up to a ridge. Windows of drafts pay
below it.
"""
import time
from collections.abc import Sequence

import numpy as np
import torch

from autoregressive.models.base import CodeModel
from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.native_engine import fitting_kernels
from autoregressive.models.plan import Raster, Request
from native.build import cpu
from utils.files import remembered

WINDOWS = (2, 4, 8, 16, 32)
GAIN = 0.4  # a window of w drafts decides about w ** GAIN codes: 1.7 of 4, 2.3 of 8, 3 of 16 (a trained GPT-B)
WORTH = 1.1  # times as fast as single codes: less is not worth it
DEAR = 8.0  # times as long as a step of one token: larger windows cannot pay
REPEATS = 4
PATIENCE = 2.0  # seconds after which a step of each size is timed once, and after twice as long none

_KNOWN: dict[tuple, list[tuple[int, float]]] = {}


def best_window(model: CodeModel, *, rows: int, windows: Sequence[int] = WINDOWS) -> tuple[int, float]:
    """(which of the windows to draw `rows` rows in, how many times as long as one code it takes); (1, 1) if none pays,
    as far as one can know before it is tried."""
    sizes, seconds = zip(*step_seconds(model), strict=True)

    def time_of(tokens: int) -> float:  # beyond what was measured, time grows with the number of tokens
        return float(np.interp(tokens, sizes, seconds)) * max(1.0, tokens / sizes[-1])

    prices = {window: time_of(window * rows) / time_of(rows) for window in windows}
    best = max(prices, key=lambda window: window**GAIN / prices[window])
    return (best, prices[best]) if best**GAIN / prices[best] > WORTH else (1, 1.0)


def step_seconds(model: CodeModel) -> list[tuple[int, float]]:
    """(tokens, seconds of a step of so many), choosing codes included; kept in the cache folder."""
    config, weight = model.config, next(model.parameters())
    device = cpu() if weight.device.type == "cpu" else torch.cuda.get_device_name(weight.device)
    weights, kernels = fitting_kernels(model)
    file = getattr(kernels, "_name", None)  # has another name when the kernels change
    key = (device, torch.get_num_threads(), torch.__version__, str(weight.dtype), weights, file, config.n_layer,
           config.dim, config.n_head, config.n_kv_head, config.hidden, config.vocab_size, config.block_size)
    if key not in _KNOWN:
        try:
            kept = remembered("step-seconds", key, lambda: measure_steps(model))
            _KNOWN[key] = [(int(tokens), float(seconds)) for tokens, seconds in kept]
        except (TypeError, ValueError):  # somebody else wrote into the file
            _KNOWN[key] = measure_steps(model)
    return _KNOWN[key] or [(1, 1.0)]


def measure_steps(model: CodeModel) -> list[tuple[int, float]]:
    """The same, measured now: some steps of each size, about a second in all for GPT-B on two cores, some seconds for
    the largest models. On a busy machine some take ten times as long, but fewer tokens never longer than more."""
    config, decoder, found, spent = model.config, CodeDecoder(model), [], 0.0
    decoder.reserve(1, guided=False)
    condition = 0 if config.model_type == "c2i" else torch.zeros(
        config.cls_token_num, config.caption_dim, dtype=next(model.parameters()).dtype)
    for tokens in (1, *WINDOWS, 2 * WINDOWS[-1]):
        plan, spans = Raster(np.ones(config.block_size), window=tokens), []
        slot = decoder.join(Request(condition, plan, key=0))
        decoder.step()
        while slot in decoder.active and len(spans) < (REPEATS if spent < PATIENCE else 1) and plan.next()[2] == tokens:
            start = time.perf_counter()
            decoder.step()
            if decoder.codes.device.type == "cuda":
                torch.cuda.synchronize(decoder.codes.device)
            spans.append(time.perf_counter() - start)
            spent += spans[-1]
        if slot in decoder.active:
            decoder.leave(slot)
        if not spans or (found and (min(spans) > DEAR * found[0][1] or spent > 2 * PATIENCE)):
            break
        found.append((tokens, min(spans)))
    for i in reversed(range(len(found) - 1)):
        found[i] = found[i][0], min(found[i][1], found[i + 1][1])
    return found or [(1, 1.0)]  # a model of one code has no windows
