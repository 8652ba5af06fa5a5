"""What a model draws after: classes, given as labels, or prompts, given as their text features.

One of the two belongs to a `Pipeline`, which asks it for what `generate` takes. All that depends on the kind of
condition is here.
"""
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.base import CodeModel
from language.text_encoder import left_padded
from utils import cli

TAKEN_BY = {"c2i": "sample_c2i.py, sample_ddp.py and edit.py", "t2i": "sample_t2i.py and sample_t2i_ddp.py"}
WORDS = {"c2i": "classes", "t2i": "text"}


@dataclass(frozen=True)
class ClassConditions:
    """Labels 0 to count - 1, and `nothing` (the label `count`) for no class."""

    count: int
    names: list[str] | None

    @property
    def nothing(self) -> int:
        """The condition that says nothing."""
        return self.count

    @property
    def described(self) -> dict[str, Any]:
        """For the description of a sample set."""
        return {"num_classes": self.count}

    def arguments(self, labels: Sequence[int], *, cfg_scale: float, device: torch.device) -> dict[str, Any]:
        """Labels → what `generate` takes. Guidance away from "no class" does not change "no class"."""
        labels = [int(label) for label in labels]
        scales = [cfg_scale if label < self.count else 1.0 for label in labels]
        return {"cond": torch.tensor(labels, device=device), "cfg_scale": scales}

    def name(self, label: int) -> str:
        """What to write under a picture."""
        return "no class" if label == self.nothing else self.names[label] if self.names else str(label)

    def parse(self, text: str) -> list[int]:
        """Comma-separated names or numbers of classes → labels; what is a known name means that name.

        A name with commas, line breaks or blanks at its ends goes in double quotes. Raises ValueError for what the
        model does not know.
        """
        names = self.names or ()
        if text in names or text.strip() in names:
            return [self.label_of(text)]
        try:
            words = next(csv.reader([text], skipinitialspace=True), [])
        except csv.Error:
            raise ValueError(f"classes {text!r} are no list of names: put each name with a comma or a line break in "
                             "double quotes") from None
        labels = [self.label_of(word) for word in words if word.strip()]
        if not labels:
            raise ValueError("no class given")
        return labels

    def label_of(self, word: str) -> int:
        """The label of one class, by its name or its number; says which where a name is another class's number."""
        names = self.names or ()
        word = word if word in names else word.strip()
        number = int(word) if re.fullmatch(r"[+-]?[0-9]{1,18}", word) else None
        if word in names:
            label = self.names.index(word)
            if number not in (None, label) and 0 <= number < self.count:
                cli.warn(f"class {word} is taken as the class of that name, whose number is {label}; number {word} is "
                         f"named {self.names[number]}", kind="note")
            return label
        if number is None:
            known = f"choose from {', '.join(self.names[:20])} (in double quotes where there is a comma in a name)" \
                if self.names else "the checkpoint holds no class names, use numbers"
            raise ValueError(f"class {word!r} is unknown: {known}")
        if not 0 <= number < self.count:
            raise ValueError(f"class {word} is out of range: the model has 0 to {self.count - 1}")
        return number


@dataclass(frozen=True)
class TextConditions:
    """Text features (n, dim) of prompts, 1 <= n <= length, and `nothing` for no prompt.

    The prefix of the model has `length` tokens. Padding, on the left as in training unless `on_the_left` is False, is
    hidden from attention, and prefix tokens have no position of their own. What the side changes: the last token of the
    prefix gives the logits of the first code, and on the right that is a token of padding; and without a condition
    the model sees as many features that mean nothing, the last ones or the first.
    """

    length: int
    dim: int
    nothing: Tensor  # (length, dim)
    encoder: dict[str, Any] | None  # the text encoder that the model was trained with, if its file says so
    on_the_left: bool = True

    @property
    def described(self) -> dict[str, Any]:
        """For the description of a sample set."""
        return {"cls_token_num": self.length, "caption_dim": self.dim, "left_padding": self.on_the_left}

    def arguments(self, features: Sequence[Tensor], *, cfg_scale: float, device: torch.device) -> dict[str, Any]:
        """Features (n, dim) of each image, n may differ → what `generate` takes."""
        cond, masks = padded([one.to(features[0].dtype) for one in features], self.length, on_the_left=self.on_the_left)
        scales = [1.0 if one is self.nothing else cfg_scale for one in features]
        return {"cond": cond.to(device), "emb_masks": masks, "cfg_scale": scales}


def padded(features: Sequence[Tensor], length: int, *, on_the_left: bool) -> tuple[Tensor, Tensor]:
    """Features (n, dim), n <= length → (B, length, dim) with zeros for padding, and the mask (B, length), True where
    there is text."""
    if on_the_left:
        return left_padded(features, length)
    turned, mask = left_padded([one.flip(0) for one in features], length)
    return turned.flip(1), mask.flip(1)


def conditions_of(model: CodeModel, saved: dict[str, Any]) -> ClassConditions | TextConditions:
    """What a model draws after; `saved`: the config of its checkpoint."""
    if model.config.model_type == "c2i":
        return ClassConditions(model.config.num_classes, saved.get("classes"))
    encoder = saved.get("text_encoder")
    return TextConditions(model.config.cls_token_num, model.config.caption_dim,
                          model.cls_embedding.uncond_embedding.cpu(), encoder if isinstance(encoder, dict) else None)
