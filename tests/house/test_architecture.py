"""The house: imports point down and not in circles, nothing is defined twice, every flag is read by the commands that
take it, every file says what it is.
"""
import ast
import dataclasses
import graphlib
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from autoregressive.sample.prompts import TextSampleFlags
from autoregressive.serve.served import ServeFlags
from tests.conftest import ROOT
from tests.house import flag_reads

OURS = ("utils", "native", "dataset", "language", "tokenizer", "autoregressive", "evaluations", "compatibility",
        "benchmarks", "tests")
FILES = [Path("app.py"), *sorted(path.relative_to(ROOT) for top in OURS[:-1] for path in (ROOT / top).rglob("*.py"))]
SOURCES = [path for path in FILES if path.name != "__init__.py"]

GENERAL = {f"utils.{path.stem}" for path in (ROOT / "utils").glob("*.py")}  # without utils.checkpoints, utils.training

# For each room: what of ours it may import. A file belongs to the room with the longest path.
MAY_IMPORT = {
    "utils": GENERAL,
    "utils/checkpoints": {*GENERAL, "utils.checkpoints"},
    "utils/training": {*GENERAL, "utils.checkpoints", "utils.training"},
    "native": {*GENERAL, "native"},  # C++ kernels for the CPU
    "autoregressive/models": {*GENERAL, "native", "autoregressive.models"},
    "dataset": {*GENERAL, "dataset"},
    "language": {"utils", "dataset", "language"},
    "evaluations": {"utils", "dataset", "evaluations"},  # image sets only; who makes images may ask how good they are
    "tokenizer": {"utils", "native", "dataset", "evaluations", "tokenizer"},
    "autoregressive": {"utils", "native", "dataset", "evaluations", "language", "tokenizer", "autoregressive"},
    "compatibility": {"utils", "dataset", "tokenizer", "autoregressive", "compatibility"},  # LlamaGen's names of them
    "app.py": {"utils", "autoregressive"},
    "benchmarks": {*OURS[:-1], "tests.data", "tests.autoregressive.models.toy_training"},  # what the GPU check tries
}
MODEL_FILES = [Path("tokenizer/tokenizer_image") / name for name in
               ("vq_model.py", "layers.py", "quantize.py", "discriminator.py")]
ONLY_TORCH = {*GENERAL, "native", "torch", "torchvision"}


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


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def test_no_module_imports_itself_through_others():
    names = {module_name(path): path for path in SOURCES}
    needs = {name: {module if module in names else module.rpartition(".")[0] for module in imports(path)} & names.keys()
             for name, path in names.items()}
    assert needs["utils.training.trainer"] >= {"utils.dist", "utils.training.stop"}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("path", [*(p for p in SOURCES if p.is_relative_to("autoregressive/models")), *MODEL_FILES],
                         ids=str)
def test_models_need_only_torch(path):
    foreign = {module for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names}
    own = {"autoregressive.models", "tokenizer.tokenizer_image"}
    own |= {"numpy"} if path.is_relative_to("autoregressive/models") else set()  # a step's few host integers: torch is
    beyond = {m for m in foreign if not within(m, {*ONLY_TORCH, *own})}  # two to five times as slow on them
    assert not beyond
    assert not imports(path) & {"argparse", "torch.distributed"}


def adds_to_its_namesake(node: ast.stmt) -> bool:
    """Whether a class is `class X(…, module.X)`: the same one with something more, such as loading from the hub."""
    return isinstance(node, ast.ClassDef) and any(
        isinstance(base, ast.Attribute) and base.attr == node.name for base in node.bases)


def test_nothing_is_defined_twice():
    homes = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in (
                    "main", "_build") and not adds_to_its_namesake(node):
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


# ---- what a command reads of its flags


GRIDS = ("autoregressive.sample.sample_c2i", "autoregressive.sample.sample_t2i")
ENTRIES = [(module_name(path), found[1]) for path in SOURCES
           if (found := re.search(r"^    cli\.run\(main, (\w+)\)", (ROOT / path).read_text(), flags=re.MULTILINE))]


@pytest.mark.parametrize(("module", "flags"), ENTRIES, ids=[module for module, _ in ENTRIES])
def test_a_command_reads_every_flag_it_takes(module, flags):
    kind = getattr(importlib.import_module(module), flags)
    taken, read = {field.name for field in dataclasses.fields(kind)}, flag_reads.read_fields(module)
    if issubclass(kind, ServeFlags):  # a process of their own loads the models, as the grid commands do
        drawing = {field.name for field in dataclasses.fields(TextSampleFlags)}
        read = read | drawing.intersection(set().union(*map(flag_reads.read_fields, GRIDS)))
    assert taken - read <= {"recipe"}  # utils/cli.py reads that one


def test_what_reads_flags_is_found():
    assert len(ENTRIES) == sum((ROOT / path).read_text().count("cli.run(main") for path in SOURCES) > 15
    reached = flag_reads.reached("autoregressive.train.doctor")
    names = {f"{home}.{node.name}" for home, node in reached if hasattr(node, "name")}
    assert {"autoregressive.train.train.build_model", "tokenizer.build.load_tokenizer"} <= names
    assert "autoregressive.train.train.main" not in names and "utils.training.trainer.Trainer" not in names


FOLLOWED = """
from utils.lower import BaseFlags, Kept, Other, called, never, recorded
class Flags(BaseFlags): ...
def made(flags):
    return OtherFlags(**{k: v for k, v in vars(flags).items()})
def main(flags: Flags):
    flags.direct + flags.method() + called(1, options=flags)
    kept = Kept(flags)
    kept.look(lambda: flags.in_lambda)
    other = Other()
    other.not_these + other.flags.nor_these + recorded(flags)
    for name in ("looped", *MORE):
        getattr(flags, name)
    made(flags).through_a_copy
class OtherFlags: ...
MORE = ("of_a_constant",)
"""
LOWER = """
class BaseFlags:
    def method(self): return self.in_a_method + self.in_a_property
    @property
    def in_a_property(self): return self.deeper
    def never(self): return self.only_where_nobody_calls
class Kept:
    def __init__(self, given): self.a, self.flags = 1, given
    def look(self, f): return self.flags.kept + self.a.not_that
class Other:
    def __init__(self): self.settings = 2
    def look_there(self): return self.flags.of_another_object + self.settings.nothing
def called(x, options): return options.passed + x.not_x
def never(flags): return flags.uncalled
def recorded(flags): return {field.name: getattr(flags, field.name) for field in fields(flags)}
"""


def test_flags_are_followed_and_nothing_else(monkeypatch):
    """Not what another object has of the same name, not what is merely recorded, not what nobody calls."""
    texts = {"top.entry": FOLLOWED, "utils.lower": LOWER}
    monkeypatch.setattr(flag_reads, "source", texts.get)
    read = flag_reads.Reads("top.entry").fields
    assert read == {"direct", "method", "passed", "kept", "in_lambda", "looped", "of_a_constant", "through_a_copy",
                    "in_a_method", "in_a_property", "deeper"}


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
