"""Edits: what is known stays to the last bit, the hole's content does not matter, and (seed, index) fixes the rest."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.arpg import ARPG_models
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.schedule import DrawSchedule
from autoregressive.sample import edit as command
from autoregressive.sample.editing import edit
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.seams import filled, pasted, psnr_where, strip
from tests.conftest import ROOT
from tests.data.references import filled as with_weights
from tokenizer.build import encode_images
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import cli, dist, images
from utils.seeding import sample_generator

GRID, SIZE = (4, 6), (16, 24)  # of the model, in cells of 4 pixels
SETTINGS = {"cfg_scale": 3.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
CLASSES = ["cat", "dog", "owl"]


def pipeline_of(build, **settings) -> Pipeline:
    gpt = with_weights(build, "edit", vocab_size=256, num_classes=3, grid=GRID)
    schedule = DrawSchedule(steps=settings.pop("steps", None)) if gpt.any_order else None
    return Pipeline(gpt, with_weights(VQ_models["VQ-4-S"], "edit"), CLASSES, SETTINGS | settings, {}, schedule=schedule)


@pytest.fixture(scope="module")
def arpg() -> Pipeline:
    return pipeline_of(ARPG_models["ARPG-S"])


@pytest.fixture(scope="module")
def gpt() -> Pipeline:
    return pipeline_of(GPT_models["GPT-S"])


def picture(size=SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def block(top: int, left: int, height: int, width: int, size=SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:top + height, left:left + width] = True
    return mask


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


# ---- seams


def test_holes_are_filled_with_their_surroundings():
    image = np.zeros((9, 14, 3), np.uint8)
    image[:, 7:] = (200, 100, 50)
    hole = block(2, 2, 4, 10, (9, 14))
    made = filled(image, hole)
    assert np.array_equal(made[~hole], image[~hole])
    assert made[3, 3].max() < 60 and np.abs(made[3, 11].astype(int) - (200, 100, 50)).max() < 60
    assert made[hole].max() <= 200
    flat = np.full((33, 5, 3), 77, np.uint8)
    assert (filled(flat, block(0, 0, 32, 5, (33, 5))) == 77).all()
    assert (filled(flat, np.ones((33, 5), bool)) == 127).all()


def test_psnr_of_part_of_a_picture():
    image, other = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    other[0] = 100
    assert psnr_where(image, other, block(1, 0, 2, 4, (4, 4))) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr_where(image, other, block(0, 0, 2, 4, (4, 4))) == pytest.approx(10 * np.log10(2 * 255**2 / 100))
    assert psnr_where(image, other, block(0, 0, 1, 4, (4, 4))) is None  # identical
    assert psnr_where(image, other, block(0, 0, 0, 0, (4, 4))) is None


def test_the_mixture_of_both_sides_falls_off_evenly():
    made, original = np.full((1, 8, 3), 200, np.uint8), np.full((1, 8, 3), 100, np.uint8)
    hole = block(0, 0, 1, 2, (1, 8))
    assert pasted(made, original, hole, feather=3)[0, :, 0].tolist() == [200, 200, 175, 150, 125, 100, 100, 100]
    assert pasted(made, original, hole, feather=10**9)[0, :, 0].tolist() == [200] * 8
    assert pasted(made, original, hole, feather=0)[0, :, 0].tolist() == [200, 200, *[100] * 6]


def test_strips_have_a_row_for_each_mask():
    pictures, masks = np.stack([picture(), picture(seed=1)]), np.zeros((2, *SIZE), np.uint8)
    one = strip(picture(), masks, pictures, names=["cat", "dog"])
    masks[1] = 255
    two = strip(picture(), masks, pictures, names=["cat", "dog"])
    assert one.shape[1] > 4 * 128 and two.shape[1] < one.shape[1] and two.shape[0] > one.shape[0]
    assert (one[2, 148:148 + 144] == 127).all() and (one[3, 149:148 + 143] == 0).all()  # the mask, in its frame
    assert np.array_equal(one[2:2 + 96, 2:2 + 144], picture().repeat(6, 0).repeat(6, 1))


# ---- the command


@pytest.fixture(scope="module")
def models(arpg, gpt, tmp_path_factory) -> dict[str, list[str]]:
    """The flags that name the models, for both kinds."""
    folder, flags = tmp_path_factory.mktemp("models"), {}
    torch.save({"model": arpg.tokenizer.state_dict(), "config": {"vq_model": "VQ-4-S"}}, folder / "vq.pt")
    for name, pipeline in (("ARPG-S", arpg), ("GPT-S", gpt)):
        config = {"gpt_model": name, "grid": list(GRID), "classes": CLASSES}
        torch.save({"model": pipeline.gpt.state_dict(), "config": config}, folder / f"{name}.pt")
        flags[name] = ["--gpt-ckpt", str(folder / f"{name}.pt"), "--vq-ckpt", str(folder / "vq.pt"), "--precision",
                       "none", "--cfg-scale", "3.0"]
    return flags


@pytest.fixture
def run(tmp_path, models, monkeypatch):
    """run(flags…) edits photo.png, 32x40; in a folder of its own, with an ARPG unless a model is named."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture((32, 40))).save("photo.png")

    def run(*argv, model: str = "ARPG-S") -> None:
        cli.run(command.main, command.EditFlags, [*models[model], "--image", "photo.png", *map(str, argv)])

    return run


