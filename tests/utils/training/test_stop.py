"""Steps whose loss or gradient is not finite change nothing, are told, and end the run when there are too many."""
import json
import math

import pytest
import torch
from torch import nn

from autoregressive.train.task import GPTTask
from tests.conftest import TINY_GPT, call, two_processes
from tests.runs import last, rows, same
from utils.checkpoints import containers
from utils.training.loss_scale import LossScale, step_unless
from utils.training.meter import Meter
from utils.training.optim import adamw

RUN = "000-GPT-S"


@pytest.fixture
def command(code_store, tmp_path):
    """Six steps, a row for each."""
    return ["train_gpt", "--code-path", code_store, *TINY_GPT, "--global-batch-size", 6, "--epochs", 1,
            "--log-every", 1, "--ema", "--resume", "auto", "--results-dir", tmp_path]


ONE = torch.tensor(1.0)


def poison(monkeypatch, steps: set[int], *, value: float = math.nan) -> None:
    """Make the loss of some steps (from 1) not finite."""
    original = GPTTask.micro_step

    def poisoned(self, batch, *, step, backward):
        bad = value if step + 1 in steps else 1.0
        return original(self, batch, step=step,
                        backward=lambda name, loss, weight: backward(name, loss * bad, weight))

    monkeypatch.setattr(GPTTask, "micro_step", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_changes_nothing_and_is_told(value, command, tmp_path, monkeypatch, capsys):
    call(*command, "--ckpt-every", 1)
    good = containers.read(tmp_path / RUN / "checkpoints" / "0000002")
    poison(monkeypatch, {3, 4}, value=value)
    call(*[tmp_path / "bad" if word == tmp_path else word for word in command], "--ckpt-every", 1)
    folder = tmp_path / "bad" / RUN
    out = capsys.readouterr().out
    assert "step 3 skipped: its loss or gradient is not finite (1 in a row)" in out
    assert "step 4 skipped: its loss or gradient is not finite (2 in a row)" in out
    assert same(containers.read(folder / "checkpoints" / "0000004")["model"], good["model"])
    assert same(containers.read(folder / "checkpoints" / "0000004")["ema"], good["ema"])
    assert not same(containers.read(folder / "checkpoints" / "0000005")["model"], good["model"])
    found = rows(folder)
    assert [row.get("skipped_steps") for row in found] == [None, None, 1, 1, None, None]
    assert ["loss" in row for row in found] == [True, True, False, False, True, True]
    assert all(math.isfinite(value) for row in found for value in row.values())


def test_too_many_in_a_row_end_the_run(command, tmp_path, monkeypatch, capsys):
    command = [*command, "--max-skipped-steps", 2, "--ckpt-every", 2]
    with monkeypatch.context() as patch:
        poison(patch, {4, 5, 6})
        with pytest.raises(SystemExit) as caught:
            call(*command)
    assert caught.value.code == 2
    assert "stopped at step 5: 2 steps in a row" in capsys.readouterr().err
    saved = containers.read(tmp_path / RUN / "bad-batch-0000005-rank0.pt")
    assert saved["micro_batches"][0]["codes"].shape == (6, 16)
    call(*command)  # the cause mended
    assert [row["step"] for row in rows(tmp_path / RUN)] == [1, 2, 3, 4, 5, 6]


def test_the_count_survives_a_resume(command, tmp_path, monkeypatch):
    command = [*command, "--max-skipped-steps", 3, "--ckpt-every", 4]
    poison(monkeypatch, {3, 4, 5})
    with monkeypatch.context() as patch:
        original = GPTTask.micro_step

        def stopped(self, batch, *, step, backward):
            if step == 4:
                raise KeyboardInterrupt
            return original(self, batch, step=step, backward=backward)

        patch.setattr(GPTTask, "micro_step", stopped)
        with pytest.raises(SystemExit):
            call(*command)
    with pytest.raises(SystemExit) as caught:
        call(*command)  # from step 4, two behind it
    assert caught.value.code == 2
    assert (tmp_path / RUN / "bad-batch-0000005-rank0.pt").is_file()


@pytest.mark.processes
@pytest.mark.slow
def test_one_bad_process_makes_the_step_bad_for_all(command, tmp_path):
    setup = """import math
from autoregressive.train.task import GPTTask
original = GPTTask.micro_step
def poisoned(self, batch, *, step, backward):
    import torch.distributed
    bad = step == 2 and torch.distributed.get_rank() == 1
    return original(self, batch, step=step,
                    backward=lambda name, loss, weight: backward(name, loss * (math.nan if bad else 1), weight))
GPTTask.micro_step = poisoned"""
    jobs = [("train_gpt", [*command[1:-1], tmp_path / how, "--data-parallel", how, "--ckpt-every", 1])
            for how in ("ddp", "fsdp")]
    two_processes(jobs, tmp_path, setup=setup)
    for how in ("ddp", "fsdp"):
        folder = tmp_path / how / RUN
        assert [row.get("skipped_steps") for row in rows(folder)] == [None, None, 1, None, None, None]
        before, after = (containers.read(folder / "checkpoints" / name)["model"] for name in ("0000002", "0000003"))
        assert same(before, after)
        assert all(value.isfinite().all() for value in last(folder)["model"].values())


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_steps_unless_told_not_to(fused):
    model = nn.Linear(3, 2)
    optimizer = adamw(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.95)) if fused else \
        torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    step_unless(optimizer, torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values() if "step" in state)
    step_unless(optimizer, torch.tensor(False))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not hasattr(optimizer, "found_inf")


