"""What tests of sampling from text share: a small text model, and an encoder that needs no weights."""
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.models.registry import MODELS, recorded_options
from autoregressive.sample import prompts
from tests.data.references import filled

LENGTH, DIM = 6, 8  # of the prefix
ENCODER = {"name": "stand-in", "sha256": "a" * 64, "dim": DIM, "max_tokens": LENGTH}
SIZES = {"vocab_size": 256, "grid": (4, 4), "model_type": "t2i", "caption_dim": DIM, "cls_token_num": LENGTH}
PROMPTS = ["a red cat", "two dogs on a boat", "a cat", "", "一只猫", "one two three four five six seven eight"]


class StandIn:
    """Features that depend on each word alone, one for each, and one for the end; Chinese is cleaned away."""

    def __init__(self, name: str, *, dim: int = DIM, most: int = LENGTH, dtype: torch.dtype = torch.float32) -> None:
        self.dim, self.max_tokens, self.dtype = dim, most, dtype
        self.described = ENCODER | {"name": name, "dim": dim, "max_tokens": most}

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        found = []
        for caption in captions:
            words = ["".join(letter for letter in word if ord(letter) < 256) for word in caption.split()]
            words = [word for word in words if word][:self.max_tokens - 1]
            seeds = [int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) for word in [*words, "</s>"]]
            found.append(torch.stack([torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
                                      for seed in seeds]).to(self.dtype))
        return found


def install() -> None:
    """Put the stand-in in the place of real encoders. Called in other processes too."""
    prompts.load_text_encoder = lambda flags, *, device, dtype: StandIn(
        flags.t5_model_type, most=flags.t5_feature_max_len, dim=16 if flags.t5_model_type == "wide" else DIM,
        dtype=dtype)


def save_text_model(path: Path, model: str = "GPT-S", *, config: dict | None = None, bare: bool = False) -> Path:
    """A checkpoint with the weights of the filler; `bare`: without a config, as LlamaGen releases them."""
    state = filled(MODELS[model], "text", **SIZES).state_dict()
    own = {"gpt_model": model, "gpt_type": "t2i", "grid": [4, 4], "cls_token_num": LENGTH, "caption_dim": DIM,
           "text_encoder": ENCODER, **recorded_options(model, {})} | (config or {})
    torch.save({"model": state} if bare else {"model": state, "config": own}, path)
    return path
