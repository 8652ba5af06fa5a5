"""From logits to a code: guidance, temperature, top-k, top-p and the draw. The only place where codes are chosen.

Randomness is a function of (key of the image, position of the code): Gumbel noise made from Philox counters, and the
code with the largest logit + noise, which is a draw from the softmax. So an image depends neither on the batch it is
drawn in nor on how many positions are tried at once. `native/sample.cpp` is the same in C++, for CPUs.
"""
import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from native.build import load, pointer

MIN_TEMPERATURE = 1e-5


@dataclass
class Settings:
    """How codes are drawn, on one device; tensors (B,) hold one value per image."""

    scale: Tensor  # of guidance, fp32
    temperature: Tensor  # fp32
    top_k: Tensor  # int64, 0: all
    top_p: Tensor  # fp32, 1: all
    keys: Tensor  # int64
    greedy: bool
    uses_top_k: bool = False  # known on the host, without a sync
    uses_top_p: bool = False


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on logits (B, V): l_u + scale * (l_c - l_u); scale a number or
    (B, 1)."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int | Tensor = 0,
                  top_p: float | Tensor = 1.0) -> Tensor:
    """Logits (B, V) → logits / temperature with everything outside top-k and top-p at -inf.

    top_k 0 keeps all; ties with the k-th are kept. top_p keeps the shortest prefix of the sorted probabilities whose
    mass exceeds it (nucleus sampling, arXiv 1904.09751), at least one. Each may be a tensor, one value per row.
    """
    temperature, top_p = (torch.as_tensor(x, dtype=torch.float32, device=logits.device).expand(len(logits))
                          for x in (temperature, top_p))
    top_k = torch.as_tensor(top_k, device=logits.device).expand(len(logits))
    logits = logits.float() / temperature.clamp_min(MIN_TEMPERATURE)[:, None]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    kth = ordered.gather(1, torch.where((top_k > 0) & (top_k < vocab), top_k - 1, vocab - 1)[:, None])
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    probabilities = ordered.softmax(-1)
    beyond = (probabilities.cumsum(-1) - probabilities > top_p[:, None]) & (top_p < 1)[:, None]  # mass of better codes
    beyond[:, 0] = False
    beyond |= ordered == float("-inf")
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))


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


def choose(logits: Tensor, conditional: Tensor, unconditional: Tensor, positions: Tensor, images: Tensor,
           settings: Settings) -> tuple[Tensor, Tensor]:
    """Codes (n,) int64 for n slots: row `conditional[i]` of logits (rows, V) guided by row `unconditional[i]` (-1: by
    none), drawn for position `positions[i]` of image `images[i]`; and whether the guided logits of each are finite,
    (n,) bool: the host does not wait to see it."""
    kernels = load("sample") if logits.device.type == "cpu" else None
    if kernels is not None:
        return _choose_native(kernels, logits, conditional, unconditional, positions, images, settings)
    chosen = logits[conditional]
    guided = (unconditional >= 0)[:, None]
    chosen = torch.where(guided, guide(chosen, logits[unconditional], settings.scale[images][:, None]), chosen)
    low, high = chosen.aminmax(dim=-1)
    finite = low.isfinite() & high.isfinite()  # before the filters, which put -inf in
    if settings.greedy:
        return chosen.argmax(-1), finite
    if settings.uses_top_k or settings.uses_top_p:
        chosen = filter_logits(chosen, temperature=settings.temperature[images], top_k=settings.top_k[images],
                               top_p=settings.top_p[images])
    else:
        chosen = chosen / settings.temperature[images].clamp_min(MIN_TEMPERATURE)[:, None]
    return draw(chosen, settings.keys[images], positions), finite


class Draws(ctypes.Structure):
    """The struct of the same name in native/sample.cpp."""

    _fields_ = [("logits", ctypes.c_void_p), ("stride", ctypes.c_int64), ("vocab", ctypes.c_int64),
                ("count", ctypes.c_int64), *((name, ctypes.c_void_p) for name in (
                    "conditional", "unconditional", "scale", "temperature", "top_k", "top_p", "key", "position")),
                ("greedy", ctypes.c_int64), ("codes", ctypes.c_void_p), ("finite", ctypes.c_void_p),
                ("threads", ctypes.c_int64)]


def _choose_native(kernels: ctypes.CDLL, logits: Tensor, conditional: Tensor, unconditional: Tensor, positions: Tensor,
                   images: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    codes, finite = torch.empty(len(images), dtype=torch.long), torch.empty(len(images), dtype=torch.bool)
    arrays = [conditional.int(), unconditional.int(), *(x[images] for x in (
        settings.scale, settings.temperature, settings.top_k, settings.top_p, settings.keys)), positions.contiguous()]
    kernels.sample(ctypes.byref(Draws(logits.data_ptr(), logits.stride(0), logits.shape[1], len(images),
                                      *(pointer(x) for x in arrays), settings.greedy, pointer(codes),
                                      pointer(finite), min(torch.get_num_threads(), len(images)))))
    return codes, finite


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a setting that has no meaning."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature is {temperature}, expected 0 or more")
    if top_k < 0:
        raise ValueError(f"--top-k is {top_k}, expected 0 (all) or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"--top-p is {top_p}, expected a value in [0, 1]")
