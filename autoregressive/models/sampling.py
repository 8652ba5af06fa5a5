"""From logits to a code: guidance, temperature, top-k, top-p and the draw. The only place where codes are chosen.

Randomness is a function of (key of the image, position of the code): Gumbel noise made from Philox counters, and the
code with the largest logit + noise, which is a draw from the softmax. So an image depends neither on the batch it is
drawn in nor on how many positions are tried at once. `native/sample.cpp` is the same in C++, for CPUs.
"""
import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from native.build import load

MIN_TEMPERATURE = 1e-5
MOST_STRENGTH = 100  # of control, to either side: far beyond what training shows


@dataclass
class Settings:
    """How codes are drawn, on one device; tensors (B,) hold one value per image."""

    temperature: Tensor  # fp32
    top_k: Tensor  # int64, 0: all
    top_p: Tensor  # fp32, 1: all
    key: Tensor  # int64
    greedy: Tensor  # bool: take the best code
    largest_k: int = 0  # the largest top_k in use, 0: none; this and the following are known without asking the device
    uses_top_p: bool = False


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on logits (B, V): l_u + scale * (l_c - l_u); scale a number or
    (B, 1)."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int | Tensor = 0,
                  top_p: float | Tensor = 1.0, largest_k: int | None = None, uses_top_p: bool = True) -> Tensor:
    """Logits (B, V) → logits / temperature with everything outside top-k and top-p at -inf.

    top_k 0 keeps all; ties with the k-th are kept. top_p keeps the shortest prefix of the sorted probabilities whose
    mass exceeds it (nucleus sampling, arXiv 1904.09751), at least one. Each may be a tensor, one value per row.
    largest_k, uses_top_p: what is known of them without asking the device.
    """
    temperature, top_p = (torch.as_tensor(x, dtype=torch.float32, device=logits.device).expand(len(logits))
                          for x in (temperature, top_p))
    top_k = torch.as_tensor(top_k, device=logits.device).expand(len(logits))
    logits, vocab = logits.float() / temperature.clamp_min(MIN_TEMPERATURE)[:, None], logits.shape[-1]
    largest_k = min(vocab, int(top_k.max()) if largest_k is None else largest_k)
    if largest_k > 0:
        kth = logits.topk(largest_k).values.gather(1, (top_k - 1).clamp(0, largest_k - 1)[:, None])
        logits = logits.masked_fill((logits < kth) & ((top_k > 0) & (top_k < vocab))[:, None], float("-inf"))
    if uses_top_p:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        beyond = (probabilities.cumsum(-1) - probabilities > top_p[:, None]) & (top_p < 1)[:, None]  # of better codes
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def gumbel(keys: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Gumbel noise -ln(-ln(1 - u)) for codes 0 … vocab-1: keys, positions (B,) int64 → (B, vocab) fp32.

    u = (bits + 1/2) / 2^32; word v mod 4 of the Philox counter (v div 4, position) gives the bits of code v.
    """
    blocks = torch.arange(-(-vocab // 4), device=keys.device)
    words = philox(keys[:, None], blocks[None], positions[:, None])  # 4 times (B, blocks)
    u = torch.stack(words, dim=-1).flatten(1)[:, :vocab].float() * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))


def philox(keys: Tensor, *counters: Tensor) -> list[Tensor]:
    """Philox 4x32 with ten rounds ("Parallel random numbers: as easy as 1, 2, 3", SC 2011), in int64 arithmetic.

    keys int64 (its two halves are the key), up to four counters below 2^32, all broadcast → four tensors of words in
    [0, 2^32).
    """
    low = 2**32 - 1
    key = [keys & low, (keys >> 32) & low]
    state = [*torch.broadcast_tensors(*(c & low for c in counters)), *[torch.zeros_like(keys)] * (4 - len(counters))]
    for _ in range(10):
        a, b = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57  # overflows int64, but all 64 bits are right
        state = [((b >> 32) & low) ^ state[1] ^ key[0], b & low, ((a >> 32) & low) ^ state[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return list(torch.broadcast_tensors(*state))


def draw(logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """One code per row of logits (B, V), a draw from their softmax fixed by (key, position) → (B,) int64."""
    return (logits.float() + gumbel(keys, positions, logits.shape[-1])).argmax(-1)


def choose(logits: Tensor, draws: Tensor, scale: Tensor, settings: Settings, *,
           fused: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (n,) int64 for n slots, and whether the guided logits of each are finite, (n,) bool, which the host does
    not wait to see.

    draws (4 or more, n) int64: row of the logits (rows, V); row that guides it, or -1; image; position. scale (n,)
    fp32: of guidance. fused: by torch.compile, which makes a few kernels of two hundred; for GPUs.
    """
    kernels = load("sample") if logits.device.type == "cpu" else None
    if kernels is not None:
        return _choose_native(kernels, logits, draws, scale, settings)
    chosen = _fused() if fused else _choose_plain
    return chosen(logits, draws, scale, settings.temperature, settings.top_k, settings.top_p, settings.key,
                  settings.greedy, settings.largest_k, settings.uses_top_p)


def _choose_plain(logits: Tensor, draws: Tensor, scale: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
            keys: Tensor, greedy: Tensor, largest_k: int, uses_top_p: bool) -> tuple[Tensor, Tensor]:
    conditional, unconditional, image, position = draws[:4].unbind()
    chosen = logits[conditional]
    guided = (unconditional >= 0)[:, None]
    chosen = torch.where(guided, guide(chosen, logits[unconditional], scale[:, None]), chosen)
    low, high = chosen.aminmax(dim=-1)
    finite = low.isfinite() & high.isfinite()  # before the filters, which put -inf in
    best = chosen.argmax(-1)
    chosen = filter_logits(chosen, temperature=temperature[image], top_k=top_k[image], top_p=top_p[image],
                           largest_k=largest_k, uses_top_p=uses_top_p)
    return torch.where(greedy[image], best, draw(chosen, keys[image], position)), finite


@functools.cache
def _fused() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_choose_plain, dynamic=True)


