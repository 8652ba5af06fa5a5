"""Edits: what is known stays to the last bit, the hole's content does not matter, and (seed, index) fixes the rest."""
import numpy as np
import pytest
import torch

from autoregressive.models.arpg import ARPG_models
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.schedule import DrawSchedule
from autoregressive.sample.editing import edit
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.seams import filled
from tests.autoregressive.sample.editing import GRID, SETTINGS, SIZE, block, picture, pipeline_of
from tokenizer.build import encode_images
from utils import images
from utils.seeding import sample_generator


@pytest.fixture(scope="module")
def arpg() -> Pipeline:
    return pipeline_of(ARPG_models["ARPG-S"])


@pytest.fixture(scope="module")
def gpt() -> Pipeline:
    return pipeline_of(GPT_models["GPT-S"])


def frame(size=SIZE) -> np.ndarray:
    return ~block(1, 1, size[0] - 2, size[1] - 2, size)


def codes_of(pipeline: Pipeline, image: np.ndarray) -> np.ndarray:
    return encode_images(pipeline.tokenizer, images.to_float(image[None])).numpy().reshape(-1, image.shape[1] // 4)


MASKS = {  # a mask, and the cells that it opens with one around them
    "one pixel": (block(9, 13, 1, 1), 9), "a corner": (block(0, 0, 1, 1), 4), "a block": (block(5, 9, 6, 6), 4 * 4),
    "all": (block(0, 0, *SIZE), 24), "a frame": (frame(), 24), "grey": (block(0, 0, 1, 1).astype(np.uint8) * 128, 4),
    "larger": (block(20, 28, 1, 1, (32, 48)), 9), "a column": (block(0, 23, 16, 1), 8)}


@pytest.mark.parametrize("name", MASKS)
def test_known_codes_stay_and_the_others_are_drawn(arpg, name):
    mask, count = MASKS[name]
    made = edit(arpg, picture(), mask, conditions=[1], indices=[5])
    assert made.pictures.shape == (1, *SIZE, 3) and made.codes.shape == (1, *GRID)
    assert made.drawn.sum() == count == made.results[0]["redrawn"]
    hole = mask if mask.shape == SIZE else block(10, 14, 1, 1)
    known = codes_of(arpg, filled(picture(), hole.astype(bool)))
    assert np.array_equal(made.codes[0].numpy()[~made.drawn[0]], known[~made.drawn[0]])
    assert made.codes.min() >= 0 and made.codes.max() < 256
    other = edit(arpg, picture(), mask, conditions=[1], indices=[6])
    assert not torch.equal(made.codes, other.codes)


def test_a_frame_without_dilation_keeps_what_it_frames(arpg):
    made = edit(arpg, picture(), frame(), dilate=0)
    assert made.drawn[0].astype(int).tolist() == [[1] * 6, [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1], [1] * 6]
    assert (made.masks[0] == np.where(frame(), 255, np.where(made.drawn[0].repeat(4, 0).repeat(4, 1), 127, 0))).all()


def test_redrawing_everything_is_sampling(arpg, gpt):
    for pipeline in (arpg, gpt):
        made = edit(pipeline, picture(), block(0, 0, *SIZE), conditions=[2, 0], seed=3, indices=[4, 9])
        assert np.array_equal(made.pictures, pipeline([2, 0], seed=3, indices=[4, 9]))
        assert made.results[0]["seam_psnr"] is None and made.results[0]["known_psnr"] is None


@pytest.mark.parametrize("size", [SIZE, (40, 52)])
def test_what_was_in_the_hole_does_not_matter(arpg, size):
    mask = block(6, 9, 5, 4, size)
    image, other = picture(size), picture(size)
    other[mask] = 255 - other[mask]
    first, second = (edit(arpg, one, mask, conditions=[1], paste=2) for one in (image, other))
    assert torch.equal(first.codes, second.codes) and np.array_equal(first.pictures, second.pictures)
    other[6, 8] = 255 - other[6, 8]  # what is beside it does
    assert not np.array_equal(first.pictures, edit(arpg, other, mask, conditions=[1], paste=2).pictures)


@pytest.mark.parametrize("feather", [0, 1, 3])
def test_pasted_pixels_are_the_pictures_own(arpg, feather):
    mask = block(7, 8, 2, 5)
    plain, made = (edit(arpg, picture(), mask, paste=paste) for paste in (None, feather))
    far = np.ones(SIZE, bool)
    far[7 - feather:9 + feather, 8 - feather:13 + feather] = False
    assert np.array_equal(made.pictures[0][far], picture()[far])
    assert np.array_equal(made.pictures[0][mask], plain.pictures[0][mask])
    if feather:
        share = feather / (feather + 1)  # of what was drawn, one pixel from the hole
        wanted = share * plain.pictures[0, 6, 10] + (1 - share) * picture()[6, 10]
        assert np.abs(made.pictures[0, 6, 10] - wanted).max() <= 0.5
        assert made.results[0]["seam_psnr"] > made.results[0]["seam_psnr_decoded"]
    else:
        assert made.results[0]["seam_psnr"] is None  # all identical
    assert made.results[0]["seam_psnr_decoded"] == plain.results[0]["seam_psnr"] != plain.results[0]["known_psnr"]


def test_another_class_changes_the_box_alone(arpg):
    made = edit(arpg, picture(), block(0, 12, 16, 12), conditions=[0, 1, 2, 3], indices=[0] * 4, dilate=0)
    inside = made.drawn[0]
    assert inside.sum() == 12 and inside[:, 3:].all()
    assert len({made.codes[i].numpy()[inside].tobytes() for i in range(4)}) == 4
    assert len({made.codes[i].numpy()[~inside].tobytes() for i in range(4)}) == 1
    nobody = edit(arpg, picture(), block(0, 12, 16, 12), dilate=0)
    assert torch.equal(nobody.codes[0], made.codes[3])  # without a class is the label after the last


def test_no_class_needs_no_guidance(arpg):
    free = pipeline_of(ARPG_models["ARPG-S"], cfg_scale=1.0)
    made, unguided = (edit(one, picture(), block(3, 3, 9, 9)) for one in (arpg, free))
    assert torch.equal(made.codes, unguided.codes)


def test_variations_redraw_a_share_of_the_cells(arpg):
    made = edit(arpg, picture(), redraw=0.3, indices=[0, 1, 2], paste=1)
    assert [result["redrawn"] for result in made.results] == [7, 7, 7]
    known = codes_of(arpg, picture())  # of the picture as it is
    for i in range(3):
        assert np.array_equal(made.codes[i].numpy()[~made.drawn[i]], known[~made.drawn[i]])
        assert (made.masks[i] == 255).sum() == 7 * 16
        assert not np.array_equal(made.drawn[i], made.drawn[i - 1])
    again = edit(arpg, picture(), redraw=0.3, indices=[1], paste=1)
    assert np.array_equal(again.drawn[0], made.drawn[1]) and np.array_equal(again.pictures[0], made.pictures[1])
    part = edit(arpg, picture(), block(0, 0, 8, 8), redraw=0.5, dilate=0)
    assert part.drawn.sum() == 2 and part.drawn[0, :2, :2].sum() == 2
    assert edit(arpg, picture(), redraw=1.0).drawn.all()


CANVASES = [  # canvas, place of the picture (x, y): one and a half windows, odd sizes, corners, a single pixel more
    ((16, 36), (0, 0)), ((24, 24), (0, 8)), ((23, 51), None), ((17, 24), (0, 0)), ((16, 25), (1, 0)),
    ((61, 47), (22, 9))]


@pytest.mark.parametrize(("canvas", "place"), CANVASES)
def test_a_picture_is_continued_to_any_canvas(arpg, canvas, place):
    made = edit(arpg, picture(), canvas=canvas, place=place, conditions=[1], paste=0)
    assert made.pictures.shape == (1, *canvas, 3)
    known = ~made.drawn[0]
    assert known.sum() == 24 and np.array_equal(made.codes[0].numpy()[known], codes_of(arpg, picture()).ravel())
    x, y = place or ((canvas[1] - 24) // 2, (canvas[0] - 16) // 2)
    assert np.array_equal(made.pictures[0, y:y + 16, x:x + 24], picture())
    assert (made.codes >= 0).all()
    beyond = ~block(y, x, *SIZE, canvas)
    unpasted = edit(arpg, picture(), canvas=canvas, place=place, conditions=[1])
    assert np.array_equal(made.pictures[0][beyond], unpasted.pictures[0][beyond])
    assert (made.masks[0] == 255 * beyond).all()
    alone = edit(arpg, picture(), canvas=canvas, place=place, conditions=[2, 1], indices=[1, 0], paste=0)
    assert np.array_equal(alone.pictures[1], made.pictures[0])


def test_a_canvas_and_a_mask_at_once(arpg):
    made = edit(arpg, picture(), block(0, 0, 1, 1), canvas=(16, 36), place=(12, 0), dilate=0)
    assert made.drawn[0, :, :3].all() and made.drawn[0, 0, 3] and made.drawn.sum() == 13
    assert edit(arpg, picture(), block(0, 0, 0, 0), canvas=(16, 36)).drawn.sum() == 16  # 6 pixels at each side


@pytest.mark.parametrize("size", [(10, 24), (16, 15), (5, 7), (3, 2), (50, 24), (45, 61)])
def test_pictures_of_other_sizes_are_edited_as_they_are(arpg, size):
    """Smaller than a window, larger, and no multiple of a cell."""
    mask = block(1, 0, 1, 2, size)
    made = edit(arpg, picture(size), mask, dilate=0, paste=0)
    assert made.pictures.shape == (1, *size, 3)
    assert np.array_equal(made.pictures[0][~mask], picture(size)[~mask])
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert made.drawn[0, :rows, :columns].sum() == 1 and made.drawn[0, rows:].all() and made.drawn[0, :, columns:].all()
    padded = np.pad(filled(picture(size), mask), [(0, -size[0] % 4), (0, -size[1] % 4), (0, 0)], mode="edge")
    known = ~made.drawn[0, :rows, :columns]
    assert np.array_equal(made.codes[0, :rows, :columns].numpy()[known], codes_of(arpg, padded)[known])


def test_an_image_does_not_depend_on_the_batch(arpg):
    image, mask = picture((40, 52)), block(10, 4, 20, 40, (40, 52))
    together = edit(arpg, image, mask, conditions=[0, 1, 2], seed=7, indices=[0, 1, 2])
    for i in range(3):
        alone = edit(arpg, image, mask, conditions=[i], seed=7, indices=[i])
        assert torch.equal(alone.codes[0], together.codes[i])
        assert np.array_equal(alone.pictures[0], together.pictures[i])
    assert not torch.equal(edit(arpg, image, mask, conditions=[0], seed=8).codes[0], together.codes[0])
    varied = edit(arpg, image, redraw=0.05, indices=[0, 1, 2])
    assert torch.equal(edit(arpg, image, redraw=0.05, indices=[2]).codes[0], varied.codes[2])


@pytest.mark.parametrize("settings", [{"steps": 1}, {"steps": 24}, {"cfg_scale": 1.0}, {"cfg_scale": 0.0}, {"top_k": 1},
                                      {"top_p": 0.5}])
def test_all_settings_of_sampling_apply(arpg, settings):
    pipeline, mask = pipeline_of(ARPG_models["ARPG-S"], **settings), block(0, 0, 8, 16)
    made = edit(pipeline, picture(), mask, conditions=[1], dilate=0)
    assert made.drawn.sum() == 8  # fewer than steps
    known = torch.from_numpy(codes_of(pipeline, filled(picture(), mask)))
    known[torch.from_numpy(made.drawn[0])] = -1
    steps = settings.pop("steps", None)
    wanted = generate(pipeline.gpt, torch.tensor([1]), 24, known=known.reshape(1, -1), schedule=DrawSchedule(steps),
                      generators=[sample_generator(0, 0)], **SETTINGS | settings)
    assert torch.equal(made.codes.flatten(1), wanted)


# ---- a GPT


def test_a_gpt_redraws_the_lower_part(gpt):
    mask = block(9, 0, 7, 24)
    made = edit(gpt, picture(), mask, conditions=[1], indices=[2], dilate=0)
    assert made.drawn[0].any(1).tolist() == [False, False, True, True]
    known = codes_of(gpt, filled(picture(), mask))
    assert np.array_equal(made.codes[0, :2].numpy(), known[:2])
    given = torch.from_numpy(np.where(made.drawn[0], -1, known)).reshape(1, -1)
    wanted = generate(gpt.gpt, torch.tensor([1]), 24, known=given, generators=[sample_generator(0, 2)], **SETTINGS)
    assert torch.equal(made.codes.flatten(1), wanted)
    down = edit(gpt, picture(), canvas=(30, 24), place=(0, 0), conditions=[1])  # in two windows
    assert np.array_equal(down.codes[0, :4].numpy(), codes_of(gpt, picture())) and down.codes.shape == (1, 8, 6)


@pytest.mark.parametrize("arguments", [{"mask": block(0, 0, 9, 24), "dilate": 0}, {"redraw": 0.5},
                                       {"mask": block(9, 0, 3, 24), "dilate": 0}, {"canvas": (16, 30)}])
def test_a_gpt_refuses_the_rest(gpt, arguments):
    with pytest.raises(ValueError, match=r"a GPT draws row by row.*an ARPG redraws any cells"):
        edit(gpt, picture(), **arguments)


# ---- refusals


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "give --mask, --box, --redraw or a larger --canvas"), ({"canvas": SIZE}, "give --mask"),
    ({"mask": block(0, 0, 0, 0)}, "no pixel of the mask is white"), ({"mask": frame(), "dilate": -1}, "--dilate is -1"),
    ({"mask": frame(), "paste": -2}, "--paste is -2"), ({"redraw": 0.0}, "--redraw is 0.0"),
    ({"redraw": 1.5}, "--redraw is 1.5"), ({"redraw": float("nan")}, "--redraw is nan"),
    ({"mask": frame(), "place": (0, 0)}, "--place says where"), ({"canvas": (16, 20)}, "does not lie on a canvas"),
    ({"mask": block(0, 0, 4, 4, (24, 16))}, "the mask is 24x16 pixels, the picture 16x24"),
    ({"mask": frame(), "indices": []}, "0 images"), ({"mask": frame(), "conditions": [1, 2]}, "2 conditions for 1"),
    ({"mask": frame(), "conditions": [4]}, "classes 0 to 2")])
def test_edits_without_sense_are_refused(arpg, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(arpg, picture(), **arguments)
    with pytest.raises(ValueError, match=r"expected uint8 \(height, width, 3\)"):
        edit(arpg, picture()[..., 0], frame())
