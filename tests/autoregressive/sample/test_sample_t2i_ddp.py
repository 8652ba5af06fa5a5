"""Sets of pictures for text-to-image benchmarks: the same for any batch and number of processes, gone on with, never
mixed, and scored as they are."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from autoregressive.sample import prompts as prompting
from autoregressive.sample.set_claim import locked
from evaluations.t2i import evaluation
from evaluations.t2i.evaluation import T2IEvaluationFlags
from evaluations.t2i.layouts import GenEvalLayout
from tests.autoregressive.sample.test_sample_t2i import refused
from tests.autoregressive.sample.text import PROMPTS, install, save_text_model
from tests.conftest import ROOT, call, two_processes
from tests.evaluations.t2i.test_evaluation import CONFIG, TINY_CLIP, clip_flags, install_stand_ins
from utils import cli
from utils.checkpoints import containers
from utils.images import load_png

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = [*[text for text in PROMPTS if text], 'a "sign", open', "ein Bär", "a red cat"]  # the last for the second time


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
    monkeypatch.setattr(prompting, "load_text_encoder", None)  # put back afterwards
    install()


@pytest.fixture(scope="module")
def text_ckpt(tmp_path_factory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text") / "gpt.pt")


@pytest.fixture(scope="module")
def models(text_ckpt, vq_ckpt) -> list:
    return ["--gpt-ckpt", text_ckpt, "--vq-ckpt", vq_ckpt, "--precision", "none"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Prompts as benchmarks give them."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "Parti.tsv").write_text("Prompt\tCategory\n" + "".join(
        '"' + text.replace('"', '""') + '"\tx\n' for text in LONG), encoding="utf-8")
    (folder / "meta.jsonl").write_text("".join(json.dumps({"tag": "colors", "prompt": text}) + "\n" for text in LONG))
    (folder / "dpg").mkdir()
    for i, text in enumerate(LONG):
        (folder / "dpg" / f"{i}.txt").write_text(text, encoding="utf-8")
    return {"flat": folder / "Parti.tsv", "geneval": folder / "meta.jsonl", "dpg": folder / "dpg"}


def sample(where: Path, *argv) -> Path:
    """Run the sampler in this process; the one folder that it made or filled."""
    call("sample_prompts", *argv, "--sample-dir", where)
    folder, = (path for path in where.iterdir() if path.is_dir())
    return folder


def contents(where: Path) -> dict[str, bytes]:
    return {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()}


@pytest.mark.processes
def test_sets_are_the_same_for_any_batch_and_number_of_processes(models, sources, tmp_path):
    layouts = {"flat": ["--images-per-prompt", 2], "geneval": [], "dpg": ["--cfg-scale", 1.0]}
    commands = {kind: [*models, "--prompt-csv", sources[kind], *flags] for kind, flags in layouts.items()}
    for kind, command in commands.items():
        sample(tmp_path / "one" / kind, *command)
        sample(tmp_path / "three" / kind, *command, "--per-proc-batch-size", 3)
    flat = commands["flat"]
    sample(tmp_path / "single" / "flat", *flat, "--per-proc-batch-size", 1)
    two_processes([("sample_prompts", [*command, "--per-proc-batch-size", size, "--sample-dir", tmp_path / name / kind])
                   for kind, command in commands.items() for name, size in (("two", 3), ("two by one", 1))], tmp_path,
                  setup="from tests.autoregressive.sample.text import install\ninstall()\n"
                        "import torch\ntorch.set_num_threads(1)")
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "three") == contents(tmp_path / "two") == contents(tmp_path / "two by one") == whole
    assert contents(tmp_path / "single" / "flat") == contents(tmp_path / "one" / "flat")
    n = len(LONG)
    assert sum(name.endswith(".png") for name in whole) == 2 * n + 4 * n + n


def test_the_flat_folder_and_its_name(models, sources, tmp_path):
    folder = sample(tmp_path, *models, "--prompt-csv", sources["flat"], "--num-fid-samples", 3)
    assert folder.name == ("GPT-S-gpt-parti-size-16-size-16-VQ-4-S-topk-1000-topp-1.0-temperature-1.0-cfg-7.5-seed-0")
    assert (folder / "captions.txt").read_text(encoding="utf-8").splitlines() == LONG[:3]
    config = json.loads((folder / "config.json").read_text())
    assert config["text_encoder"]["name"] == "stand-in" and config["left_padding"] is True and config["seed"] == 0
    assert config["images_per_prompt"] == 1 and config["layout"] == "flat" and config["warnings"] == []
    first = load_png(folder / "images" / "000000.png")
    grown = sample(tmp_path, *models, "--prompt-csv", sources["flat"])  # the rest of the prompts
    assert grown == folder and len(list((folder / "images").iterdir())) == len(LONG)
    assert np.array_equal(load_png(folder / "images" / "000000.png"), first)


def test_an_image_of_n_is_that_of_one_and_that_of_the_grid(models, sources, tmp_path):
    one, three = (sample(tmp_path / str(n), *models, "--prompt-csv", sources["flat"], "--images-per-prompt", n)
                  for n in (1, 3))
    assert three.name.endswith("-each-3-seed-0")
    for p in range(len(LONG)):
        pictures = [load_png(three / "images" / f"{3 * p + j:06d}.png") for j in range(3)]
        assert np.array_equal(pictures[0], load_png(one / "images" / f"{p:06d}.png"))
        assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(load_png(one / "images" / "000000.png"),  # the same prompt, at another place
                              load_png(one / "images" / f"{len(LONG) - 1:06d}.png"))
    call("prompt_grid", *models, "--prompt", LONG[0], "--output", tmp_path / "grid.png")
    assert np.array_equal(load_png(tmp_path / "grid.png")[2:18, 2:18], load_png(one / "images" / "000000.png"))


@pytest.mark.parametrize("kind", ["flat", "geneval", "dpg"])
def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(models, sources, tmp_path, capsys, kind):
    command = [*models, "--prompt-csv", sources[kind], "--per-proc-batch-size", 3]
    folder = sample(tmp_path, *command)
    files = contents(tmp_path)
    pictures = sorted(folder.rglob("*.png"))
    pictures[0].unlink()
    pictures[2].write_bytes(pictures[2].read_bytes()[:-20])
    pictures[3].write_bytes(b"")
    (pictures[1].parent / f".{pictures[1].name}.0a1b.tmp").touch()  # of a killed writer
    kept = pictures[1].stat().st_mtime_ns
    capsys.readouterr()
    assert sample(tmp_path, *command) == folder and contents(tmp_path) == files
    shown = capsys.readouterr()
    assert pictures[1].stat().st_mtime_ns == kept and shown.err.count("is cut short or no PNG: it is made again") == 2
    sample(tmp_path, *command)
    assert "finished already, nothing to sample" in capsys.readouterr().out and contents(tmp_path) == files


def test_a_set_is_not_mixed_with_other_pictures(models, text_ckpt, vq_ckpt, sources, tmp_path, capsys):
    command = ["--vq-ckpt", vq_ckpt, "--precision", "none", "--prompt-csv", sources["flat"], "--num-fid-samples", 2]
    folder = sample(tmp_path / "set", "--gpt-ckpt", text_ckpt, *command)
    before = contents(tmp_path / "set")

    def again(*argv) -> str:
        return refused(capsys, "sample_prompts", *argv, "--sample-dir", tmp_path / "set")

    content = containers.read(text_ckpt)
    content["model"]["norm.weight"] += 1
    torch.save(content, tmp_path / "gpt.pt")  # the same name, hence the same folder
    assert "made with another gpt_ckpt_sha256" in again("--gpt-ckpt", tmp_path / "gpt.pt", *command)
    assert "made with another text_encoder" in again("--gpt-ckpt", text_ckpt, *command, "--t5-model-type", "other")
    assert "made with another text_encoder" in again("--gpt-ckpt", text_ckpt, *command, "--t5-feature-max-len", 4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Parti.tsv").write_text("Prompt\na boat\n")
    command[5] = tmp_path / "other" / "Parti.tsv"
    assert "made with another prompts_sha256" in again("--gpt-ckpt", text_ckpt, *command)
    command[5] = sources["flat"]
    with locked(folder):
        assert "another run is filling" in again("--gpt-ckpt", text_ckpt, *command)
    assert contents(tmp_path / "set") == before
    (folder / "config.json").unlink()  # LlamaGen writes none
    assert "holds images, but there is no" in again("--gpt-ckpt", text_ckpt, *command)


def test_right_padding_and_seeds_make_other_sets(models, sources, tmp_path):
    command = [*models, "--prompt-csv", sources["flat"], "--num-fid-samples", 2]
    plain = sample(tmp_path / "a", *command)
    right = sample(tmp_path / "b", *command, "--no-left-padding")
    seeded = sample(tmp_path / "c", *command, "--global-seed", 1)
    assert "-right-padding-" in right.name and seeded.name.endswith("-seed-1")
    first = [load_png(folder / "images" / "000000.png") for folder in (plain, right, seeded)]
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])


def test_prompts_that_do_not_fit_are_refused_before_any_work(models, sources, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, said in (("evaluations/t2i/PartiPrompts.tsv", "Google's repository parti"), ("x.tsv", "x.tsv and put")):
        message = refused(capsys, "sample_prompts", *models, "--prompt-csv", name)
        assert f"no prompts at {name}: download" in message and said in message and "--prompt-csv" in message
    assert "grids have 4" in refused(capsys, "sample_prompts", *models, "--prompt-csv", sources["dpg"],
                                     "--images-per-prompt", 2)
    assert "at least 1" in refused(capsys, "sample_prompts", *models, "--prompt-csv", sources["flat"],
                                   "--num-fid-samples", 0)
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_keeps_what_is_written(models, sources, tmp_path, capsys, monkeypatch):
    write, count = GenEvalLayout.write, []

    def failing(self, job, image):
        count.append(job)
        if len(count) > 3:
            raise OSError(28, "No space left on device")
        write(self, job, image)

    command = [*models, "--prompt-csv", sources["geneval"], "--sample-dir", tmp_path, "--per-proc-batch-size", 1]
    with monkeypatch.context() as patch:
        patch.setattr(GenEvalLayout, "write", failing)
        with pytest.raises(SystemExit):
            call("sample_prompts", *command)
    assert "No space left on device: what was written is kept, run again to continue" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("*.png"))) == 3
    call("sample_prompts", *command)
    assert len(list(tmp_path.rglob("*.png"))) == 4 * len(LONG)


@pytest.fixture
def clip(tmp_path_factory, monkeypatch) -> list:
    """Flags for a tiny CLIP model, which open_clip knows."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{TINY_CLIP}.json").write_text(json.dumps(CONFIG))
    for name in ("load_inception", "POOL_DIM"):
        monkeypatch.setattr(evaluation, name, getattr(evaluation, name))  # put back afterwards
    install_stand_ins(folder)
    save_file(open_clip.create_model(TINY_CLIP).state_dict(), folder / f"{TINY_CLIP}.safetensors")
    return clip_flags(folder)


