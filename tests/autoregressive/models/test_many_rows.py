"""The kernels' steps of many rows: every row has the bits that it has alone, whatever the weights and threads."""
import numpy as np
import pytest
import torch
from torch import Tensor

from autoregressive.models.batch import Batch
from autoregressive.models.engines import engine_for
from autoregressive.models.gpt import Transformer
from autoregressive.models.native_engine import NativeEngine
from autoregressive.models.quantized import quantize_
from tests.autoregressive.models.decoding import run_step
from tests.autoregressive.models.small_arpg import tiny as tiny_arpg
from tests.autoregressive.models.test_gpt import tiny

COUNTS = (*range(2, 71), 95, 96, 97, 143, 200, 333)
KINDS = [torch.float32, torch.bfloat16, 8, 4]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """A number of threads that kernels run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def model_of(kind: torch.dtype | int, **options) -> Transformer:
    """One layer with such weights."""
    model = tiny(n_layer=1, **options)
    if isinstance(kind, torch.dtype):
        return model.to(kind)
    quantize_(model, kind)
    return model


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_every_row_has_the_bits_that_it_has_alone(kind, threads, native):
    options = [{"dim": 128, "multiple_of": 64, "vocab_size": 97}]  # columns that no tile divides
    if kind not in (8, 4):
        options += [{"dim": 48, "vocab_size": 49}, {"dim": 48, "n_kv_head": 2, "vocab_size": 5}]
    if kind == torch.float32:
        options += [{"dim": 40, "n_head": 2, "multiple_of": 8, "vocab_size": 103}]  # inputs: no multiple of 16
    for option in options:
        model = model_of(kind, **option)
        engine, place = engine_for(model), torch.zeros(1, dtype=torch.long)
        assert type(engine) is NativeEngine
        engine.reserve(COUNTS[-1], 8)
        x = torch.randn(COUNTS[-1], 1, model.config.dim)
        alone = torch.cat([run_step(engine, row[None], place, [0]) for row in x])
        for rows in COUNTS:
            found = run_step(engine, x[:rows], place, [0] * rows)
            assert torch.equal(found, alone[:rows]), (option, rows)


def ask_step(rows: int, asks: int, *, slot: int = 0, first: int = 0) -> Batch:
    """One token is fed to each row; asks at the places first + 1, first + 2, …"""
    row, zero = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    of = row.repeat_interleave(asks)
    places = (first + torch.arange(asks)).repeat(rows) % 16 + 1
    return Batch(torch.stack([zero, zero + slot % 17, row, zero + slot, zero + slot + 1]),
                 torch.stack([of * 0, places, of, of * 0 + slot + 1]), torch.empty(7, 0, dtype=torch.long),
                 torch.empty(0), row.numpy(), np.full(rows, 1), np.full(rows, asks), slot + 1, fresh=False,
                 drafts=False)


def asked(engine: NativeEngine, x: Tensor, asks: int, *, slot: int = 0, first: int = 0) -> Tensor:
    """Logits (rows, asks, V)."""
    found = engine.forward(x.clone(), ask_step(len(x), asks, slot=slot, first=first))
    return found.clone().unflatten(0, (len(x), asks))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", KINDS[:2], ids=str)
@torch.no_grad()
def test_every_query_has_the_bits_that_it_has_alone(dtype, kv_heads, threads, native):
    model = tiny_arpg(grid=(4, 4), n_kv_head=kv_heads).to(dtype)
    engine = engine_for(model)
    assert type(engine) is NativeEngine
    engine.reserve(30, 60)
    for slot in range(40):
        x = torch.randn(30, 48)
        first = asked(engine, x, 1, slot=slot)
        if slot in (0, 1, 2, 7, 15, 16, 31, 32, 39):  # seen positions that fill one to three blocks, or not
            alone = torch.cat([first, *(asked(engine, x, 1, slot=slot, first=i) for i in range(1, 16))], 1)
            for asks in (2, 3, 4, 5, 7, 8, 9, 16):
                assert torch.equal(asked(engine, x, asks, slot=slot), alone[:, :asks]), (slot, asks)


@pytest.mark.parametrize("dtype", KINDS[:2], ids=str)
@torch.no_grad()
def test_the_first_layer_of_queries_is_computed_once_with_the_same_bits(dtype, native):
    model, x = tiny_arpg(grid=(4, 4)).to(dtype), torch.randn(3, 48)
    engine = engine_for(model)
    engine.reserve(3, 8)
    assert engine.first_query.shape == (48,)
    asked(engine, torch.randn(3, 48), 1)  # with a single position to see, queries would make no difference
    once = asked(engine, x, 5, slot=1)
    engine.first_query = None
    assert torch.equal(asked(engine, x, 5, slot=1), once)
    engine.first_query = torch.zeros(48)
    assert not torch.equal(asked(engine, x, 5, slot=1), once)  # it is used
    model.layers.cross_dec[0].attn.to_q.weight.mul_(2)
    engine.reserve(3, 8)
    changed = asked(engine, x, 5, slot=1)
    engine.first_query = None
    assert torch.equal(asked(engine, x, 5, slot=1), changed) and not torch.equal(changed, once)
