"""What processes ask of the system."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHOW = """
import torch
from utils import dist
dist.ask_for_huge_pages()
x = torch.ones(2**24)
print(next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")).split()[1])
"""


@pytest.mark.processes
@pytest.mark.skipif(not THP.is_file() or "[never]" in THP.read_text(), reason="Linux gives no huge pages here")
@pytest.mark.parametrize(("wish", "given"), [(None, True), ("0", False)])
def test_huge_pages_unless_somebody_says_no(wish, given):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if wish is None else {"THP_MEM_ALLOC_ENABLE": wish}
    shown = subprocess.run([sys.executable, "-c", SHOW], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert (int(shown.stdout) >= 2**15) == given  # KiB: half of the tensor, or none of it
