"""A sheet of pictures with their captions under them, as a training would see them."""
import textwrap
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from dataset.pairs import Captions
from utils.files import plain

SIDE = 256  # pixels at most that a picture takes on the sheet
LINES = 7  # of text below a picture
TEXT_SIZE = 13  # pixels
MARGIN = 8


@cache
def text_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings, or matplotlib's, which knows more scripts, where it is installed."""
    try:
        from matplotlib import font_manager

        return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), TEXT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except (ImportError, OSError, ValueError):
        return ImageFont.load_default(TEXT_SIZE)


def captioned_sheet(rows: list[tuple[str, Image.Image, Captions]]) -> Image.Image:
    """A grid of (name, picture, captions); the pictures, of one size, are scaled down to the sheet."""
    columns = max(1, round(len(rows) ** 0.5))
    size = rows[0][1].size
    width, height = (max(1, round(side * min(1.0, SIDE / max(size)))) for side in size)
    line = TEXT_SIZE + 3
    cell = max(width, SIDE) + 2 * MARGIN, height + LINES * line + 3 * MARGIN
    paper = Image.new("RGB", (columns * cell[0], -(-len(rows) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(paper)
    for i, (name, picture, captions) in enumerate(rows):
        left, top = i % columns * cell[0] + MARGIN, i // columns * cell[1] + MARGIN
        paper.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        for k, text in enumerate(lines_of_text(name, captions, cell[0] - 2 * MARGIN)):
            place = left, top + height + MARGIN + k * line
            draw.text(place, text, fill="black" if k else "gray", font=text_font())
    return paper


def lines_of_text(name: str, captions: Captions, width: int) -> list[str]:
    """The name, the long caption and, in brackets, the short one, in LINES lines of `width` pixels; "…" marks a cut."""
    short = wrapped(f"[{captions.short}]", width, most=2) if captions.short else []
    return [*wrapped(name, width, most=1), *wrapped(captions.long, width, most=LINES - 1 - len(short)), *short]


def wrapped(text: str, width: int, *, most: int) -> list[str]:
    """A text in lines of so many pixels, at most so many lines. What the font lacks is spelt out as \\u4e2d."""
    text = "".join(letter if has_glyph(letter) else letter.encode("unicode_escape").decode()
                   for letter in plain(" ".join(text[:most * width].split())))
    letters = max(4, int(width / max(1.0, text_font().getlength("n"))))
    while letters > 4:
        lines = textwrap.wrap(text, letters) or [""]
        if all(text_font().getlength(line + "…") <= width for line in lines[:most]):
            break
        letters -= 1
    return [*lines[:most - 1], lines[most - 1] + "…"] if len(lines) > most else lines


@cache
def has_glyph(letter: str) -> bool:
    """Whether the font can draw a letter: what it lacks looks like what no font has."""
    if letter.isspace():
        return True
    missing, found = (text_font().getmask(each) for each in ("\U0010fffe", letter))
    return found.size != missing.size or bytes(found) != bytes(missing)
