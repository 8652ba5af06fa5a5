"""The evaluation command: its numbers against plain numpy, what it remembers and reports."""
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy.special import rel_entr
from torch import nn

from evaluations.c2i import comparison_rules, evaluator, features
from evaluations.c2i.image_sets import NpzImages, open_image_set
from evaluations.c2i.monitor import Monitor, MonitorFlags
from tests.conftest import TINY_GPT, TINY_VQ, call, two_processes
from tests.evaluations.stand_ins import (
    TINY,
    StandIn,
    TinyNetwork,
    evaluate,
    pictures,
    refused,
    save_program,
    tiny_network,
)
from utils import dist
from utils.checkpoints import containers
from utils.checkpoints.containers import newest
from utils.images import load_png, save_png
from utils.training.logger import read_metrics

pytestmark = pytest.mark.usefixtures("own_cache")
TRAININGS = {"train_gpt": "000-GPT-S", "train_vq": "001-VQ-4-S"}


def training_flags(name: str, folder: Path, inputs: dict) -> list:
    """Three steps of a training."""
    if name == "train_vq":
        return ["--data-path", inputs["image_folder"], *TINY_VQ, "--global-batch-size", 12, "--epochs", 1]
    return ["--code-path", inputs["code_store"], *TINY_GPT, "--global-batch-size", 12, "--epochs", 1, "--vq-ckpt",
            inputs["vq_ckpt"]]


def monitoring_flags(folder: Path) -> list:
    return [*TINY, "--eval-every", 2, "--eval-reference", folder / "ref.npz", "--eval-images", 14]


def reference_flags(folder: Path) -> list:
    return ["--data-path", folder / "images", "--image-size", 16, "--num-workers", 0, "--per-proc-batch-size", 8]


@pytest.fixture(scope="module")
def inputs(image_folder, vq_ckpt, code_store) -> dict:
    return {"image_folder": image_folder, "vq_ckpt": vq_ckpt, "code_store": code_store}


