"""A served model: its decoder, the images that wait for it and are in it, which join and leave at any step."""
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.generate import check_logits
from autoregressive.models.plan import Finished, Request
from autoregressive.sample.batch_size import batch_that_fits
from autoregressive.sample.conditions import ClassConditions
from autoregressive.sample.editing import edit_steps
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.prompts import TextSampleFlags, encoder_for, load_text_pipeline, prompt_stream
from autoregressive.serve.preview import preview
from autoregressive.serve.protocol import Job, ModelCard, Picture
from autoregressive.serve.served import ServedModel
from utils import cli
from utils.checkpoints import containers
from utils.finite import NotFiniteError
from utils.seeding import sample_generator

KEPT_PROMPTS = 256  # whose features are kept


@dataclass(eq=False)
class Drawing:
    """A job in progress."""

    number: int
    job: Job
    given: Any  # what the pipeline draws after: a label, or text features
    left: int  # pictures that are not complete
    edit: Generator[dict, Tensor, Any] | None = None  # what is done between and after windows of an edit
    window: dict[int, Tensor] = field(default_factory=dict)  # codes of the window that is drawn
    over: bool = False  # cancelled, failed or complete


@dataclass(eq=False)
class Wanted:
    """One image of a job that waits or is decoded."""

    drawing: Drawing
    which: int
    generator: torch.Generator
    known: Tensor | None = None  # (1, L)
    shown: int = 0  # partial pictures so far


