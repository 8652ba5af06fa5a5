"""What requests say, field by field: what becomes of it, and what never reaches a backend."""
import io

import numpy as np
import pytest
from PIL import Image

from autoregressive.serve.fields import (
    EditFields,
    GenerationFields,
    RefusedError,
    card_for,
    fields_of,
    job_of,
    picture_and_mask,
)
from tests.autoregressive.serve.coloured import CARDS, card


def job(values: dict, own=CARDS[0]):
    return job_of(fields_of(GenerationFields, values), own)


def test_what_is_left_out_is_the_models_own():
    made = job({"prompt": "flags"})
    assert (made.model, made.condition, tuple(made.indices), made.steps, made.partials) == (
        "emoji-gpt", 1, (0,), None, 0)
    assert (made.cfg_scale, made.temperature, made.top_k, made.top_p) == (2.0, 0.9, 0, 1.0)
    assert 0 <= made.seed < 2**32 and made.seed != job({"prompt": "flags"}).seed  # by chance, and told in the answer


def test_every_field_arrives():
    made = job({"class": 2, "n": 3, "index": 7, "seed": 5, "cfg_scale": 1, "temperature": 0.0, "top_k": 4, "top_p": 0.5,
                "steps": 3, "stream": True, "partial_images": 2, "size": "16x16", "user": "me"}, CARDS[1])
    assert (made.condition, list(made.indices), made.seed, made.cfg_scale, made.temperature, made.top_k, made.top_p,
            made.steps, made.partials) == (2, [7, 8, 9], 5, 1, 0.0, 4, 0.5, 3, 2)
    assert job({"prompt": "", "stream": False, "partial_images": 2}).partials == 0  # nobody would see them


@pytest.mark.parametrize(("values", "condition"), [
    ({"prompt": "clocks"}, 2), ({"prompt": "1"}, 1), ({"prompt": 0}, 0), ({"class": " 2 "}, 2), ({"prompt": ""}, None),
    ({}, None), ({"class": None, "prompt": None}, None), ({"class": "faces", "prompt": ""}, 0)])
def test_classes_by_name_and_number(values, condition):
    assert job(values).condition == condition


def test_prompts():
    assert job({"prompt": "a red cat"}, CARDS[2]).condition == "a red cat"
    assert job({"prompt": 7}, CARDS[2]).condition == "7"
    assert job({"prompt": ""}, CARDS[2]).condition is None
    with pytest.raises(RefusedError, match="give a prompt, no class"):
        job({"class": 1}, CARDS[2])


NO_INTEGER = [1.5, "3", True, [1], {}, 2**200, -1, 1e400, float("nan")]


@pytest.mark.parametrize("field", ["n", "seed", "index", "top_k", "steps", "partial_images", "output_compression"])
@pytest.mark.parametrize("value", NO_INTEGER, ids=range(len(NO_INTEGER)))
def test_numbers_that_are_none(field, value):
    with pytest.raises(RefusedError, match=field) as refused:
        job({field: value})
    assert refused.value.status == 400 and refused.value.param == field


