"""The same with vLLM's Model Runner V2, the usual one on GPUs. Its kernels are Triton's, which an interpreter runs on a
CPU; as that is set before vLLM is imported, the tests run in a process of their own."""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CHOSEN = "plain or (text and (pre-empted or three)) or runner"


@pytest.mark.processes
def test_codes_are_the_decoders():
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", CHOSEN,
                           "tests/autoregressive/serve/vllm/test_exact.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout[-4000:]
