"""Noise, filters and draws: known answers, distributions, C++ against PyTorch, images against their probabilities."""
import itertools
import math

import pytest
import torch

from autoregressive.models import sampling
from autoregressive.models.generate import generate
from autoregressive.models.sampling import Settings, check_sampling, draw, filter_logits, guide, gumbel, philox
from tests.autoregressive.models.decoding import chi_square_tail, draw_codes, engine_of, plain_logits
from tests.autoregressive.models.test_gpt import V, tiny

RARE = 1e-4  # of seeds, in which a right sampler fails a test


def settings_of(count: int, **changes) -> Settings:
    """Settings that change nothing, for `count` images."""
    ones, zeros = torch.ones(count), torch.zeros(count, dtype=torch.long)
    plain = {"temperature": ones, "top_k": zeros, "top_p": ones, "key": torch.arange(count) * 2**33 + 7,
             "greedy": torch.zeros(count, dtype=torch.bool),
             "largest_k": 20000, "uses_top_p": True}
    return Settings(**{**plain, **changes})


@pytest.mark.parametrize(("counter", "key", "words"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))], ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, words):
    low, high = key
    key = torch.tensor([(high << 32 | low) - (2**64 if high >> 31 else 0)])
    assert tuple(int(word) for word in philox(key, *(torch.tensor([c]) for c in counter))) == words


def test_the_noise_is_gumbel_s():
    noise = gumbel(torch.arange(100) + 2**61, torch.arange(100) * 31, 4001)
    count = noise.numel()
    assert noise.dtype == torch.float32 and noise.isfinite().all() and noise.unique().numel() > 0.95 * count
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * (math.pi**2 / 6 / count) ** 0.5)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=4 * (4.4 * (math.pi**2 / 6) ** 2 / count) ** 0.5)
    uniform = torch.exp(-torch.exp(-noise.flatten().double())).sort().values
    steps = torch.arange(1, count + 1) / count
    distance = torch.maximum((uniform - steps).abs(), (uniform - steps + 1 / count).abs()).max().item()
    assert distance * count**0.5 < 2.23  # Kolmogorov-Smirnov: 2 exp(-2 d^2 n) = RARE
    for shift in (1, 2, 3, 4, 8, 32):  # codes are independent of each other, and so are positions
        a, b = noise[:, shift:].flatten(), noise[:, :-shift].flatten()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 4 / len(a) ** 0.5
    assert abs(torch.corrcoef(torch.stack([noise[1:].flatten(), noise[:-1].flatten()]))[0, 1].item()) < 0.01


def test_noise_is_a_function_of_key_position_and_code():
    keys, places = torch.tensor([5, 5, 5 + 2**32, 6]), torch.tensor([1, 2, 1, 1])
    noise = gumbel(keys, places, 40)
    assert len(noise.unique(dim=0)) == 4
    assert torch.equal(noise[:, :33], gumbel(keys, places, 33))
    assert torch.equal(noise[2:3], gumbel(keys[2:3], places[2:3], 40))


@pytest.mark.parametrize(("bits", "value"), [(0, 33 * math.log(2)), (2**32 - 1, -math.log(24 * math.log(2)))])
def test_the_extremes_of_the_noise_are_finite(bits, value, monkeypatch):
    monkeypatch.setattr(sampling, "philox", lambda keys, *counters: [torch.full((1, 2), bits)] * 4)
    torch.testing.assert_close(gumbel(torch.tensor([1]), torch.tensor([1]), 8), torch.full((1, 8), value))


# ---- draws from given logits


def random_settings(count: int) -> Settings:
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (count,))]  # noqa: E731
    return settings_of(count, temperature=pick(1.0, 0.3, 2.0, 1e-6, 0.0),
                       top_k=pick(0, 1, 2, 5, 31, 100, 20000), top_p=pick(1.0, 0.0, 0.3, 0.9, 0.999))


