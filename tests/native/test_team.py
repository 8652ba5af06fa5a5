"""The threads that share the kernels' loops: every piece is done once, whoever calls, forks or comes late."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from native import build
from tests.conftest import ROOT
from tokenizer.tokenizer_image import convolution
from tokenizer.tokenizer_image.convolution import convolve

pytestmark = pytest.mark.skipif(convolution.kernels() is None, reason="no C++ compiler")


@pytest.mark.processes
@pytest.mark.parametrize("options", [["-O2"], ["-O2", "-g", "-fsanitize=thread"],
                                     ["-O1", "-g", "-fsanitize=address,undefined"]], ids=lambda options: options[-1])
def test_each_piece_is_done_once(options, tmp_path):
    program, source = tmp_path / "stress", Path(__file__).with_name("stress.cpp")
    command = [build._compiler(), "-std=c++17", "-pthread", *options, f"-I{build.SOURCES}", str(source), "-o"]
    built = subprocess.run([*command, str(program)], capture_output=True, text=True)
    if built.returncode and options != ["-O2"]:
        pytest.skip(f"the compiler lacks {options[-1]}")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("the sanitizer does not work on this kernel")
    assert (run.returncode, run.stderr) == (0, "")


@pytest.fixture
def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(24, 40, 3, padding=1).eval().requires_grad_(False)


def test_callers_at_once_get_what_they_get_alone(layer):
    pictures = [torch.randn(3, 24, 20, 28) for _ in range(4)]
    alone, wrong = [convolve(layer, picture) for picture in pictures], []

    def call(picture, expected):
        wrong.extend(i for i in range(40) if not torch.equal(convolve(layer, picture), expected))

    callers = [threading.Thread(target=call, args=arguments) for arguments in zip(pictures, alone, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_fork_has_threads_of_its_own(layer):
    picture, before = torch.randn(1, 24, 20, 28), torch.get_num_threads()  # so small that PyTorch uses no thread, which
    # would wait in the child for ever
    torch.set_num_threads(3)
    try:
        expected = convolve(layer, picture)
        child = os.fork()
        if child == 0:
            same = False
            try:
                same = all(torch.equal(convolve(layer, picture), expected) for _ in range(3))
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(convolve(layer, picture), expected)
    finally:
        torch.set_num_threads(before)


WHERE = """import os
import torch
torch.set_num_threads(2)
from tests.native.test_team import convolve, nn
layer = nn.Conv2d(24, 40, 3, padding=1).eval().requires_grad_(False)
convolve(layer, torch.randn(1, 24, 20, 28))
print(*{len(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()})
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/task").exists() or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "GOMP_CPU_AFFINITY"])
def test_threads_are_not_bound_to_the_core_of_the_one_that_started_them(name):
    value = {"OMP_PROC_BIND": "true", "GOMP_CPU_AFFINITY": "0-1"}[name]
    run = subprocess.run([sys.executable, "-c", WHERE], capture_output=True, text=True, cwd=ROOT,
                         env={**os.environ, name: value, "OMP_NUM_THREADS": "2"})
    assert run.returncode == 0, run.stderr
    assert max(map(int, run.stdout.split())) > 1
