"""vLLM is tested in the environment that scripts/serve_env.sh makes; without it, what needs it says so in one line."""
import importlib.util
import os
import re
import subprocess

import pytest

from tests.conftest import ROOT, call

SCRIPT = "scripts/serve_env.sh"
UNREACHABLE = ("No matching distribution found for vllm", "Could not find a version that satisfies",
               "Connection refused", "Temporary failure in name resolution", "Network is unreachable", "timed out")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_commands_say_where_it_is(capsys):
    for command in ("served_grid", "served_prompts"):
        with pytest.raises(SystemExit) as stop:
            call(command, "--gpt-ckpt", "none.pt", "--vq-ckpt", "none.pt")
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and "bash scripts/serve_env.sh" in lines[0]


@pytest.mark.processes
@pytest.mark.slow
def test_with_vllm():
    """About two minutes to install what a machine does not have yet, about three to run the tests there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    made = subprocess.run(["bash", SCRIPT], cwd=ROOT, capture_output=True, text=True, env=environment)
    if made.returncode and any(sign in made.stderr for sign in UNREACHABLE):
        pytest.skip("pip cannot reach vLLM's package from here")
    assert made.returncode == 0, made.stderr[-4000:]
    done = subprocess.run(["bash", SCRIPT, "python", "-m", "pytest", "-p", "no:cacheprovider",
                           "tests/autoregressive/serve/vllm"], cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 25 and "skipped" not in done.stdout