@pytest.mark.parametrize("vocab", [5, 31, 32, 33, 1000, 16384])
def test_kernels_draw_what_pytorch_draws(vocab, native, monkeypatch):
    torch.manual_seed(vocab)
    rows, slots, images = 24, 400 if vocab < 10000 else 60, 20
    logits = (torch.randn(rows, vocab + 3) * 3)[:, :vocab]  # rows lie apart
    conditional, other = torch.randint(rows, (slots,)), torch.randint(-1, rows, (slots,))
    positions, owner = torch.randint(576, (slots,)), torch.randint(images, (slots,))
    chosen, scale = random_settings(images), torch.randn(images) * 3
    for greedy in (torch.zeros(images), torch.ones(images), torch.arange(images) % 2):
        chosen.greedy = greedy.bool()
        monkeypatch.setenv("LLAMAGEN_NATIVE", "1")
        ours, finite = draw_codes(logits, conditional, other, positions, owner, chosen, scale=scale)
        monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
        again, _ = draw_codes(logits, conditional, other, positions, owner, chosen, scale=scale)
        assert torch.equal(again, ours) and finite.all()
        assert ours.dtype == torch.long and ours.max() < vocab and len(ours.unique()) > 3


@pytest.mark.parametrize("top_k", [1, 3, 200, 400, 450, 499])
def test_the_edge_of_top_k_among_ties_zeros_and_infinities(top_k, native, monkeypatch):
    """Logits 1 and -1, zeros of both signs, -infinity: a hundred of each."""
    values = torch.tensor([1.0, -1.0, 0.0, -0.0, -math.inf]).repeat(100)[None]
    count = 3000
    places, drawn = torch.zeros(count, dtype=torch.long), {}
    for kernels in ("1", "0"):
        monkeypatch.setenv("LLAMAGEN_NATIVE", kernels)
        drawn[kernels], _ = draw_codes(values, places, places - 1, places, torch.arange(count),
                                       settings_of(count, top_k=torch.full((count,), top_k)))
    assert torch.equal(drawn["1"], drawn["0"])
    kept = {1: {1.0}, 3: {1.0}, 200: {1.0, 0.0}, 400: {1.0, 0.0, -1.0}}.get(top_k, {1.0, 0.0, -1.0})
    assert set(values[0, drawn["1"]].tolist()) == kept


@pytest.mark.parametrize("vocab", [5, 33, 300])
def test_every_code_of_equal_logits_comes_equally_often(vocab, engine):
    count = 40_000
    drawn, _ = draw_codes(torch.zeros(1, vocab), torch.zeros(count, dtype=torch.long), torch.full((count,), -1),
                   torch.arange(count) % 20, torch.arange(count) // 20, settings_of(count // 20))
    assert chi_square_tail(torch.bincount(drawn, minlength=vocab), torch.full((vocab,), count / vocab)) > RARE


@pytest.mark.parametrize("changes", [
    {}, {"top_k": 4}, {"top_p": 0.7, "temperature": 1.5}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0.4}], ids=str)
def test_draws_follow_the_probabilities(changes, engine):
    """Chi-square with at most five degrees of freedom."""
    logits, count = torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0, -3.0]]), 20_000
    plain = settings_of(count)
    own = {name: torch.full((count,), value, dtype=getattr(plain, name).dtype) for name, value in changes.items()}
    zeros = torch.zeros(count, dtype=torch.long)
    drawn, _ = draw_codes(logits, zeros, zeros - 1, zeros + 3, torch.arange(count), settings_of(count, **own))
    expected = filter_logits(logits, **changes)[0].softmax(-1) * count
    assert chi_square_tail(torch.bincount(drawn, minlength=6), expected) > RARE


def test_the_codes_of_one_image_are_independent(engine):
    count, zeros = 20_000, torch.zeros(20_000, dtype=torch.long)
    drawn, _ = draw_codes(torch.zeros(1, 4), zeros, zeros - 1, torch.arange(count), zeros, settings_of(1))
    pairs = torch.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    assert chi_square_tail(pairs, torch.full((16,), (count - 1) / 16)) > RARE


# ---- whole images


