"""The doctor: each trap is found, sound stores and runs are let pass, the published numbers are those published."""
import json
import math

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import Transformer
from autoregressive.train import doctor, log_checks
from autoregressive.train.doctor import Sample, check_classes, check_codes, check_tokenizer
from autoregressive.train.log_checks import Run, check_run, conclusion
from autoregressive.train.published_losses import IMAGENET, PUBLISHED, TOLERANCE
from dataset.codes import open_stores
from tests.conftest import TINY_GPT, call
from tests.dataset.codes import fake_codes, write_packed
from tokenizer.build import fingerprint, load_tokenizer, new_tokenizer
from utils import cli
from utils.images import load_png

pytestmark = pytest.mark.usefixtures("own_cache")
BATCH_1024, GPT_B = PUBLISHED[:2]


def ask(capsys, *argv) -> tuple[int, str]:
    """Exit code and what is printed."""
    capsys.readouterr()
    try:
        cli.run(doctor.main, doctor.DoctorFlags, [str(word) for word in argv])
    except SystemExit as stop:
        return stop.code, "".join(capsys.readouterr())
    return 0, capsys.readouterr().out


# ---- the store


@pytest.fixture
def store(vq_ckpt, tmp_path) -> dict:
    """A store of random codes that names the tokenizer of `vq_ckpt`, and the flags to look at it."""
    _, tokenizer = load_tokenizer(doctor.DoctorFlags(code_path="", vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))
    folder = write_packed(tmp_path / "codes", fake_codes(36, views=2), np.arange(36) % 3,
                          classes=["blue", "green", "red"], tokenizer=fingerprint(tokenizer))
    return {"path": folder, "flags": ["--code-path", folder, "--gpt-model", "GPT-S", "--output", tmp_path / "doctor"]}


def test_a_sound_store(store, vq_ckpt, tmp_path, capsys):
    code, text = ask(capsys, *store["flags"], "--vq-ckpt", vq_ckpt)
    assert code == 0 and "problem " not in text
    for line in ("36 images, 2 views of 4x4 codes", "3 classes of 12 to 12 images", "4x4 tokens, 16x16 pixels",
                 "made the codes", "5.5452 of a new GPT-S, ln 256 = 5.5452; the gradient is finite"):
        assert line in text
    assert load_png(tmp_path / "doctor" / "codes.png").shape[1] == 8 * 18 + 2  # eight columns
    assert (tmp_path / "doctor" / "labels.png").is_file()
    assert not (tmp_path / "doctor" / "loss.png").exists()


def test_a_rare_store_shown_often_holds_no_duplicates(store, tmp_path, capsys):
    made = json.loads((store["path"] / "manifest.json").read_text())["tokenizer"]["weights_sha256"]
    few = write_packed(tmp_path / "few", fake_codes(4, views=1, seed=1), np.zeros(4, dtype=int), classes=["red"],
                       tokenizer=made)
    code, text = ask(capsys, "--code-path", f"{store['path']},{few}", "--store-weights", "1,20", *store["flags"][2:])
    assert code == 0 and "0.0% of 40 images have the codes of another one" in text


def test_of_a_recipe_is_taken_what_the_doctor_uses(store, tmp_path, capsys):
    recipe = tmp_path / "own.json"
    recipe.write_text(json.dumps({"train": {"gpt-model": "GPT-S", "lr": 3e-3, "epochs": 7, "global-batch-size": 48}}))
    code, text = ask(capsys, "--recipe", recipe, *store["flags"])
    assert code == 0 and "lr 0.003 at batch 48" in text


def test_more_classes_than_have_names_are_refused(store, capsys):
    code, text = ask(capsys, *store["flags"], "--num-classes", 1000)
    assert code == 2 and "--num-classes is 1000, but the store names 3 classes: leave it out" in text


def edit(store: dict, **changes) -> None:
    path = store["path"] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_folder_above_the_classes_is_seen(store, capsys):
    edit(store, classes=["train", "Val", "test"])
    code, text = ask(capsys, *store["flags"])
    assert code == 1 and "named train, Val, test: these are parts of a set, no classes" in text
    assert "not given: with --vq-ckpt the codes are decoded" in text


