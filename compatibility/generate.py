"""autoregressive.models.generate as LlamaGen has it: filters and draws for loops of one's own.

Draws come from torch's global random state; `generate` of ours has a stream per image.
"""
import torch
from torch import Tensor

from autoregressive.models.sampling import MIN_TEMPERATURE, filter_logits

__all__ = ["logits_to_probs", "sample", "top_k_top_p_filtering"]


def top_k_top_p_filtering(logits: Tensor, top_k: int = 0, top_p: float = 1.0, filter_value: float = -float("inf"),
                          min_tokens_to_keep: int = 1) -> Tensor:
    """Logits (B, V) with `filter_value` outside top-k and top-p; the min_tokens_to_keep best always stay."""
    kept = filter_logits(logits, top_k=max(top_k, min_tokens_to_keep) if top_k > 0 else 0, top_p=top_p) > -float("inf")
    best = logits.topk(min(min_tokens_to_keep, logits.shape[-1]), dim=-1).indices
    return logits.masked_fill(~kept.scatter(-1, best, True), filter_value)


def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Logits (B, V) → the probabilities (B, V) to draw from."""
    return top_k_top_p_filtering(logits / max(temperature, MIN_TEMPERATURE), top_k, top_p).softmax(-1)


def sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           sample_logits: bool = True) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) → (codes (B, 1) for the last position, their probabilities (B, V)); greedy if not drawn."""
    probabilities = logits_to_probs(logits[:, -1], temperature, top_p, top_k)
    if sample_logits:
        return torch.multinomial(probabilities, 1), probabilities
    return probabilities.argmax(-1, keepdim=True), probabilities
