"""Training and sampling with --control: begins as the model it was, on any number of processes and after an
interruption the same run; samples that follow a picture, mistakes in one line."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.generate import generate
from autoregressive.sample import edit, sample_c2i, sample_ddp
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.train import export
from dataset.codes import open_stores
from dataset.control import read_control, to_signed
from tests.autoregressive.models.decoding import streams
from tests.conftest import TINY, call, two_processes
from tests.runs import QUICK_GPT, interrupt, last, rows, same
from utils import cli
from utils.checkpoints import containers
from utils.images import load_png

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTER = ["--control", "canny", "--control-vit", "vit_tiny_patch16_224", "--control-layers", 1]
MODELS = ("ARPG-S", "GPT-S")


@pytest.fixture(scope="module")
def store(image_folder, vq_ckpt, tmp_path_factory):
    """Codes of the image folder with edges."""
    codes = tmp_path_factory.mktemp("codes")
    call("extract", "--data-path", image_folder, "--code-path", codes, "--vq-ckpt", vq_ckpt, *TINY,
         "--control", "canny", "--canny-low", 10, "--canny-high", 20)
    return codes


@pytest.fixture(scope="module")
def bases(store, tmp_path_factory):
    """A trained model of each family."""
    results = tmp_path_factory.mktemp("bases")
    for name in MODELS:
        call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", name, "--lr", 3e-3, "--epochs", 2,
             "--results-dir", results)
    return {name: results / f"{i:03d}-{name}" for i, name in enumerate(MODELS)}


@pytest.fixture(scope="module")
def controlled(store, bases, vq_ckpt, tmp_path_factory):
    """The same with trained adapters; with previews."""
    results = tmp_path_factory.mktemp("controlled")
    for name in MODELS:
        call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", name, "--init-from", bases[name], *ADAPTER,
             "--lr", 3e-3, "--vq-ckpt", vq_ckpt, "--results-dir", results, "--ema")
    return {name: results / f"{i:03d}-{name}" for i, name in enumerate(MODELS)}


def pipeline_of(checkpoint, vq_ckpt, **options):
    flags = SampleFlags(gpt_ckpt=str(checkpoint), vq_ckpt=str(vq_ckpt), precision="none", **options)
    return load_pipeline(flags, device=torch.device("cpu"))


def grid(*argv) -> None:
    cli.run(sample_c2i.main, sample_c2i.GridFlags, [str(word) for word in argv])


# ---- training


@pytest.mark.parametrize("name", MODELS)
def test_training_begins_with_the_model_as_it_was(name, store, bases, controlled, tmp_path):
    command = ["train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", name, "--init-from", bases[name], "--lr",
               3e-3, "--results-dir", tmp_path]
    call(*command)
    plain, ours = rows(tmp_path / f"000-{name}"), rows(controlled[name])
    assert ours[0]["loss"] == plain[0]["loss"]
    assert ours[-1]["loss"] != plain[-1]["loss"]
    before, after = containers.read(bases[name])["model"], containers.read(controlled[name])["model"]
    assert [key for key in after if not key.startswith("control.")] == list(before)
    zero = [key for key in after if key.startswith("control.") and key.endswith("fc2.weight")]
    assert all(after[key].abs().max() > 0 for key in zero)
    assert list((controlled[name] / "previews").glob("*.png"))


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_run_is_the_whole_run(name, store, bases, tmp_path, monkeypatch):
    command = ["train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", name, "--init-from", bases[name], *ADAPTER,
               "--class-dropout", 0.3, "--ema", "--ckpt-every", 2, "--resume", "auto", "--results-dir"]
    call(*command, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(SystemExit):
            call(*command, tmp_path / "cut")
    call(*command, tmp_path / "cut")
    whole, cut = (tmp_path / folder / f"000-{name}" for folder in ("whole", "cut"))
    assert same(last(cut), last(whole)) and rows(cut) == rows(whole)
    assert "ema" in last(whole) and any(key.startswith("control.vit.") for key in last(whole)["ema"])


@pytest.mark.processes
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(name, store, bases, tmp_path):
    """DDP and FSDP2, with accumulation, and a run on two processes that goes on where it was left."""
    command = ["--code-path", store, *QUICK_GPT, "--gpt-model", name, "--init-from", bases[name], *ADAPTER,
               "--lr", 1e-3, "--class-dropout", 0.3, "--ema", "--global-batch-size", 4, "--results-dir"]
    parts = ["--gradient-accumulation-steps", 2]
    call("train_gpt", *command, tmp_path / "one")
    two_processes([("train_gpt", [*command, tmp_path / "ddp", *parts]),
                   ("train_gpt", [*command, tmp_path / "fsdp", "--data-parallel", "fsdp"])], tmp_path)
    one = tmp_path / "one" / f"000-{name}"
    for how in ("ddp", "fsdp"):
        other = tmp_path / how / f"000-{name}"
        for ours, theirs in zip(rows(other), rows(one), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5), (how, ours["step"])
        for part in ("model", "ema"):
            ours, theirs = last(other)[part], last(one)[part]
            assert ours.keys() == theirs.keys()
            assert max((ours[key] - theirs[key]).abs().max() for key in theirs) < 1e-4, (how, part)


@pytest.mark.processes
def test_a_resumed_run_on_two_processes_is_the_whole_one(store, bases, tmp_path):
    command = ["--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", "--init-from", bases["ARPG-S"], *ADAPTER,
               "--ema", "--ckpt-every", 3, "--resume", "auto", "--results-dir"]
    stops = """from utils.training.trainer import Trainer
