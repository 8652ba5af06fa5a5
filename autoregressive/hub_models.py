"""Models that load from, save to and go to the Hugging Face hub: GPT, ARPG and Tokenizer (see autoregressive/hub.py).

Each is the class of autoregressive/models or tokenizer/ with huggingface_hub's mixin, so that it can be used wherever
that one can. What is written is what autoregressive/train/export.py writes.
"""
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from autoregressive.model_card import is_own_card, model_card
from autoregressive.models import arpg
from autoregressive.models.base import CodeModel
from autoregressive.models.gpt import Transformer
from autoregressive.train.export import (
    DTYPES,
    ExportFlags,
    described_gpt,
    described_tokenizer,
    load_model,
    write_safetensors,
)
from tokenizer.build import tokenizer_sizes
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.checkpoints.hub import HubName, hub_name, local_copy, pushing

try:
    from huggingface_hub import ModelCard, ModelHubMixin
except ImportError:
    raise ImportError("autoregressive.hub needs huggingface_hub: pip install huggingface_hub") from None

Model = TypeVar("Model", bound="HubModel")
OF_THESE_WEIGHTS = ("measured", "source_sha256")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HubModel(ModelHubMixin, library_name="llamagen"):
    """What the three have in common."""

    KIND: ClassVar[str]  # "a GPT", for sentences
    FLAG: ClassVar[str]  # of export.py that takes its checkpoints
    _hub_mixin_config: ClassVar[dict[str, Any]] = {}  # the mixin writes none: config.json is written with the weights
    known: dict[str, Any] | None = None  # what the checkpoint says beside its weights; None: it was not loaded

    @classmethod
    def from_pretrained(cls: type[Model], pretrained_model_name_or_path: str | Path, *, revision: str | None = None,
                        token: str | bool | None = None, cache_dir: str | Path | None = None,
                        force_download: bool = False, local_files_only: bool = False,
                        dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Model:
        """The model of any checkpoint that the commands read: a file, a folder, a run's folder (its newest one), or a
        name of the hub: owner/name, owner/name:file. In eval mode, in the types that the file has, or in `dtype`.

        Averaged weights if it has them, LoRA adapters merged. Names of parameters and shapes must be the model's.
        Raises ValueError or FileNotFoundError, one line, for what is missing, damaged, or another kind of model.
        """
        given, source = str(pretrained_model_name_or_path), None
        found = hub_name(given)
        if found is not None:
            if revision not in (None, found.revision) and found.revision is not None:
                raise ValueError(f"{given} and revision={revision!r} name two revisions: give one")
            source = HubName(found.repository, found.inside, revision or found.revision)
            given = str(local_copy(source, token=token, cache_dir=cache_dir, force_download=force_download,
                                   local_files_only=local_files_only))
        model, config = load_model(ExportFlags(**{cls.FLAG: given}))
        if not issubclass(cls, type(model)):
            right = owner_of(model)
            raise ValueError(f"{source or given} is {right.KIND}, not {cls.KIND}: {right.__name__}.from_pretrained "
                             "loads it")
        model.__class__ = cls  # has no fields of its own; a second model would need as much memory again
        model.known = config | ({"source": str(source)} if source is not None else {})
        if isinstance(model, CodeModel):
            if config.get("grid"):
                model.set_grid(tuple(config["grid"]))
            model.loaded_grid = model.config.grid
        model.requires_grad_(True)
        take_stored_types(model)
        model.to(device=device, dtype=dtype)
        model.as_loaded = model.versions()
        return model

    def versions(self) -> list[int]:
        """Numbers that change when weights do."""
        return [weight._version for weight in self.parameters()]

    def description(self) -> dict[str, Any]:
        """The content of config.json: of weights that were changed since, without what was measured of the old ones."""
        known = dict(self.known or {})
        if self.known is not None and self.as_loaded != self.versions():
            known = {name: value for name, value in known.items() if name not in OF_THESE_WEIGHTS}
        kinds = {weight.dtype for weight in self.parameters()}
        dtype = NAMES.get(kinds.pop(), "mixed") if len(kinds) == 1 else "mixed"
        return self.described(known) | {"dtype": dtype}

    def described(self, known: dict[str, Any]) -> dict[str, Any]:
        """The content of config.json but for the type of the weights."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        card = save_directory / "README.md"
        if is_own_card(card):
            card.unlink()  # the mixin then writes one
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_safetensors(save_directory, state, self.description())

    def generate_model_card(self, *args: Any, license: str | None = None, **kwargs: Any) -> ModelCard:
        """The card; `license` is the licence of the weights, as the hub calls it (mit, cc-by-sa-4.0, …)."""
        return ModelCard(model_card(self.description(), license=license,
                                    parameters=sum(weight.numel() for weight in self.parameters())))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save into a repository owner/name of the hub, which is made if need be → the URL of the commit. `options`:
        commit_message, private, token, branch, create_pr, model_card_kwargs={"license": …}, … (huggingface_hub's).

        Raises ValueError or OSError, one line, that says what to do.
        """
        with pushing(repo_id):
            return super().push_to_hub(repo_id, **options)


class _CodeHubModel(HubModel):
    FLAG: ClassVar[str] = "gpt_ckpt"

    def described(self, known: dict[str, Any]) -> dict[str, Any]:
        """See `HubModel`. The grid of a file that does not tell it is left open until `set_grid` says it."""
        if self.known is None or "grid" in known or self.config.grid != self.loaded_grid:
            known["grid"] = list(self.config.grid)
        return described_gpt(self, known)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, in the order of their labels."""
        return (self.known or {}).get("classes")


class GPT(_CodeHubModel, Transformer):
    """The GPT over image codes, class- or text-conditional."""

    KIND: ClassVar[str] = "a GPT"


class ARPG(_CodeHubModel, arpg.ARPG):
    """The model that draws codes in any order, many at once."""

    KIND: ClassVar[str] = "an ARPG"


class Tokenizer(HubModel, VQModel):
    """The VQ tokenizer: images to codes and back."""

    KIND: ClassVar[str] = "a tokenizer"
    FLAG: ClassVar[str] = "vq_ckpt"

    def described(self, known: dict[str, Any]) -> dict[str, Any]:
        """See `HubModel`."""
        return described_tokenizer(self, {"vq_model": tokenizer_sizes(self.state_dict()).get("vq_model")} | known)


def owner_of(model: nn.Module) -> type[HubModel]:
    """The class that loads and saves such a model."""
    return next(one for one in (GPT, ARPG, Tokenizer) if issubclass(one, type(model)))


def take_stored_types(model: nn.Module) -> None:
    """Give the parameters the one type that they have in the file, and buffers their own; of files with parameters of
    several types they stay in fp32, which holds them all."""
    names = dict(model.named_parameters())
    kinds = {dtype for name, dtype in model.stored_types.items() if name in names}
    for name, tensor in [*names.items(), *model.named_buffers()]:
        if tensor.is_floating_point() and (name not in names or len(kinds) == 1):
            tensor.data = tensor.data.to(model.stored_types[name])
