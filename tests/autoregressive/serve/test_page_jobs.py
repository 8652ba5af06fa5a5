"""What the page's controls say becomes jobs, or a line that says what is missing."""
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from autoregressive.serve import page_jobs
from autoregressive.serve.page_jobs import NO_CLASS, asked_job, class_choices, defaults_of, edit_job, example_jobs
from tests.autoregressive.serve.coloured import CARDS, card

GPT, ARPG, TEXT = CARDS
CONTROLS = {"chosen": 1, "prompt": "red heart", "count": 4, "seed": 7, "cfg_scale": 2, "temperature": 0.9, "top_k": 0,
            "top_p": 1, "steps": 8}


def asked(card=GPT, **changed):
    return asked_job(card, **CONTROLS | changed)


def test_a_job_is_what_the_controls_say():
    job = asked()
    assert (job.model, job.condition, job.seed, list(job.indices)) == ("emoji-gpt", 1, 7, [0, 1, 2, 3])
    assert (job.cfg_scale, job.temperature, job.top_k, job.top_p) == (2.0, 0.9, 0, 1.0)
    assert job.steps is None and asked(ARPG).steps == 8
    assert asked(TEXT, prompt=" red heart\n").condition == "red heart"


@pytest.mark.parametrize(("chosen", "label"), [(0, 0), ("2", 2), ("clocks", 2), (NO_CLASS, None)])
def test_classes_are_chosen_by_name_or_number(chosen, label):
    assert asked(chosen=chosen).condition == label


def test_a_list_of_classes_begins_with_none_and_has_numbers_where_there_are_no_names():
    assert class_choices(GPT) == [(NO_CLASS, NO_CLASS), ("faces", 0), ("flags", 1), ("clocks", 2)]
    assert class_choices(card("x", class_names=None))[1:] == [("0", 0), ("1", 1), ("2", 2)]
    named = card("x", class_names=(NO_CLASS, "a", "b"))
    assert asked_job(named, **CONTROLS | {"chosen": class_choices(named)[1][1]}).condition == 0


@pytest.mark.parametrize(("given", "changed", "said"), [
    (GPT, {"chosen": "cats"}, "class 'cats' is unknown: choose from faces, flags, clocks"),
    (GPT, {"chosen": "3"}, "class 3 is out of range"), (GPT, {"chosen": None}, "no class is chosen"),
    (TEXT, {"prompt": "  "}, "the prompt is empty"), (TEXT, {"prompt": "x" * 10_001}, "10001 characters"),
    (GPT, {"seed": None}, "the seed is empty"), (GPT, {"seed": -1}, "no seed"), (GPT, {"seed": 2**32}, "no seed"),
    (GPT, {"count": 65}, "65 images"), (GPT, {"count": 0}, "0 images"), (GPT, {"top_k": 0.5}, "top-k is 0.5"),
    (GPT, {"seed": float("nan")}, "the seed is nan"), (GPT, {"top_k": float("inf")}, "top-k is inf"),
    (GPT, {"temperature": None}, "temperature is empty"), (GPT, {"cfg_scale": float("nan")}, "cfg_scale is nan"),
    (ARPG, {"steps": 17}, "steps is 17"), (ARPG, {"steps": None}, "steps is empty")])
def test_what_cannot_be_drawn_is_said(given, changed, said):
    with pytest.raises(ValueError, match=said):
        asked(given, **changed)


def test_partial_pictures_are_fewer_for_many_pictures():
    assert [asked(count=count).partials for count in (1, 8, 32, 64)] == [3, 3, 1, 1]  # of 4 rows
    large = card("large", image_size=(96, 96), grid=(24, 24), family="arpg")
    assert asked(large, count=1, steps=64).partials == 63 and asked(large, count=8).partials == 7


def test_a_visitor_first_sees_classes_of_the_whole_list():
    jobs, captions = example_jobs(GPT)
    assert [job.condition for job in jobs] == [0, 1, 2] and captions == ["faces", "flags", "clocks"]
    many = card("many", classes=1000, class_names=None)
    assert [job.condition for job in example_jobs(many)[0]] == list(range(0, 1000, 125))
    assert example_jobs(TEXT)[0][0].condition == example_jobs(TEXT)[1][0]


def test_defaults_are_the_models_within_what_the_controls_can_say():
    assert defaults_of(ARPG) == {"cfg_scale": 4.0, "temperature": 0.9, "top_k": 0, "top_p": 1.0, "steps": 8}
    assert defaults_of(card("x", defaults={"top_k": 2000}))["top_k"] == 256
    assert defaults_of(card("x", family="arpg", defaults={"steps": None}))["steps"] == 16


# ---- parts drawn anew


PICTURE = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


def paint(*pixels: tuple[int, int], size: int = 512) -> np.ndarray:
    """Paint at pixels (row, column) of the picture, on an enlarged canvas."""
    painted = np.zeros((size, size), bool)
    for row, column in pixels:
        painted[row * size // 16 + 3, column * size // 16 + 5] = True
    return painted


def test_an_arpg_redraws_what_is_painted_and_a_gpt_all_rows_from_there_on():
    job = edit_job(ARPG, asked(ARPG), PICTURE, paint((6, 2), (9, 15)), paste=4)
    assert [tuple(place) for place in np.argwhere(job.mask)] == [(6, 2), (9, 15)]
    assert (job.image == PICTURE).all() and job.paste == 4
    job = edit_job(GPT, asked(), PICTURE, paint((6, 2), (9, 15)), paste=None)
    assert job.mask[4:].all() and not job.mask[:4].any() and job.paste is None  # rows of codes have 4 pixels


@pytest.mark.parametrize(("given", "picture", "painted", "said"), [
    (ARPG, None, paint((1, 1)), "there is no picture: upload one"),
    (ARPG, PICTURE, None, "nothing is painted"), (ARPG, PICTURE, paint(), "nothing is painted"),
    (ARPG, PICTURE[:8], paint((1, 1)), "the picture is 8x16, emoji-arpg draws 16x16"),
    (replace(ARPG, edits=False), PICTURE, paint((1, 1)), "does not edit pictures")])
def test_what_cannot_be_redrawn_is_said(given, picture, painted, said):
    with pytest.raises(ValueError, match=said):
        edit_job(given, asked(ARPG), picture, painted, paste=None)


def test_paint_is_found_in_all_layers_of_the_editor():
    layers = np.zeros((2, 8, 8, 4), np.uint8)
    layers[0, 1, 2, 3], layers[1, 3, 4, 3] = 255, 9
    found = page_jobs.painted({"background": None, "layers": list(layers), "composite": None})
    assert [tuple(place) for place in np.argwhere(found)] == [(1, 2), (3, 4)]
    assert page_jobs.painted({"layers": []}) is None and page_jobs.painted(None) is None


def test_pictures_are_cropped_to_the_model_and_enlarged_to_paint_on():
    wide = Image.fromarray(np.full((40, 90, 3), 200, np.uint8))
    fitting = page_jobs.fitted(wide, GPT)
    assert fitting.shape == (16, 16, 3)
    assert page_jobs.enlarged(fitting).shape == (512, 512, 3)
    assert page_jobs.enlarged(np.zeros((768, 1024, 3), np.uint8)).shape == (768, 1024, 3)


def test_models_and_what_they_redraw_are_told_in_words():
    assert page_jobs.facts_of_card(GPT) == "GPT · 16×16 pixels of 4×4 codes · 3 classes"
    assert "row by row" in page_jobs.edit_note(GPT) and "row by row" not in page_jobs.edit_note(ARPG)
    assert page_jobs.edit_note(TEXT).startswith("emoji-text does not redraw")