@pytest.mark.parametrize("changes", [
    {}, {"cfg_scale": 2.5, "temperature": 0.8}, {"cfg_scale": 3.0, "cfg_interval": 0, "temperature": 1.5},
    {"top_k": 3}, {"cfg_scale": 1.5, "top_p": 0.8, "temperature": 1.3}], ids=str)
@pytest.mark.parametrize("way", ["sequential", "jacobi"])
def test_images_come_as_often_as_their_probability_says(changes, way, engine):
    """Chi-square of all 125 images of three codes, each probability by full forwards; <= 124 degrees of freedom."""
    vocab, length, count = 5, 3, 4000
    model = tiny(vocab_size=vocab, grid=(1, 3), head=0.06)
    images = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    cond = torch.ones(len(images), dtype=torch.long)
    log_probability = torch.zeros(len(images))
    filters = {name: value for name, value in changes.items() if not name.startswith("cfg")}
    for i in range(length):
        logits = plain_logits(model, images[:, :i], cond, scale=changes.get("cfg_scale", 1.0),
                              interval=changes.get("cfg_interval", -1))
        chances = filter_logits(logits, **filters).log_softmax(-1)
        log_probability += chances.gather(1, images[:, i:i + 1])[:, 0]
    expected = log_probability.exp() * count
    assert (expected > 5).sum() > 20 and expected.max() < count / 2  # a distribution worth testing

    torch.manual_seed(11)
    codes = generate(model, torch.ones(count, dtype=torch.long), length, decode=way, **changes)
    seen = torch.bincount(codes @ torch.tensor([vocab**2, vocab, 1]), minlength=len(images))
    assert chi_square_tail(seen, expected) > RARE
    assert type(engine_of(model)) is engine


def test_the_chi_square_test_fails_on_wrong_chances():
    expected = torch.tensor([100.0, 200.0, 300.0, 3.0, 2.0, 0.0])
    assert chi_square_tail(torch.tensor([110, 190, 300, 3, 2, 0]), expected) > 0.1
    assert chi_square_tail(torch.tensor([150, 150, 300, 3, 2, 0]), expected) < 1e-6
    assert chi_square_tail(torch.tensor([5, 5]), torch.tensor([5.0, 5.0])) == 1
    distance = torch.tensor([60.0, 40.0])  # (10^2 / 50) * 2 = 4 with one degree of freedom: 4.55 %
    assert chi_square_tail(distance, torch.tensor([50.0, 50.0])) == pytest.approx(0.0455, abs=1e-4)
    with pytest.raises(AssertionError):
        chi_square_tail(torch.tensor([100, 200, 300, 3, 1, 1]), expected)


# ---- filters


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
    rows = filter_logits(logits, temperature=torch.full((6,), temperature), top_k=torch.full((6,), top_k),
                         top_p=torch.full((6,), top_p))
    assert torch.equal(found, rows)
    for row, result in zip(logits, found, strict=True):
        kept = naive_filter(row.double().tolist(), temperature, top_k, top_p)
        assert set(result.isfinite().nonzero().flatten().tolist()) == kept
        alive = sorted(kept)
        torch.testing.assert_close(result[alive], row[alive] / max(temperature, 1e-5))
        assert int(draw(result[None], torch.tensor([3]), torch.tensor([0]))) in kept


def test_ties_at_the_edge_of_top_k_are_kept(engine):
    logits, count = torch.tensor([[3.0, 1.0, 1.0, 0.0]]), 300
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]
    zeros = torch.zeros(count, dtype=torch.long)
    top_k = settings_of(count, top_k=zeros + 2, temperature=torch.full((count,), 3.0))
    assert draw_codes(logits, zeros, zeros - 1, zeros, torch.arange(count), top_k)[0].unique().tolist() == [0, 1, 2]
    best_of_ties = settings_of(count, top_p=torch.full((count,), 0.0))
    ties = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert draw_codes(ties, zeros, zeros - 1, zeros, torch.arange(count), best_of_ties)[0].unique().tolist() == [1]


def test_settings_in_range_pass():
    check_sampling(temperature=0.0, top_k=0, top_p=0.0)
    check_sampling(temperature=2.0, top_k=10**6, top_p=1.0)
