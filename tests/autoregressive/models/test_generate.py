"""Decoding: its codes against full forwards, on both engines and in both ways; settings per image; refusals."""
import math

import pytest
import torch

from autoregressive.models.generate import generate
from tests.autoregressive.models.decoding import engine_of, keys_of, plain_codes, streams
from tests.autoregressive.models.test_gpt import CAPTION, TEXT, V, condition, tiny

WAYS = [{"decode": "sequential"}, *({"decode": "jacobi", "window": window} for window in (2, 3, 7, 50))]
BOTH = [{"decode": "sequential"}, {"decode": "jacobi", "window": 3}]
MASKS = {  # of text tokens, five images
    "left": [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "right": [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    "last hidden": [[1, 1, 1, 1, 0]] * 5,
    "mixed": [[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 1], [0, 1, 0, 1, 0]],
    "visible": [[1] * 5] * 5,
    "none": None}


@pytest.mark.parametrize(("scale", "interval"), [(1.0, -1), (3.0, -1), (3.0, 0), (3.0, 4), (3.0, 100), (0.5, 2)])
@pytest.mark.parametrize("options", [
    {}, {"n_kv_head": 2, "grid": (3, 4)}, {"n_kv_head": 1, "grid": (2, 5)}, {"dim": 40, "n_head": 2, "grid": (1, 7)},
    {"model_type": "t2i", "n_kv_head": 2, "grid": (4, 2)}], ids=str)
def test_greedy_is_the_argmax_of_full_forwards(options, scale, interval, engine):
    model = tiny(**options)
    cond, valid = condition(model, 5)
    length = model.config.block_size
    expected = plain_codes(model, cond, length, scale=scale, interval=interval, valid=valid)
    for way in WAYS:
        codes = generate(model, cond, length, emb_masks=valid, cfg_scale=scale, cfg_interval=interval,
                         sample_logits=False, **way)
        assert codes.dtype == torch.long and torch.equal(codes, expected), way
    assert type(engine_of(model)) is engine


def test_without_guidance_there_is_one_stream(engine, monkeypatch):
    rows, reserve = [], engine.reserve

    def recording(self, count: int, tokens: int) -> bool:
        rows.append(count)
        return reserve(self, count, tokens)

    monkeypatch.setattr(engine, "reserve", recording)
    for scale in (0.5, 1.0, 1.5):
        generate(tiny(), torch.arange(8) % 3, 9, cfg_scale=scale, decode="sequential")
    assert rows == [8, 8, 16]


@pytest.mark.parametrize("way", BOTH, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_hidden_text_is_not_seen(name, way, engine):
    model = tiny(model_type="t2i", grid=(3, 4))
    cond, mask = torch.randn(5, TEXT, CAPTION), MASKS[name]
    valid = None if mask is None else torch.tensor(mask)
    for scale, interval in ((1.0, -1), (3.0, -1), (3.0, 2)):
        expected = plain_codes(model, cond, 12, scale=scale, interval=interval, valid=valid, keys=keys_of(streams(5)))
        codes = generate(model, cond, 12, emb_masks=valid, cfg_scale=scale, cfg_interval=interval,
                         generators=streams(5), **way)
        assert torch.equal(codes, expected), scale
    assert type(engine_of(model)) is engine


def test_masks_settings_and_intervals_matter_in_these_models():
    model, text = tiny(grid=(3, 4)), tiny(model_type="t2i", grid=(3, 4))
    cond, features = torch.arange(5) % 3, torch.randn(5, TEXT, CAPTION)
    keys = keys_of(streams(5))
    runs = [plain_codes(model, cond, 12, scale=3.0, interval=interval, keys=keys) for interval in (-1, 0, 4)]
    runs += [plain_codes(model, cond, 12, keys=keys, **one) for one in (
        {}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.5})]
    runs += [plain_codes(text, features, 12, valid=None if mask is None else torch.tensor(mask), keys=keys)
             for name, mask in MASKS.items() if name != "none"]
    for i, run in enumerate(runs):
        assert not any(torch.equal(run, other) for other in runs[:i]), i


@pytest.mark.parametrize("settings", [
    {}, {"cfg_scale": 2.0}, {"cfg_scale": 4.0, "cfg_interval": 3, "temperature": 1.5, "top_k": 9},
    {"cfg_scale": 1.5, "top_p": 0.8}, {"top_k": 20, "top_p": 0.9, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("options", [{"grid": (3, 4)}, {"vocab_size": 300, "n_kv_head": 2}, {"model_type": "t2i"}],
                         ids=str)
def test_a_sample_is_the_largest_of_logits_and_noise(options, settings, engine):
    model = tiny(**options)
    cond, valid = condition(model, 5)
    length = model.config.block_size
    plain = {name.removeprefix("cfg_"): value for name, value in settings.items()}
    expected = plain_codes(model, cond, length, keys=keys_of(streams(5)), valid=valid, **plain)
    for way in WAYS:
        codes = generate(model, cond, length, emb_masks=valid, generators=streams(5), **way, **settings)
        assert torch.equal(codes, expected), way
    assert type(engine_of(model)) is engine


MIXED = {"cfg_scale": [1.0, 3.0, 0.0, -2.0, 1.5, 7.0, 1.0, 2.0], "top_p": [0.0, 0.5, 1.0, 0.9, 1.0, 0.5, 1.0, 1.0],
         "temperature": [1.0, 0.0, 1e-6, 2.0, 1.0, 2.0, 0.5, 1.0], "top_k": [0, 1, V, V + 5, 3, 0, 2, 0]}


@pytest.mark.parametrize("changes", [{}, {"cfg_interval": 3}, {"sample_logits": False}, {"top_p": 1.0, "top_k": 0}],
                         ids=str)
@pytest.mark.parametrize("way", BOTH, ids=str)
def test_every_image_has_its_own_settings(way, changes, engine):
    model, cond = tiny(grid=(3, 4)), torch.arange(8) % 3
    settings = {**MIXED, **changes}
    together = generate(model, cond, 12, generators=streams(8), **way, **settings)
    tensors = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in settings.items()}
    assert torch.equal(generate(model, cond, 12, generators=streams(8), **way, **tensors), together)
    for i in range(8):
        own = {name: value[i] if isinstance(value, list) else value for name, value in settings.items()}
        alone = generate(model, cond[i:i + 1], 12, generators=streams(8)[i:i + 1], **way, **own)
        assert torch.equal(alone[0], together[i]), (i, own)
    assert type(engine_of(model)) is engine


def test_a_scale_of_one_or_less_is_no_guidance(engine):
    model, cond = tiny(), torch.arange(6) % 3

    def sample(scale):
        return generate(model, cond, 9, cfg_scale=scale, generators=streams(6))

    assert torch.equal(sample(1.0), sample(0.0)) and torch.equal(sample(1.0), sample(-2.0))
    assert not torch.equal(sample(1.0), sample(4.0))


def test_temperature_zero_takes_the_best_code(engine):
    model, cond = tiny(), torch.arange(5) % 3
    greedy = generate(model, cond, 9, sample_logits=False)
    for settings in ({"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 0.0}):
        assert torch.equal(generate(model, cond, 9, **settings), greedy), settings


def test_without_generators_the_global_seed_decides(engine):
    model, cond = tiny(), torch.arange(3)

    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, cond, 9)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize(("changes", "message"), [
    ({"cond": torch.tensor([0, 4])}, r"labels lie in \[0, 4\]"), ({"cond": torch.tensor([-1, 0])}, "labels"),
    ({"max_new_tokens": 10}, "holds 1 to 9"), ({"max_new_tokens": 0}, "holds 1 to 9"),
    ({"cond": torch.empty(0, dtype=torch.long)}, "batch is empty"),
    ({"generators": [torch.Generator()]}, "1 generators for 2 samples"), ({"temperature": -1.0}, "--temperature"),
    ({"top_k": -1}, "--top-k"), ({"top_p": 1.5}, "--top-p"), ({"top_p": -0.1}, "--top-p"),
    ({"temperature": math.nan}, "--temperature"), ({"temperature": [1.0, math.inf]}, "--temperature is inf"),
    ({"top_k": [0, -3]}, "--top-k is -3"), ({"top_p": [2.0, 1.0]}, "--top-p is 2.0"),
    ({"cfg_scale": [1.0]}, "1 values of cfg_scale for 2 samples"),
    ({"top_k": [1, 2, 3]}, "3 values of top_k for 2 samples"), ({"top_p": []}, "0 values of top_p for 2 samples"),
    ({"temperature": torch.ones(3)}, "3 values of temperature for 2 samples"),
    ({"decode": "parallel"}, "--decode is 'parallel', expected auto, sequential or jacobi"),
    ({"window": 0}, "window is 0, expected 1 or more"), ({"window": -2, "decode": "jacobi"}, "window is -2")])
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **{"cond": torch.tensor([0, 1]), "max_new_tokens": 9, **changes})


@pytest.mark.parametrize("changes", [
    {"cond": torch.randn(2, TEXT - 1, CAPTION)}, {"cond": torch.randn(2, TEXT, CAPTION + 1)},
    {"emb_masks": torch.ones(2, TEXT + 1)}, {"emb_masks": torch.ones(3, TEXT)}])
def test_text_features_of_another_shape_are_refused(changes):
    with pytest.raises(ValueError, match=r"expected|the model takes"):
        generate(tiny(model_type="t2i"), **{"cond": torch.randn(2, TEXT, CAPTION), "max_new_tokens": 9, **changes})


def test_no_class_can_be_sampled(engine):
    assert generate(tiny(), torch.tensor([3]), 4).shape == (1, 4)
