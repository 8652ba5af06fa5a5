"""Text under pictures: wrapped to a width, cut with "…", in any script that some font of this machine has."""
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from utils import cli
from utils.files import plain

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
                "/System/Library/Fonts", "/Library/Fonts", "C:/Windows/Fonts")
FONT_ENDINGS = (".ttf", ".otf", ".ttc")
TRIED_FIRST = ("dejavusans.", "notosanscjk-regular", "notosans-regular", "arial unicode", "pingfang", "msyh", "wqy",
               "droidsansfallback")  # plain faces of many letters; how the names of their files begin
MOST_FONTS = 300  # looked at for a letter that the first ones lack
NO_LETTER = "\U0010ffff"  # no font has it: it shows how a font draws what it lacks
CUT = "…"


class Lettering:
    """Writes text of one size (pixels). A letter that no font here has is drawn as the first font draws those."""

    def __init__(self, size: int) -> None:
        self.size, self.line = size, int(size * 1.5)  # height of a line
        self.font = ImageFont.load_default(size=size)
        self.lacking: set[str] = set()

    def font_for(self, text: str) -> FreeTypeFont | None:
        """The first font that has all letters of a text; None if there is none."""
        def whole(font: FreeTypeFont | None) -> bool:
            return font is not None and all(letter.isspace() or has_letter(font, letter) for letter in text)

        if whole(self.font):
            return self.font
        return next((font for path in font_files() if whole(font := font_of(path, self.size))), None)

    def runs(self, text: str) -> Iterator[tuple[str, FreeTypeFont]]:
        """The text in parts that one font has: words, and where no font has the whole word, letters."""
        for word in re.findall(r"\s+|\S+", text):
            font = self.font_for(word)
            for part in [word] if font else word:
                found = font or self.font_for(part)
                if found is None:
                    self.lacking.add(part)
                yield part, found or self.font

    def width(self, text: str) -> float:
        """How wide a text is, in pixels."""
        return sum(font.getlength(part) for part, font in self.runs(text))

    def wrapped(self, text: str, width: int, lines: int) -> list[str]:
        """A text in at most `lines` lines of `width` pixels, broken at spaces where there are some; what does not fit
        is cut off with "…"."""
        words, found = plain(" ".join(text.split()))[:width * lines].split(" "), [""]  # no letter is under a pixel wide
        while words:
            word = words.pop(0)
            longer = f"{found[-1]} {word}".strip()
            if self.width(longer) <= width:
                found[-1] = longer
            elif found[-1] and len(found) < lines:
                found.append("")
                words.insert(0, word)
            elif len(found) < lines:
                fits = self.that_fits(word, width)
                found[-1] = word[:fits]
                found.append("")
                words.insert(0, word[fits:])
            else:
                found[-1] = longer[:self.that_fits(longer, width, CUT)].rstrip() + CUT
                break
        return found

    def that_fits(self, text: str, width: int, end: str = "") -> int:
        """How many of the first letters, with `end` after them, are at most `width` wide together; at least one."""
        short, long = 1, len(text)
        while short < long:  # by halves
            middle = (short + long + 1) // 2
            short, long = (middle, long) if self.width(text[:middle] + end) <= width else (short, middle - 1)
        return short

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
        """Write one line with its upper left corner at `place`, black."""
        (x, y), base = place, self.font.getmetrics()[0]
        for part, font in self.runs(text):
            pen.text((x, y + base), part, fill="black", font=font, anchor="ls")
            x += font.getlength(part)

    def tell_lacking(self) -> None:
        """Say which letters were drawn as boxes, if some were."""
        if self.lacking:
            tell_once("".join(sorted(self.lacking)[:10]) + CUT * (len(self.lacking) > 10))


@functools.cache
def tell_once(letters: str) -> None:
    """Say that letters were drawn as boxes; a training, whose previews have the same labels, says it once."""
    cli.warn(f"no font here has {letters}, so boxes stand for them: install one, such as the Noto fonts", kind="note")


@functools.cache
def font_files() -> list[Path]:
    """The fonts of this machine, those of many letters first."""
    found = [path for folder in FONT_FOLDERS for path in sorted(Path(folder).expanduser().rglob("*"))
             if path.suffix.lower() in FONT_ENDINGS]

    def rank(path: Path) -> int:
        name = path.name.lower()
        return next((i for i, start in enumerate(TRIED_FIRST) if name.startswith(start)), len(TRIED_FIRST))

    return sorted(found, key=rank)[:MOST_FONTS]


@functools.cache
def font_of(path: Path, size: int) -> FreeTypeFont | None:
    """A font file at a size; None if it cannot be read, or has no such size, as fonts of coloured emoji."""
    try:
        return ImageFont.truetype(str(path), size)
    except OSError:
        return None


@functools.cache
def has_letter(font: FreeTypeFont, letter: str) -> bool:
    """Whether a font has a letter: whether it draws it in another way than what it lacks."""
    (mask, _), (lacking, _) = (font.getmask2(text) for text in (letter, NO_LETTER))
    return mask.size != lacking.size or bytes(mask) != bytes(lacking)
