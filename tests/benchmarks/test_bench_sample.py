"""The benchmark of sampling: its plain loop computes what ours computes, its limits are the specified ones, its results
file grows table by table. Nothing is timed."""
import json
import mmap
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.generate import generate
from autoregressive.models.gpt import PRESETS, ModelArgs
from benchmarks import bench_sample, bench_sample_modes, sample_rows
from benchmarks.bench_sample import Case, chosen_cases, plain_run
from benchmarks.bench_tokenizer import PlainTokenizer
from benchmarks.plain_sampler import (
    PlainSampler,
    PlainSettings,
    plain_draw,
    plain_generate,
    plain_uint8,
    png_files,
)
from benchmarks.roofline import limit_seconds, step_cost
from benchmarks.sample_rows import TABLES, with_row
from tests.autoregressive.models.test_gpt import tiny
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import cli
from utils.images import to_uint8

CPU = torch.device("cpu")


@pytest.mark.parametrize(("scale", "interval"), [(1.0, -1), (3.0, -1), (3.0, 4)])
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2, "grid": (3, 4)}], ids=str)
def test_plain_codes_are_ours(options, scale, interval):
    model = tiny(**options)
    labels, tokens = torch.arange(5) % 3, model.config.block_size
    settings = PlainSettings(cfg_scale=scale, cfg_interval=interval, sample_logits=False)
    plain = plain_generate(PlainSampler(model), labels, tokens, settings)
    ours = generate(model, labels, tokens, cfg_scale=scale, cfg_interval=interval, sample_logits=False)
    assert torch.equal(plain, ours) and plain.unique().numel() > 5


def test_the_plain_sampler_shares_the_weights_and_rounds_its_caches_up():
    model = tiny().to(torch.bfloat16)
    sampler = PlainSampler(model)
    assert {p.data_ptr() for p in sampler.parameters()} == {p.data_ptr() for p in model.parameters()}
    codes = plain_generate(sampler, torch.arange(2), 9, PlainSettings(cfg_scale=2.0, top_k=5))
    attention = sampler.layers[0].attention
    assert codes.shape == (2, 9) and sampler.mask.shape == (4, 16, 16) and sampler.table.dtype == torch.float32
    assert attention.keys.shape == (4, 4, 16, 12) and attention.keys.dtype == torch.bfloat16
    assert attention.keys[:, :, 1:9].any(-1).all() and not attention.keys[:, :, 9:].any()
    assert not attention.keys[:, :, 0].any() and attention.values[:, :, 0].any()  # the prefix: rotated by zeros


def test_plain_draws_stay_within_the_best():
    logits = torch.randn(4, 1, 50)
    best = logits[:, 0].topk(3).indices
    for _ in range(20):
        codes, probabilities = plain_draw(logits.clone(), PlainSettings(top_k=3, temperature=2.0))
        assert (codes == best).any(1).all()
    kept = (logits[:, 0].gather(1, best) / 2).softmax(-1)
    torch.testing.assert_close(probabilities.gather(1, best), kept)


@torch.no_grad()
def test_plain_pictures_are_ours():
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-4-S"]().eval()
    codes = torch.randint(256, (2, 12))
    plain, ours = PlainTokenizer(tokenizer).decode(codes, (3, 4)), tokenizer.decode_code(codes, (3, 4))
    torch.testing.assert_close(plain, ours, atol=1e-4, rtol=0)
    assert plain.std() > 0.1
    pictures = plain_uint8(plain)
    for picture, file in zip(pictures, png_files(pictures), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(file))), picture)
    assert abs(pictures.astype(int) - to_uint8(ours)).max() <= 1


def test_a_sampled_run_counts_the_steps_that_it_leaves_out():
    model = tiny(grid=(4, 5), num_classes=1000)
    case = Case("tiny", 20, 2, 2.0, 0, "fp32")
    for whole, expected in ((False, 7), (True, 0)):  # of 19 after the prefill, 3 groups of 4
        seconds, missing = plain_run(PlainSampler(model), case, CPU, whole=whole)
        assert missing == expected and seconds > 0


