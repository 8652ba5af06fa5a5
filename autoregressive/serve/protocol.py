"""What a server and a page ask of a backend, and what they get: pictures, some of them before they are complete.

A `Backend` draws with the decoder of this program (native_backend.py), with vLLM (vllm_backend.py), or asks a server
elsewhere (client.py). Image (seed, index) is the one that the command line draws with the same settings.
"""
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Protocol

import numpy as np

from utils.seeding import check_seed

MOST_IMAGES = 64  # of one job
MOST_PARTIALS = 64  # pictures of one image before it is complete
MOST_SCALE = 100.0  # of guidance: far beyond what pictures stand
MOST_TEMPERATURE = 100.0
MOST_PROMPT = 10_000  # characters


class OverloadedError(RuntimeError):
    """There are too many jobs: try again after `seconds`."""

    def __init__(self, message: str, *, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class UnavailableError(RuntimeError):
    """The engine is not there: it is being loaded, or it died and is started again."""


class FailedError(RuntimeError):
    """A picture could not be drawn."""


@dataclass(frozen=True)
class ModelCard:
    """What a served model is and takes."""

    name: str
    family: Literal["gpt", "arpg"]
    condition: Literal["class", "text"]
    image_size: tuple[int, int]  # height and width in pixels
    grid: tuple[int, int]  # the same in codes
    classes: int  # how many; 0 for a model of text
    class_names: tuple[str, ...] | None
    vocab_size: int
    defaults: dict[str, Any]  # cfg_scale, temperature, top_k, top_p; of an ARPG steps
    edits: bool  # whether parts of pictures can be drawn anew: by an ARPG any part, by a GPT all from some row on
    created: int  # seconds since 1970, of the checkpoint

    def label(self, given: int | str | None) -> int:
        """The label of a class by its name or number; None is "no class". Raises ValueError for what is unknown."""
        if given is None:
            return self.classes
        names = self.class_names or ()
        if isinstance(given, str) and given in names:
            return names.index(given)
        word = given.strip() if isinstance(given, str) else given
        number = int(word) if isinstance(word, str) and word.isascii() and word.isdigit() and len(word) < 19 else word
        if isinstance(number, bool) or not isinstance(number, Integral):
            known = f"choose from {', '.join(names[:20])}" if names else "the model has no class names, use numbers"
            raise ValueError(f"class {str(given)[:50]!r} is unknown: {known}")
        if not 0 <= number < self.classes:
            raise ValueError(f"class {str(number)[:20]} is out of range: the model has 0 to {self.classes - 1}")
        return int(number)

    def as_json(self) -> dict[str, Any]:
        """For /v1/models."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images of one condition. Check it against the model's card before it is drawn."""

    model: str
    condition: int | str | None  # a label, or a prompt; None: no class, no prompt
    seed: int
    indices: Sequence[int] = (0,)  # of the images in the stream of the seed
    cfg_scale: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int | None = None  # of an ARPG; None: the model's default
    partials: int = 0  # pictures of each image before it is complete
    image: np.ndarray | None = field(default=None, repr=False)  # an edit: uint8 (H, W, 3) of the model's size
    mask: np.ndarray | None = field(default=None, repr=False)  # bool (H, W): what is drawn anew
    paste: int | None = None  # of an edit: known pixels as they were, mixed up to so many pixels from the mask

    def check(self, card: ModelCard) -> None:
        """Raise ValueError for what the model does not take: nothing of that may reach an engine."""
        if self.condition is not None and card.condition == "class":
            if not isinstance(self.condition, Integral) or not 0 <= self.condition < card.classes:
                raise ValueError(f"class {str(self.condition)[:50]} is out of range: {card.name} has 0 to "
                                 f"{card.classes - 1}")
        elif self.condition is not None and not isinstance(self.condition, str):
            raise ValueError(f"{card.name} draws what a text says: give a prompt, not class {self.condition}")
        elif self.condition is not None and len(self.condition) > MOST_PROMPT:
            raise ValueError(f"the prompt has {len(self.condition)} characters, expected at most {MOST_PROMPT}")
        check_seed(self.seed)
        if not 0 < len(self.indices) <= MOST_IMAGES:
            raise ValueError(f"{len(self.indices)} images are asked for, expected 1 to {MOST_IMAGES}")
        if not all(isinstance(index, Integral) and 0 <= index < 2**32 for index in self.indices):
            raise ValueError(f"the images' indices are not from 0 to {2**32 - 1}")
        for name, most in (("cfg_scale", MOST_SCALE), ("temperature", MOST_TEMPERATURE), ("top_p", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} is {value}, expected a number")
            if not 0 <= value <= most:
                raise ValueError(f"{name} is {value:g}, expected 0 to {most:g}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, Integral) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {str(self.top_k)[:20]}, expected 0 (all codes) or more, below {2**31}")
        if self.steps is not None and card.family == "gpt":
            raise ValueError(f"steps are for an ARPG, which draws many codes at once; {card.name} is a GPT")
        codes = card.grid[0] * card.grid[1]
        if self.steps is not None and not 1 <= self.steps <= codes:
            raise ValueError(f"steps is {self.steps}, expected 1 to {codes}, the number of codes of an image")
        if not 0 <= self.partials <= MOST_PARTIALS:
            raise ValueError(f"{self.partials} partial pictures are asked for, expected 0 to {MOST_PARTIALS}")
        if self.image is not None and not card.edits:
            raise ValueError(f"{card.name} does not edit pictures here")
        if self.image is not None and not (self.image.shape == (*card.image_size, 3) and self.mask is not None
                                           and self.mask.shape == card.image_size):
            raise ValueError(f"the picture is {self.image.shape} and its mask {np.shape(self.mask)}, expected "
                             f"{(*card.image_size, 3)} and {card.image_size}")


@dataclass(frozen=True)
class Picture:
    """A picture of a job. Those with `share` below 1 are partial: what is not drawn yet is grey."""

    which: int  # position in the job's indices
    pixels: np.ndarray  # uint8 (H, W, 3)
    share: float  # of the codes that are to be drawn
    partial: int | None = None  # number of a partial picture, from 0; None: it is complete


class Backend(Protocol):
    """What draws. All methods belong to one event loop."""

    async def start(self) -> None:
        """Load the models; returns when `draw` can be called. Raises ValueError or FileNotFoundError."""

    async def stop(self) -> None:
        """Finish: jobs in progress raise UnavailableError."""

    @property
    def cards(self) -> list[ModelCard]:
        """The models; the first is the default."""

    @property
    def state(self) -> Literal["ready", "loading"]:
        """Whether jobs are taken now."""

    def draw(self, job: Job) -> AsyncIterator[Picture]:
        """Draw a checked job's pictures, in the order in which they are ready. To close the iterator cancels the job
        and frees its places. Raises OverloadedError or UnavailableError, also in the middle."""


class EngineBackend(Backend, Protocol):
    """A backend with a process of its own that draws, which a server can tell of."""

    decoding: int  # images that are decoded now
    waiting: int  # images that wait for a place
    restarts: int  # how often the process was started again
