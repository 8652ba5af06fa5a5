"""Windows of drafts, batches and threads: none of them shows in a code, nor in the bits of what it is drawn from."""
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoregressive.models import ridge
from autoregressive.models.generate import Statistics, generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.native_engine import NativeEngine
from tests.autoregressive.models.decoding import Record, engine_of, keys_of, plain_codes, same_bits, streams
from tests.autoregressive.models.test_gpt import CAPTION, TEXT, condition, tiny
from utils.seeding import sample_generator

SHAPES = {
    "S": {"vocab_size": 256, "grid": (3, 3)},
    "192": {"vocab_size": 16384, "dim": 192, "n_head": 6, "n_layer": 2},
    "768": {"vocab_size": 1000, "dim": 768, "n_head": 12, "n_kv_head": 4, "n_layer": 1},
    "t2i": {"vocab_size": 512, "n_head": 4, "model_type": "t2i", "cls_token_num": TEXT, "caption_dim": CAPTION}}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sampler(options: dict, record: Record, *, dtype: torch.dtype = torch.float32, padded: bool = True):
    """(model, function of the rows of a batch of nine and further settings → codes, what they were drawn from)."""
    torch.manual_seed(3)
    model = GPT_models["GPT-S"](**{"num_classes": 3, "grid": (2, 3), **options}).eval()
    torch.nn.init.normal_(model.output.weight, std=0.05)
    model = model.to(dtype)
    cond, valid = condition(model, 9) if "model_type" in options else (torch.arange(9) % 3, None)
    cond, valid = cond if valid is None else cond.to(dtype), valid if padded else None

    def sample(rows: range, *, scale: float, **way) -> tuple[torch.Tensor, list]:
        codes = generate(model, cond[list(rows)], model.config.block_size, cfg_scale=scale, cfg_interval=2,
                         emb_masks=None if valid is None else valid[list(rows)],
                         generators=[sample_generator(5, i) for i in rows], **way)
        return codes, record.take(len(rows), codes.shape[1])

    return model, sample


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", SHAPES)
def test_a_sample_is_the_same_alone_and_in_any_batch(name, scale, engine, monkeypatch):
    """Not only its codes: what they are drawn from, to the last bit, so that no near tie can tell batches apart."""
    padded = engine is NativeEngine  # how far PyTorch's products reach shows in their bits
    model, sample = sampler(SHAPES[name], Record(monkeypatch), padded=padded)
    codes, logits = sample(range(9), scale=scale, decode="sequential")
    assert len(torch.unique(codes, dim=0)) == 9
    for size in range(1, 9):
        parts = [sample(range(first, min(first + size, 9)), scale=scale, decode="sequential")
                 for first in range(0, 9, size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), codes), size
        assert same_bits([row for part in parts for row in part[1]], logits), size
    assert type(engine_of(model)) is engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_windows_batches_and_threads_leave_every_bit(name, dtype, native, threads, monkeypatch):
    model, sample = sampler(SHAPES[name], Record(monkeypatch), dtype=dtype)
    threads(1)
    codes, logits = sample(range(9), scale=2.0, decode="sequential")
    for count, size, window in ((1, 9, 3), (2, 4, 2), (3, 2, 5), (2, 9, 1), (3, 1, 7), (1, 1, 2), (2, 1, 1)):
        threads(count if "model_type" not in SHAPES[name] else 1)  # captions are projected by PyTorch
        way = {"decode": "jacobi", "window": window} if window > 1 else {"decode": "sequential"}
        parts = [sample(range(first, min(first + size, 9)), scale=2.0, **way) for first in range(0, 9, size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), codes), (count, size, window)
        assert same_bits([row for part in parts for row in part[1]], logits), (count, size, window)
    assert type(engine_of(model)) is NativeEngine


def test_the_record_sees_bits(native, monkeypatch):
    _, sample = sampler(SHAPES["S"], Record(monkeypatch))
    _, logits = sample(range(2), scale=2.0, decode="sequential")
    _, again = sample(range(2), scale=2.0, decode="sequential")
    assert same_bits(again, logits) and len(logits) == 2 * 9 and logits[0][1].shape == (256,)
    again[7][0][3] = torch.nextafter(again[7][0][3], torch.tensor(9.0))
    assert not same_bits(again, logits)


@pytest.mark.parametrize("window", [2, 3, 7, 16, 100])
def test_bfloat16_windows_draw_the_codes_of_one_after_the_other(window, native):
    model, cond = tiny(grid=(4, 4)).bfloat16(), torch.arange(7) % 3
    settings = {"cfg_scale": [1.0, 2.0, 3.0, 0.0, 2.0, 2.0, 1.0], "top_k": 20}
    expected = generate(model, cond, 16, generators=streams(7), decode="sequential", **settings)
    found = generate(model, cond, 16, generators=streams(7), decode="jacobi", window=window, **settings)
    assert torch.equal(found, expected) and type(engine_of(model)) is NativeEngine


