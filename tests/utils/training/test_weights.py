"""Samples may weigh differently: a step's loss is a sum over all samples by their weights, however they are split."""
import math

import pytest

from dataset.codes import CodeBatches
from tests.conftest import call, two_processes
from tests.runs import QUICK_GPT, last, rows

WEIGHED = """from dataset.codes import CodeBatches
plain = CodeBatches.__getitems__
def weighed(self, keys):
    batch = plain(self, keys)
    return batch | {"valid": batch["codes"].sum(1) % 7 / 7}
CodeBatches.__getitems__ = weighed"""


@pytest.mark.processes
def test_uneven_samples_on_two_processes_and_in_parts_are_one_batch(code_store, tmp_path, monkeypatch):
    """With classes dropped, too: which ones does not hang on the number of processes."""
    command = ["--code-path", code_store, *QUICK_GPT, "--lr", 1e-3, "--mixed-precision", "none", "--class-dropout", 0.3,
               "--results-dir"]
    two_processes([("train_gpt", [*command, tmp_path / "ddp"]),
                   ("train_gpt", [*command, tmp_path / "fsdp", "--data-parallel", "fsdp"])], tmp_path, setup=WEIGHED)
    monkeypatch.setattr(CodeBatches, "__getitems__", CodeBatches.__getitems__)  # as it was, at the end
    exec(WEIGHED, {})
    call("train_gpt", *command, tmp_path / "one")
    call("train_gpt", *command, tmp_path / "parts", "--gradient-accumulation-steps", 3)
    one = tmp_path / "one" / "000-GPT-S"
    for how in ("ddp", "fsdp", "parts"):
        other = tmp_path / how / "000-GPT-S"
        for ours, theirs in zip(rows(other), rows(one), strict=True):
            for name in ("loss", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (how, ours["step"])
        ours, theirs = last(other)["model"], last(one)["model"]
        assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 3e-5, how
    assert rows(one)[0]["loss"] == pytest.approx(math.log(256), abs=1e-4)