class ModelEngine:
    """A model, its decoder, and the images that wait for it and are in it. For one thread."""

    def __init__(self, served: ServedModel, *, device: torch.device, slots: int, send: Any) -> None:
        flags, self.send = served.flags, send
        text = isinstance(flags, TextSampleFlags)
        self.pipeline = load_text_pipeline(flags, device=device) if text else load_pipeline(flags, device=device)
        self.encoder = encoder_for(flags, self.pipeline, device=device) if text else None
        self.dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32  # of features, as `features_of`
        self.features: OrderedDict[str, Tensor] = OrderedDict()
        self.card = card_of(served.name, self.pipeline, flags.gpt_ckpt)
        self.slots = batch_that_fits(self.pipeline, device, most=slots)
        self.waiting: deque[Wanted] = deque()
        self.active: dict[int, Wanted] = {}
        self.drawings: dict[int, Drawing] = {}
        self.renew()

    def renew(self) -> None:
        """Make an empty decoder."""
        self.decoder = CodeDecoder(self.pipeline.gpt)
        self.decoder.reserve(self.slots)

    # ---- jobs

    def take(self, number: int, job: Job) -> None:
        """Let a job's images wait. Raises ValueError for what cannot be drawn."""
        drawing = Drawing(number, job, self.given(job.condition), len(job.indices))
        if job.image is None:
            self.drawings[number] = drawing
            self.waiting += [Wanted(drawing, which, self.stream(job, index)) for which, index in enumerate(job.indices)]
            return
        drawing.edit = edit_steps(self.pipeline, job.image, job.mask, conditions=[drawing.given] * len(job.indices),
                                  seed=job.seed, indices=job.indices, paste=job.paste)
        self.drawings[number] = drawing
        self.go_on(drawing, None)

    def cancel(self, number: int) -> None:
        """Drop a job, if it is still there: its places are free at once."""
        drawing = self.drawings.pop(number, None)
        if drawing is not None:
            drawing.over = True
            self.waiting = deque(wanted for wanted in self.waiting if wanted.drawing is not drawing)
            for slot in [slot for slot, wanted in self.active.items() if wanted.drawing is drawing]:
                self.decoder.leave(slot)
                del self.active[slot]

    def fail(self, drawing: Drawing, error: Exception) -> None:
        """Tell what is wrong with a job, and drop it."""
        if not drawing.over:
            self.send((outcome(error), drawing.number, cli.message(error)))
            self.cancel(drawing.number)

    def given(self, condition: int | str | None) -> Any:
        """What the pipeline draws after for a label or prompt."""
        if condition is None:
            return self.pipeline.conditions.nothing
        if isinstance(self.pipeline.conditions, ClassConditions):
            return int(condition)
        if condition in self.features:
            self.features.move_to_end(condition)
        else:
            self.features[condition] = self.encoder([condition])[0].to("cpu", self.dtype)
            while len(self.features) > KEPT_PROMPTS:
                self.features.popitem(last=False)
        return self.features[condition]

    def stream(self, job: Job, index: int) -> torch.Generator:
        """The random stream of an image: that of the grid commands, where a prompt is the first of its command."""
        if isinstance(job.condition, str) and job.image is None:
            return prompt_stream(job.seed, index)
        return sample_generator(job.seed, index)

    # ---- steps

    def step(self) -> None:
        """Let waiting images join, take one step with those that are there, hand out pictures."""
        while self.waiting and self.decoder.free:
            self.join(self.waiting.popleft())
        if not self.active:
            return
        for done in self.decoder.step():
            self.finish(self.active.pop(done.slot), done)
        for slot, wanted in list(self.active.items()):
            if wanted.shown < wanted.drawing.job.partials and not wanted.drawing.over:
                self.show(slot, wanted)

    def join(self, wanted: Wanted) -> None:
        """Let an image into the decoder; one of which all codes are known is complete already."""
        drawing = wanted.drawing
        try:
            request = self.request(wanted)
            if request is None:
                self.window_part(wanted, wanted.known[0])
            else:
                self.active[self.decoder.join(request)] = wanted
        except Exception as error:
            self.fail(drawing, error)
            if not isinstance(error, ValueError):
                traceback.print_exc()

    def request(self, wanted: Wanted) -> Request | None:
        """What the decoder is asked for an image."""
        job, schedule = wanted.drawing.job, self.pipeline.schedule
        if job.steps is not None:
            schedule = replace(schedule, steps=job.steps)
        rows = sum(1 + (active.drawing.job.cfg_scale > 1) for active in self.active.values())
        return self.pipeline.requests(
            [wanted.drawing.given], seed=job.seed, generators=[wanted.generator], known=wanted.known, beside=rows,
            schedule=schedule, cfg_scale=job.cfg_scale, temperature=job.temperature, top_k=job.top_k,
            top_p=job.top_p)[0]

    def show(self, slot: int, wanted: Wanted) -> None:
        """Send a partial picture if one is due: they come when equal shares of what is to be drawn are there."""
        plan, partials = self.decoder.active[slot].request.plan, wanted.drawing.job.partials
        share = (plan.decided - plan.known) / (len(plan.order) - plan.known)
        due = min(partials, int(share * (partials + 1)))
        if due <= wanted.shown:
            return
        drawn = torch.zeros(len(plan.order), dtype=torch.bool)
        drawn[plan.order[:plan.decided]] = True
        codes = self.decoder.codes[slot, :len(plan.order)]
        pixels = preview(self.pipeline.tokenizer, codes, drawn.to(codes.device), self.card.grid)
        self.send(("picture", wanted.drawing.number, Picture(wanted.which, pixels, share, due - 1)))
        wanted.shown = due

    def finish(self, wanted: Wanted, done: Finished) -> None:
        """Hand out an image whose codes are complete."""
        drawing = wanted.drawing
        if drawing.over:
            return
        try:
            check_logits([done.broken])
            if drawing.edit is not None:
                self.window_part(wanted, done.codes)
                return
            self.hand_out(drawing, wanted.which, self.pipeline.to_pixels(done.codes[None])[0])
        except (ValueError, NotFiniteError) as error:
            self.fail(drawing, error)

    def hand_out(self, drawing: Drawing, which: int, pixels: np.ndarray) -> None:
        """Send a complete picture."""
        self.send(("picture", drawing.number, Picture(which, pixels, 1.0)))
        drawing.left -= 1
        if not drawing.left:
            drawing.over = True
            del self.drawings[drawing.number]

    # ---- edits: window by window

    def window_part(self, wanted: Wanted, codes: Tensor) -> None:
        """Note the codes of one image's window; when those of all are there, the edit goes on."""
        drawing = wanted.drawing
        drawing.window[wanted.which] = codes.cpu()
        if len(drawing.window) == len(drawing.job.indices):
            made = torch.stack([drawing.window[which] for which in range(len(drawing.window))])
            drawing.window = {}
            self.go_on(drawing, made)

    def go_on(self, drawing: Drawing, made: Tensor | None) -> None:
        """Let an edit take its next step: another window waits, or its pictures are complete."""
        try:
            asked = drawing.edit.send(made)
        except StopIteration as end:
            for which, pixels in enumerate(end.value.pictures):
                self.hand_out(drawing, which, pixels)
            return
        except Exception:
            self.drawings.pop(drawing.number, None)
            raise
        self.waiting += [Wanted(drawing, which, generator, known[None]) for which, (generator, known) in
                         enumerate(zip(asked["generators"], asked["known"], strict=True))]


def card_of(name: str, pipeline: Any, path: str) -> ModelCard:
    """What a server says of a model."""
    conditions, settings = pipeline.conditions, pipeline.settings
    text = not isinstance(conditions, ClassConditions)
    defaults = {key: settings[key] for key in ("cfg_scale", "temperature", "top_k", "top_p")}
    if pipeline.schedule is not None:
        defaults["steps"] = len(pipeline.schedule.sizes(pipeline.gpt.config.block_size))
    names = None if text or conditions.names is None else tuple(conditions.names)
    place = containers.resolve(path)
    created = Path(place).stat().st_mtime if Path(place).exists() else time.time()
    return ModelCard(name, "arpg" if pipeline.gpt.any_order else "gpt", "text" if text else "class",
                     pipeline.image_size, pipeline.gpt.config.grid, 0 if text else conditions.count, names,
                     pipeline.gpt.config.vocab_size, defaults, True, int(created))


def outcome(error: Exception) -> str:
    """Whether a job was refused, which is its sender's mistake, or failed."""
    return "refused" if isinstance(error, ValueError) else "failed"
