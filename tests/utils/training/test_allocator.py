"""A heap that is kept gives a tensor pages that were touched before."""
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import resource, sys
import torch
from utils.training.allocator import keep_freed_memory
from tests.conftest import ROOT
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)  # 40 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(20):  # until the leftovers of alignment have filled the thread's cache and are merged again
    faults()
print(sum(faults() for _ in range(5)))
"""


@pytest.mark.processes
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_pages_are_touched_once():
    root = ROOT
    default, kept = (int(subprocess.run([sys.executable, "-c", SCRIPT, way], cwd=root, capture_output=True, text=True,
                                        check=True).stdout) for way in ("default", "kept"))
    assert default > 10 * kept, (default, kept)