@pytest.mark.parametrize(("name", "weights", "cache", "gflop", "a100"), [  # 576 tokens, 16 rows, two bytes a value
    ("GPT-B", 195, 170, 3.3, 0.105), ("GPT-L", 650, 454, 10.9, 0.318), ("GPT-XL", 1505, 851, 24.9, 0.679),
    ("GPT-XXL", 2768, 1361, 45.7, 1.19), ("GPT-3B", 6082, 1418, 98.7, 2.16)])
def test_limits_of_the_released_models(name, weights, cache, gflop, a100):
    cost = step_cost(ModelArgs(**PRESETS[name], block_size=576), rows=16, bytes_each=2)
    assert cost.weights / 1e6 == pytest.approx(weights, abs=0.6)
    assert cost.cache / 1e6 == pytest.approx(cache, abs=0.6)
    assert cost.flops / 1e9 == pytest.approx(gflop, abs=0.06)
    assert 576 * limit_seconds(cost, bandwidth=2.0e12, speed=312e12) == pytest.approx(a100, rel=0.01)
    assert limit_seconds(cost, bandwidth=1e18, speed=1e9) == pytest.approx(gflop, rel=0.02)  # held up by operations


def test_grouped_heads_shrink_the_cache():
    whole, grouped = (step_cost(ModelArgs(n_kv_head=heads), rows=2, bytes_each=4) for heads in (12, 3))
    assert grouped.cache == whole.cache / 4
    assert whole.weights - grouped.weights == 4 * 12 * 2 * 768 * (768 - 192)


def test_cases_by_name():
    assert len(chosen_cases("*")) == 32
    assert [case.name for case in chosen_cases("GPT-L:576:8:*:bf16")] == ["GPT-L:576:8:2.0:0:bf16",
                                                                        "GPT-L:576:8:4.0:2000:bf16"]
    assert all(chosen_cases(case.name) == [case] for case in chosen_cases("*"))
    assert {case.model for case in chosen_cases("GPT-B:256:1,GPT-L:256:1")} == {"GPT-B", "GPT-L"}
    assert Case("GPT-B", 256, 8, 1.0, 0, "fp32").rows == 8 and chosen_cases("*")[0].rows == 2


@pytest.mark.parametrize(("words", "expected"), [
    (["--only", "GPT-Z"], "--only 'GPT-Z' fits no case, they are named like GPT-B:256:1:2.0:0:fp32"),
    (["--repeats", "0"], "--repeats is 0, expected 1 or more")])
def test_refusals(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(bench_sample.main, bench_sample.BenchSampleFlags, [*words, "--device", "cpu"])
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_rows_join_their_own_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_rows, "RESULTS", tmp_path / "sample.md")
    for title, table in TABLES.items():
        columns = next(line for line in table.splitlines() if line.startswith("|")).count("|") - 1
        for row in "ab":
            sample_rows.add_row(title, [title + row, *"-" * (columns - 1)], write=True)
    text = (tmp_path / "sample.md").read_text()
    for title, part in zip(TABLES, text.split("\n## ")[1:], strict=True):
        table = part.strip().splitlines()[-4:]
        assert part.startswith(title) and [line.split(title)[-1][:1] for line in table[2:]] == ["a", "b"]
        assert len({line.count("|") for line in table}) == 1
    assert with_row(text, title, ["x", *"-" * (columns - 1)]).startswith(text)
    with pytest.raises(AssertionError):
        with_row(text, title, ["too few"])
    sample_rows.add_row(title, [], write=False)
    assert (tmp_path / "sample.md").read_text() == text


