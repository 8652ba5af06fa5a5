"""From logits to a code: guidance, temperature, top-k, top-p and the draw. The only place where it is decided."""
import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-5


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on logits (B, V): l_u + scale * (l_c - l_u)."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) → logits / temperature with everything outside top-k and top-p at -inf.

    top_k 0 keeps all; ties with the k-th are kept. top_p keeps the shortest prefix of the sorted probabilities whose
    mass exceeds it (nucleus sampling, arXiv 1904.09751), at least one.
    """
    logits = logits.float() / max(temperature, MIN_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of all better codes
        beyond = before > top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def draw(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Draw one code per row of logits (B, V), row i with generators[i] → (B,) int64.

    The largest p / e with e ~ Exp(1) is a draw from p. The noise is made on the generator's own device, the CPU in
    our pipeline, so that a seed gives the same picture everywhere; a row's noise does not depend on the other rows.
    """
    noise = torch.stack([torch.empty(logits.shape[-1], device=g.device).exponential_(generator=g) for g in generators])
    return (logits.float().softmax(-1) / noise.to(logits.device)).argmax(-1)


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a setting that has no meaning."""
    if not temperature >= 0:
        raise ValueError(f"--temperature is {temperature}, expected 0 or more")
    if top_k < 0:
        raise ValueError(f"--top-k is {top_k}, expected 0 (all) or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"--top-p is {top_p}, expected a value in [0, 1]")
