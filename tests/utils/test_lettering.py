"""Labels under pictures: wrapped, cut, in any script; letters without a font are boxes, and that is said once."""
import numpy as np
import pytest

from utils import lettering
from utils.images import grid
from utils.lettering import CUT, Lettering


@pytest.fixture
def writer() -> Lettering:
    return Lettering(14)


def test_labels_are_wrapped_at_words_and_cut_with_dots(writer):
    assert writer.wrapped("a red cat", 200, 3) == ["a red cat"]
    lines = writer.wrapped("a photograph of a red cat which sits on a long table by the window and sleeps", 128, 3)
    assert len(lines) == 3 and lines[0].startswith("a photograph of a") and lines[2].endswith(CUT)
    assert all(writer.width(line) <= 128 for line in lines)
    assert " ".join(lines).startswith("a photograph of a red cat which sits on a long")
    assert writer.wrapped("", 64, 2) == writer.wrapped("  \n ", 64, 2) == [""]


@pytest.mark.parametrize("text", ["x" * 10_000, "一只猫" * 4000, "😀" * 5000, "a b " * 3000, "i" * 40 + " " + "w" * 90],
                         ids=["one word", "Chinese", "emoji", "short words", "two long words"])
def test_every_line_fits_whatever_the_text(writer, text):
    for lines in (1, 3):
        found = writer.wrapped(text, 100, lines)
        assert len(found) == lines and found[-1].endswith(CUT)
        assert all(0 < writer.width(line) <= 100 for line in found)
    assert len(writer.wrapped(text, 1, 2)) == 2  # narrower than any letter


def test_a_label_is_drawn_in_any_script_and_does_nothing_to_a_terminal(writer):
    assert writer.wrapped("a\x1b[31mb", 200, 1) == ["a\\x1b[31mb"]
    for text in ("Бär", "→", "العربية", "\ud800"):
        sheet = grid(np.full((1, 40, 120, 3), 9, np.uint8), columns=1, labels=[text], lines=2)
        assert (sheet[42:] < 128).any()


def test_letters_without_a_font_are_boxes_and_said_once(monkeypatch, capsys):
    monkeypatch.setattr(lettering, "font_files", list)
    lettering.tell_once.cache_clear()
    for _ in range(2):
        sheet = grid(np.full((1, 40, 80, 3), 9, np.uint8), columns=1, labels=["a 猫"])
    assert (sheet[42:] < 128).any()
    assert capsys.readouterr().err.count("no font here has 猫") == 1


def test_a_grid_has_room_for_its_longest_label():
    pictures = np.full((2, 64, 64, 3), 9, np.uint8)
    heights = [len(grid(pictures, columns=2, labels=["a", label], lines=3)) for label in ("b", "b " * 12, "b " * 99)]
    assert heights[0] < heights[1] < heights[2]
    assert len(grid(pictures, columns=2, labels=["a", "b " * 99])) == heights[0]  # lines=1
