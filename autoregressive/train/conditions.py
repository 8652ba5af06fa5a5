"""What a model is trained to follow: classes, or captions. The rest of the training does not know which."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from autoregressive.train.finetune import check_same_classes
from dataset.code_layouts import CodeStore
from dataset.codes import CodeBatches
from dataset.text_batches import TextBatches, TextColumns
from language.text_encoder import TextEncoder, left_padded, same_encoder
from utils.checkpoints import containers


class Condition(Protocol):
    """A condition is a number: a label, or the row of the store that has the caption."""

    count: int  # conditions are 0 to count - 1
    what_there_is: str  # in some words

    def model_options(self) -> dict[str, Any]:
        """Options with which a model for it is built."""

    def described(self) -> dict[str, Any]:
        """What checkpoints say about it."""

    def check(self, content: dict[str, Any], source: str | Path) -> None:
        """Raise ValueError if a file whose training is to be continued was trained on other conditions."""

    def batches(self, **options: Any) -> CodeBatches:
        """The training batches; options: see `CodeBatches`."""

    def inputs(self, batch: dict[str, Any], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a model's forward takes of a training batch."""

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The conditions of rows (B,) of the store."""

    def name(self, condition: int) -> str:
        """What to write under a picture of it."""

    def to_draw(self, conditions: Sequence[int], device: torch.device) -> dict[str, Tensor | None]:
        """{"cond", "emb_masks"} for `generate`."""


class Classes:
    """The classes of a store."""

    def __init__(self, store: CodeStore, *, num_classes: int | None, cls_token_num: int | None) -> None:
        self.store, self.classes, self.prefix = store, store.classes, cls_token_num or 1
        self.count = num_classes or store.num_classes
        self.what_there_is = f"{self.count} classes"

    def model_options(self) -> dict[str, Any]:
        """See `Condition`."""
        return {"model_type": "c2i", "num_classes": self.count, "cls_token_num": self.prefix}

    def described(self) -> dict[str, Any]:
        """See `Condition`."""
        return {"num_classes": self.count, "classes": self.classes}

    def check(self, content: dict[str, Any], source: str | Path) -> None:
        """See `Condition`."""
        check_same_classes(content, source, self.classes)

    def batches(self, **options: Any) -> CodeBatches:
        """See `Condition`."""
        return CodeBatches(self.store, **options)

    def inputs(self, batch: dict[str, Any], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Condition`."""
        return {"cond_idx": batch["labels"]}

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """See `Condition`."""
        return self.store.labels[rows]

    def name(self, condition: int) -> str:
        """See `Condition`."""
        return self.classes[condition] if self.classes else str(condition)

    def to_draw(self, conditions: Sequence[int], device: torch.device) -> dict[str, Tensor | None]:
        """See `Condition`."""
        return {"cond": torch.as_tensor(np.asarray(conditions), device=device), "emb_masks": None}


class Texts:
    """The captions of a store, by their features: those that are stored with them, or made by `encoder`."""

    def __init__(self, store: CodeStore, columns: TextColumns, *, cls_token_num: int, caption_dim: int,
                 encoder: TextEncoder | None, described: dict[str, Any] | None) -> None:
        """`described`: the encoder's description for checkpoints, None where it is not known."""
        self.store, self.columns, self.encoder = store, columns, encoder
        self.tokens, self.width, self.encoder_described = cls_token_num, caption_dim, described
        self.count = len(store.labels)
        name = (described or {}).get("name", "an unnamed encoder")
        self.what_there_is = f"captions of up to {cls_token_num} x {caption_dim} features of {name}"

    def model_options(self) -> dict[str, Any]:
        """See `Condition`."""
        return {"model_type": "t2i", "cls_token_num": self.tokens, "caption_dim": self.width}

    def described(self) -> dict[str, Any]:
        """See `Condition`."""
        return {"num_classes": None, "classes": None, "caption_dim": self.width,
                "text_encoder": self.encoder_described}

    def check(self, content: dict[str, Any], source: str | Path) -> None:
        """See `Condition`."""
        theirs, ours = containers.saved_config(content).get("text_encoder"), self.encoder_described
        if theirs and ours and not same_encoder(theirs, ours):
            apart = [key for key in {**theirs, **ours} if key != "name" and theirs.get(key) != ours.get(key)]
            raise ValueError(f"{source} was trained on features of {theirs.get('name')}, these are of "
                             f"{ours.get('name')}, with another {', '.join(apart)}: give features of the same encoder, "
                             "or begin a new run with --init-from")

    def batches(self, **options: Any) -> CodeBatches:
        """See `Condition`."""
        return TextBatches(self.store, self.columns, **options)

    def padded(self, texts: list[str] | list[Tensor], device: torch.device, *,
               length: int | None = None) -> tuple[Tensor, Tensor]:
        """Captions, or their features (n_i, C) → (features (B, N, C) padded on the left, which are real (B, N)); N is
        `length` or what the longest has."""
        features = self.encoder(texts) if self.encoder else texts
        features = [one.to(device, non_blocking=True) if len(one) else torch.zeros(
            1, self.width, dtype=one.dtype, device=device) for one in features]  # empty ones carry no loss
        return left_padded(features, length or min(self.tokens, max(map(len, features))))

    def inputs(self, batch: dict[str, Any], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Condition`."""
        features, real = self.padded(batch["texts"], batch["codes"].device)
        return {"cond_idx": features.to(dtype), "lengths": real.sum(1)}

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """See `Condition`."""
        return rows

    def name(self, condition: int) -> str:
        """See `Condition`."""
        return self.store.column("caption", np.array([condition]))[0] if "caption" in self.store.columns else str(
            condition)

    def to_draw(self, conditions: Sequence[int], device: torch.device) -> dict[str, Tensor | None]:
        """See `Condition`."""
        features, real = self.padded(self.columns.long(np.asarray(conditions)), device, length=self.tokens)
        return {"cond": features, "emb_masks": real}


def evenly_spaced(condition: Condition, count: int) -> np.ndarray:
    """`count` conditions, spread over all."""
    return np.linspace(0, condition.count - 1, count).round().astype(int)
