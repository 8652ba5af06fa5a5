"""The house: imports point down, nothing is defined twice, no flag is declared twice, every file says what it is."""
import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = ("utils", "native", "dataset", "language", "tokenizer", "autoregressive", "evaluations", "benchmarks", "tests")
FILES = sorted(path.relative_to(ROOT) for top in OURS[:-1] for path in (ROOT / top).rglob("*.py"))
SOURCES = [path for path in FILES if path.name != "__init__.py"]

# For each room, longest prefix first: what of ours it may import.
MAY_IMPORT = {
    "utils": {"utils"},
    "native": {"utils", "native"},  # C++ kernels for the CPU
    "autoregressive/models": {"utils", "native", "autoregressive.models"},
    "dataset": {"utils", "dataset"},
    "language": {"utils", "dataset", "language"},
    "evaluations": {"utils", "dataset", "evaluations"},  # image sets only; who makes images may ask how good they are
    "tokenizer": {"utils", "native", "dataset", "evaluations", "tokenizer"},
    "autoregressive": {"utils", "native", "dataset", "evaluations", "language", "tokenizer", "autoregressive"},
    "benchmarks": set(OURS[:-1]),
}
MODEL_FILES = [Path("tokenizer/tokenizer_image") / name for name in
               ("vq_model.py", "layers.py", "quantize.py", "discriminator.py")]
ONLY_TORCH = {"utils", "native", "torch", "torchvision"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, allowed: set[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    room = max((room for room in MAY_IMPORT if path.is_relative_to(room)), key=len)
    ours = {module for module in imports(path) if module.split(".")[0] in OURS}
    upward = {module for module in ours if not within(module, MAY_IMPORT[room])}
    assert not upward, f"{path} may not import {upward}"


@pytest.mark.parametrize("path", [*(p for p in SOURCES if p.is_relative_to("autoregressive/models")), *MODEL_FILES],
                         ids=str)
def test_models_need_only_torch(path):
    foreign = {module for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names}
    beyond = {m for m in foreign if not within(m, {*ONLY_TORCH, "autoregressive.models", "tokenizer.tokenizer_image"})}
    assert not beyond
    assert not imports(path) & {"argparse", "torch.distributed"}


def test_nothing_is_defined_twice():
    homes = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("main", "_build"):
                homes[node.name].append(str(path))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def flag_declarations() -> dict[str, list[str]]:
    homes = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)
                    and getattr(node.value.func, "id", "") == "flag"):
                homes[node.target.id].append(str(path))
    return homes


def test_no_flag_is_declared_twice():
    assert len(flag_declarations()) > 50
    assert not {name: places for name, places in flag_declarations().items() if len(places) > 1}


def test_every_flag_is_read():
    text = "\n".join((ROOT / path).read_text() for path in SOURCES)
    unused = [name for name in flag_declarations()
              if f".{name}" not in text and f'"{name}"' not in text]
    assert not unused, f"flags that do nothing: {unused}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


def test_no_absolute_paths_and_no_loose_loading():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "README.md" in listed
    for name in listed:
        if name.endswith((".py", ".sh", ".md", ".toml", ".txt")) and name != "tests/house/test_architecture.py":
            text = (ROOT / name).read_text()
            for forbidden in ("/home/", "/root/"):
                assert forbidden not in text, f"{name} contains {forbidden}"
            assert name.startswith("tests/") or "weights_only=False" not in text, name
            assert not re.search(r"load_state_dict\(.*strict=False", text), name