plain, begun = Trainer.optimizer_step, []
def stopping(self, batches):
    if self.step == 4 and "cut" in str(self.folder) and not begun:
        begun.append(1)
        raise ValueError("stopped")
    return plain(self, batches)
Trainer.optimizer_step = stopping"""
    two_processes([("train_gpt", [*command, tmp_path / "whole"])], tmp_path)
    with pytest.raises(AssertionError, match="stopped"):
        two_processes([("train_gpt", [*command, tmp_path / "cut"])], tmp_path, setup=stops)
    two_processes([("train_gpt", [*command, tmp_path / "cut"])], tmp_path)
    whole, cut = (tmp_path / folder / "000-ARPG-S" for folder in ("whole", "cut"))
    assert same(last(cut), last(whole)) and rows(cut) == rows(whole)


@pytest.mark.parametrize("choice", [["--freeze", "blocks"], ["--lora-rank", 2]])
def test_the_adapter_is_trained_beside_what_is_frozen(choice, store, bases, vq_ckpt, tmp_path):
    call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", "--init-from", bases["ARPG-S"],
         *ADAPTER, *choice, "--results-dir", tmp_path)
    before = containers.read(bases["ARPG-S"])["model"]
    content = containers.read(tmp_path / "000-ARPG-S")
    after = containers.weights(content, "run")
    frozen = "layers.self_dec.0.ffn.w1.weight"
    assert torch.equal(after[frozen], before[frozen]) == (choice[0] == "--freeze")
    assert after["control.tokens.fc2.weight"].abs().max() > 0
    assert not any("lora" in key for key in content["model"] if key.startswith("control."))
    pipeline_of(tmp_path / "000-ARPG-S", vq_ckpt)


def test_an_adapter_is_taken_over(store, controlled, tmp_path, capsys):
    call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", "--init-from", controlled["ARPG-S"],
         *ADAPTER, "--lr", 0, "--results-dir", tmp_path)
    assert "new control adapter" not in capsys.readouterr().out
    before = containers.weights(containers.read(controlled["ARPG-S"]), "run")
    assert same(containers.read(tmp_path / "000-ARPG-S")["model"], before)


def test_an_adapter_is_not_lost_by_mistake(store, controlled, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "GPT-S", "--init-from", controlled["GPT-S"],
             "--results-dir", tmp_path)
    assert "has a control adapter, this run has none: give --control" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["--resume", "--gpt-ckpt"])
@pytest.mark.parametrize(("argv", "said"), [
    ([], "has a control adapter, this run has none: give --control canny"),
    ([*ADAPTER, "--control-mode", "replace"], "was trained with --control-mode add, this run has replace"),
    ([*ADAPTER[:-1], 2], "was trained with --control-layers 1, this run has 2")])
def test_a_run_goes_on_with_the_adapter_that_it_had(start, argv, said, store, controlled, tmp_path, capsys):
    checkpoint = containers.newest(controlled["ARPG-S"] / "checkpoints")
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", start, checkpoint, "--ema",
             "--results-dir", tmp_path, *argv)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", ["--resume", "--gpt-ckpt"])
def test_a_run_without_adapter_does_not_go_on_with_one(start, store, bases, tmp_path, capsys):
    checkpoint = containers.newest(bases["ARPG-S"] / "checkpoints")
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", start, checkpoint, *ADAPTER,
             "--results-dir", tmp_path)
    assert "has no control adapter: a new run gets one, --init-from" in capsys.readouterr().err


def test_an_adapter_that_adds_is_no_start_for_one_that_replaces(store, controlled, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", "--init-from",
             controlled["ARPG-S"], *ADAPTER, "--control-mode", "replace", "--results-dir", tmp_path)
    assert "was trained with --control-mode add, this run has replace" in capsys.readouterr().err


def test_timms_weights_are_the_first_ones(store, bases, tmp_path, monkeypatch):
    import timm

    from autoregressive.train import train

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained, **options: create(name, **options))
    plain = train.pretrained_values
    fetched_values = {key: torch.full_like(value, 0.25) for key, value in plain(train.AdapterArgs(
        "vit_tiny_patch16_224", 4, (16, 16), 1)).items()}
    monkeypatch.setattr(train, "pretrained_values", lambda args: fetched_values)
    call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", "--init-from", bases["ARPG-S"],
         *ADAPTER, "--control-pretrained", "--lr", 0, "--results-dir", tmp_path)
    found = containers.read(tmp_path / "000-ARPG-S")["model"]
    assert all(torch.equal(found[key], value) for key, value in fetched_values.items())


@pytest.mark.parametrize(("argv", "said"), [
    (["--control", "depth"], "holds no depth control pictures of the codes' size (there are canny)"),
    (["--control-layers", 1], "--control-layers is for --control"),
    (["--control-mode", "replace"], "--control-mode is for --control"),
    ([*ADAPTER, "--control-mode", "replace", "--gpt-model", "GPT-S"], "--control-mode replace is for ARPG"),
    ([*ADAPTER, "--control-layers", 13], "--control-layers is 13, vit_tiny_patch16_224 has 12"),
    ([*ADAPTER, "--control-layers", 0], "no control adapter"),
    ([*ADAPTER, "--control-vit", "resnet18"], "--control-vit is 'resnet18'")])
def test_trainings_that_make_no_sense(argv, said, store, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", store, *QUICK_GPT, *argv, "--results-dir", tmp_path)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_codes_without_pictures(code_store, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", code_store, *QUICK_GPT, *ADAPTER, "--results-dir", tmp_path)
    assert "(there are none at all): extract the codes with --control canny" in capsys.readouterr().err


# ---- sampling


@pytest.mark.parametrize("name", MODELS)
def test_without_a_picture_it_is_the_plain_model(name, store, bases, vq_ckpt, tmp_path):
    """Training with --lr 0 changes nothing; the adapter of the run is not asked."""
    call("train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", name, "--init-from", bases[name], *ADAPTER,
         "--lr", 0, "--results-dir", tmp_path)
    with_adapter, plain = (pipeline_of(path, vq_ckpt) for path in (tmp_path / f"000-{name}", bases[name]))
    drawn = [pipeline([0, 1, 2], seed=0, indices=[0, 1, 2]) for pipeline in (with_adapter, plain)]
    assert np.array_equal(*drawn)


def test_drawing_without_a_picture_is_said(controlled, bases, vq_ckpt, image_folder, tmp_path, capsys):
    photo, quick = image_folder / "red" / "00.jpg", ["--vq-ckpt", vq_ckpt, "--step", 2, "--precision", "none"]
    commands = [(sample_c2i, sample_c2i.GridFlags, ["--classes", "red", "--output", tmp_path / "a.png"]),
                (sample_ddp, sample_ddp.SampleSetFlags, ["--num-fid-samples", 2, "--sample-dir", tmp_path / "set"]),
                (edit, edit.EditFlags, ["--image", photo, "--redraw", 0.5, "--output", tmp_path / "edited"])]
    for ckpt, times in ((controlled["ARPG-S"], 1), (bases["ARPG-S"], 0)):
        for module, flags, argv in commands:
            cli.run(module.main, flags, [str(word) for word in ["--gpt-ckpt", ckpt, *quick, *argv]])
            found = capsys.readouterr()
            assert found.err.count("the model can follow canny pictures; here it draws without one") == times


def test_an_evaluation_without_pictures_is_said(store, bases, vq_ckpt, tmp_path, capsys, stand_in, own_cache):
    np.savez(tmp_path / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8))
    command = ["train_gpt", "--code-path", store, *QUICK_GPT, "--gpt-model", "ARPG-S", "--init-from", bases["ARPG-S"],
               "--vq-ckpt", vq_ckpt, "--results-dir", tmp_path, "--eval-every", 6, "--eval-images", 9,
               "--eval-reference", tmp_path / "reference.npz", "--metrics", "precision"]
    for adapter, times in ((ADAPTER, 1), ([], 0)):
        call(*command, *adapter)
        assert capsys.readouterr().out.count("--eval-every draws without control pictures") == times


@pytest.fixture
def edges(image_folder, tmp_path):
    """A picture of edges, of the images' size."""
    rng = np.random.default_rng(1)
    Image.fromarray(np.uint8(255) * (rng.random((16, 16)) < 0.3)).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