def refused(capsys, run, *argv, **options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv, **options)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_the_command_writes_results_strip_and_numbers(run, tmp_path, capsys, arpg):
    run("--box", "8,8,16,12", "--classes", "dog,cat", "--variants", 2, "--seed", 4, "--paste", 1)
    assert sorted(path.name for path in (tmp_path / "edited").iterdir()) == [
        "000000.png", "000001.png", "000002.png", "000003.png", "config.json", "strip.png"]
    saved = json.loads((tmp_path / "edited" / "config.json").read_text())
    assert [(result["class"], result["index"]) for result in saved["results"]] == [
        ("dog", 0), ("dog", 1), ("cat", 0), ("cat", 1)]
    assert {"redrawn", "cells", "seam_psnr", "seam_psnr_decoded", "known_psnr", "file"} <= saved["results"][0].keys()
    assert saved["box"] == [8, 8, 16, 12] and saved["models"]["gpt_model"] == "ARPG-S"
    assert "4 images of 16x24" in capsys.readouterr().out
    _, mask = command.model_view(Image.open("photo.png"), block(8, 8, 12, 16, (32, 40)), SIZE)
    assert np.array_equal(mask, block(3, 4, 8, 11))  # 32x40 becomes 19x24, of which a row is cut off above
    hidden = filled(picture((32, 40)), block(8, 8, 12, 16, (32, 40)))
    image = command.center_crop(Image.fromarray(hidden), SIZE)
    made = edit(arpg, image, mask, conditions=[0], indices=[1], seed=4, paste=1)
    assert np.array_equal(images.load_png(tmp_path / "edited" / "000003.png"), made.pictures[0])


def test_what_was_in_the_hole_does_not_matter_after_resizing(run, tmp_path):
    other, mask = picture((32, 40)), block(9, 13, 7, 9, (32, 40))
    Image.fromarray(mask).save("mask.png")
    run("--mask", "mask.png", "--paste", 0)
    other[mask] = 0
    Image.fromarray(other).save("photo.png")
    run("--mask", "mask.png", "--paste", 0, "--output", "again")
    assert (tmp_path / "edited" / "000000.png").read_bytes() == (tmp_path / "again" / "000000.png").read_bytes()


def test_pictures_keep_their_size_on_request(run, tmp_path):
    run("--keep-size", "--box=-5,-5,9,9", "--paste", 0)
    made = images.load_png(tmp_path / "edited" / "000000.png")
    assert made.shape == (32, 40, 3)
    assert np.array_equal(made[4:], picture((32, 40))[4:]) and not np.array_equal(made, picture((32, 40)))
    run("--keep-size", "--canvas", "37x40", "--place", "0,5", "--paste", 0)
    assert np.array_equal(images.load_png(tmp_path / "edited" / "000000.png")[5:], picture((32, 40)))
    run("--redraw", 0.5, "--canvas", "16x30", "--variants", 2)
    assert images.load_png(tmp_path / "edited" / "000001.png").shape == (16, 30, 3)


def test_the_batch_is_that_of_the_canvas(run, monkeypatch, tmp_path):
    asked = []

    def one(pipeline, device, *, canvas):
        asked.append(canvas)
        return 1

    monkeypatch.setattr(command, "batch_that_fits", one)
    run("--canvas", "16x200", "--variants", 2)
    run("--keep-size", "--canvas", "40x70", "--output", "larger")
    Image.fromarray(picture((5, 7))).save("photo.png")
    run("--keep-size", "--redraw", 1, "--output", "smaller")
    assert asked == [(16, 200), (40, 70), SIZE]  # of a small picture a whole window is drawn


def test_the_strip_shows_the_first_results(run, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "MOST_SHOWN", 2)
    run("--box", "8,8,16,12", "--variants", 2)
    run("--box", "8,8,16,12", "--variants", 3, "--output", "more")
    assert (tmp_path / "edited" / "strip.png").read_bytes() == (tmp_path / "more" / "strip.png").read_bytes()
    assert (tmp_path / "more" / "000002.png").is_file()


def test_what_an_earlier_edit_left_is_pointed_out(run, capsys, tmp_path):
    run("--redraw", 0.5, "--variants", 3)
    assert capsys.readouterr().err == ""
    kept = (tmp_path / "edited" / "000002.png").read_bytes()
    run("--redraw", 0.5, "--variants", 1)
    said = capsys.readouterr().err
    assert "pictures of an earlier edit stay in edited (000001.png, 000002.png)" in said
    assert said.count("\n") == 1 and (tmp_path / "edited" / "000002.png").read_bytes() == kept