def test_statistics_say_what_was_done(engine):
    model, cond = tiny(grid=(3, 4)), torch.arange(4) % 3
    told = Statistics()
    generate(model, cond, 12, decode="sequential", statistics=told)
    assert (told.steps, told.tokens, told.window, told.tokens_per_step) == (11, 11, 1, 1)
    for window in (2, 5, 11):
        told = Statistics()
        generate(model, cond, 12, temperature=0.0, decode="jacobi", window=window, statistics=told)
        assert told.tokens == 11 and told.window == window
        assert 11 / window <= told.steps <= 11 and told.tokens_per_step == pytest.approx(11 / told.steps)
    with torch.no_grad():
        model.output.weight.zero_()  # every code is 0, as every draft
    told = Statistics(steps=99)
    assert not generate(model, cond, 12, sample_logits=False, decode="jacobi", window=5, statistics=told).any()
    assert told.steps == 3
    generate(model, cond, 1, statistics=told)
    assert (told.steps, told.tokens, told.tokens_per_step) == (0, 0, 0)


LINEAR, FREE = ([(n, float(n)) for n in (1, 64)], [(n, 1.0) for n in (1, 64)])  # seconds of n tokens


def test_windows_without_a_width_get_the_best_one(engine, monkeypatch):
    model, cond = tiny(grid=(3, 4)), torch.arange(2)
    for seconds, width in ((LINEAR, 2), (FREE, 11), ([(1, 1.0), (2, 1.0), (4, 1.0), (8, 9.0), (16, 20.0)], 2)):
        monkeypatch.setattr(ridge, "step_seconds", lambda model, seconds=seconds: seconds)
        told = Statistics()
        generate(model, cond[:1], 12, cfg_scale=2.0, decode="jacobi", statistics=told)  # two rows
        assert told.window == width, seconds


@pytest.mark.parametrize(("seconds", "temperature", "window"), [(FREE, 0.0, 4), (LINEAR, 0.0, 1), (None, 1.0, 1)],
                         ids=["windows pay", "a window costs as much as its codes", "its drafts are wrong"])
def test_auto_takes_windows_while_they_pay(seconds, temperature, window, native, monkeypatch):
    model, cond = tiny(grid=(8, 8)), torch.arange(5) % 3
    with torch.no_grad():
        model.output.weight.mul_(4)
    settings = {"cfg_scale": [1.0, 2.0, 3.0, 0.0, 2.0], "cfg_interval": 20, "temperature": temperature}
    price = [(1, 1.0), (8, 1.0), (32, 1.57)]  # a window of 4 for 8 rows costs 1.57, about what it might bring
    monkeypatch.setattr(ridge, "step_seconds", lambda model: seconds or price)
    if window > 1:
        model.output.weight.data.zero_()  # every draft is right
    told = Statistics()
    codes = generate(model, cond, 64, generators=streams(5), window=4, statistics=told, **settings)
    assert told.window == window and told.tokens == 63
    if seconds is None:
        assert told.steps < 63  # windows were tried before they were given up
    keys = keys_of(streams(5))
    assert torch.equal(codes, plain_codes(model, cond, 64, keys=keys, scale=torch.tensor(settings["cfg_scale"]),
                                          interval=20, temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_steps_of_every_model_can_be_measured(kind, dtype, engine, monkeypatch):
    monkeypatch.setattr(ridge, "DEAR", math.inf)  # however busy the machine is
    monkeypatch.setattr(ridge, "PATIENCE", math.inf)
    assert len(ridge.measure_steps(tiny(model_type=kind, grid=(3, 4)).to(dtype))) > 1


def test_large_models_are_measured_in_some_seconds(engine, monkeypatch):
    ticks = iter(tick for _ in range(100) for tick in (0.0, 1.0))
    monkeypatch.setattr(ridge, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert [tokens for tokens, _ in ridge.measure_steps(tiny(grid=(8, 8)))] == [1, 2, 4]  # 2 + 1 + 1 steps
    assert len(list(ticks)) == 2 * (100 - 5)


def test_a_machine_that_was_busy_for_a_moment_does_not_make_windows_look_cheap(engine, monkeypatch):
    spans = iter([*[0.1] * ridge.REPEATS, *[0.01] * 100])
    ticks = iter(tick for span in spans for tick in (0.0, span))
    monkeypatch.setattr(ridge, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = ridge.measure_steps(tiny(grid=(5, 5)))
    assert [tokens for tokens, _ in found] == [1, 2, 4, 8, 16] and {seconds for _, seconds in found} == {0.01}


def test_what_steps_take_is_measured_once(native, own_cache, monkeypatch):
    monkeypatch.setattr(ridge, "_KNOWN", {})
    model = tiny(grid=(6, 6))
    found = ridge.step_seconds(model)
    assert [tokens for tokens, _ in found][:3] == [1, 2, 4] and all(seconds > 0 for _, seconds in found)
    monkeypatch.setattr(ridge, "measure_steps", lambda model: 1 / 0)
    assert ridge.step_seconds(model) == found
    ridge._KNOWN.clear()
    kept = ridge.step_seconds(tiny(grid=(6, 6)))  # from the cache folder
    assert [tuple(pair) for pair in kept] == [tuple(pair) for pair in found]
    with pytest.raises(ZeroDivisionError):
        ridge.step_seconds(tiny(grid=(6, 7)))
    assert ridge.best_window(tiny(grid=(6, 6)), rows=10**6) == (1, 1.0)
    file, = Path(os.environ["XDG_CACHE_HOME"]).glob("llamagen/measured/*.json")
    monkeypatch.setattr(ridge, "measure_steps", lambda model: [(1, 0.5)])
    for text in ("{}", "null", "[1]", '[["a", 1]]', "", "[["):
        ridge._KNOWN.clear()
        file.write_text(text)
        assert ridge.step_seconds(tiny(grid=(6, 6)))[0][0] == 1, text