@pytest.mark.parametrize("name", MODELS)
def test_the_grid_shows_control_and_sample(name, controlled, vq_ckpt, edges, tmp_path):
    command = ["--gpt-ckpt", controlled[name], "--vq-ckpt", vq_ckpt, "--precision", "none", "--classes", "red,blue"]
    grid(*command, "--control-image", edges, "--output", tmp_path / "a.png")
    pipeline = pipeline_of(controlled[name], vq_ckpt, top_k=2000)
    picture, _ = read_control(str(edges), "canny", (16, 16))
    expected = pipeline([2, 0], seed=0, indices=[0, 1], control=[to_signed(torch.from_numpy(picture))] * 2)
    shown = load_png(tmp_path / "a.png")
    for i in range(2):
        left = 2 + 36 * i
        assert np.array_equal(shown[2:18, left:left + 16, 0], picture[0])
        assert np.array_equal(shown[2:18, left + 18:left + 34], expected[i])
    grid(*command, "--control-image", edges, "--control-strength", 0, "--output", tmp_path / "b.png")
    plain = pipeline([2, 0], seed=0, indices=[0, 1])
    assert np.array_equal(load_png(tmp_path / "b.png")[2:18, 20:36], plain[0])
    strong = pipeline([2, 0], seed=0, indices=[0, 1], control=[to_signed(torch.from_numpy(picture))] * 2,
                      control_strength=100.0)
    assert not np.array_equal(plain, strong)


