"""What a request over HTTP says, field by field, and the job that it means. Nothing else reaches a backend."""
import functools
import io
import re
import secrets
import warnings
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoregressive.sample.editing import model_view
from autoregressive.sample.masks import as_mask
from autoregressive.serve.protocol import MOST_IMAGES, MOST_PARTIALS, MOST_PROMPT, Job, ModelCard
from dataset.pictures import PictureReader, UnreadableError

UPLOADS = ("PNG", "JPEG", "WEBP")  # formats that are read from strangers
SEEDS = 2**32
SIZE = re.compile("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
IGNORED = ("user", "quality", "style", "moderation", "input_fidelity")  # of OpenAI's, that say nothing here

Word = Annotated[str, Field(max_length=200)]


class RefusedError(Exception):
    """What is wrong with a request: an HTTP status, a line for its sender, which field it is about."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
                 retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


class GenerationFields(BaseModel):
    """POST /v1/images/generations: OpenAI's fields and ours. null is the same as left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Word | None = None
    prompt: Annotated[str, Field(max_length=MOST_PROMPT)] | int | None = None
    class_: Word | int | None = Field(None, alias="class")
    n: int | None = Field(None, ge=1, le=MOST_IMAGES)
    size: Word | None = None
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    index: int | None = Field(None, ge=0, lt=SEEDS - MOST_IMAGES)
    cfg_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = Field(None, ge=0, lt=2**31)
    top_p: float | None = None
    steps: int | None = Field(None, ge=1, lt=2**31)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=MOST_PARTIALS)
    background: Literal["auto", "opaque"] | None = None
    user: Word | None = None
    quality: Word | None = None
    style: Word | None = None
    moderation: Word | None = None


class EditFields(GenerationFields):
    """POST /v1/images/edits, multipart: these, and the files image and mask."""

    input_fidelity: Word | None = None
    paste: int | None = Field(None, ge=0, le=4096)


def fields_of(kind: type[GenerationFields], values: Any, *, strings: bool = False) -> GenerationFields:
    """Check the values of a request; strings: all of them are text, as in a form. Raises RefusedError."""
    if not isinstance(values, dict):
        raise RefusedError("the body is no JSON object: expected {\"prompt\": …, …}")
    try:
        return kind.model_validate_strings(values) if strings else kind.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0])[:60] if first["loc"] else None
        known = ", ".join(field.alias or name for name, field in kind.model_fields.items() if name not in IGNORED)
        text = f"there is no such field, expected some of {known}" if first["type"] == "extra_forbidden" else \
            first["msg"][0].lower() + first["msg"][1:]
        raise RefusedError(f"{name}: {text}", param=name) from None


def card_for(name: str | None, cards: list[ModelCard], *, edit: bool = False) -> ModelCard:
    """The model of a request; without a name the first, for an edit the first ARPG, which redraws any part. Raises
    RefusedError."""
    if edit and name is None:
        name = next((card.name for card in cards if card.family == "arpg"), None)
    card = next((card for card in cards if name in (None, card.name)), None)
    if card is None:
        raise RefusedError(f"there is no model {name!r} here: choose from {', '.join(card.name for card in cards)}",
                           status=404, param="model", code="model_not_found")
    return card


def job_of(fields: GenerationFields, card: ModelCard, *, image: bytes | None = None, mask: bytes | None = None,
           most_pixels: int = 0) -> Job:
    """The job of a request. image, mask: files of an edit. Raises RefusedError."""
    settings = {name: card.defaults.get(name) if getattr(fields, name) is None else getattr(fields, name)
                for name in ("cfg_scale", "temperature", "top_k", "top_p")}
    height, width = card.image_size
    if fields.size not in (None, "auto", f"{width}x{height}"):
        shape = "width x height, " if SIZE.fullmatch(fields.size) is None else ""
        raise RefusedError(f"size is {fields.size!r}: {card.name} draws pictures of {shape}{width}x{height}",
                           param="size")
    first, pictures = fields.index or 0, {}
    if image is not None:
        pixels, hole = picture_and_mask(image, mask, most_pixels=most_pixels)
        try:
            if hole.shape != card.image_size:
                pixels, _, hole = model_view(Image.fromarray(pixels), hole, card.image_size)
        except ValueError:
            raise RefusedError(f"the mask lies in the part of the picture that is cut off to make it {width}x{height}",
                               param="mask") from None
        pictures = {"image": pixels, "mask": hole, "paste": fields.paste}
    job = Job(model=card.name, condition=condition_of(fields, card), steps=fields.steps, **settings, **pictures,
              seed=secrets.randbelow(SEEDS) if fields.seed is None else fields.seed,
              indices=range(first, first + (fields.n or 1)),
              partials=(fields.partial_images or 0) if fields.stream else 0)
    try:
        job.check(card)
    except ValueError as error:
        about = str(error).split()[0]
        raise RefusedError(str(error), param=about if about in GenerationFields.model_fields else None) from None
    return job


