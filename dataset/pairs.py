"""What all layouts of captioned pictures share: a pair's captions, what is wrong with pairs, counted by kind."""
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dataset.pictures import PictureReader, UnreadableError
from utils import cli

EXAMPLES = 5  # of each kind of problem that are kept by name
SHOWN = 2  # of them that are told when pairs are opened
MOST_CAPTION = 2**20  # bytes: a longer file is no caption

# Kinds of problems. Each pair that is left out is counted under one of them.
BROKEN_LINE, NO_KEYS, NO_CAPTION, EMPTY_CAPTION, BROKEN_CAPTION = (
    "broken line", "line without image or caption", "no caption", "empty caption", "caption that is no text")
NO_IMAGE, MISSING_IMAGE, TOO_SMALL, DUPLICATE, DAMAGED_FILE = (
    "caption without image", "missing image", "too small", "duplicate name", "missing or damaged file")
UNREADABLE = UnreadableError.kind


class Captions(NamedTuple):
    """The captions of a picture, both without blanks around them."""

    long: str
    short: str | None


class PairProblemError(ValueError):
    """A pair cannot be used; `kind` is one of those above."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Problems:
    """How many pairs are left out for which reason, exactly, and the first ones of each kind by name."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        """Count one; `example`: the pair's name and what is wrong with it."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples.setdefault(kind, [])) < EXAMPLES:
            self.examples[kind].append(example)

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another one's `described` said."""
        for kind, count in other["counts"].items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.examples[kind] = [*self.examples.get(kind, []), *other["examples"][kind]][:EXAMPLES]

    def described(self) -> dict[str, Any]:
        """{"counts": {kind: number}, "examples": {kind: texts}}, JSON-ready."""
        return {"counts": dict(sorted(self.counts.items())), "examples": dict(sorted(self.examples.items()))}

    def __str__(self) -> str:
        """"3 broken line (a.jsonl:17: …, …), 2 empty caption (…)"; empty if there are none."""
        return ", ".join(f"{count} {kind} ({'; '.join(self.examples[kind][:SHOWN])}{'; …' * (count > SHOWN)})"
                         for kind, count in sorted(self.counts.items()))


class Pairs:
    """Captioned pictures. Also an `ImageDataset`: without classes, all labels 0.

    Pairs that the files themselves show to be unusable (a broken line, no caption) are left out when the pairs are
    opened and counted in `problems`. Whether a picture can be read is seen when it is.
    """

    classes: list[str] | None = None

    def __init__(self, *, reader: PictureReader | None, smallest: tuple[int, int]) -> None:
        """`smallest`: height and width in pixels below which `image` refuses a picture."""
        self.reader, self.smallest, self.problems = reader or PictureReader(), smallest, Problems()
        self.has_short = False  # whether some pair has a short caption too

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 zeros that take no memory."""
        return np.broadcast_to(np.int64(0), (len(self),))

    def name(self, index: int) -> str:
        """The pair's name, the same wherever the data lies; valid UTF-8."""
        raise NotImplementedError

    def captions(self, index: int) -> Captions:
        """(long, short or None). Raises PairProblemError if the file has changed since the pairs were opened."""
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        """The RGB picture, of any size. Raises UnreadableError."""
        raise NotImplementedError

    def states(self) -> dict[str, str]:
        """{"image_names", "image_sizes", "image_times": hash} of what the pairs are made from; a moved folder has the
        same ones, other names, sizes or times of files others."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """The RGB picture. Raises UnreadableError, with its `kind`, if it cannot be read or is too small."""
        picture = self.picture(index)
        if picture.height < self.smallest[0] or picture.width < self.smallest[1]:
            raise UnreadableError(f"{self.name(index)} is {picture.height}x{picture.width} pixels (height x width), "
                                  f"smaller than {self.smallest[0]}x{self.smallest[1]}", kind=TOO_SMALL)
        return picture

    def checked(self, path: str) -> "Pairs":
        """Tell what is left out. Raises ValueError if nothing is left."""
        if not len(self):
            said = str(self.problems) or "it is empty"
            raise ValueError(f"{path} holds no usable pair of a picture and a caption: {said}")
        if self.problems.counts:
            total = sum(self.problems.counts.values())
            cli.warn(f"{path}: {len(self)} pairs; {total} left out: {self.problems}", kind="note")
        return self


def clean_text(value: Any) -> str:
    """A caption without blanks around it; "" for what is no text. Halves of UTF-16 pairs, which JSON may hold and no
    file can, become U+FFFD."""
    if not isinstance(value, str):
        return ""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def clean_name(name: str) -> str:
    """A file's name as valid UTF-8: bytes that are none are spelt out."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def decode_caption(content: bytes) -> str:
    """The text of a caption file: UTF-8, or UTF-16 with its mark. Raises PairProblemError."""
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if len(content) > MOST_CAPTION:
        raise PairProblemError(BROKEN_CAPTION, f"it is {len(content)} bytes long")
    try:
        return clean_text(content.decode(encoding))
    except UnicodeDecodeError:
        raise PairProblemError(BROKEN_CAPTION, "it is not UTF-8: save it as UTF-8") from None


def choose_captions(texts: Iterable[Any], short: Any = None) -> Captions | None:
    """From the captions of a picture as LlamaGen lists them, [short, long, …], and perhaps a `short` one given apart.

    The first is the long one where there is no second; None where there is none at all.
    """
    first, second, *_ = [*map(clean_text, texts), "", ""]
    given = clean_text(short)
    long = second or first or given
    brief = given or first
    return Captions(long, brief if brief and brief != long else None) if long else None