def test_one_picture_for_each_class_and_photographs(controlled, vq_ckpt, image_folder, tmp_path, capsys):
    photos = ",".join(str(image_folder / "red" / name) for name in ("00.jpg", "01.png"))
    command = ["--gpt-ckpt", controlled["ARPG-S"], "--vq-ckpt", vq_ckpt, "--classes", "red,blue"]
    grid(*command, "--control-image", photos, "--control", "canny", "--output", tmp_path / "a.png")
    store = load_png(tmp_path / "a.png")
    assert set(np.unique(store[2:18, 2:18])) == {0, 255} and not np.array_equal(store[2:18, 2:18], store[2:18, 38:54])
    grid(*command, "--control-image", photos, "--output", tmp_path / "b.png")
    assert "has 18x18 pixels: its centre is cut out and brought to 16x16" in capsys.readouterr().err
    grid(*command, "--control-image", photos.replace(",", " , "), "--control", "canny", "--output", tmp_path / "c.png")
    assert np.array_equal(load_png(tmp_path / "c.png"), store)


@pytest.mark.parametrize("black", [100, 156])  # of 256 pixels
def test_a_drawing_of_black_lines_is_pointed_out(black, controlled, vq_ckpt, tmp_path, capsys):
    drawing = np.full(256, 255, np.uint8)
    drawing[:black] = 0
    Image.fromarray(drawing.reshape(16, 16)).save(tmp_path / "drawing.png")
    grid("--gpt-ckpt", controlled["ARPG-S"], "--vq-ckpt", vq_ckpt, "--classes", "red", "--control-image",
         tmp_path / "drawing.png", "--output", tmp_path / "a.png")
    assert ("white in more than half of its pixels" in capsys.readouterr().err) == (black == 100)