def test_a_gpt_edits_below_a_row(run, capsys, tmp_path):
    run("--box", "0,20,99,99", model="GPT-S")
    assert (tmp_path / "edited" / "strip.png").is_file()
    assert "a GPT draws row by row, so that it can redraw everything from a cell on; an ARPG redraws any cells" in \
        refused(capsys, run, "--box", "0,0,99,9", "--output", "other", model="GPT-S")
    assert not (tmp_path / "other").exists()
    assert "--step is for ARPG" in refused(capsys, run, "--box", "0,20,99,99", "--step", 3, model="GPT-S")


def test_mistakes_are_told_in_a_line(run, capsys, tmp_path):
    assert "--step is 25, expected 1 to 24" in refused(capsys, run, "--redraw", 1, "--step", 25)
    assert "class 'fish' is unknown" in refused(capsys, run, "--redraw", 1, "--classes", "fish")
    assert "cut off to make it 16x24" in refused(capsys, run, "--box", "0,0,40,1")  # of 32x40, the middle 27 rows
    assert "canvas of 8x8" in refused(capsys, run, "--canvas", "8x8")
    assert not (tmp_path / "edited").exists()


def test_most_mistakes_are_told_before_models_are_loaded(run, capsys, monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(command, "load_pipeline", load)
    Image.fromarray(block(0, 0, 0, 0, (32, 40))).save("empty.png")
    Image.fromarray(block(0, 0, 4, 4, (40, 32))).save("turned.png")
    Path("text.png").write_text("no picture")
    Path("text").touch()
    Path("edited").mkdir()
    for name in ("000003.png", "strip.png"):
        Image.fromarray(picture((32, 40))).save(Path("edited") / name)
    for flags, message in (
            ([], "give --mask, --box"), (["--mask", "empty.png"], "no pixel of the mask is white"),
            (["--mask", "turned.png"], "the mask is 40x32 pixels, the picture 32x40"),
            (["--mask", "absent.png"], "absent.png cannot be read"),
            (["--mask", "text.png"], "text.png cannot be read"),
            (["--image", "text.png", "--redraw", 1], "text.png cannot be read"),
            (["--box", "40,0,3,3"], "lies outside of the picture of 32x40"), (["--box", "1,2,3"], "x,y,width,height"),
            (["--box", "1,2,3,x"], "x,y,width,height"), (["--redraw", 2], "--redraw is 2"),
            (["--redraw", 1, "--variants", 0], "--variants is 0"), (["--redraw", 1, "--dilate", -1], "--dilate is -1"),
            (["--redraw", 1, "--paste", -1], "--paste is -1"), (["--redraw", 1, "--place", "0,0"], "--canvas too"),
            (["--keep-size", "--canvas", "32x39"], "does not lie on a canvas of 32x39"),
            (["--keep-size", "--canvas", "64x64", "--place", "30,0"], "does not lie on a canvas"),
            (["--redraw", 1, "--output", "edited.PNG"], "into a folder"),
            (["--redraw", 1, "--output", "text"], "--output is text, a file"),
            (["--image", "edited/000003.png", "--redraw", 1], "--image edited/000003.png would be overwritten"),
            (["--mask", "./edited/strip.png"], "give another --output than"),
            (["--keep-size", "--canvas", "32x40"], "give --mask, --box"), (["--canvas", "0x3"], "--canvas")):
        assert message in refused(capsys, run, *flags), flags


def test_one_process_edits(run, capsys, monkeypatch):
    monkeypatch.setattr(command.dist, "setup", lambda: dist.Process(0, 2, torch.device("cpu")))
    assert "takes one process, 2 were started: set nproc_per_node=1" in refused(capsys, run, "--redraw", 1)


@pytest.mark.processes
def test_the_script_starts_one_process(tmp_path, models):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    done = subprocess.run(["bash", ROOT / "scripts/autoregressive/edit.sh", *models["ARPG-S"], "--image", "photo.png",
                           "--canvas", "16x36", "--output", "wide"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "nproc_per_node": "2", "VIRTUAL_ENV": sys.prefix,
                               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    assert images.load_png(tmp_path / "wide" / "000000.png").shape == (16, 36, 3)


def test_a_mask_and_a_box_count_both(tmp_path):
    Image.fromarray(block(0, 0, 2, 2)).save(tmp_path / "mask.png")
    flags = command.EditFlags(image="", mask=str(tmp_path / "mask.png"), box=(4, 5, 3, 1))
    marked = command.asked_mask(flags, SIZE, command.PictureReader())
    assert np.array_equal(marked, block(0, 0, 2, 2) | block(5, 4, 1, 3))
