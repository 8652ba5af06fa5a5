"""Training batches of codes with captions, or with the features of these."""
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.code_layouts import CodeStore
from dataset.codes import CodeBatches
from dataset.text_features import read_features
from utils.seeding import derive_seed, hash_choice

SHORT_CAPTION = 0x53484F52  # sets these draws apart from others of the same (seed, epoch, index)


@dataclass(frozen=True)
class TextColumns:
    """The columns of a store that are read: features, or captions. short_share: how often the short one is taken, of
    rows that have one."""

    store: CodeStore
    features: bool
    short_share: float = 0.0

    @property
    def kind(self) -> str:
        """The name of the long captions' column."""
        return "features" if self.features else "caption"

    def read(self, column: str, rows: np.ndarray) -> list[str] | list[Tensor]:
        """Captions, or features (n_i, C), of rows (B,)."""
        return read_features(self.store, column, rows) if self.features else self.store.column(column, rows)

    def long(self, rows: np.ndarray) -> list[str] | list[Tensor]:
        """The long captions of rows (B,), or their features."""
        return self.read(self.kind, rows)

    def choose(self, rows: np.ndarray, epochs: np.ndarray, indices: np.ndarray, *,
               seed: int) -> list[str] | list[Tensor]:
        """The same, or the short ones, fixed by (seed, epoch, index)."""
        texts = self.long(rows)
        short = "short_features" if self.features else "short_caption"
        if self.short_share and short in self.store.columns:
            chance = hash_choice(derive_seed(seed, SHORT_CAPTION), epochs, indices, options=2**24) / 2**24
            for place in np.flatnonzero(chance < self.short_share).tolist():
                brief = self.read(short, rows[place:place + 1])[0]
                texts[place] = brief if len(brief) else texts[place]
        return texts


class TextBatches(CodeBatches):
    """`CodeBatches` with "texts": a caption for each sample, or its features (n_i, C)."""

    def __init__(self, store: CodeStore, text: TextColumns, **options: Any) -> None:
        super().__init__(store, **options)
        self.text = text

    def beside(self, rows: np.ndarray, views: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> dict[str, Any]:
        """See `CodeBatches`."""
        texts = self.text.choose(rows, epochs, indices, seed=self.seed)
        found = super().beside(rows, views, epochs, indices) | {"texts": texts}
        lost = torch.tensor([len(text) == 0 for text in texts]) if self.text.features else None
        if lost is not None and lost.any():  # features that turned out damaged: the sample carries no loss
            found["valid"] = ~lost
        return found