def test_another_tokenizer_is_seen(store, vq_ckpt, tmp_path, capsys):
    torch.manual_seed(1)
    for name, size, line in (("other", 256, "is not the tokenizer that made the codes"),
                             ("small", 128, "the codes are of a codebook of 256")):
        flags = doctor.DoctorFlags(code_path="x", vq_model="VQ-4-S", codebook_size=size)
        torch.save({"model": new_tokenizer(flags)[1].state_dict()}, tmp_path / f"{name}.pt")
        code, text = ask(capsys, *store["flags"], "--vq-ckpt", tmp_path / f"{name}.pt", "--vq-model", "VQ-4-S",
                         "--codebook-size", size)
        assert code == 1 and line in text
    made = json.loads((store["path"] / "manifest.json").read_text())["tokenizer"]
    edit(store, tokenizer={**made, "downsample": 8})
    code, text = ask(capsys, *store["flags"], "--vq-ckpt", vq_ckpt)
    assert code == 1 and "the codes have 8 pixels per side of a token" in text
    edit(store, tokenizer=made)
    opened, (_, tokenizer) = open_stores(str(store["path"])), new_tokenizer(doctor.DoctorFlags(vq_model="VQ-4-S"))
    opened.manifest = {}  # LlamaGen's layout has none
    found = {finding.topic: finding for finding in check_tokenizer(opened, tokenizer, "vq.pt")}
    assert found["tokenizer"].grade == "warning"
    assert "does not say which tokenizer made it" in found["tokenizer"].text


@pytest.mark.parametrize(("change", "message"), [
    (lambda model: torch.nn.init.normal_(model.output.weight), "the head does not start at zero"),
    (lambda model: model.norm.weight.data.fill_(math.inf), "nan of a new GPT-S")])
def test_a_head_that_does_not_start_at_zero_is_seen(store, capsys, monkeypatch, change, message):
    draw = Transformer.init_weights

    def changed(model, seed, **options):
        draw(model, seed, **options)
        with torch.no_grad():
            change(model)

    monkeypatch.setattr(Transformer, "init_weights", changed)
    code, text = ask(capsys, *store["flags"])
    assert code == 1 and message in text


def test_misuse(store, capsys, tmp_path):
    for flags, message in ((["--run-folder", tmp_path / "none"], "has no config.json"),
                           (["--num-classes", 2], "--num-classes is 2"), (["--image-size", 32], "--image-size"),
                           (["--code-path", tmp_path / "none"], "none"), (["--epochs", 3], "arguments: --epochs")):
        code, text = ask(capsys, *store["flags"], *flags)
        assert code == 2 and message in text
    code, text = ask(capsys, "--gpt-model", "GPT-S")
    assert code == 2 and "--code-path is missing" in text and "--run-folder" in text


def grades(findings) -> dict[str, str]:
    return {finding.topic: finding.grade for finding in findings}


