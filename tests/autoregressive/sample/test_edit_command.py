"""The edit command: what it writes and says, and mistakes in one line."""
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
from autoregressive.models.gpt import GPT_models
from autoregressive.sample import edit as command
from autoregressive.sample.editing import edit
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.seams import filled
from dataset.augmentation import center_crop
from tests.autoregressive.sample.editing import CLASSES, GRID, SIZE, block, picture, pipeline_of
from tests.conftest import ROOT
from utils import cli, dist, images


@pytest.fixture(scope="module")
def arpg() -> Pipeline:
    return pipeline_of(ARPG_models["ARPG-S"])


@pytest.fixture(scope="module")
def models(arpg, tmp_path_factory) -> dict[str, list[str]]:
    """The flags that name the models, for both kinds."""
    folder, flags = tmp_path_factory.mktemp("models"), {}
    torch.save({"model": arpg.tokenizer.state_dict(), "config": {"vq_model": "VQ-4-S"}}, folder / "vq.pt")
    for name, pipeline in (("ARPG-S", arpg), ("GPT-S", pipeline_of(GPT_models["GPT-S"]))):
        config = {"gpt_model": name, "grid": list(GRID), "classes": CLASSES,
                  "class_at_origin": pipeline.gpt.prefix_at_origin}
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
    _, _, mask = command.model_view(Image.open("photo.png"), block(8, 8, 12, 16, (32, 40)), SIZE)
    assert np.array_equal(mask, block(3, 4, 8, 11))  # 32x40 becomes 19x24, of which a row is cut off above
    hidden = filled(picture((32, 40)), block(8, 8, 12, 16, (32, 40)))
    image = center_crop(Image.fromarray(hidden), SIZE)
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
