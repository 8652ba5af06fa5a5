"""What a page's controls say, as jobs: a class or prompt, numbers, a painted mask. Knows nothing of the page itself."""
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from autoregressive.sample.masks import as_mask
from autoregressive.serve.protocol import MOST_PARTIALS, Job, ModelCard
from dataset.augmentation import center_crop

NO_CLASS = "no class"
EXAMPLES = 8  # pictures that a visitor sees first
EXAMPLE_PROMPTS = ("red heart", "smiling face with sunglasses", "woman firefighter", "blue circle", "alarm clock",
                   "green apple", "black cat", "waving hand")
SHARP_BELOW = 256  # pixels: smaller pictures are enlarged without blur
EDITOR_SIDE = 512  # pixels, about: how large a picture is shown to be painted on


def class_choices(card: ModelCard) -> list[tuple[str, int | str]]:
    """What can be chosen as (shown, value)."""
    names = card.class_names or map(str, range(card.classes))
    return [(NO_CLASS, NO_CLASS), *((name, label) for label, name in enumerate(names))]


def asked_job(card: ModelCard, *, chosen: int | str | None, prompt: str | None, count: float | None,
              seed: float | None, cfg_scale: float | None, temperature: float | None, top_k: float | None,
              top_p: float | None, steps: float | None) -> Job:
    """The job that the controls describe; of `chosen` and `prompt` the model takes one. Raises ValueError for what is
    empty or what the model does not take."""
    if card.condition == "class":
        if chosen is None or chosen == "":
            raise ValueError(f"no class is chosen: take one from the list, or {NO_CLASS!r}")
        condition = None if chosen == NO_CLASS else card.label(chosen)
    else:
        condition = (prompt or "").strip()
        if not condition:
            raise ValueError("the prompt is empty: write what is to be drawn")
    count = whole_number("the number of pictures", count)
    numbers = {"guidance": cfg_scale, "temperature": temperature, "top-p": top_p}
    for name, value in numbers.items():
        if value is None:
            raise ValueError(f"{name} is empty: give a number")
    job = Job(model=card.name, condition=condition, seed=whole_number("the seed", seed), indices=range(count),
              cfg_scale=float(cfg_scale), temperature=float(temperature), top_k=whole_number("top-k", top_k),
              top_p=float(top_p), steps=whole_number("steps", steps) if card.family == "arpg" else None)
    job.check(card)
    return replace(job, partials=partials(card, count, job.steps))


def example_jobs(card: ModelCard) -> tuple[list[Job], list[str]]:
    """Jobs of one picture each that show what a model draws, of classes from its whole list, and what each shows."""
    settings = {"count": 1, "seed": 0, **{name: card.defaults.get(name) for name in
                                          ("cfg_scale", "temperature", "top_k", "top_p", "steps")}}
    if card.condition == "class":
        labels = [place * card.classes // EXAMPLES for place in range(EXAMPLES)] if card.classes > EXAMPLES else range(
            card.classes)
        jobs = [asked_job(card, chosen=label, prompt=None, **settings) for label in labels]
        return jobs, [card.class_names[label] if card.class_names else f"class {label}" for label in labels]
    jobs = [asked_job(card, chosen=None, prompt=prompt, **settings) for prompt in EXAMPLE_PROMPTS]
    return jobs, list(EXAMPLE_PROMPTS)


def partials(card: ModelCard, count: int, steps: int | None) -> int:
    """How many partial pictures of each of `count` a browser can be sent: a GPT's rows, an ARPG's steps, fewer if there
    are many pictures."""
    most = card.grid[0] if card.family == "gpt" else steps or card.grid[0]
    return max(2, min(most, MOST_PARTIALS, 64 // count)) - 1


def whole_number(name: str, value: float | None) -> int:
    """A whole number from a control. Raises ValueError."""
    if value is None or not float(value).is_integer():
        raise ValueError(f"{name} is {'empty' if value is None else value}: give a whole number")
    return int(value)


# ---- parts drawn anew


def fitted(picture: Image.Image, card: ModelCard) -> np.ndarray:
    """A picture as the model takes it: cropped and resized as for training, uint8 (H, W, 3)."""
    return center_crop(picture, card.image_size)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), each pixel repeated so that one can paint on it."""
    times = max(1, round(EDITOR_SIDE / max(picture.shape[:2])))
    return picture.repeat(times, 0).repeat(times, 1)


def painted(canvas: dict[str, Any] | None) -> np.ndarray | None:
    """Where there is paint in what gradio's editor gives, layers of uint8 (H, W, 4): bool (H, W); None: nowhere."""
    layers = (canvas or {}).get("layers") or []
    return np.any([layer[..., 3] > 0 for layer in layers], axis=0) if layers else None


def edit_job(card: ModelCard, job: Job, picture: np.ndarray | None, paint: np.ndarray | None, *,
             paste: int | None) -> Job:
    """The job with a picture (H, W, 3) and what is painted of it, bool of the same aspect, to be drawn anew.

    A GPT draws row by row: of it everything from the highest painted row of codes on is drawn anew.
    """
    if picture is None:
        raise ValueError("there is no picture: upload one, or take one that was drawn")
    if picture.shape != (*card.image_size, 3):
        raise ValueError(f"the picture is {picture.shape[0]}x{picture.shape[1]}, {card.name} draws "
                         f"{card.image_size[0]}x{card.image_size[1]}: upload it again")
    if paint is None or not paint.any():
        raise ValueError("nothing is painted: mark with the brush what is to be drawn anew")
    mask = as_mask(paint, card.image_size)
    if card.family == "gpt":
        patch = card.image_size[0] // card.grid[0]
        mask[int(mask.any(1).argmax()) // patch * patch:] = True
    job = replace(job, image=picture, mask=mask, paste=paste)
    job.check(card)
    return job


def defaults_of(card: ModelCard) -> dict[str, Any]:
    """Values of the controls for a model."""
    known = {"cfg_scale": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "steps": None}
    values = known | {name: value for name, value in card.defaults.items() if name in known and value is not None}
    values["top_k"] = min(values["top_k"], card.vocab_size)  # as many as there are: all
    if card.family == "arpg" and values["steps"] is None:
        values["steps"] = min(64, card.grid[0] * card.grid[1])
    return values


# ---- in words


def facts_of_card(card: ModelCard) -> str:
    """What a model is, in a line."""
    (height, width), (h, w) = card.image_size, card.grid
    of = f"{card.classes} classes" if card.condition == "class" else "prompts"
    return f"{card.family.upper()} · {width}×{height} pixels of {w}×{h} codes · {of}"


def edit_note(card: ModelCard) -> str:
    """What of a picture a model can draw anew."""
    if not card.edits:
        return f"{card.name} does not redraw parts of pictures here: choose another model."
    if card.family == "gpt":
        return (f"Paint what is to change. {card.name} draws row by row: everything from the highest painted row on is "
                "redrawn. An ARPG can redraw any part.")
    return "Paint what is to change: that part is redrawn as the class or prompt says, once for each picture asked for."


def is_small(card: ModelCard) -> bool:
    """Whether its pictures are enlarged, which is then done without blur."""
    return max(card.image_size) < SHARP_BELOW
