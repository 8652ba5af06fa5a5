"""The benchmark of ARPG's sampling: its plain loop computes what ours computes, its limit is the specified cost."""
import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.schedule import DrawSchedule, cell_order
from benchmarks import bench_arpg, sample_rows
from benchmarks.bench_arpg import ARPGCase, chosen_arpg_cases
from benchmarks.plain_arpg import PlainARPG, plain_arpg_generate
from tests.autoregressive.models.test_arpg import tiny
from utils import cli

CPU = torch.device("cpu")


@pytest.mark.parametrize(("steps", "schedule", "scale"), [(5, "arccos", 3.0), (12, "cosine", 1.0), (1, "arccos", 2.0)])
def test_plain_codes_are_ours(steps, schedule, scale):
    model, labels, how = tiny(), torch.arange(4) % 3, DrawSchedule(steps, schedule)
    order = torch.from_numpy(cell_order("random", (3, 4)))
    plain = plain_arpg_generate(PlainARPG(model), labels, how, cfg_scale=scale, order=order, greedy=True)
    ours = generate(model, labels, 12, cfg_scale=scale, schedule=how, orders=order, sample_logits=False)
    assert torch.equal(plain, ours) and plain.unique().numel() > 2


def test_the_plain_loop_shares_the_weights_and_its_caches_grow():
    model = tiny().to(torch.bfloat16)
    plain = PlainARPG(model)
    assert {p.data_ptr() for p in plain.parameters()} == {p.data_ptr() for p in model.parameters()}
    plain_arpg_generate(plain, torch.arange(2), DrawSchedule(4), cfg_scale=2.0, order=torch.arange(12))
    last = DrawSchedule(4).sizes(12)[-1]  # the last codes are never fed
    assert plain.keys.shape == plain.layers.self_dec[0].attn.keys.shape == (4, 4, 13 - last, 12)


@pytest.mark.parametrize(("steps", "gflop"), [(16, 279), (32, 290), (64, 298), (256, 316)])
def test_the_limit_is_the_specified_cost(steps, gflop):
    """Of an image, both rows."""
    case = ARPGCase("ARPG-L", steps, 1, "fp32")
    assert case.limit(1e18, 1e9) == pytest.approx(gflop, abs=0.6)
    assert ARPGCase("ARPG-L", steps, 8, "fp32").limit(1e18, 1e9) == pytest.approx(8 * case.limit(1e18, 1e9))
    assert case.limit(1e9, 1e18) == pytest.approx(1.2 * steps, rel=0.05)  # GB of fp32 weights that each step reads


def test_cases_by_name():
    assert len(chosen_arpg_cases("*")) == 16
    assert all(chosen_arpg_cases(case.name) == [case] for case in chosen_arpg_cases("*"))
    assert [case.steps for case in chosen_arpg_cases("L:64:8:bf16,L:16:1:fp32")] == [16, 64]
    with pytest.raises(ValueError, match="fits no case"):
        chosen_arpg_cases("ARPG-Z")


def test_a_row(monkeypatch, tmp_path, capsys):
    rows = tmp_path / "sample.md"
    rows.write_text("# Sampling\n\n## Codes and pictures\n\n| a |\n|---|\n")
    monkeypatch.setattr(sample_rows, "RESULTS", rows)
    monkeypatch.setattr(bench_arpg, "measured_peaks", lambda device, dtype: (4e10, 3e11))
    monkeypatch.setattr(bench_arpg, "model_of_case", lambda name, case, device: tiny(grid=(16, 16), num_classes=1000))
    side = bench_arpg.side
    monkeypatch.setattr(bench_arpg, "side", lambda name, *rest: side("ours" if name == "gpt" else name, *rest))
    cli.run(bench_arpg.main, sample_rows.RowFlags, ["--only", "ARPG-L:16:1:fp32", "--repeats", "1"])
    assert "ARPG-L:16:1:fp32" in rows.read_text() and rows.read_text().count("## ") == 2
    assert len(rows.read_text().splitlines()[-1].split(" | ")) == 14