@pytest.fixture(scope="module")
def pair(inputs, tmp_path_factory) -> Path:
    """What two processes make of everything that is shared between them, in one folder: started once, it takes long."""
    folder = tmp_path_factory.mktemp("pair")
    np.savez(folder / "ref.npz", arr_0=pictures(40, seed=0))
    np.savez(folder / "sample.npz", arr_0=pictures(31, seed=1))
    shutil.copytree(inputs["image_folder"], folder / "images")
    (folder / "images" / "red" / "00.jpg").write_bytes(b"broken")
    jobs = [("evaluate", [folder / "ref.npz", folder / "sample.npz", *TINY, "--per-proc-batch-size", size, "--output",
                          folder / f"{name}.json"]) for name, size in (("two", 6), ("idle", 64))]
    jobs += [(name, [*training_flags(name, folder, inputs), *monitoring_flags(folder), "--results-dir", folder / "two"])
             for name in TRAININGS]
    jobs.append(("reference", [*reference_flags(folder), "--output", folder / "built.npz"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        two_processes(jobs, folder, setup="""
import evaluations.c2i.features as f, tests.evaluations.stand_ins as t
f.load_inception = lambda path, device: (t.StandIn(), {'sha256': '0', 'weights_sha256': '1'})""")
    return folder


@pytest.mark.parametrize(("flags", "says"), [
    ({}, []), ({"eval_images": 95}, ["each evaluation holds 95 images, fewer"])])
def test_what_is_said_of_the_number_of_images_while_training(flags, says, stand_in, tmp_path, capsys):
    """The default of --eval-images is no reason to warn. The stand-in has 96 features."""
    np.savez(tmp_path / "ref.npz", arr_0=pictures(100, seed=0))
    Monitor(MonitorFlags(eval_every=1, eval_reference=str(tmp_path / "ref.npz"), **flags),
            dist.Process(0, 1, torch.device("cpu")), reconstructs=None)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == len(says) and all(text in line for text, line in zip(says, warnings, strict=True))


def sideways_folder(folder: Path) -> Path:
    """Five pictures that are stored sideways, a folder that is called like one, and what is hidden."""
    (folder / "sub.png").mkdir(parents=True)
    (folder / "._0.png").write_bytes(b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, picture in enumerate(pictures(5, seed=0)):
        Image.fromarray(picture).save(folder / f"{i}.png", exif=exif)
    return folder


def test_folders_are_read_upright_or_as_stored_and_the_report_says_which(sets, tmp_path):
    folder, stored = sideways_folder(tmp_path / "pictures"), pictures(5, seed=0)
    for flag, expected in ((True, np.rot90(stored, -1, axes=(1, 2))), (False, stored)):
        (_, found), = open_image_set(folder, exif_orientation=flag).batches(8)
        np.testing.assert_array_equal(found, expected)
        report = evaluate(sets[0], folder, *TINY, *([] if flag else ["--no-exif-orientation"]))
        assert report["protocol"]["exif_orientation"] is flag and report["protocol"]["sample"]["images"] == 5


def test_the_reference_of_a_training_is_read_as_its_pictures_are(stand_in, own_cache, tmp_path):
    flags = MonitorFlags(eval_every=1, eval_reference=str(sideways_folder(tmp_path / "pictures")))
    process = dist.Process(0, 1, torch.device("cpu"))
    upright, stored = (Monitor.wanted(flags, process, reconstructs=(16, 16), exif_orientation=choice).measured
                       .statistics["pooled"][0] for choice in (True, False))
    assert not torch.allclose(upright, stored)


def expected_distance(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def expected_precision_recall(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    def distances(x, y):
        return ((x[:, None] - y[None]) ** 2).sum(-1)

    radii_a, radii_b = (np.sort(distances(x, x), 1)[:, 3] for x in (a, b))
    between = distances(a, b)
    return float((between <= radii_a[:, None]).any(0).mean()), float((between <= radii_b[None]).any(1).mean())


def test_numbers_are_those_of_plain_numpy(sets):
    report = evaluate(*sets, *TINY, "--per-proc-batch-size", 7, "--pr-dtype", "fp32")
    ref, sample = (tiny_network()(torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1).double()
                   .numpy() for path in sets)
    assert report["frechet_distance"] == pytest.approx(expected_distance(ref, sample), rel=1e-5)
    assert (report["precision"], report["recall"]) == pytest.approx(expected_precision_recall(ref, sample))
    assert 0 < report["precision"] < 1
    assert report["precision"] == report["precision_fp32"]
    assert "fid" not in report and "FID" not in sets[1].with_suffix(".txt").read_text()
    assert report["protocol"]["network"]["name"] == TINY[1] and len(report["protocol"]["network"]["sha256"]) == 64
    assert sets[1].with_suffix(".txt").read_text().startswith("Fréchet distance: ")


def test_the_container_does_not_matter(sets, tmp_path):
    ref, sample = sets
    wanted = evaluate(*sets, *TINY)
    images = np.load(sample)["arr_0"]
    np.savez_compressed(tmp_path / "packed.npz", extra=np.zeros(3), arr_0=images, arr_1=np.array([{}] * 31, object))
    for i, image in enumerate(images):
        save_png(tmp_path / "folder.v1" / f"{i}.png", image)  # 10 comes after 9: natural order
    (tmp_path / "folder.v1" / "config.json").write_text('{"cfg_scale": 1.5, "seed": 3}')
    for other in (tmp_path / "packed.npz", tmp_path / "folder.v1"):
        report = evaluate(ref, other, *TINY)
        assert all(report[key] == wanted[key] for key in ("frechet_distance", "precision", "recall"))
        assert report["protocol"]["sample"]["sha256"] != wanted["protocol"]["sample"]["sha256"]
    assert report["protocol"]["sampler"] == {"cfg_scale": 1.5, "seed": 3}
    assert not report["protocol"]["sample"]["statistics"].startswith("stored")
    batches = [batch for _, batch in open_image_set(tmp_path / "folder.v1").batches(8)]
    assert np.array_equal(np.concatenate(batches), images)


def test_all_of_adms_metrics_and_the_report(stand_in, sets, tmp_path, capsys):
    ref, sample = sets
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "config.json").write_text('{"gpt_ckpt_sha256": "abc", "label_mode": "random"}')
    report = evaluate(ref, sample)
    network = features.inception_network(None, device=torch.device("cpu"))
    ours = [network(np.load(path)["arr_0"]) for path in sets]
    for name, part in (("fid", "pooled"), ("sfid", "spatial")):
        a, b = (getattr(each, part).double() for each in ours)
        assert report[name] == pytest.approx(small_distance(a, b), rel=1e-6)
    p = ours[1].logits.double().softmax(1).numpy()
    score = np.exp(rel_entr(p, p.mean(0)).sum(1).mean())
    assert report["is"] == pytest.approx(score, rel=1e-6) and report["is_shuffled"] == pytest.approx(score, rel=1e-6)
    assert (report["precision_fp32"], report["recall_fp32"]) == pytest.approx(
        expected_precision_recall(*(each.pooled.double().numpy() for each in ours)))
    assert report["precision"] == report["precision_fp16"]
    found = report["protocol"]
    assert found["sampler"] == {"gpt_ckpt_sha256": "abc", "label_mode": "random"}
    assert found["reference"]["images"] == 40 and found["sample"]["images"] == 31
    assert found["reference"]["kind"] == "custom" and found["pr_dtype"] == "fp16" and "fp32" in found["precision_mode"]
    assert found["network"]["sha256"] == "0" * 64 and found["versions"]["torch"] == torch.__version__
    lines = sample.with_suffix(".txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    shown = capsys.readouterr()
    assert lines[1] in shown.out
    for text in ("31 samples: published FIDs are of 50000", "sample.npz holds 31 images, fewer than"):
        assert text in shown.err and any(text in warning for warning in found["warnings"])


def small_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of n < D rows, without D x D matrices: tr (A B)^½ is the sum of singular values of Xa Xb' of centred rows."""
    x, y = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross)


def test_stored_statistics_go_before_images(stand_in, sets, tmp_path):
    rng = np.random.default_rng(5)
    root = rng.normal(size=(50, 96))
    stored = {"mu": rng.normal(size=96).astype(np.float32), "sigma": root.T @ root / 50}
    np.savez(tmp_path / "virtual.npz", arr_0=pictures(8, seed=2), **stored)
    np.savez(tmp_path / "only.npz", **stored)
    reports = [evaluate(tmp_path / name, sets[1], "--metrics", "fid") for name in ("virtual.npz", "only.npz")]
    assert reports[0]["fid"] == reports[1]["fid"]
    assert reports[0]["protocol"]["reference"]["statistics"] == "stored (mu, sigma)"
    pooled = features.inception_network(None, device=torch.device("cpu"))(np.load(sets[1])["arr_0"]).pooled.double()
    x = (pooled - pooled.mean(0)) / 30 ** 0.5
    cross = torch.linalg.svdvals(x @ torch.from_numpy(root / 50 ** 0.5).T).sum()
    wanted = float((pooled.mean(0) - torch.from_numpy(stored["mu"])).square().sum() + x.square().sum()
                   + np.trace(stored["sigma"]) - 2 * cross)
    assert reports[0]["fid"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.processes
def test_two_processes_give_the_same_numbers(pair):
    one = evaluate(pair / "ref.npz", pair / "sample.npz", *TINY, "--per-proc-batch-size", 6)
    for name in ("two", "idle"):  # in the second run rank 1 has no images at all
        other = json.loads((pair / f"{name}.json").read_text())
        assert other["protocol"]["processes"] == 2
        assert all(other[key] == pytest.approx(one[key], rel=1e-9) for key in one if key != "protocol")


def test_class_order_is_noticed(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "SPLIT", 10)
    corners = np.zeros((4, 2, 2, 3), np.uint8)
    corners[range(4), [0, 0, 1, 1], [0, 1, 0, 1]] = 255  # a class is where the light is
    images = corners.repeat(8, 1).repeat(8, 2).repeat(10, 0)
    np.savez(tmp_path / "sorted.npz", arr_0=images, arr_1=np.arange(40) // 10)
    np.savez(tmp_path / "ref.npz", arr_0=pictures(8, seed=0))
    report = evaluate(tmp_path / "ref.npz", tmp_path / "sorted.npz", "--metrics", "is")
    assert report["is"] == pytest.approx(1) and report["is_shuffled"] > 1.1
    shown = capsys.readouterr().err
    assert "is in class order" in shown and "sorted, by class perhaps" in shown


def test_precision_of_duplicates_is_not_trusted():
    """Distances below fp16's rounding make the two arithmetics disagree."""
    found = evaluator.result_warnings({"precision": 0.9, "precision_fp16": 0.9, "precision_fp32": 0.5})
    assert len(found) == 1 and "trust fp32" in found[0]
    assert not evaluator.result_warnings({"precision": 0.9, "precision_fp16": 0.9, "precision_fp32": 0.895})


class Doubled(TinyNetwork):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(images)


def test_the_reference_is_measured_once(sets, tmp_path, monkeypatch, capsys):
    program = save_program(tmp_path / "net.pt", tiny_network())
    first = evaluate(*sets, *program)
    seen = []
    measure = features.measure
    monkeypatch.setattr(features, "measure", lambda images, *rest, **named:
                        seen.append(images.name) or measure(images, *rest, **named))
    again = evaluate(*sets, *program)
    assert seen == ["sample.npz"] and all(first[key] == again[key] for key in first if key != "protocol")
    assert evaluate(*sets, *program, "--metrics", "recall")["recall"] == first["recall"]  # less: measured anew
    kept = min(features.cache_folder().glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    kept.write_bytes(kept.read_bytes()[:100])
    assert evaluate(*sets, *program)["frechet_distance"] == first["frechet_distance"]
    assert "is damaged and will be made again" in capsys.readouterr().err
    save_program(tmp_path / "net.pt", Doubled())  # another network in the same file
    assert evaluate(*sets, *program)["frechet_distance"] == pytest.approx(4 * first["frechet_distance"])
    save_program(tmp_path / "net.pt", tiny_network())
    with_more = np.load(sets[0])["arr_0"].copy()
    with_more[0] = 0
    np.savez(sets[0], arr_0=with_more)  # another content in the same file
    assert evaluate(*sets, *program)["frechet_distance"] != first["frechet_distance"]


def test_a_function_is_not_remembered(sets):
    """Its code may change while its weights, here none, do not."""
    evaluate(*sets, *TINY)
    assert not features.cache_folder().exists()


def test_a_cache_that_cannot_be_written_stops_nothing(sets, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert evaluate(*sets, *save_program(tmp_path / "net.pt", tiny_network()))["frechet_distance"] > 0
    assert "could not be kept" in capsys.readouterr().err


def test_images_are_streamed(tmp_path):
    np.savez_compressed(tmp_path / "many.npz", arr_0=np.zeros((4000, 32, 32, 3), np.uint8))  # 12 MB
    images = NpzImages(tmp_path / "many.npz")
    tracemalloc.start()
    count = sum(len(indices) for indices, _ in images.batches(50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 3e6


def test_an_accepted_reference_is_known(stand_in, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "ref.npz", arr_0=pictures(9, seed=0))
    np.savez(tmp_path / "adm.npz", arr_0=pictures(9, seed=1))
    flags = (tmp_path / "ref.npz", tmp_path / "adm.npz", "--metrics", "is,recall")
    found = evaluate(*flags)
    monkeypatch.setattr(comparison_rules, "TOLERANCE", {"is": 0.3, "recall": 0.003})
    monkeypatch.setattr(comparison_rules, "ACCEPTANCE", {"adm": {"is": found["is"] + 0.5, "recall": found["recall"]}})
    refused(capsys, "these are not ADM's numbers", *flags, "--acceptance")
    assert evaluate(*flags)["protocol"]["reference"]["kind"] == "custom"
    monkeypatch.setattr(comparison_rules, "ACCEPTANCE", {"adm": {"is": found["is"] + 0.2, "recall": found["recall"]}})
    capsys.readouterr()
    evaluate(*flags, "--acceptance")
    assert capsys.readouterr().out.count("  ok ") == 2
    assert "proven by adm" in evaluate(*flags)["protocol"]["reference"]["kind"]
    refused(capsys, "holds statistics of a training set", *flags, "--preset", "rfid")


@pytest.mark.processes
def test_reference_of_an_image_folder(stand_in, pair, tmp_path, monkeypatch, capsys):
    flags = reference_flags(pair)
    call("reference", *flags, "--output", tmp_path / "whole.npz")
    call("reference", *flags, "--output", tmp_path / "few.npz", "--keep-images", 10)
    whole, few, two = map(np.load, (tmp_path / "whole.npz", tmp_path / "few.npz", pair / "built.npz"))
    assert whole["arr_0"].shape == (35, 16, 16, 3) and few["arr_0"].shape == (10, 16, 16, 3)
    assert np.array_equal(two["arr_0"], whole["arr_0"]) and sorted(set(few["arr_1"])) == [0, 1, 2]
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.array_equal(whole[key], few[key]) and np.allclose(whole[key], two[key], rtol=1e-5, atol=1e-6)
    pooled = features.inception_network(None, device=torch.device("cpu"))(whole["arr_0"]).pooled.double().numpy()
    assert np.allclose(whole["mu"], pooled.mean(0)) and np.allclose(whole["sigma"], np.cov(pooled, rowvar=False))
    said = json.loads((tmp_path / "few.config.json").read_text())
    assert said["images"] == 35 and said["kept"] == 10
    assert said["unreadable"] == [str(pair / "images" / "red" / "00.jpg")]
    np.savez(tmp_path / "sample.npz", arr_0=pictures(9, seed=1))
    flags_of = (tmp_path / "few.npz", tmp_path / "sample.npz", "--preset", "gfid", "--metrics", "precision,recall")
    evaluate(*flags_of)
    assert "other Inception weights" not in capsys.readouterr().err
    monkeypatch.setattr(features, "load_inception",
                        lambda path, device: (StandIn(), {"file": "other", "sha256": "2", "weights_sha256": "2"}))
    evaluate(*flags_of)
    assert "few.npz were made with other Inception weights than other" in capsys.readouterr().err
    (tmp_path / "junk" / "a").mkdir(parents=True)
    (tmp_path / "junk" / "a" / "b.png").write_bytes(b"broken")
    for wrong, says in ((("--output", "x.json"), "ends in .npz"), (("--keep-images", 0), "--keep-images"),
                        (("--data-path", tmp_path / "junk"), "none of the 1 images")):
        with pytest.raises(SystemExit):
            call("reference", *flags, *wrong)
        assert says in capsys.readouterr().err


def test_torchscript_features_and_wrong_shapes(sets, tmp_path, capsys):
    by_file, by_name = evaluate(*sets, *save_program(tmp_path / "net.pt", tiny_network())), evaluate(*sets, *TINY)
    assert by_file["frechet_distance"] == by_name["frechet_distance"]
    assert by_file["protocol"]["network"]["file"] == "net.pt"
    refused(capsys, "expected (", *sets, *save_program(tmp_path / "net.pt", nn.Identity()))
    refused(capsys, "failed on images of 16x16", *sets, "--features", "tests.evaluations.stand_ins:for_other_sizes")
    for content in ({"weight": torch.zeros(1)}, "nonsense"):
        torch.save(content, tmp_path / "net.pt")
        refused(capsys, "is no TorchScript program", *sets, "--features", tmp_path / "net.pt")


def test_a_set_against_itself_is_noted(sets):
    report = evaluate(sets[0], sets[0], *TINY)
    assert report["frechet_distance"] == pytest.approx(0, abs=1e-6) and report["precision"] == 1
    assert "samples and reference are the same file" in report["protocol"]["warnings"]


def test_lossy_folders_are_noted(sets, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "jpegs").mkdir()
    for i, image in enumerate(pictures(6, seed=0)):
        Image.fromarray(image).save(tmp_path / "jpegs" / f"{i}.jpg")
    report = evaluate(sets[0], tmp_path / "jpegs", *TINY)
    assert any("lossy" in warning for warning in report["protocol"]["warnings"])
    assert load_png(tmp_path / "jpegs" / "0.jpg").shape == (16, 16, 3)
    assert os.path.exists(tmp_path / "jpegs.json")


@pytest.mark.processes
@pytest.mark.parametrize("name", TRAININGS)
def test_evaluation_while_training(name, inputs, pair, tmp_path):
    """It logs, on two processes as on one, leaves no file and does not change the training."""
    run, flags = TRAININGS[name].replace("001", "000"), training_flags(name, pair, inputs)
    call(name, *flags, *monitoring_flags(pair), "--results-dir", tmp_path / "with")
    call(name, *flags, "--results-dir", tmp_path / "without")
    rows, other = (read_metrics(folder / "metrics.jsonl") for folder in
                   (tmp_path / "with" / run, pair / "two" / TRAININGS[name]))
    found = [row for row in rows if "eval_frechet_distance" in row]
    assert [row["step"] for row in found] == [2, 3] and all(0 <= row["eval_recall"] <= 1 for row in found)
    assert ("eval_psnr" in found[0]) == (name == "train_vq")
    assert {key for row in other for key in row} == {key for row in rows for key in row}
    left, usual = (sorted(path.name for path in (tmp_path / kind / run).iterdir()) for kind in ("with", "without"))
    assert left == usual
    first, second = (containers.read(newest(tmp_path / kind / run / "checkpoints")) for kind in ("with", "without"))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
