"""autoregressive.models.gpt as LlamaGen has it: a factory per size, the rotary table of a square grid."""
from torch import Tensor

from autoregressive.models.gpt import GPT_models
from autoregressive.models.rope import apply_rope, rope_table

__all__ = ["GPT_1B", "GPT_3B", "GPT_7B", "GPT_B", "GPT_L", "GPT_XL", "GPT_XXL", "GPT_XXXL", "apply_rotary_emb",
           "precompute_freqs_cis_2d"]

GPT_B, GPT_L, GPT_XL, GPT_XXL, GPT_XXXL, GPT_1B, GPT_3B, GPT_7B = (
    GPT_models[f"GPT-{size}"] for size in ("B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B"))


def precompute_freqs_cis_2d(grid_size: int, n_elem: int, base: float = 10000, cls_token_num: int = 120) -> Tensor:
    """Cosines and sines (cls_token_num + grid_size², n_elem/2, 2) for heads of n_elem; those of the prefix are zero."""
    return rope_table((grid_size, grid_size), n_elem, cls_token_num, base=base)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn x (B, T, H, K) by a table (T, K/2, 2)."""
    return apply_rope(x, freqs_cis)