@pytest.mark.parametrize("field", ["cfg_scale", "temperature", "top_p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "2", True, [2], -1, 1e300, 10**400],
                         ids=str)
def test_settings_that_are_none(field, value):
    with pytest.raises(RefusedError, match=field.replace("_", ".")) as refused:
        job({field: value})
    assert refused.value.status == 400


@pytest.mark.parametrize(("values", "said"), [
    ([], "no JSON object"), (None, "no JSON object"), ("text", "no JSON object"),
    ({"cfg_scal": 3}, "there is no such field"), ({"prompt": "cats"}, "class 'cats' is unknown"),
    ({"prompt": 3}, "out of range"), ({"prompt": -1}, "out of range"), ({"class": 2**31}, "out of range"),
    ({"class": 2**63}, "out of range"), ({"class": 10**50}, "out of range"), ({"class": "9" * 18}, "out of range"),
    ({"class": "9" * 60}, "unknown"), ({"class": "²"}, "unknown"), ({"class": True}, "class"),
    ({"prompt": "faces", "class": "flags"}, "give one"), ({"prompt": "x" * 10_001}, "prompt"),
    ({"n": 0}, "greater than"), ({"n": 65}, "less than"), ({"seed": 2**32}, "less than"),
    ({"size": "1024x1024"}, "draws pictures of 16x16"), ({"size": "big"}, "width x height"),
    ({"size": "16x16x16"}, "width x height"), ({"response_format": "jpg"}, "response_format"),
    ({"output_format": "gif"}, "output_format"), ({"background": "transparent"}, "background"),
    ({"steps": 3}, "steps are for an ARPG"), ({"top_p": 1.1}, "top_p is 1.1"),
    ({"user": "x" * 201}, "user"),
    ({"model": "x" * 201}, "model")])
def test_requests_without_sense(values, said):
    with pytest.raises(RefusedError, match=said):
        job(values)


def test_steps_of_an_arpg():
    with pytest.raises(RefusedError, match="expected 1 to 16"):
        job({"steps": 17}, CARDS[1])


def test_models_by_name():
    assert card_for(None, CARDS) is CARDS[0] and card_for("emoji-arpg", CARDS) is CARDS[1]
    with pytest.raises(RefusedError, match="choose from emoji-gpt, emoji-arpg, emoji-text") as refused:
        card_for("dall-e-3", CARDS)
    assert refused.value.status == 404 and refused.value.code == "model_not_found"


def test_forms_hold_texts():
    fields = fields_of(EditFields, {"n": "2", "cfg_scale": "1.5", "stream": "true", "class": "1", "paste": "3",
                                    "input_fidelity": "high"}, strings=True)
    assert (fields.n, fields.cfg_scale, fields.stream, fields.class_, fields.paste) == (2, 1.5, True, "1", 3)
    for values in ({"n": "2.5"}, {"n": "many"}, {"cfg_scale": "nan"}, {"seed": "-1"}, {"paste": "-1"}):
        with pytest.raises(RefusedError, match=next(iter(values))):
            fields_of(EditFields, values, strings=True)


# ---- pictures


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


PICTURE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
HOLE = np.zeros((8, 12), bool)
HOLE[2:5, 3:9] = True


def with_alpha(pixels: np.ndarray, hole: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.where(hole, 0, 255).astype(np.uint8)[..., None]], axis=2)


def read(image: bytes, mask: bytes | None = None, most: int = 10_000):
    return picture_and_mask(image, mask, most_pixels=most)


def test_masks_are_transparent_or_white():
    white = png(np.where(HOLE, 255, 0).astype(np.uint8))
    for mask in (png(with_alpha(PICTURE, HOLE)), white, png(with_alpha(np.full_like(PICTURE, 255), HOLE))):
        picture, hole = read(png(PICTURE), mask)
        assert np.array_equal(picture, PICTURE) and np.array_equal(hole, HOLE)
    picture, hole = read(png(with_alpha(PICTURE, HOLE)))  # the picture's own transparent part
    assert np.array_equal(hole, HOLE) and np.array_equal(picture[~HOLE], PICTURE[~HOLE])


def test_other_sizes_of_masks_are_stretched():
    _, hole = read(png(PICTURE), png(np.where(HOLE, 255, 0).astype(np.uint8).repeat(2, 0).repeat(2, 1)))
    assert np.array_equal(hole, HOLE)


@pytest.mark.parametrize(("image", "mask", "said"), [
    (b"", None, "no PNG, JPEG or WebP"), (b"GIF89a" + bytes(100), None, "no PNG, JPEG or WebP"),
    (png(PICTURE, "BMP"), None, "no PNG"), (png(PICTURE)[:80], None, "image"), (png(PICTURE), None, "there is no mask"),
    (png(PICTURE), b"nothing", "mask is no PNG"), (png(PICTURE), png(with_alpha(PICTURE, HOLE))[:90], "damaged"),
    (png(PICTURE), png(np.zeros((8, 12), np.uint8)), "marks nothing"),
    (png(PICTURE), png(np.full((12, 8), 255, np.uint8)), "mask"),
    (png(with_alpha(PICTURE, ~HOLE & HOLE)), None, "no transparent part")])
def test_files_that_are_no_picture_or_mask(image, mask, said):
    with pytest.raises(RefusedError, match=said):
        read(image, mask)


def test_huge_pictures_are_not_decoded():
    bomb = png(np.zeros((4000, 4000), np.uint8))
    assert len(bomb) < 50_000
    for image, mask in ((bomb, None), (png(PICTURE), bomb)):
        with pytest.raises(RefusedError, match="4000x4000 pixels") as refused:
            read(image, mask)
        assert refused.value.status == 413


def test_a_model_that_does_not_edit():
    own = card("emoji-text", condition="text", classes=0, class_names=None, edits=False)
    with pytest.raises(RefusedError, match="does not edit"):
        job_of(fields_of(EditFields, {}), own, image=png(with_alpha(PICTURE, HOLE)), most_pixels=1000)
