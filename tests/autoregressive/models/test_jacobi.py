"""Windows of drafts, batches and threads: none of them shows in a code, nor in the bits of what it is drawn from."""
import itertools
from types import SimpleNamespace

import pytest
import torch

from autoregressive.models import generate as module
from autoregressive.models.engine import TorchEngine
from autoregressive.models.generate import Statistics, generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.native_engine import NativeEngine
from tests.autoregressive.models.decoding import Record, keys_of, plain_codes, same_bits, streams
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
    assert type(model.engines[0]) is engine


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
    assert type(model.engines[0]) is NativeEngine


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
    assert torch.equal(found, expected) and type(model.engines[0]) is NativeEngine


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


def test_windows_without_a_width_get_one(engine):
    model, cond = tiny(grid=(3, 4)), torch.arange(2)
    for batch, width in ((1, 4), (2, 2)):  # with guidance
        told = Statistics()
        generate(model, cond[:batch], 12, cfg_scale=2.0, decode="jacobi", statistics=told)
        assert told.window == (width if engine is NativeEngine else 2)  # eight rows at least


@pytest.mark.parametrize(("clock", "window"), [((0, 3, 3, 3.1), 4), ((0, 3, 3, 99), 1), ((0, 1e-9), 1)],
                         ids=["windows pay", "they do not", "too small to ask"])
def test_auto_tries_both_ways_and_takes_the_faster(clock, window, native, monkeypatch):
    """A clock of our own: at the start and end of steps in lockstep, then of the steps with windows."""
    model, cond = tiny(grid=(4, 8)), torch.arange(5) % 3
    settings = {"cfg_scale": [1.0, 2.0, 3.0, 0.0, 2.0], "cfg_interval": 20, "temperature": 1.5}
    ticks = itertools.chain(clock, itertools.repeat(clock[-1]))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    told = Statistics()
    codes = generate(model, cond, 32, generators=streams(5), window=4, statistics=told, **settings)
    assert told.window == window and told.tokens == 31
    keys = keys_of(streams(5))
    assert torch.equal(codes, plain_codes(model, cond, 32, keys=keys, scale=torch.tensor(settings["cfg_scale"]),
                                          interval=20, temperature=1.5))


def test_auto_without_kernels_goes_one_after_the_other(monkeypatch):
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    model, told = tiny(), Statistics()
    generate(model, torch.arange(2), 9, window=4, statistics=told)
    assert (told.steps, told.window) == (8, 1) and type(model.engines[0]) is TorchEngine