@pytest.mark.parametrize(("argv", "said"), [
    (["--control", "canny"], "--control is for --control-image"),
    (["--control-strength", "0.5"], "--control-strength is for --control-image"),
    *((["--control-image", "EDGES", "--control-strength", strength], f"--control-strength is {strength}, expected -100")
      for strength in ("nan", "inf", "1e+300", "-100.5")),
    (["--control-image", "EDGES", "--control", "depth"], "follows canny pictures, not depth"),
    (["--control-image", "EDGES,EDGES,EDGES"], "names 3 pictures for 2 classes"),
    (["--control-image", "EDGES,EDGES", "--output", "EDGES"], "would overwrite the --control-image"),
    (["--control-image", "nowhere.png"], "nowhere.png: there is no such file")])
def test_samples_that_cannot_be_asked_for(argv, said, controlled, vq_ckpt, edges, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grid("--gpt-ckpt", controlled["ARPG-S"], "--vq-ckpt", vq_ckpt, "--classes", "red,blue", "--output",
             tmp_path / "a.png", *[word.replace("EDGES", str(edges)) for word in argv])
    assert said in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_a_model_without_adapter_follows_nothing(bases, vq_ckpt, edges, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grid("--gpt-ckpt", bases["GPT-S"], "--vq-ckpt", vq_ckpt, "--control-image", edges, "--output",
             tmp_path / "a.png")
    assert "has no control adapter: train one, --init-from" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_exported_weights_keep_the_adapter(name, controlled, vq_ckpt, tmp_path):
    cli.run(export.main, export.ExportFlags, ["--gpt-ckpt", str(controlled[name]), "--output", str(tmp_path / "out")])
    picture = [torch.ones(1, 16, 16)]
    drawn = [pipeline_of(path, vq_ckpt)([1], seed=0, indices=[3], control=picture)
             for path in (controlled[name], tmp_path / "out")]
    assert np.array_equal(*drawn)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["control"]["kind"], config["control"]["low"]) == ("canny", 10)
    del config["control"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has a control adapter .* but its config does not say which"):
        pipeline_of(tmp_path / "out", vq_ckpt)


def test_in_half_precision_the_adapter_stays_as_it_is(controlled, vq_ckpt):
    pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(controlled["ARPG-S"]), vq_ckpt=str(vq_ckpt)),
                             device=torch.device("cpu"))
    weight = next(pipeline.gpt.parameters())
    assert next(pipeline.gpt.control.parameters()).dtype == torch.float32
    control = [torch.ones(1, 16, 16), None]
    codes = generate(pipeline.gpt, torch.tensor([0, 1]), 16, control=control, generators=streams(2))
    assert codes.shape == (2, 16) and weight.dtype in (torch.bfloat16, torch.float32)


def test_the_store_of_the_tests_has_edges(store):
    found = open_stores(str(store)).column("canny", np.arange(36))
    assert sum(pictures.any() for pictures in found) > 20
