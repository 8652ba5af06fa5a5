"""What a request says to the model inside vLLM beside its codes: its class, its scale of guidance, its text's length.

vLLM gives a model the ids of tokens and their positions, nothing else of a request. So the ids of the prompt hold what
there is to say, and from them `positions` makes the M-RoPE positions of all tokens. The request keeps them when vLLM
splits its prompt, or takes its memory away and computes it again. They are integers of 31 bits: the place of a token in
the model's sequence, and the scale in thousandths. vLLM's hook is for pictures in prompts; what it is used for here is
all in this file.
"""
import torch
from torch import Tensor

STEPS = 1000  # of a scale of 1: scales are rounded to thousandths
PLACES = 2**14  # tokens of the longest sequence
MOST_SCALE = 100  # so that positions stay below 2^31: vLLM's Model Runner V2 stores them in 32 bits


def scale_steps(scale: float) -> int:
    """A scale of guidance in thousandths; 1 and less is none. Raises ValueError for more than MOST_SCALE."""
    if not scale <= MOST_SCALE:
        raise ValueError(f"--cfg-scale is {scale}, vLLM takes at most {MOST_SCALE} here")
    return round(max(1, scale) * STEPS)


def class_id(label: int, scale: float, *, vocab_size: int, num_classes: int) -> int:
    """The one token of a class's prompt: label 0 to num_classes, which is none."""
    return vocab_size + label + (num_classes + 1) * scale_steps(scale)


def text_id(length: int, scale: float, *, prefix: int) -> int:
    """The id of every token in the prompt of a text with so many features, of which the model takes `prefix`."""
    return length + (prefix + 1) * scale_steps(scale)


def label_of(ids: Tensor, *, vocab_size: int, num_classes: int) -> Tensor:
    """Of ids of a class's prompt: the label."""
    return (ids - vocab_size) % (num_classes + 1)


def positions(tokens: list[int], *, vocab_size: int, num_classes: int | None, prefix: int) -> tuple[Tensor, int]:
    """Of a request's tokens (the prompt, perhaps followed by codes) the M-RoPE positions (3, n) int64, and what is
    added to a later token's number to get its position. num_classes: None for a model of text."""
    if num_classes is not None:
        missing, steps = 0, (tokens[0] - vocab_size) // (num_classes + 1)
    else:
        missing, steps = prefix - tokens[0] % (prefix + 1), tokens[0] // (prefix + 1)
    first = missing + PLACES * steps  # padding before a text is left out, and its places with it
    return torch.arange(first, first + len(tokens)).expand(3, -1), first


def places_and_scales(position: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (n,) → places in the model's sequence (n,) int64, and scales (n,) fp32."""
    return position % PLACES, (position // PLACES).float() / STEPS
