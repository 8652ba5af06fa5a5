"""Edits to other classes are measured on pictures whose middle alone was drawn anew, each as a class that is not its
own."""
import numpy as np

from autoregressive.models.arpg import ARPG_models
from benchmarks import edited_classes
from tests.autoregressive.sample.editing import SIZE, picture, pipeline_of
from utils import cli


def test_no_picture_keeps_its_class():
    old = np.repeat(np.arange(4), 6)
    new = edited_classes.other_classes(old, 4)
    assert (new != old).all() and np.bincount(new, minlength=4).tolist() == [6] * 4


def test_what_is_counted(monkeypatch, capsys):
    """With a judge that sees the first class everywhere: how many pictures that is right for is known."""
    pipeline = pipeline_of(ARPG_models["ARPG-S"], steps=2)
    pictures, labels, seen = np.stack([picture(seed=i) for i in range(4)]), np.array([0, 1, 2, 1]), []

    def predict(judge, made, *, device):
        seen.append(made)
        return np.zeros(len(made), int), None

    monkeypatch.setattr(edited_classes, "load_pipeline", lambda flags, device: pipeline)
    monkeypatch.setattr(edited_classes, "build_dataset", lambda *_, **__: None)
    monkeypatch.setattr(edited_classes, "stack_images", lambda data, size: (pictures, labels))
    monkeypatch.setattr(edited_classes, "train_classifier", lambda *_, **__: None)
    monkeypatch.setattr(edited_classes, "predict", predict)
    cli.run(edited_classes.main, edited_classes.EditedClassesFlags, ["--seeds", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "taken for" in line]
    new = edited_classes.other_classes(labels, 3)
    shares = f"new class {(new == 0).mean():.1%}, for the old one 25.0%"
    assert len(lines) == 6 and all(shares in line for line in lines)
    assert "as they are (4)" in lines[0] and "middle half, as the new class (8)" in lines[1]
    assert len(seen) == 1 + 5 * 2 and all(made.shape == (4, *SIZE, 3) for made in seen)
    assert not np.array_equal(seen[1], seen[2]) and not np.array_equal(seen[1], seen[3])  # another seed, no class
