"""The retrieval score: right samples are found, wrong ones are not, chance is said."""
import json

import numpy as np
import pytest
from PIL import Image

from evaluations.t2i import retrieval
from utils import cli

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (120, 120, 120),
           "yellow": (220, 220, 20), "pink": (250, 150, 200)}


@pytest.fixture
def pairs(tmp_path):
    """Six pictures of one colour each, "a red square" and so on."""
    (tmp_path / "pairs").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / "pairs" / f"{name}.png")
        (tmp_path / "pairs" / f"{name}.txt").write_text(f"a {name} square")
    return tmp_path / "pairs"


def samples_of(folder, prompts: dict[str, str]):
    """A folder of samples: for each prompt, a picture of a colour."""
    (folder / "images").mkdir(parents=True)
    (folder / "captions.txt").write_text("".join(f"a {prompt} square\n" for prompt in prompts))
    for i, colour in enumerate(prompts.values()):
        Image.new("RGB", (24, 20), COLOURS[colour]).save(folder / "images" / f"{i:06d}.png")
    return folder


def test_samples_that_show_their_prompts_are_found(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "LEAST_STEPS", 60)
    found = {}
    for name, prompts in (("right", {"red": "red", "blue": "blue"}), ("wrong", {"red": "blue", "green": "green"})):
        folder = samples_of(tmp_path / name, prompts)
        cli.run(retrieval.main, retrieval.RetrievalFlags, [
            "--fake-dir", str(folder), "--data-path", str(pairs), "--image-size", "16", "--output",
            str(tmp_path / "out.json")])
        found[name] = json.loads((tmp_path / "out.json").read_text())
    assert found["right"]["top1"] == 1 and found["right"]["real"] == 1
    assert found["wrong"]["top1"] == 0.5 and found["wrong"]["nearest"][0] == "a blue square"
    assert found["right"]["chance"] == pytest.approx(1 / 6)


def test_the_scores():
    captions = ["a", "b", "c", "a", "d", "e", "f", "g"]
    hits = retrieval.retrieval(np.array([[3, 0, 1, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 4, 5]]), ["a", "b", "g"], captions)
    assert hits == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3), "chance": pytest.approx(4 / 24)}


def test_prompts_of_other_data_are_refused(pairs, tmp_path, capsys):
    folder = samples_of(tmp_path / "samples", {"mauve": "red"})
    with pytest.raises(SystemExit):
        cli.run(retrieval.main, retrieval.RetrievalFlags, ["--fake-dir", str(folder), "--data-path", str(pairs)])
    assert "1 prompts are captions of no real picture, such as 'a mauve square'" in capsys.readouterr().err
