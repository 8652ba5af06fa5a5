"""Training losses of LlamaGen and ARPG that were published, each with its conditions and source.

LlamaGen published no logs, its users did. An ARPG's losses are for codes in random order, a GPT's for codes in raster
order: they say nothing about each other. Losses are cross-entropies per code in nats. Two early curves of different
batch size and learning rate are at least 0.405 nats apart at equal steps (500 … 900): a run whose losses are within
TOLERANCE, half of that, of one curve cannot be mistaken for one that follows the other.
"""
from dataclasses import dataclass
from typing import Literal

IMAGENET = 1_281_167  # images
TOLERANCE = 0.2


@dataclass(frozen=True)
class Curve:
    """A posted training loss. What is None was not posted and is not asked for.

    epochs: of the whole training, where a cosine ends by then.
    """

    name: str
    source: str
    points: dict[int, float]
    unit: Literal["step", "epoch"] = "step"
    model: str | None = None
    side: int = 16  # tokens per side
    batch: int | None = None
    lr: float | None = None
    family: Literal["GPT", "ARPG"] = "GPT"
    epochs: int | None = None


PUBLISHED = (
    Curve("LlamaGen at batch 1024", "a log in RandAR's GitHub thread 12; size of the model not said, batch inferred",
          {100: 9.579, 200: 9.361, 300: 9.192, 400: 9.038, 500: 8.877, 600: 8.728, 700: 8.599, 800: 8.514, 900: 8.445},
          batch=1024, lr=4e-4),
    Curve("GPT-B at lr 1e-4", "a log in PyTorch's GitHub thread 113180, perhaps of a compiled run that was the "
          "worse of two; batch inferred",
          {500: 9.282, 600: 9.210, 700: 9.134, 800: 9.066, 900: 8.998, 1000: 8.928, 1100: 8.868, 1200: 8.810},
          model="GPT-B", batch=256, lr=1e-4),
    Curve("GPT-L after 50 epochs", "LlamaGen's GitHub thread 46", {50: 7.86}, unit="epoch", model="GPT-L"),
    Curve("GPT-1B after 50 epochs", "LlamaGen's GitHub thread 46", {50: 7.33}, unit="epoch", model="GPT-1B"),
    Curve("GPT-XL at 384 pixels after 300 epochs", "LlamaGen's GitHub thread 56", {300: 6.9}, unit="epoch",
          model="GPT-XL", side=24),
    Curve("ARPG-L after 150 epochs", "ARPG's GitHub thread 6; the length of the whole training not said", {150: 7.66},
          unit="epoch", model="ARPG-L", batch=1024, lr=4e-4, family="ARPG"),
    *(Curve(f"{model} after 400 epochs", "ARPG's authors, of the training in arXiv 2503.10568, table 6", {400: loss},
            unit="epoch", model=model, batch=batch, lr=lr, family="ARPG", epochs=400)
      for model, loss, batch, lr in (("ARPG-L", 7.50, 1024, 4e-4), ("ARPG-XL", 7.295, 768, 3e-4),  # XL: 7.29 to 7.30
                                     ("ARPG-XXL", 7.03, 512, 2e-4))),
)
