"""Class accuracy tells right samples from wrong ones; the report shows what a run left."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations import quickstart_report
from evaluations.c2i import class_accuracy
from evaluations.c2i.inception_weights import load_torchscript
from utils import cli
from utils.images import save_npz, save_png, to_float

COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]])
NAMES = ["red", "green", "blue"]


def squares(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = rng.normal(0, 25, (count, 16, 16, 3))
    return np.clip(COLOURS[labels][:, None, None] + noise, 0, 255).astype(np.uint8), labels


def test_right_samples_score_high_and_wrong_ones_low():
    train, heldout, (samples, labels) = squares(60, seed=0), squares(30, seed=1), squares(24, seed=2)
    right = class_accuracy.evaluate_samples(samples, labels, NAMES, train, heldout, steps=40)
    assert right["heldout_accuracy"] > 0.9
    assert right["sample_accuracy"] > 0.9
    wrong = class_accuracy.evaluate_samples(samples, (labels + 1) % 3, NAMES, train, heldout, steps=40)
    assert wrong["sample_accuracy"] < 0.1
    assert [row["count"] for row in right["per_class"].values()] == [8, 8, 8]
    assert np.array(right["confusion"]).sum() == 24
    assert "held-out" in class_accuracy.format_table(right)


def test_accuracies_are_shares_of_what_was_asked_for():
    """Rows are true classes: two of three of class 0 are recognised, none of class 1, of class 2 there are none."""
    confusion = class_accuracy.confusion_matrix(np.array([0, 0, 0, 1]), np.array([0, 0, 2, 0]), num_classes=3)
    assert confusion.tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(class_accuracy.class_accuracies(confusion), [2 / 3, 0, np.nan])
    assert class_accuracy.balanced_accuracy(confusion) == pytest.approx(1 / 3)
    assert class_accuracy.plain_accuracy(confusion) == 0.5


def test_a_class_is_drawn_by_the_square_root_of_its_size(monkeypatch):
    def draw(weights, *args, **options):
        shares = np.bincount(labels, weights=weights) / weights.sum().item()
        np.testing.assert_allclose(shares, [1 / 4, 2 / 4, 1 / 4])
        raise StopIteration

    labels = np.array([0, 1, 1, 1, 1, 2])
    monkeypatch.setattr(torch, "multinomial", draw)
    with pytest.raises(StopIteration):
        class_accuracy.train_classifier(squares(6, seed=0)[0], labels, num_classes=3, steps=1)


def test_the_classifiers_features_are_those_below_its_last_layer(tmp_path):
    images, labels = squares(12, seed=0)
    model = class_accuracy.train_classifier(images, labels, num_classes=3, steps=2)
    class_accuracy.save_features(model, tmp_path / "features.pt")
    pixels = to_float(np.resize(images, (5, 24, 16, 3)))  # another batch, another size than it was traced with
    features = load_torchscript(tmp_path / "features.pt")(pixels)
    assert features.shape == (5, class_accuracy.WIDTHS[-1])
    assert torch.allclose(model.head(features), model(pixels), atol=1e-5)


def test_bad_samples_are_refused(tmp_path, image_folder, capsys):
    samples, labels = squares(6, seed=0)
    unlabelled = tmp_path / "unlabelled.npz"
    save_npz(unlabelled, samples, count=6, shape=(16, 16))
    labelled = tmp_path / "labelled.npz"
    save_npz(labelled, samples, count=6, shape=(16, 16), labels=labels)
    flags = ["--data-path", str(image_folder), "--output", str(tmp_path / "out.json")]
    for path, more, says in ((unlabelled, ["--image-size", "16"], "no arr_0 and arr_1"),
                             (labelled, ["--image-size", "24"], "--image-size"),
                             (labelled, ["--image-size", "16", "--dataset", "coco"], "no classes"),
                             (tmp_path / "none.npz", [], "no sample set")):
        with pytest.raises(SystemExit) as caught:
            cli.run(class_accuracy.main, class_accuracy.AccuracyFlags, ["--samples", str(path), *flags, *more])
        assert caught.value.code == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def score(tmp_path, image_folder, monkeypatch, capsys, own_cache):
    """score(data path, *flags) → (whether it was computed anew, the result), with a classifier of two steps."""
    samples, labels = squares(6, seed=0)
    save_npz(tmp_path / "set.npz", samples, count=6, shape=(16, 16), labels=labels)
    train = class_accuracy.train_classifier
    monkeypatch.setattr(class_accuracy, "train_classifier", lambda *a, **k: train(*a, **{**k, "steps": 2}))

    def run(data=image_folder, *flags, size=16):
        cli.run(class_accuracy.main, class_accuracy.AccuracyFlags, [
            "--samples", str(tmp_path / "set.npz"), "--data-path", str(data), "--image-size", str(size),
            "--output", str(tmp_path / "out.json"), *flags])
        return "nothing to do" not in capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    return run


def test_scoring_is_not_repeated_for_the_same_samples(score, image_folder, tmp_path):
    new, first = score()
    assert new
    assert score() == (False, first)
    assert score(shutil.copytree(image_folder, tmp_path / "moved")) == (False, first)  # the same pictures elsewhere


def test_another_data_set_is_scored_anew(score, image_folder, tmp_path):
    """Its result was that of the first one: the key held neither the data nor the size."""
    _, first = score()
    other = shutil.copytree(image_folder, tmp_path / "other")
    (other / "red" / "00.jpg").write_bytes((other / "green" / "00.jpg").read_bytes())
    new, second = score(other)
    assert new
    assert second["pictures_sha256"] != first["pictures_sha256"]
    for name in ("red", "green", "blue"):
        (other / name).rename(other / f"{name}ish")
    new, third = score(other)
    assert new
    assert set(third["per_class"]) == {"redish", "greenish", "blueish"}
    assert score(other, "--global-seed", "3")[0]


def test_other_samples_are_judged_by_the_same_classifier(score, image_folder, tmp_path, monkeypatch):
    _, first = score()
    kept, = (tmp_path / "cache" / "llamagen" / "classifiers").iterdir()
    samples, labels = squares(6, seed=0)
    save_npz(tmp_path / "set.npz", samples[::-1], count=6, shape=(16, 16), labels=labels[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(class_accuracy, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
        new, second = score()
    assert new
    for key in ("heldout_accuracy", "sample_accuracy", "per_class"):
        assert second[key] == first[key]
    assert class_accuracy.is_up_to_date(tmp_path / "out.json", tmp_path / "out_features.pt", {})
    kept.write_bytes(kept.read_bytes()[:-4])
    (tmp_path / "out.json").unlink()
    assert {**score()[1], "features_sha256": 0} == {**second, "features_sha256": 0}  # trained anew, to the same end
    for flags in (["--global-seed", "1"], []):
        other = shutil.copytree(image_folder, tmp_path / f"other{len(flags)}")
        (other / "red" / "00.jpg").write_bytes((other / "green" / "00.jpg").read_bytes())
        before = len(list(kept.parent.iterdir()))
        score(other, *flags)
        assert len(list(kept.parent.iterdir())) == before + 1


def test_another_size_is_not_taken_for_done(score, capsys):
    score()
    with pytest.raises(SystemExit):
        score(size=24)
    assert "see --image-size" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [
    lambda output, features: output.write_text("{"), lambda output, features: output.write_text("[]"),
    lambda output, features: features.unlink(), lambda output, features: features.write_bytes(b"of another run"),
    lambda output, features: output.write_text(output.read_text().replace('"code_sha256": "', '"code_sha256": "0')),
], ids=["damaged", "another thing", "no features", "other features", "another version"])
def test_what_is_not_the_whole_result_is_made_anew(score, tmp_path, spoil):
    _, first = score()
    spoil(tmp_path / "out.json", tmp_path / "out_features.pt")
    new, second = score()
    assert new
    assert {**second, "features_sha256": 0} == {**first, "features_sha256": 0}
    assert not score()[0]


PER_CLASS = {name: {"heldout": 1.0, "samples": None, "count": 2} for name in NAMES}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def leave_samples(root: Path, folder: str, *, scores: str, accuracy: float, settings: dict) -> None:
    """A sample set, and its class accuracy."""
    samples, labels = squares(6, seed=0)
    write(root / folder / "set" / "config.json", json.dumps(
        {"cfg_scale": 2.0, "top_k": 0, "top_p": 1.0, "temperature": 0.9, "seed": 0, **settings}))
    save_npz(root / folder / "set.npz", samples, count=6, shape=(16, 16), labels=labels)
    write(root / scores, json.dumps({"sample_accuracy": accuracy, "heldout_accuracy": 0.9, "per_class": PER_CLASS}))


def leave_part(root: Path, run: str, *, distance: str, distances: tuple[float, float],
               losses: tuple[float, float]) -> None:
    """A training's log, and distances."""
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    write(root / run / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    write(root / run / "config.json", json.dumps({"model": {"vocab_size": 256, "classes": NAMES,
                                                           "image_size": [16, 16]}}))
    for name, found in zip(("samples", "heldout"), distances, strict=True):
        write(root / f"{distance}_{name}.json", json.dumps(
            {"frechet_distance": found, "precision": 0.75, "recall": 0.5,
             "protocol": {"sample": {"images": 6}, "reference": {"images": 9}}}))


@pytest.fixture
def shared_dir(tmp_path):
    """What scripts/quickstart.sh leaves of the tokenizer, in small."""
    write(tmp_path / "tokenizer/000-VQ-4-S/metrics.jsonl", "".join(json.dumps(
        {"step": step, "reconstruction": 1 / step, "codebook_usage": 0.5, "codebook_perplexity": 40}) + "\n"
        for step in (1, 2)))
    write(tmp_path / "reconstructions/set/results.json", '{"psnr": 21.5, "ssim": 0.8, "images": 9}')
    save_png(tmp_path / "reconstructions" / "set.png", squares(6, seed=0)[0][0])
    write(tmp_path / "times.tsv", "tokenizer\t60\ntokenizer\t30\nGPT\t120\n")
    return tmp_path


@pytest.fixture
def run_dir(shared_dir):
    """The same after the GPT."""
    leave_part(shared_dir, "gpt/000-GPT-S", distance="distance", distances=(12.5, 8.25), losses=(5.5, 1.25))
    leave_samples(shared_dir, "samples", scores="class_accuracy.json", accuracy=0.875, settings={})
    return shared_dir


@pytest.fixture
def arpg_dir(shared_dir):
    """The same after the ARPG; of the set of 64 steps nobody noted the time."""
    leave_part(shared_dir, "arpg/000-ARPG-S", distance="distance_arpg", distances=(13.5, 8.75), losses=(5.25, 2.75))
    for steps in (8, 16, 32, 64):
        leave_samples(shared_dir, f"samples_arpg/{steps}", scores=f"class_accuracy_arpg_{steps}.json",
                      accuracy=0.5 + steps / 200, settings={"steps": steps})
        if steps < 64:
            write(shared_dir / "samples_arpg" / str(steps) / "set.speed.jsonl",
                  f'{{"images": 4, "seconds": {steps / 100}}}\n{{"images": 2, "seconds": {steps / 200}}}\n')
    for name in [*(f"inpainted/{name}/strip" for name in NAMES), "edges"]:
        (shared_dir / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(shared_dir / f"{name}.png", squares(1, seed=0)[0][0])
    return shared_dir


def report(root: Path, *flags: str) -> str:
    cli.run(quickstart_report.main, quickstart_report.ReportFlags, ["--run-dir", str(root), *flags])
    return (root / "report.html").read_text()


def test_report_of_an_arpg_has_its_steps(arpg_dir, capsys):
    page = report(arpg_dir, "--model", "arpg")
    rows = [f"<tr><td>{steps}</td><td>{time}</td><td>{accuracy}</td></tr>" for steps, time, accuracy in (
        (8, "20.0 ms", "54.0%"), (16, "40.0 ms", "58.0%"), (32, "80.0 ms", "66.0%"), (64, "–", "82.0%"))]
    for text in ("21.50 dB", "5.250 → 2.750", "13.50", "8.75", "steps 64, cfg_scale 2.0", *rows):
        assert text in page
    assert "GPT" not in page.split("</head>")[1].replace("ARPG", "").replace("<td>GPT</td><td>2.0 min</td>", "")
    assert all(f'alt="{name}"' in page.partition("ARPG: inpainting")[2] for name in (*NAMES, "edges and samples"))
    assert (arpg_dir / "samples_arpg.png").is_file() and "82.0%" in capsys.readouterr().out
    (arpg_dir / "class_accuracy_arpg_8.json").unlink()
    with pytest.raises(SystemExit):
        report(arpg_dir, "--model", "arpg")
    assert "run scripts/quickstart.sh to its end" in capsys.readouterr().err


@pytest.mark.usefixtures("arpg_dir")
def test_report_after_both_shows_both(run_dir):
    titles = ("GPT: samples, class by class", "ARPG: samples, class by class")
    for flags, order in (((), titles), (("--model", "arpg"), titles[::-1])):
        page = report(run_dir, *flags)
        assert 0 < page.index(order[0]) < page.index(f"<h2>{order[1]}")
        assert "87.5%" in page and "82.0%" in page


def test_report_shows_what_the_run_left(run_dir, capsys):
    page = report(run_dir)
    assert "ARPG" not in page
    for text in ("21.50 dB", "87.5%", "5.500 → 1.250", "ln 256 = 5.545", "12.50", "8.25", "0.750",
                 "1.5 min", "3.5 min", "OpenMoji", "red"):
        assert text in page
    assert page.count("data:image/png;base64") >= 2 * len(NAMES) + 2
    assert "http" not in page.split("</head>")[1]  # self-contained
    assert (run_dir / "samples.png").is_file()
    assert "87.5%" in capsys.readouterr().out


def test_report_of_an_unfinished_run_says_what_is_missing(run_dir, capsys):
    (run_dir / "samples" / "set.npz").unlink()
    with pytest.raises(SystemExit) as caught:
        report(run_dir)
    assert caught.value.code == 2
    assert "run scripts/quickstart.sh to its end" in capsys.readouterr().err
    assert not (run_dir / "report.html").exists()


def test_the_table_spells_out_control_characters():
    row = {"heldout": 1.0, "samples": 0.0, "count": 2}
    result = {"per_class": {"a\x1b[31m": row, "two\nlines": row}, "confusion": [[0, 2], [2, 0]],
              "heldout_accuracy": 1.0, "sample_accuracy": 0.0}
    table = class_accuracy.format_table(result)
    assert "\x1b" not in table and len(table.splitlines()) == 4 and r"2 a\x1b[31m" in table
