"""The house: imports point down and not in circles, nothing is defined twice, every flag is read by the commands that
take it, every file says what it is.
"""
import ast
import dataclasses
import functools
import graphlib
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = ("utils", "native", "dataset", "language", "tokenizer", "autoregressive", "evaluations", "compatibility",
        "benchmarks", "tests")
FILES = sorted(path.relative_to(ROOT) for top in OURS[:-1] for path in (ROOT / top).rglob("*.py"))
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
    "benchmarks": set(OURS[:-1]),
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


# ---- what a command reads of its flags: in `main`, and in every function and class that is named in code it reaches


ENTRIES = [(module_name(path), found[1]) for path in SOURCES
           if (found := re.search(r"^    cli\.run\(main, (\w+)\)", (ROOT / path).read_text(), flags=re.MULTILINE))]
Definition = tuple[str, ast.stmt]  # (module, what defines a name at its top level)


@functools.cache
def top_level(module: str) -> dict[str, ast.stmt | tuple[str, str]]:
    """The names that a module defines, and those that it imports from another of ours: (module, name)."""
    tree, names = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            names[getattr(target, "id", getattr(target, "name", ""))] = node
    return names


def defined(module: str, name: str) -> Definition | str | None:
    """What a name in a module stands for: a definition of ours, a module's name, or None for all else."""
    if (ROOT / f"{module}.{name}".replace(".", "/")).with_suffix(".py").is_file():
        return f"{module}.{name}"
    found = top_level(module).get(name) if (ROOT / f"{module.replace('.', '/')}.py").is_file() else None
    return defined(*found) if isinstance(found, tuple) else (module, found) if found else None


def reached(module: str) -> list[Definition]:
    """The definitions that a module's `main` can reach."""
    todo, seen = [defined(module, "main")], {}
    while todo:
        home, node = todo.pop()
        if node in seen:
            continue
        seen[node] = home
        for part in ast.walk(node):
            found = defined(home, part.id) if isinstance(part, ast.Name) else None
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                owner = defined(home, part.value.id)
                found = defined(owner, part.attr) if isinstance(owner, str) else None
            if isinstance(found, tuple):
                todo.append(found)
    return [(home, node) for node, home in seen.items()]


def fields_read(node: ast.stmt) -> set[str]:
    """x of every `flags.x`, and all strings where `getattr(flags, …)` is called; `flags`: what is named or typed so."""
    typed = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)
             and re.search(r"Flags\b", ast.unparse(part.annotation or ast.Constant("")))}
    if isinstance(node, ast.ClassDef) and node.name.endswith("Flags"):
        typed.add("self")

    def is_flags(owner: ast.expr) -> bool:
        name = getattr(owner, "id", getattr(owner, "attr", ""))
        return name in typed or name == "flags" or name.endswith("_flags")

    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load) and is_flags(part.value):
            found.add(part.attr)
        if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "getattr" and is_flags(part.args[0]):
            found |= {text.value for text in ast.walk(node) if isinstance(text, ast.Constant)}
    return found


# `recipe` is read by utils/cli.py.
READ_NOWHERE = {"autoregressive.train.extract_codes": {"global_seed"}}  # LlamaGen's scripts give it; nothing is random


@pytest.mark.parametrize(("module", "flags"), ENTRIES, ids=[module for module, _ in ENTRIES])
def test_a_command_reads_every_flag_it_takes(module, flags):
    taken = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), flags))}
    read = {"recipe"}.union(*(fields_read(node) for _, node in reached(module)))
    assert taken - read == READ_NOWHERE.get(module, set())


def test_what_reads_flags_is_found():
    assert len(ENTRIES) == sum((ROOT / path).read_text().count("cli.run(main") for path in SOURCES) > 15
    names = {f"{home}.{node.name}" for home, node in reached("autoregressive.train.doctor") if hasattr(node, "name")}
    assert {"autoregressive.train.train.build_model", "tokenizer.build.load_tokenizer"} <= names
    assert "autoregressive.train.train.main" not in names and "utils.training.trainer.Trainer" not in names
    function, = ast.parse("def f(c: XFlags, flags): c.a + flags.b + c.d.e + self.flags.g + other.h").body
    assert fields_read(function) == {"a", "b", "d", "g"}


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
