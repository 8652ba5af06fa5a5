"""What draws an image: chosen by what was really built, recorded in sample sets, never mixed in one."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoregressive.sample import pipeline as pipelines
from autoregressive.sample import sample_ddp
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import engine_name, load_pipeline, pixel_dtype
from native import build
from tests.autoregressive.models.test_gpt import tiny
from tests.conftest import ROOT
from tokenizer.tokenizer_image.convolution import can_keep_16_bits
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import cli
from utils.checkpoints import containers

CPU = torch.device("cpu")


@pytest.fixture
def broken_compiler(tmp_path, own_cache, monkeypatch):
    """A compiler that is there, says its version and cannot compile."""
    path = tmp_path / "broken"
    path.write_text("#!/bin/sh\ncase $1 in --version) echo 1 ;; *) echo 'out of order' >&2; exit 1 ;; esac\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("LLAMAGEN_NATIVE", "1")
    build._compiler.cache_clear(), build._load.cache_clear()
    yield path
    build._compiler.cache_clear(), build._load.cache_clear()


@pytest.fixture
def flags(gpt_ckpt, vq_ckpt) -> dict:
    return {"gpt_ckpt": str(gpt_ckpt), "vq_ckpt": str(vq_ckpt)}


# ---- the type of the weights


@pytest.mark.parametrize(("units", "wanted"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_a_compiler_that_cannot_build_does_not_choose_emulated_bf16(broken_compiler, flags, monkeypatch, units, wanted):
    monkeypatch.setenv("LLAMAGEN_CPU_BF16", units)
    gpt = load_pipeline(SampleFlags(**flags), device=CPU).gpt
    state = containers.weights(containers.read(flags["gpt_ckpt"]), flags["gpt_ckpt"])
    assert all(torch.equal(value, state[name].to(wanted)) for name, value in gpt.state_dict().items())
    assert len({value.dtype for value in gpt.state_dict().values()} | {wanted}) == 1


def test_kernels_that_do_not_fit_do_not_choose_it_either(native, flags, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_CPU_BF16", "0")
    assert load_pipeline(SampleFlags(**flags), device=CPU).gpt.output.weight.dtype == torch.bfloat16
    monkeypatch.setattr(pipelines, "fitting_kernels", lambda model: (None, None))
    assert load_pipeline(SampleFlags(**flags), device=CPU).gpt.output.weight.dtype == torch.float32


def test_nothing_is_built_for_checkpoints_that_are_not_there(flags, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(pipelines, "prepare", lambda *kernels: begun.append(kernels))
    for name in flags:
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_pipeline(SampleFlags(**{**flags, name: str(tmp_path / "absent.pt")}), device=CPU)
        with pytest.raises(ValueError, match="is missing"):
            load_pipeline(SampleFlags(**{**flags, name: None}), device=CPU)
    assert not begun
    load_pipeline(SampleFlags(**flags), device=CPU)
    assert len(begun) == 1


# ---- what a set records


@pytest.fixture
def sample(flags, tmp_path, capsys):
    """sample(count, flags…) → (what the run printed, or the one line of its refusal; config.json or None)."""
    def run(count: int, *argv) -> tuple[str, dict | None]:
        capsys.readouterr()
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        problem = None
        try:
            cli.run(sample_ddp.main, sample_ddp.SampleSetFlags, [
                *words, "--precision", "none", "--sample-dir", str(tmp_path / "sets"), "--num-fid-samples", str(count),
                *map(str, argv)])
        except SystemExit as stop:
            problem = stop.code
        said = capsys.readouterr()
        assert problem in (None, 2) and (problem is None or len(said.err.strip().splitlines()) == 1)
        found = list((tmp_path / "sets").glob("*/config.json"))
        return said.err.strip() if problem else said.out, json.loads(found[0].read_text()) if found else None

    return run


@pytest.mark.skipif(not can_keep_16_bits(), reason="no AMX")
def test_pictures_keep_16_bits_beside_bf16_models_on_kernels_alone():
    gpt, tokenizer = tiny(), VQ_models["VQ-4-S"]().eval().requires_grad_(False)
    assert pixel_dtype(gpt, tokenizer) == torch.float32
    assert engine_name(gpt, tokenizer).endswith("C++ kernels for pixels on cpu")
    assert pixel_dtype(gpt.bfloat16(), tokenizer) == torch.bfloat16
    assert engine_name(gpt, tokenizer).endswith("C++ kernels by AMX for pixels on cpu")
    tokenizer.decoder.conv_in.register_forward_hook(lambda *_: None)  # PyTorch decodes, whose bfloat16 shows
    assert pixel_dtype(gpt, tokenizer) == torch.float32
    assert engine_name(gpt, tokenizer).endswith("PyTorch for pixels on cpu")


def test_engines_are_recorded_and_not_mixed(native, sample, tmp_path, monkeypatch):
    _, config = sample(2)
    assert config["engine"] == "C++ kernels for codes and C++ kernels for pixels on cpu"
    before = {path: path.read_bytes() for path in (tmp_path / "sets").rglob("*") if path.is_file()}
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    said, _ = sample(3)
    assert re.search(r"holds images made with another engine \(C\+\+ kernels for codes and C\+\+ kernels for pixels on "
                     r"cpu drew them, here PyTorch for codes and PyTorch for pixels on cpu would: go on where .*"
                     r"LLAMAGEN_NATIVE\): give another --sample-dir$", said)
    assert {path: path.read_bytes() for path in (tmp_path / "sets").rglob("*") if path.is_file()} == before
    assert "finished already, nothing to sample" in sample(2)[0]
    said, _ = sample(3, "--cfg-scale", 1.5, "--precision", "fp16")  # fp32 on a CPU: only the engine differs
    assert "another engine" in said
    monkeypatch.setenv("LLAMAGEN_NATIVE", "1")
    assert "1 sampled" in sample(3)[0]


def test_compiled_models_are_another_engine(sample, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl))
    _, config = sample(1, "--compile")
    assert config["engine"].startswith("torch.compile for codes")
    assert "another engine" in sample(2)[0]


def test_a_set_that_records_no_engine_is_gone_on_with_and_that_is_said(sample, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:  # as earlier versions described their sets
        described = pipelines.Pipeline.__init__

        def init(self, *given, **named):
            described(self, *given, **named)
            del self.described["engine"]

        earlier.setattr(pipelines.Pipeline, "__init__", init)
        earlier.setattr(sample_ddp, "ENGINE", "gpt_model")
        said, config = sample(2)
        assert "2 sampled" in said and "engine" not in config
    said, config = sample(2)
    assert "nothing to sample" in said and "does not record" not in said and "engine" not in config
    said, config = sample(4)
    assert "2 sampled" in said and "engine" not in config
    assert "does not record which engine drew its images, as an earlier version began it: " in said
    assert len(list((tmp_path / "sets").glob("*.npz"))) == 1
    said, _ = sample(4, "--quantize", "int8")
    assert "another dtype: give another --sample-dir" in said


@pytest.mark.processes
def test_processes_that_draw_differently_are_refused(native, flags, tmp_path):
    code = ("import os; os.environ['LLAMAGEN_NATIVE'] = str(1 - int(os.environ['RANK'])); "
            "from autoregressive.sample import sample_ddp; from utils import cli; "
            "cli.run(sample_ddp.main, sample_ddp.SampleSetFlags)")
    (tmp_path / "entry.py").write_text(code)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(tmp_path / "entry.py"), *words, "--precision", "none", "--num-fid-samples", "4", "--sample-dir",
         str(tmp_path / "sets")], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the processes would draw images of one set differently, by C++ kernels for" in lines[0]
    assert not Path(tmp_path / "sets").exists()
