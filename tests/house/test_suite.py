"""How the suite is run: what scripts/test.sh gives to pytest, and who may start processes."""
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRETENDER = """#!/usr/bin/env bash
if [ "${2:-}" = pytest ]; then shift 2; printf '%s\\n' "$@"; fi
"""


@pytest.fixture
def given_to_pytest(tmp_path):
    """What pytest would get from scripts/test.sh with these arguments, in a copy with a pretended environment."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PRETENDER)
    python.chmod(0o755)

    def run(*argv: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TORCH"}
        done = subprocess.run(["bash", tmp_path / "scripts" / "test.sh", *argv], capture_output=True, text=True,
                              env={**environment, "PYTHON": sys.executable}, check=True)
        return [line for line in done.stdout.splitlines() if not line.startswith("installing")]

    return run


@pytest.mark.processes
def test_the_script_runs_the_quick_tests_all_tests_or_those_named(given_to_pytest):
    workers = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert given_to_pytest() == [*workers, "-m", "not slow"]
    assert given_to_pytest("--all") == workers
    assert given_to_pytest("--all", "--durations=20") == [*workers, "--durations=20"]
    assert given_to_pytest("tests/house", "-k", "two words") == ["tests/house", "-k", "two words"]


def test_everything_is_run_before_a_change_is_taken():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1].startswith("exec bash scripts/test.sh --all")


@pytest.mark.parametrize("words", [[sys.executable, "-c", ""], ["bash", "-c", "true"], "exit 0"])
def test_a_test_without_the_marker_may_not_start_processes(words):
    with pytest.raises(pytest.fail.Exception, match=r"mark it with pytest\.mark\.processes"):
        subprocess.run(words, shell=isinstance(words, str), check=True)
    subprocess.run(["git", "--version"], capture_output=True, check=True)  # what needs no torch costs nothing
