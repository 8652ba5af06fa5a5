"""All models over image codes by name, and what a state dict says about its model."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.args import PRESETS as GPT_SIZES
from autoregressive.models.arpg import PRESETS as ARPG_SIZES
from autoregressive.models.arpg import ARPG_models
from autoregressive.models.base import CodeModel
from autoregressive.models.conditions import UNCONDITIONAL
from autoregressive.models.gpt import GPT_models

MODELS: dict[str, Callable[..., CodeModel]] = {**GPT_models, **ARPG_models}


@dataclass(frozen=True)
class StateFacts:
    """What a state dict says about its model."""

    family: str
    codes: str  # name of the table with the codes' embeddings
    classes: str | None  # name of the table with the classes' embeddings, the last "no class"; None for text
    first_class: int  # the row of class 0 there
    num_classes: int | None
    vocab_size: int
    width: int
    depth: tuple[int, ...]  # layers; of an ARPG, also those of queries
    caption_dim: int | None = None  # width of the text features that it takes; None: it takes none
    prefix: int = 1  # tokens that say what to draw

    @property
    def condition(self) -> str | None:
        """What it takes, as --gpt-type calls it; None: neither classes nor text."""
        return "t2i" if self.caption_dim is not None else "c2i" if self.classes is not None else None

    @property
    def kind(self) -> str:
        """The family with its article, for sentences."""
        return f"{'an' if self.family == 'ARPG' else 'a'} {self.family}"

    @property
    def size(self) -> str:
        """Depth, width and vocabulary in words."""
        return f"{'+'.join(map(str, self.depth))} layers, width {self.width}, {self.vocab_size} codes"

    def layers(self) -> dict[str, int]:
        """How many layers to build an ARPG of any preset with; a GPT has those of its preset."""
        return dict(zip(("n_layer", "n_query_layer"), self.depth, strict=True)) if self.family == "ARPG" else {}

    def preset(self) -> str | None:
        """The preset of this size; an ARPG's halves may have any depth, so that its width alone says which."""
        sizes = ARPG_SIZES if self.family == "ARPG" else GPT_SIZES
        return next((name for name, size in sizes.items() if size["dim"] == self.width
                     and (self.family == "ARPG" or (size["n_layer"],) == self.depth)), None)

    def name(self) -> str:
        """A preset to try, for files that name none."""
        return self.preset() or ("ARPG-L" if self.family == "ARPG" else "GPT-B")

    def flags(self) -> str:
        """What to give a training of this size, in words; empty where no preset has it."""
        name, (*_, queries) = self.preset(), self.depth
        if name is None or self.family == "GPT":
            return f"--gpt-model {name}" if name else ""
        half = ARPG_SIZES[name]["n_layer"]
        depth = "" if queries == half else f" --query-layers {queries}"
        return f"--gpt-model {name}{depth}" if sum(self.depth) == 2 * half else ""

    def class_table(self, state: dict[str, Tensor]) -> Tensor:
        """The classes' embeddings and that of no class, (C + 1, D)."""
        return state[self.classes][self.first_class:self.first_class + self.num_classes + 1]

    def with_class_table(self, state: dict[str, Tensor], table: Tensor) -> Tensor:
        """The tensor `classes` of the state with another class table in its place."""
        whole = state[self.classes]
        return torch.cat([whole[:self.first_class], table, whole[self.first_class + self.num_classes + 1:]])


def facts_of(state: dict[str, Tensor]) -> StateFacts | None:
    """What a state dict says about its model; None if it is of none of ours."""
    def count(prefix: str) -> int:
        return len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)})

    if "tok_embeddings.weight" in state:
        vocab, width = state["tok_embeddings.weight"].shape
        table = "cls_embedding.embedding_table.weight"
        known = len(state[table]) - 1 if table in state else None
        return StateFacts("GPT", "tok_embeddings.weight", table if table in state else None, 0, known, vocab, width,
                          (count("layers."),), **text_facts(state))
    table, head = state.get("embeddings.weight"), state.get("head.weight")
    if table is None or head is None or table.ndim != 2 or head.ndim != 2:
        return None
    (rows, width), vocab = table.shape, len(head)
    text = text_facts(state)
    classes = None if text else rows - vocab - 3
    if rows == vocab + 1 if text else classes > 0:
        return StateFacts("ARPG", "embeddings.weight", None if text else "embeddings.weight", vocab + 1, classes, vocab,
                          width, (count("layers.self_dec."), count("layers.cross_dec.")), **text)
    return None


def text_facts(state: dict[str, Tensor]) -> dict[str, int]:
    """What the projection of text features says about them, in the fields of `StateFacts`; nothing of a class model."""
    projection, without = state.get("cls_embedding.cap_proj.fc1.weight"), state.get(UNCONDITIONAL)
    if projection is None or without is None or projection.ndim != 2 or without.ndim != 2:
        return {}
    return {"caption_dim": projection.shape[1], "prefix": len(without)}


def recorded_options(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Options for building preset `name` that a checkpoint's config says and no tensor shows. An ARPG whose config does
    not say where its class lies was trained before that could be chosen; without a config the preset says it."""
    if name not in ARPG_models:
        return {}
    known = config if config.get("gpt_model") in ARPG_models else ARPG_SIZES[name]
    return {"class_at_origin": bool(known.get("class_at_origin"))}


def arpg_depth(name: str, query_layers: int | None) -> dict[str, int]:
    """Options of an ARPG preset with `query_layers` of all its layers in the second half (None: half of them).

    Raises ValueError for other models, and for more layers than there are.
    """
    if query_layers is None:
        return {}
    if name not in ARPG_models:
        raise ValueError(f"--query-layers is for ARPG: {name} has no layers of queries")
    layers = 2 * ARPG_SIZES[name]["n_layer"]
    if not 1 <= query_layers <= layers:
        raise ValueError(f"--query-layers is {query_layers}, {name} has {layers} layers in all: expected 1 to {layers}")
    return {"n_layer": layers - query_layers, "n_query_layer": query_layers}
