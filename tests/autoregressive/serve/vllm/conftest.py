"""These tests run where vLLM is: in the environment that scripts/serve_env.sh makes (see test_vllm.py above)."""
import importlib.util
import os
from types import SimpleNamespace

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

if collect_ignore_glob == []:
    if os.environ.get("TRITON_INTERPRET") == "1":  # Model Runner V2 on a CPU: its kernels are interpreted
        import triton.backends

        triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from autoregressive.serve.vllm_engine import prepare_vllm, register_here

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # of the engines that wait; servers' have processes all the same
    prepare_vllm()  # before anything imports vLLM
    register_here()


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path_factory, monkeypatch):
    """Model folders go to a folder of the session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
