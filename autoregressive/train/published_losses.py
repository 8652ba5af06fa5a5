"""Training losses that users of LlamaGen have published, each with its conditions and source.

LlamaGen published no logs. Losses are cross-entropies per code in nats. Two early curves of different batch size and
learning rate are at least 0.405 nats apart at equal steps (500 … 900): a run whose losses are within TOLERANCE, half of
that, of one curve cannot be mistaken for one that follows the other.
"""
from dataclasses import dataclass
from typing import Literal

IMAGENET = 1_281_167  # images
TOLERANCE = 0.2


@dataclass(frozen=True)
class Curve:
    """A posted training loss. What is None was not posted and is not asked for."""

    name: str
    source: str
    points: dict[int, float]
    unit: Literal["step", "epoch"] = "step"
    model: str | None = None
    side: int = 16  # tokens per side
    batch: int | None = None
    lr: float | None = None


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
)