def test_the_scores_take_a_set_as_it_is(models, sources, tmp_path, clip):
    folder = sample(tmp_path, *models, "--prompt-csv", sources["flat"], "--images-per-prompt", 2)
    words = ["--fake-dir", folder, *clip, "--num-workers", 0, "--eval-res", 16]
    cli.run(evaluation.main, T2IEvaluationFlags, [str(word) for word in words])
    scores = json.loads((folder / "score.json").read_text())
    assert scores["clip_images"] == 2 * len(LONG) and -1 <= scores["clip_score"] <= 1
    assert not any("padding" in note for note in scores["notes"])
    assert (folder / "captions.txt").read_text(encoding="utf-8").splitlines()[:3] == [LONG[0]] * 2 + [LONG[1]]
    assert sample(tmp_path, *models, "--prompt-csv", sources["flat"], "--images-per-prompt", 2) == folder


@pytest.mark.processes
def test_the_scripts_say_what_to_download(text_ckpt, tmp_path):
    def said(script: str) -> str:
        path = ROOT / "scripts" / "autoregressive" / f"{script}.sh"
        done = subprocess.run(["bash", path, "--gpt-ckpt", text_ckpt], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "nproc_per_node": "1", "CUDA_VISIBLE_DEVICES": "",
                                   "VIRTUAL_ENV": sys.prefix,
                                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
        assert os.access(path, os.X_OK)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    assert "no prompts at evaluations/t2i/PartiPrompts.tsv: download" in said("sample_t2i_parti")
    prompts = tmp_path / "evaluations" / "t2i" / "coco_captions.csv"
    prompts.parent.mkdir(parents=True)
    prompts.write_text("Prompt\na cat\n")
    assert "put the tokenizer vq_ds16_t2i.pt there" in said("sample_t2i_coco")