class Draws(ctypes.Structure):
    """The struct of the same name in native/sample.cpp."""

    _fields_ = [("logits", ctypes.c_void_p), ("stride", ctypes.c_int64), ("vocab", ctypes.c_int64),
                ("count", ctypes.c_int64), *((name, ctypes.c_void_p) for name in (
                    "conditional", "unconditional", "image", "position", "scale", "temperature", "top_k", "top_p",
                    "key", "greedy", "codes", "finite")), ("threads", ctypes.c_int64)]


def _choose_native(kernels: ctypes.CDLL, logits: Tensor, draws: Tensor, scale: Tensor,
                   settings: Settings) -> tuple[Tensor, Tensor]:
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    count, first = draws.shape[1], draws.data_ptr()
    assert draws.is_contiguous() and draws.dtype == torch.int64, (draws.stride(), draws.dtype)
    codes, finite = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.bool)
    arrays = scale, settings.temperature, settings.top_k, settings.top_p, settings.key, settings.greedy, codes, finite
    kernels.sample(ctypes.byref(Draws(logits.data_ptr(), logits.stride(0), logits.shape[1], count,
                                      *(first + 8 * count * i for i in range(4)), *(x.data_ptr() for x in arrays),
                                      min(torch.get_num_threads(), count))))
    return codes, finite


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength of control that makes no sense: of a huge one nothing but the control is left."""
    if not -MOST_STRENGTH <= strength <= MOST_STRENGTH:
        raise ValueError(f"--control-strength is {strength}, expected {-MOST_STRENGTH} to {MOST_STRENGTH}: 1 as in "
                         "training, 0 as without a control picture, less than 0 away from it")


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a setting that has no meaning."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature is {temperature}, expected 0 or more")
    if not 0 <= top_k < 2**63:
        raise ValueError(f"--top-k is {top_k}, expected 0 (all) or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"--top-p is {top_p}, expected a value in [0, 1]")