def test_a_case_makes_a_whole_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_rows, "RESULTS", tmp_path / "sample.md")
    monkeypatch.setattr(bench_sample, "measured_peaks", lambda device, dtype: (10e9, 1e15))
    monkeypatch.setattr(bench_sample, "picture_seconds", lambda case, device, repeats: (3.0, 1.0))
    monkeypatch.setattr(bench_sample, "code_seconds", lambda case, device, repeats, whole: (25.6, 6.4))
    monkeypatch.setattr(bench_sample, "peak_in_own_process", lambda side, case, config: [1.0, 4.0 - (side == "ours")])
    cli.run(bench_sample.main, bench_sample.BenchSampleFlags, ["--only", "GPT-B:256:1:2.0:0:fp32", "--device", "cpu"])
    line = (tmp_path / "sample.md").read_text().split("\n| GPT-B")[1].split("\n")[0]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3:-1] == ["3, sampled", "100.0", "25.0", "4.00×", "10.0, 1000000", "40.9", "41%, 164%", "0.0350",
                           "0.1351", "3.86×", "1.00 / 4.00", "1.00 / 3.00", "0.75×"]


def test_memory_of_a_side(monkeypatch, capsys):
    monkeypatch.setattr(bench_sample, "random_gpt", lambda case, device: tiny(grid=(4, 4), num_classes=1000))
    monkeypatch.setattr(bench_sample, "random_tokenizer", lambda device: VQ_models["VQ-4-S"]().eval())
    monkeypatch.setattr(bench_sample, "chosen_cases", lambda only: [Case(only, 16, 2, 2.0, 5, "fp32")])
    for side in ("plain", "ours"):
        cli.run(bench_sample.main, bench_sample.BenchSampleFlags, ["--memory-of", side, "--device", "cpu"])
        codes, pixels = json.loads(capsys.readouterr().out)
        assert 0.05 < codes < 8 and 0.05 < pixels < 8


def test_a_peak_is_forgotten():
    peaks = []
    for size in (2**27, 2**20):  # bytes, straight from the kernel: malloc may have kept what it once got
        bench_sample.forget_peak(CPU)
        before = bench_sample.peak_since(CPU)
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1
        peaks.append(bench_sample.peak_since(CPU) - before)
    assert peaks[0] == pytest.approx(0.125, abs=0.01) and peaks[1] < 0.01


def test_rows_of_quantised_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_rows, "RESULTS", tmp_path / "sample.md")
    monkeypatch.setattr(bench_sample_modes, "our_codes", lambda model, case, device: None)  # errors only
    small = {"dim": 64, "multiple_of": 64, "num_classes": 1000, "vocab_size": 128}
    monkeypatch.setattr(bench_sample_modes, "random_gpt", lambda case, device: tiny(**small))
    monkeypatch.setattr(bench_sample_modes, "chosen_cases", lambda only: [Case(only, 9, 2, 2.0, 0, "fp32")])
    cli.run(bench_sample_modes.main, bench_sample_modes.BenchModesFlags,
            ["--mode", "quantized", "--only", "tiny", "--repeats", "1", "--device", "cpu"])
    text = (tmp_path / "sample.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| tiny")]
    assert [row[2] for row in rows] == ["int8", "int4"]
    int8, int4 = (float(row[-3].removesuffix("%")) for row in rows)
    assert 0 < int8 < 6 and 4 * int8 < int4 < 100


def test_rows_of_jacobi_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_rows, "RESULTS", tmp_path / "sample.md")
    settings = {"cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 2, "top_p": 1.0}
    pipeline = SimpleNamespace(gpt=tiny(), settings=settings, described={"gpt_model": "tiny", "dtype": "torch.float32"})
    monkeypatch.setattr(bench_sample_modes, "load_pipeline", lambda flags, device: pipeline)
    cli.run(bench_sample_modes.main, bench_sample_modes.BenchModesFlags, ["--repeats", "1", "--device", "cpu"])
    text = (tmp_path / "sample.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| tiny")]
    assert [row[2:5] for row in rows] == [[f"9 x {images}", "float32", "2.0, 2, 1.0"] for images in (1, 8)]
    assert all(row[-2] == "100.0%" and 1 <= float(row[-3]) <= 9 for row in rows)


def test_logit_errors():
    exact = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    changed = torch.tensor([[3.0, 0.0, 0.5], [5.0, 4.0, 0.0]])
    scale = (25 / 6) ** 0.5
    largest, rms, same = bench_sample_modes.logit_error(exact, changed)
    assert same == 0.5
    assert largest == pytest.approx(5 / scale) and rms == pytest.approx((25.25 / 6) ** 0.5 / scale)