def test_codes_are_judged():
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 64, (200, 16)), np.zeros(200, int)
    sound = Sample(codes, labels, 64)
    assert set(grades(check_codes(sound)).values()) == {"ok"}
    assert sound.entropy == pytest.approx(math.log(64), abs=0.005)  # 0.01 too small without the correction
    assert Sample(np.array([[0, 0, 0, 1]]), labels, 64).entropy == pytest.approx(0.5623 + 1 / 8, abs=1e-4)
    assert grades(check_codes(Sample(codes // 63, labels, 64)))["codebook"] == "problem"
    assert grades(check_codes(Sample(codes // 5, labels, 64)))["codebook"] == "warning"
    assert grades(check_codes(Sample(codes + 1, labels, 64)))["vocabulary"] == "problem"
    assert grades(check_codes(Sample(codes[np.arange(200) % 150], labels, 64)))["duplicates"] == "problem"
    assert grades(check_codes(Sample(codes[np.arange(200) % 190], labels, 64)))["duplicates"] == "warning"


def test_classes_are_judged(store):
    opened = open_stores(str(store["path"]))
    for labels, names, grade, text in (
            ([0] * 30 + [1], None, "warning", "train/ and val/ of ImageNet look so"),
            ([0] * 30 + [1] * 3, ["a", "b"], "ok", "2 classes of 3 to 30"),
            ([0] * 30 + [1], ["a", "b"], "warning", "rare ones such as b"),
            ([0, 2], ["a", "b", "c"], "warning", "1 have none, such as b")):
        opened.labels, opened.classes = np.array(labels), names
        found = check_classes(opened)
        assert found.grade == grade and text in found.text


# ---- the run


def make_run(losses: dict[int, float], columns: dict[int, dict] | None = None, **changes) -> Run:
    """A run of LlamaGen's settings at batch 1024, with changes."""
    model = {"vocab_size": 16384, "num_classes": 1000, "grid": [16, 16], "gpt_model": "GPT-L", "classes": None}
    config = {"lr": 4e-4, "global_batch_size": 1024, "images": IMAGENET, "model": model, "warmup_steps": 0,
              "token_noise": 0.0}
    model.update({key: changes.pop(key) for key in changes.keys() & model.keys()})
    rows = [{"step": step, "loss": loss, **(columns or {}).get(step, {})} for step, loss in losses.items()]
    return Run(rows, config | changes)


def published(curve=BATCH_1024, *, shift: float = 0.0) -> dict[int, float]:
    return {1: math.log(16384), **{step: loss + shift for step, loss in curve.points.items()}}


def test_published_numbers():
    assert (BATCH_1024.points[100], BATCH_1024.points[500], BATCH_1024.points[900]) == (9.579, 8.877, 8.445)
    assert (GPT_B.points[500], GPT_B.points[800], GPT_B.points[1200]) == (9.282, 9.066, 8.810)
    ends = {curve.model: (curve.points, curve.side) for curve in PUBLISHED if curve.family == "GPT" and curve.model}
    del ends["GPT-B"]
    assert ends == {"GPT-L": ({50: 7.86}, 16), "GPT-1B": ({50: 7.33}, 16), "GPT-XL": ({300: 6.9}, 24)}
    arpg = [(curve.model, curve.points, curve.batch, curve.lr) for curve in PUBLISHED if curve.family == "ARPG"]
    assert arpg == [("ARPG-L", {150: 7.66}, 1024, 4e-4), ("ARPG-L", {400: 7.5}, 1024, 4e-4),
                    ("ARPG-XL", {400: 7.295}, 768, 3e-4), ("ARPG-XXL", {400: 7.03}, 512, 2e-4)]
    both = BATCH_1024.points.keys() & GPT_B.points.keys()
    assert min(GPT_B.points[step] - BATCH_1024.points[step] for step in both) / 2 == pytest.approx(TOLERANCE, abs=0.003)


@pytest.mark.parametrize(("shift", "grade", "verdict"), [
    (0.0, "ok", "on track: no slower than LlamaGen at batch 1024, within 0.2"), (0.19, "ok", "on track"),
    (0.21, "problem", "not on track: published"), (-0.21, "warning", "on track")])
def test_a_run_is_compared_with_its_published_curve(shift, grade, verdict):
    run = make_run(published(shift=shift))
    found = check_run(run, 9.0)
    compared, = (finding for finding in found if finding.topic == "published" and "compared" in finding.text)
    assert compared.grade == grade and conclusion(run, found, 9.0).startswith(verdict)


def test_conditions_decide_what_applies():
    run = make_run(published(GPT_B), gpt_model="GPT-B", lr=1e-4, global_batch_size=256)
    assert "GPT-B at lr 1e-4" in conclusion(run, check_run(run, 9.0), 9.0)
    for changes, reason in (({"vocab_size": 8192}, "8192 codes"), ({"num_classes": 10}, "10 classes"),
                            ({"images": 1000}, "1000 images"), ({"token_noise": 0.1}, "token noise"),
                            ({"gpt_model": "GPT-S"}, "GPT-S"), ({"init_from": "x.pt"}, "a start from trained weights")):
        run = make_run(published(), **changes)
        text, = (finding.text for finding in check_run(run, 9.0) if finding.topic == "published")
        assert text.startswith("none applies (LlamaGen at batch 1024; GPT-B") and reason in text
    for changes, reason in (({"lr": 1e-4}, "lr 0.0001, not 0.0004"), ({"warmup_steps": 100}, "a warm-up"),
                            ({"grid": [24, 24]}, "24x24 tokens, not 16x16"), ({"global_batch_size": 8}, "batch 8")):
        assert any(reason in text for text in log_checks.objections(BATCH_1024, make_run(published(), **changes)))


def test_the_end_is_compared_by_epochs():
    steps = 50 * IMAGENET // 256
    losses = {1: math.log(16384), 1000: 9.0, steps - 1000: 7.861, steps: 7.86}
    run = make_run(losses, gpt_model="GPT-L", lr=1e-4, global_batch_size=256)
    assert [finding.grade for finding in check_run(run, 9.0) if "GPT-L after 50" in finding.text] == ["ok"]
    slow = make_run({step: loss + 0.3 for step, loss in losses.items()}, lr=1e-4, global_batch_size=256)
    assert [finding.grade for finding in check_run(slow, 9.0) if "GPT-L after 50" in finding.text] == ["problem"]


ARPG_L = {"gpt_model": "ARPG-L", "epochs": 400, "lr_schedule": "cosine", "warmup_epochs": 100.0}


def arpg_losses(shift: float = 0.0) -> dict[int, float]:
    """Of an ARPG-L at batch 1024, after 0, 150 and 400 epochs."""
    steps = [epochs * IMAGENET // 1024 for epochs in (150, 399, 400)]
    return {1: math.log(16384), **dict(zip(steps, (7.66 + shift, 7.5 + shift, 7.5 + shift), strict=True))}


def test_an_arpg_is_compared_with_arpgs_alone():
    run = make_run(arpg_losses(), **ARPG_L)
    texts = [finding.text for finding in check_run(run, 9.0) if finding.topic == "published"]
    assert [text.partition(":")[0] for text in texts] == [
        "ARPG-L after 150 epochs", "ARPG-L after 400 epochs", "ARPG-XL after 400 epochs", "ARPG-XXL after 400 epochs"]
    assert ["points compared" in text for text in texts] == [True, True, False, False]
    assert conclusion(run, check_run(run, 9.0), 9.0) == (
        "on track: no slower than ARPG-L after 150 epochs and ARPG-L after 400 epochs, within 0.2")
    slow = make_run(arpg_losses(0.25), **ARPG_L)
    assert conclusion(slow, check_run(slow, 9.0), 9.0) == "not on track: published"
    rate = next(finding for finding in check_run(run, 9.0) if finding.topic == "lr")
    assert rate.grade == "ok" and "ARPG's rule" in rate.text and "LlamaGen" not in rate.text
    for curve in PUBLISHED:
        assert curve.family == "ARPG" or objections_of(curve, run) == ["ARPG-L, no GPT"]


def objections_of(curve, run: Run) -> list[str]:
    """Those that are about the kind of model."""
    return [text for text in log_checks.objections(curve, run) if ", no " in text]


def test_a_gpt_is_not_compared_with_arpgs():
    run = make_run(arpg_losses(), **{**ARPG_L, "gpt_model": "GPT-L"})
    found = check_run(run, 9.0)
    assert not any("ARPG" in finding.text for finding in found) and "ARPG" not in conclusion(run, found, 9.0)
    assert all(objections_of(curve, run) == ["GPT-L, no ARPG"] for curve in PUBLISHED if curve.family == "ARPG")


@pytest.mark.parametrize(("change", "reason"), [
    ({"epochs": 300}, "300 epochs, not 400"), ({"lr_schedule": "constant"}, "no cosine schedule"),
    ({"query_layers": 6}, "6 layers of queries"), ({"gpt_model": "ARPG-XL"}, "ARPG-XL, not ARPG-L"),
    ({"gpt_model": "ARPG-S"}, "ARPG-S, which is no model of the paper"), ({"lr": 1e-4}, "lr 0.0001, not 0.0004")])
def test_conditions_of_an_arpgs_losses(change, reason):
    end = PUBLISHED[[curve.name for curve in PUBLISHED].index("ARPG-L after 400 epochs")]
    assert log_checks.objections(end, make_run(arpg_losses(), **ARPG_L | {"query_layers": 12})) == []
    assert reason in log_checks.objections(end, make_run(arpg_losses(), **ARPG_L | change))


def test_a_warm_up_in_epochs_is_a_warm_up():
    run = make_run(published(), warmup_epochs=100.0)
    assert run.warmup_steps == pytest.approx(125114, abs=1)
    assert "a warm-up" in log_checks.objections(BATCH_1024, run)


@pytest.mark.parametrize(("step", "warmup_epochs", "grade"), [
    (30000, 100.0, "ok"), (40000, 100.0, "problem"), (5100, 0.0, "problem"), (5100, 1.0, "ok")])
def test_nothing_learned_in_a_warm_up_is_no_problem_yet(step, warmup_epochs, grade):
    """After 30,000 of 125,114 warm-up steps a model has seen as much learning rate as 3,600 steps at the peak give."""
    run = make_run({1: math.log(16384), step - 1: 9.2, step: 9.2}, warmup_epochs=warmup_epochs)
    assert log_checks.check_level(run, 9.0).grade == grade


def test_sparse_rows_are_taken_for_the_steps_they_cover():
    fine = {step: 9.7 - 0.001 * step for step in range(100, 3001, 100)}
    coarse = {1: 9.7, **{step: float(np.mean([fine[s] for s in range(step - 400, step + 1, 100)]))
                         for step in range(500, 3001, 500)}}
    assert make_run(coarse).loss_at(1500) == pytest.approx(fine[1500], abs=1e-9)
    assert make_run(coarse).loss_at(4000) is None


def falling(count: int = 80, *, start: float = 8.5, end: float = 7.0) -> dict[int, float]:
    rng = np.random.default_rng(0)
    curve = start + (end - start) * np.log1p(np.arange(count)) / np.log(count) + rng.normal(0, 0.01, count)
    return {1: math.log(16384), **{100 * (i + 1): float(loss) for i, loss in enumerate(curve)}}


SMALL = {"images": 5000, "num_classes": 10}


def test_a_sound_run_of_other_data_is_on_track_as_far_as_one_can_tell():
    columns = {step: {"grad_norm": 0.5, "images_per_second": 100.0} for step in falling()}
    run = make_run(falling(), columns, **SMALL)
    found = check_run(run, 8.0)
    assert {finding.grade for finding in found} == {"ok"}
    assert conclusion(run, found, 8.0) == "on track, as far as one can tell without a published loss for these settings"
    young = make_run(dict(list(falling().items())[:4]), **SMALL)
    assert conclusion(young, check_run(young, 8.0), 8.0).startswith("cannot tell: no published loss applies at step")


@pytest.mark.parametrize(("change", "topic", "grade"), [
    (lambda losses, columns: losses.update({1: 9.6}), "first loss", "problem"),
    (lambda losses, columns: losses.pop(1), "first loss", "warning"),
    (lambda losses, columns: losses.update({4000: math.nan}), "finite", "problem"),
    (lambda losses, columns: columns.update({4000: {"skipped_steps": 3}, 4100: {"skipped_steps": 4}}), "finite",
     "warning"),
    (lambda losses, columns: columns.update({4000: {"skipped_steps": 45}, 4100: {"skipped_steps": 45}}), "finite",
     "problem"),
    (lambda losses, columns: losses.update(dict.fromkeys(range(6000, 8001, 100), 8.6)), "level", "problem"),
    (lambda losses, columns: losses.update(dict.fromkeys(range(7000, 8001, 100), 1.5)), "level", "warning"),
    (lambda losses, columns: losses.update({step: 7.0 + step / 8e4 for step in range(6000, 8001, 100)}), "trend",
     "problem"),
    (lambda losses, columns: losses.update(dict.fromkeys(range(5000, 8001, 100), 7.1)), "trend", "warning"),
    (lambda losses, columns: losses.update({5000: 8.6}), "stability", "warning"),
    (lambda losses, columns: losses.update({8000: 9.6}), "stability", "problem"),
    (lambda losses, columns: columns.update({step: {"grad_norm": 0.1 if step < 5000 else 4.0} for step in losses}),
     "stability", "problem"),
    (lambda losses, columns: columns.update({step: {"images_per_second": 100.0 if step < 6000 else 30.0}
                                             for step in losses}), "speed", "warning"),
])
def test_what_goes_wrong_is_seen(change, topic, grade):
    losses, columns = falling(), {}
    change(losses, columns)
    found = check_run(make_run(losses, columns, **SMALL), 8.0)
    assert grades(found)[topic] == grade
    others = [finding for finding in found if finding.grade == "problem" and finding.topic != topic]
    assert not others or topic == "level" or topic == "stability"


def test_the_rule_for_the_learning_rate():
    def grade(lr: float, batch: int, model: str = "GPT-B", **more) -> str:
        return log_checks.check_rate({"lr": lr, "global_batch_size": batch, **more}, model).grade

    assert [grade(1e-4, 256), grade(2e-4, 512), grade(2e-4, 256), grade(4e-4, 1024)] == ["ok"] * 4
    assert [grade(1e-3, 256), grade(1e-4, 1024), grade(1e-4, 64)] == ["warning"] * 3
    assert [grade(3e-3, 16, "GPT-S"), grade(3e-3, 16, "ARPG-S"), grade(2e-2, 256, optimizer="muon")] == ["ok"] * 3
    assert [grade(4e-4, 1024, "ARPG-L"), grade(1e-3, 256, "ARPG-L")] == ["ok", "warning"]
    assert grade(1e-3, 32, init_from="c2i_B_256.pt", lora_rank=8) == "ok"


@pytest.mark.parametrize("name", ["GPT-S", "ARPG-S"])
def test_a_real_run(name, store, vq_ckpt, tmp_path, capsys):
    code_store = store["path"]
    call("train_gpt", "--code-path", code_store, *TINY_GPT, "--epochs", 5, "--log-every", 1, "--results-dir", tmp_path,
         "--vq-ckpt", vq_ckpt, "--lr", 2e-3, "--gpt-model", name)
    folder = tmp_path / f"000-{name}"
    code, text = ask(capsys, "--code-path", code_store, "--vq-ckpt", vq_ckpt, "--run-folder", folder)
    assert code == 0 and "5.5452 = ln 256" in text and f"of a new {name}" in text and "class names agree" in text
    assert ("GPT" in text.replace("ARPG-S", "").replace("ARPG-L", "").replace("ARPG-X", "")) == (name == "GPT-S")
    assert "verdict: " in text and text.count("published   none applies") == 1
    assert {path.name for path in (folder / "doctor").iterdir()} == {"codes.png", "labels.png", "loss.png"}
    assert "lr 0.002 at batch 8" in text and ask(capsys, "--run-folder", folder) == (0, text)  # all is in config.json
    config = json.loads((folder / "config.json").read_text())
    config["model"]["classes"] = ["red", "green", "blue"]
    (folder / "config.json").write_text(json.dumps(config))
    code, text = ask(capsys, "--code-path", code_store, "--run-folder", folder)
    assert code == 1 and "not on track: data" in text and "another list of classes" in text
    (folder / "config.json").write_text("{}")
    code, text = ask(capsys, "--code-path", code_store, "--run-folder", folder)
    assert code == 2 and "describes no GPT" in text
