"""Decoding: greedy and guided steps against full forwards, the filters against naive ones, and samples that do not
depend on their batch."""
import math

import pytest
import torch

from autoregressive.models.generate import attention_mask, generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.sampling import check_sampling, draw, filter_logits, guide
from tests.test_gpt import CAPTION, TEXT, V, condition, tiny
from utils.seeding import sample_generator


@torch.no_grad()
def step_by_step(model, cond, steps: int, *, scale: float = 1.0, interval: int = -1, valid=None) -> torch.Tensor:
    """Greedy codes (B, steps), each from full forwards over everything before it, with guidance by its formula."""
    codes = torch.empty(len(cond), 0, dtype=torch.long)
    free = model.cls_embedding.unconditional(cond)
    for step in range(steps):
        length = model.config.cls_token_num + step
        mask = attention_mask(valid, model.config.cls_token_num, length, device=codes.device)
        logits = model(codes, cond, mask=mask)[0][:, -1]
        decoding_step = step - 1  # 0 is the first after the prefill
        if scale > 1 and (interval == -1 or decoding_step <= interval):
            without = model(codes, free, mask=mask)[0][:, -1]
            logits = without + scale * (logits - without)
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], 1)
    return codes


@pytest.mark.parametrize(("scale", "interval"), [(1.0, -1), (3.0, -1), (3.0, 0), (3.0, 4), (3.0, 100), (0.5, 2)])
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_greedy_is_the_argmax_of_full_forwards(kind, scale, interval):
    model = tiny(model_type=kind, n_kv_head=2, grid=(3, 4))
    cond, valid = condition(model, 5)
    expected = step_by_step(model, cond, 12, scale=scale, interval=interval, valid=valid)
    codes = generate(model, cond, 12, emb_masks=valid, cfg_scale=scale, cfg_interval=interval, sample_logits=False)
    assert codes.dtype == torch.long and torch.equal(codes, expected)


def test_the_guidance_interval_matters_in_these_models():
    model = tiny(grid=(3, 4))
    cond = torch.arange(8) % 3
    runs = [step_by_step(model, cond, 12, scale=3.0, interval=interval) for interval in (-1, 0, 4)]
    runs.append(step_by_step(model, cond, 12))
    for i, run in enumerate(runs):
        assert not any(torch.equal(run, other) for other in runs[:i])


def test_a_scale_of_one_or_less_is_no_guidance():
    model, cond = tiny(), torch.arange(6) % 3

    def sample(scale):
        return generate(model, cond, 9, cfg_scale=scale, generators=[sample_generator(0, i) for i in range(6)])

    assert torch.equal(sample(1.0), sample(0.0)) and torch.equal(sample(1.0), sample(-2.0))
    assert not torch.equal(sample(1.0), sample(4.0))


def test_guide_is_its_formula():
    conditional, unconditional = torch.randn(2, 4, V)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 2.5), 2.5 * conditional - 1.5 * unconditional)


def naive_filter(row: list[float], temperature: float, top_k: int, top_p: float) -> set[int]:
    """Which codes survive, in plain Python."""
    scaled = [value / max(temperature, 1e-5) for value in row]
    alive = sorted(range(len(row)), key=lambda i: -scaled[i])
    if top_k > 0:
        alive = alive[:top_k]
    weights = [math.exp(scaled[i] - scaled[alive[0]]) for i in alive]
    kept, mass = set(), 0.0
    for i, weight in zip(alive, weights, strict=True):
        kept.add(i)
        mass += weight / sum(weights)
        if top_p < 1 and mass > top_p:
            break
    return kept


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0, 1e-6, 0.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, V, V + 10])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
def test_filters_are_the_naive_ones(temperature, top_k, top_p):
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(1)) * 2
    found = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, result in zip(logits, found, strict=True):
        kept = naive_filter(row.double().tolist(), temperature, top_k, top_p)
        assert set(result.isfinite().nonzero().flatten().tolist()) == kept
        alive = sorted(kept)
        torch.testing.assert_close(result[alive], row[alive] / max(temperature, 1e-5))
    assert not draw(found, [sample_generator(0, i) for i in range(6)]).isnan().any()


def test_temperature_zero_takes_the_best_code():
    model, cond = tiny(), torch.arange(5) % 3
    greedy = generate(model, cond, 9, sample_logits=False)
    for settings in ({"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 0.0}):
        assert torch.equal(generate(model, cond, 9, **settings), greedy), settings


def test_ties_at_the_edge_of_top_k_are_kept():
    found = filter_logits(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), top_k=2)
    assert found.isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.7, "temperature": 1.5}], ids=str)