def test_the_loss_scale_falls_at_an_overflow_and_grows_slowly():
    scale = LossScale(torch.device("cpu"), enabled=True)
    good, bad = torch.tensor(False), torch.tensor(True)
    scale.update(bad)
    scale.update(bad)
    assert scale.scale == 2.0**14
    for _ in range(1999):
        scale.update(good)
    assert scale.scale == 2.0**14
    scale.update(good)
    assert (scale.scale, scale.streak) == (2.0**15, 0)
    fixed = LossScale(torch.device("cpu"), enabled=False)
    fixed.update(bad)
    assert fixed.scale == 1


def test_a_meter_weighs_its_steps():
    meter = Meter(torch.device("cpu"), samples_per_step=1)
    for value, weight in ((1.0, 1.0), (4.0, 0.5)):
        meter.add({"loss": torch.tensor(value * weight)}, weight=torch.tensor(weight), bad=torch.tensor(False))
    assert meter.read() == {"loss": 2.0}


def test_a_meter_of_two_processes_goes_on_in_one():
    state = {"ranks": [{"sums": {"loss": 20.0}, "counts": {"loss": 2.0}, "skipped": 1.0},
                       {"sums": {"loss": 60.0}, "counts": {"loss": 2.0}, "skipped": 1.0}]}
    meter = Meter(torch.device("cpu"), samples_per_step=1)
    meter.restore(state, rank=0)
    assert meter.read() == {"loss": 20.0, "skipped_steps": 1}
    meter.restore(state, rank=1)  # of three processes, say
    assert meter.sums == meter.counts == {"loss": 0.0}


def test_a_meter_goes_on_where_it_was():
    good = torch.tensor(False)
    one, other = (Meter(torch.device("cpu"), samples_per_step=1) for _ in range(2))
    values = torch.rand(7).tolist()
    for value in values[:4]:
        one.add({"loss": torch.tensor(value)}, weight=ONE, bad=good)
    one.add({"loss": torch.tensor(math.nan)}, weight=ONE, bad=torch.tensor(True))
    other.restore(json.loads(json.dumps(one.state())), rank=0)
    for meter in (one, other):
        for value in values[4:]:
            meter.add({"loss": torch.tensor(value)}, weight=ONE, bad=good)
    assert one.read() == (row := other.read())
    assert row["loss"] == pytest.approx(sum(values) / 7)
    assert row["skipped_steps"] == 1
