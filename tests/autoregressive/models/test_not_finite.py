"""Logits that are not finite are refused, in every engine and way of decoding; what filters leave out is not meant."""
import re

import numpy as np
import pytest
import torch

from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.generate import generate
from autoregressive.models.plan import Raster, Request
from tests.autoregressive.models.decoding import draw_codes, engine_of, streams
from tests.autoregressive.models.test_draws import settings_of
from tests.autoregressive.models.test_gpt import V, tiny
from utils.finite import NotFiniteError

ROWS = {"sound": 0.0, "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 3e38}


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("filtered", [{}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("vocab", [7, 64])
def test_each_slot_says_whether_its_logits_are_finite(vocab, filtered, greedy, engine):
    logits = torch.randn(len(ROWS), vocab)
    logits[:, vocab - 2] = torch.tensor(list(ROWS.values()))
    images = torch.arange(len(ROWS))
    settings = settings_of(len(ROWS), **{name: torch.full((len(ROWS),), value) for name, value in filtered.items()})
    settings.greedy[:] = greedy
    codes, finite = draw_codes(logits, images, images * 0 - 1, images, images, settings)
    assert finite.tolist() == [True, False, False, False, True]
    assert codes.min() >= 0 and codes.max() < vocab
    _, guided = draw_codes(logits, images * 0, images, images, images, settings, scale=4.0)
    assert guided.tolist() == [True, False, False, False, False]  # 4 times the largest number overflows


def test_what_filters_leave_out_is_finite(engine):
    codes = generate(tiny(), torch.arange(3), 9, top_k=[1, 2, 5], top_p=[0.0, 0.5, 1.0], generators=streams(3))
    assert codes.shape == (3, 9)


def spoilt(value: float):
    model = tiny()
    model.output.weight.data[3, 5] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0}, {"sample_logits": False}, {"top_k": 3}, {"top_p": 0.5},
                                     {"decode": "sequential"}, {"decode": "jacobi"}, {"cfg_scale": [1.0, 3.0, 0.5]}])
def test_logits_that_are_not_finite_are_refused(value, options, engine):
    model, cond = spoilt(value), torch.arange(3)
    if value == 3e38:
        model.output.weight.data[3] = value  # finite weights whose product is not
    with pytest.raises(NotFiniteError, match="logits are not finite, from code 0 on, in 3 of 3 images"):
        generate(model, cond, 9, generators=streams(3), **options)
    assert engine_of(model) is None and not model.training


@pytest.mark.parametrize("decode", ["sequential", "jacobi"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_first_such_code_is_named(decode, cfg_scale, engine):
    """A code whose embedding is not finite: images that draw it are broken from the next code on, others are not.

    Drafts count only if they come true, so windows say the same as code by code.
    """
    model, cond = tiny(), torch.arange(6) % 3
    sound = generate(model, cond, 9, cfg_scale=cfg_scale, generators=streams(6))
    counts = torch.tensor([int((sound[:, :-1] == code).any(1).sum()) for code in range(model.config.vocab_size)])
    code = int(torch.where((counts > 0) & (counts < 6), counts, -1).argmax())
    hit = (sound[:, :-1] == code).any(1)
    model.tok_embeddings.weight.data[code] = float("nan")
    first = int(hit.nonzero()[0])
    after = int((sound[first] == code).nonzero()[0]) + 1
    said = f"from code {after} on, in {int(hit.sum())} of 6 images (the first is number {first} of the batch)"
    with pytest.raises(NotFiniteError, match=re.escape(said)):
        generate(model, cond, 9, cfg_scale=cfg_scale, decode=decode, window=4, generators=streams(6))
    alone = [streams(6)[i] for i in (~hit).nonzero()[:, 0].tolist()]
    assert torch.equal(generate(model, cond[~hit], 9, cfg_scale=cfg_scale, decode=decode, window=4, generators=alone),
                       sound[~hit])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_drafts_that_turn_out_wrong_spoil_nothing(value, engine):
    """They go through the model beside tokens that do not see them, whose logits stay what they are."""
    for seed in range(6):
        model = tiny(seed=seed, grid=(3, 4))
        model.tok_embeddings.weight.data[torch.arange(seed, V, 9)] = value
        decoder, found = CodeDecoder(model), []
        decoder.reserve(4)
        for window in (1, 3, 9):
            for i in range(4):
                decoder.join(Request(i % 3, Raster(np.full(12, 2.0), window=window), 10 * seed + i))
            done = []
            while decoder.active:
                done += decoder.step()
            ends = {one.slot: 12 if one.broken is None else one.broken for one in done}
            found.append([(ends[one.slot], one.codes[:ends[one.slot]].tolist())
                          for one in sorted(done, key=lambda one: one.slot)])
        assert found[0] == found[1] == found[2], seed
