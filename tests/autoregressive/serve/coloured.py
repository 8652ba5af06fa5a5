"""A backend that draws in colours in place of a model: code after code, each a square of the class's colour."""
import asyncio
from collections.abc import AsyncIterator

import numpy as np

from autoregressive.serve.protocol import Job, ModelCard, Picture

GRID, PATCH, GREY = (4, 4), 4, 127
DEFAULTS = {"cfg_scale": 2.0, "temperature": 0.9, "top_k": 0, "top_p": 1.0}
NAMES = ("faces", "flags", "clocks")
COLOURS = ((200, 60, 60), (60, 160, 60), (60, 60, 200), (190, 160, 40))  # of the classes, and of none
PROMPTED = (150, 60, 170)


def card(name: str, **given) -> ModelCard:
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    return ModelCard(**{"name": name, "family": "gpt", "condition": "class", "image_size": size, "grid": GRID,
                        "classes": 3, "class_names": NAMES, "vocab_size": 256, "defaults": DEFAULTS, "edits": True,
                        "created": 0} | given)


CARDS = [card("emoji-gpt"), card("emoji-arpg", family="arpg", defaults={**DEFAULTS, "cfg_scale": 4.0, "steps": 8}),
         card("emoji-text", condition="text", classes=0, class_names=None, edits=False)]


class ColouredBackend:
    """See `Backend`. Each code takes `pause` seconds; `error` is raised before code `good`, and while `held` no code
    from `good` on is drawn."""

    def __init__(self, cards: list[ModelCard] | None = None, *, pause: float = 0.0) -> None:
        self.cards, self.state, self.pause = cards or CARDS, "ready", pause
        self.jobs: list[Job] = []  # all that were asked for
        self.open = 0  # that are drawn now
        self.error: Exception | None = None
        self.good = 0
        self.held = False

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def draw(self, job: Job) -> AsyncIterator[Picture]:
        own = next(card for card in self.cards if card.name == job.model)
        job.check(own)
        self.jobs.append(job)
        self.open += 1
        codes, patch = own.grid[0] * own.grid[1], own.image_size[0] // own.grid[0]
        try:
            for drawn in range(codes):
                if self.error is not None and drawn >= self.good:
                    raise self.error
                await asyncio.sleep(self.pause)
                while self.held and drawn >= self.good:
                    await asyncio.sleep(0.005)
                part = drawn * (job.partials + 1) // codes
                if drawn > 0 and part > (drawn - 1) * (job.partials + 1) // codes:
                    for which in range(len(job.indices)):
                        yield Picture(which, self.picture(job, own, drawn, patch), drawn / codes, part - 1)
            for which in range(len(job.indices)):
                yield Picture(which, self.picture(job, own, codes, patch), 1.0)
        finally:
            self.open -= 1

    @staticmethod
    def picture(job: Job, own: ModelCard, drawn: int, patch: int) -> np.ndarray:
        there = (np.arange(own.grid[0] * own.grid[1]).reshape(own.grid) < drawn).repeat(patch, 0).repeat(patch, 1)
        colour = PROMPTED if isinstance(job.condition, str) else COLOURS[3 if job.condition is None else job.condition]
        pixels = np.where(there[..., None], np.uint8(colour), np.uint8(GREY))
        return pixels if job.image is None else np.where(job.mask[..., None], pixels, job.image)
