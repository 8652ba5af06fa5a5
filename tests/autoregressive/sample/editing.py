"""What tests of editing share: small models with weights that are always the same, pictures and masks."""
import numpy as np

from autoregressive.models.schedule import DrawSchedule
from autoregressive.sample.conditions import ClassConditions
from autoregressive.sample.pipeline import Pipeline
from tests.data.references import filled as with_weights
from tokenizer.tokenizer_image.vq_model import VQ_models

GRID, SIZE = (4, 6), (16, 24)  # of the model, in cells of 4 pixels
SETTINGS = {"cfg_scale": 3.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
CLASSES = ["cat", "dog", "owl"]


def pipeline_of(build, **settings) -> Pipeline:
    gpt = with_weights(build, "edit", vocab_size=256, num_classes=3, grid=GRID)
    schedule = DrawSchedule(steps=settings.pop("steps", None)) if gpt.any_order else None
    tokenizer, classes = with_weights(VQ_models["VQ-4-S"], "edit"), ClassConditions(3, CLASSES)
    return Pipeline(gpt, tokenizer, classes, SETTINGS | settings, {}, schedule=schedule)


def picture(size=SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def block(top: int, left: int, height: int, width: int, size=SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:top + height, left:left + width] = True
    return mask