def condition_of(fields: GenerationFields, card: ModelCard) -> int | str | None:
    """What to draw after: a label, a prompt, or nothing. Of a model of classes the prompt is a class too, as OpenAI's
    clients must give one. Raises RefusedError."""
    if card.condition == "text":
        if fields.class_ is not None:
            raise RefusedError(f"{card.name} draws what a text says: give a prompt, no class", param="class")
        return None if fields.prompt in (None, "") else str(fields.prompt)
    if fields.class_ is not None and fields.prompt not in (None, "", fields.class_):
        raise RefusedError(f"prompt is {str(fields.prompt)[:50]!r} and class {str(fields.class_)[:50]!r}: give one, "
                           f"{card.name} draws classes", param="class")
    name = "prompt" if fields.class_ is None else "class"
    given = fields.prompt if fields.class_ is None else fields.class_
    try:
        label = card.label(None if given == "" else given)
    except ValueError as error:
        raise RefusedError(str(error), param=name) from None
    return None if label == card.classes else label


def picture_and_mask(image: bytes, mask: bytes | None, *, most_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture, uint8 (H, W, 3), and what is drawn anew, bool (H, W): the transparent parts of the mask, or if it has
    none the white ones; without a mask the transparent parts of the picture. Raises RefusedError."""
    reader = picture_reader()
    opened = look_at(image, "image", most_pixels=most_pixels)
    picture = opaque(reader, image, "image")
    source, name = (image, "image") if mask is None else (mask, "mask")
    holes = transparent(opened if mask is None else look_at(mask, "mask", most_pixels=most_pixels))
    if holes is None and mask is None:
        raise RefusedError("there is no mask, and the image has no transparent part: what is to be drawn anew?",
                           param="mask")
    try:
        if holes is None:
            holes = np.asarray(opaque(reader, source, name).convert("L"))
        hole = as_mask(holes, (picture.height, picture.width))
    except ValueError as error:
        raise RefusedError(str(error), param=name) from None
    if not hole.any():
        raise RefusedError("the mask marks nothing: what is to be drawn anew is transparent, or white", param="mask")
    return np.asarray(picture), hole


@functools.cache
def picture_reader() -> PictureReader:
    """One for all requests: it says once that there are transparent pictures."""
    return PictureReader()


def look_at(content: bytes, name: str, *, most_pixels: int) -> Image.Image:
    """An uploaded picture, opened but not decoded. Raises RefusedError for other formats and for huge ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's on many pixels: the limit is ours
            picture = Image.open(io.BytesIO(content), formats=UPLOADS)
    except Exception:  # a stranger's bytes make decoders raise anything
        raise RefusedError(f"the {name} is no PNG, JPEG or WebP", param=name) from None
    if picture.width * picture.height > most_pixels:
        raise RefusedError(f"the {name} has {picture.width}x{picture.height} pixels, {most_pixels} are allowed",
                           status=413, param=name)
    return picture


def opaque(reader: PictureReader, content: bytes, name: str) -> Image.Image:
    """A picture, RGB. Raises RefusedError for a damaged one."""
    try:
        return reader.decoded(content, f"the {name}")
    except UnreadableError as error:
        raise RefusedError(str(error), param=name) from None


def transparent(picture: Image.Image) -> np.ndarray | None:
    """Where a picture is transparent, bool (H, W); None if nowhere. Raises RefusedError for a damaged one."""
    try:
        picture.load()
        alpha = np.asarray(picture.convert("RGBA").getchannel("A")) if picture.has_transparency_data else None
    except Exception:
        raise RefusedError("a picture is damaged: it ends too early, or its data make no sense") from None
    return None if alpha is None or alpha.min() >= 128 else alpha < 128