def test_draws_follow_the_probabilities(settings):
    """Chi-square of 8,000 draws; the limit is exceeded by a right sampler less than once in 10,000 seeds."""
    logits = filter_logits(torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0, -3.0]]), **settings)
    count = 8_000
    drawn = draw(logits.expand(count, -1), [sample_generator(7, i) for i in range(count)])
    expected = logits[0].softmax(-1) * count
    seen = torch.bincount(drawn, minlength=6)
    alive = expected > 0
    assert not seen[~alive].any()
    assert ((seen - expected)[alive] ** 2 / expected[alive]).sum().item() < 26  # 5 degrees of freedom or fewer


def test_draws_of_one_stream_are_independent():
    generator = sample_generator(0, 0)
    drawn = torch.cat([draw(torch.zeros(1, 4), [generator]) for _ in range(4000)])
    pairs = torch.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    assert ((pairs - 3999 / 16) ** 2 / (3999 / 16)).sum().item() < 45


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("options", [
    {"vocab_size": 256, "grid": (3, 3)},
    {"vocab_size": 16384, "dim": 192, "n_head": 6, "n_layer": 2},
    {"vocab_size": 1000, "dim": 768, "n_head": 12, "n_kv_head": 4, "n_layer": 1},
    {"vocab_size": 512, "n_head": 4, "model_type": "t2i", "cls_token_num": TEXT, "caption_dim": CAPTION},
], ids=["S", "192", "768", "t2i"])
def test_a_sample_is_the_same_alone_and_in_any_batch(options, scale, monkeypatch):
    """Not only its codes: what they are drawn from, to the last bit, so that no near tie can tell batches apart."""
    torch.manual_seed(3)
    model = GPT_models["GPT-S"](**{"num_classes": 3, "grid": (2, 3), **options}).eval()
    torch.nn.init.normal_(model.output.weight, std=0.05)
    cond, valid = condition(model, 9) if "model_type" in options else (torch.arange(9) % 3, None)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("autoregressive.models.generate.draw",
                        lambda logits, generators: (seen.append(logits), draw(logits, generators))[1])

    def sample(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        seen.clear()
        codes = generate(model, cond[list(rows)], model.config.block_size, cfg_scale=scale, cfg_interval=2,
                         emb_masks=None if valid is None else valid[list(rows)],
                         generators=[sample_generator(5, i) for i in rows])
        return codes, torch.stack(seen, 1)  # (B, L), (B, L, V)

    codes, logits = sample(range(9))
    assert len(torch.unique(codes, dim=0)) == 9
    for size in (1, 2, 3, 5, 7, 8):
        parts = [sample(range(first, min(first + size, 9))) for first in range(0, 9, size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), codes), size
        assert torch.equal(torch.cat([part[1] for part in parts]), logits), size


def test_without_generators_the_global_seed_decides():
    model, cond = tiny(), torch.arange(3)

    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, cond, 9)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_bfloat16_models_sample(kind):
    model = tiny(model_type=kind).bfloat16()
    cond, valid = condition(model, 3)
    cond = cond if kind == "c2i" else cond.bfloat16()
    codes = generate(model, cond, 9, emb_masks=valid, cfg_scale=2.0)
    assert codes.shape == (3, 9) and codes.min() >= 0 and codes.max() < V


@pytest.mark.parametrize(("changes", "message"), [
    ({"cond": torch.tensor([0, 4])}, r"labels lie in \[0, 4\]"), ({"cond": torch.tensor([-1, 0])}, "labels"),
    ({"max_new_tokens": 10}, "holds 1 to 9"), ({"max_new_tokens": 0}, "holds 1 to 9"),
    ({"generators": [torch.Generator()]}, "1 generators for 2 samples"), ({"temperature": -1.0}, "--temperature"),
    ({"top_k": -1}, "--top-k"), ({"top_p": 1.5}, "--top-p"), ({"top_p": -0.1}, "--top-p"),
    ({"temperature": math.nan}, "--temperature")])
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **{"cond": torch.tensor([0, 1]), "max_new_tokens": 9, **changes})


@pytest.mark.parametrize("changes", [
    {"cond": torch.randn(2, TEXT - 1, CAPTION)}, {"cond": torch.randn(2, TEXT, CAPTION + 1)},
    {"emb_masks": torch.ones(2, TEXT + 1)}, {"emb_masks": torch.ones(3, TEXT)}])
def test_text_features_of_another_shape_are_refused(changes):
    with pytest.raises(ValueError, match=r"expected|the model takes"):
        generate(tiny(model_type="t2i"), **{"cond": torch.randn(2, TEXT, CAPTION), "max_new_tokens": 9, **changes})


def test_no_class_can_be_sampled():
    assert generate(tiny(), torch.tensor([3]), 4).shape == (1, 4)


def test_settings_in_range_pass():
    check_sampling(temperature=0.0, top_k=0, top_p=0.0)
    check_sampling(temperature=2.0, top_k=10**6, top_p=1.0)
