"""Requests that join and leave at any step; orders, groups and guidance of all kinds; room, errors, retries."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.models import decoder as module
from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.generate import generate
from autoregressive.models.native_engine import NativeEngine
from autoregressive.models.plan import Groups, Raster, Request
from autoregressive.models.sampling import gumbel
from tests.autoregressive.models.decoding import streams
from tests.autoregressive.models.small_arpg import plain_codes
from tests.autoregressive.models.small_arpg import tiny as tiny_arpg
from tests.autoregressive.models.test_gpt import CAPTION, TEXT, V, tiny

MANY = 1000


def run(decoder: CodeDecoder) -> dict[int, torch.Tensor]:
    """Steps until nobody is left; the codes by slot."""
    found = {}
    while decoder.active:
        found |= {done.slot: done.codes for done in decoder.step()}
    return found


def scales_of(kind: int, length: int) -> np.ndarray:
    """No guidance, guidance throughout, at the beginning, rising from below one, in between."""
    steps = np.arange(length)
    return [np.ones(length), np.full(length, 3.0), np.where(steps < length // 2, 2.0, 1.0), 0.5 + steps / 3,
            np.where(steps == length // 2, 4.0, 0.0)][kind]


def random_request(model, seed: int) -> Request:
    """Anything that a request may be, for a GPT."""
    rng, length = random.Random(seed), model.config.block_size
    text = model.config.model_type == "t2i"
    features = torch.randn(TEXT, CAPTION, generator=torch.Generator().manual_seed(seed % 40))
    known = rng.choice([0, 0, 0, 1, 4])
    plan = Raster(scales_of(rng.randrange(5), length), known=known, window=rng.choice([1, 1, 2, 5]),
                  price=rng.choice([0, 9]))
    visible = torch.tensor([rng.random() < 0.6 for _ in range(TEXT)]) if text and rng.random() < 0.8 else None
    return Request(features.to(model.output.weight.dtype) if text else rng.randrange(4), plan, rng.randrange(2**62),
                   rng.choice([1.0, 0.5, 2.0, 0.0]), rng.choice([0, 0, 3, V + 2]), rng.choice([1.0, 1.0, 0.7, 0.0]),
                   visible, rng.random() < 0.1,
                   torch.randint(V, (known,), generator=torch.Generator().manual_seed(seed)) if known else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_a_thousand_requests_join_and_leave_at_random(kind, dtype, native):
    """Every image is the one that is made alone, to the last bit of what it is drawn from: so all codes are equal."""
    model = tiny(grid=(3, 4), model_type=kind, n_kv_head=2).to(dtype)
    alone, decoder, rng = CodeDecoder(model), CodeDecoder(model), random.Random(0)
    alone.reserve(1)
    decoder.reserve(7)
    waiting, running, expected, finished, cancelled = iter(range(MANY)), {}, {}, 0, 0
    left = MANY
    while left or running:
        while left and decoder.free and rng.random() < 0.6:
            seed = next(waiting)
            left -= 1
            running[decoder.join(random_request(model, seed))] = seed
        if running and rng.random() < 0.05:
            slot = rng.choice(sorted(running))
            decoder.leave(slot)
            del running[slot]
            cancelled += 1
        for done in decoder.step():
            seed = running.pop(done.slot)
            slot = alone.join(random_request(model, seed))
            expected = run(alone)[slot]
            assert torch.equal(done.codes, expected) and done.broken is None, seed
            finished += 1
    assert finished + cancelled == MANY and finished > 500 and cancelled > 50
    assert sorted(decoder.free) == list(range(7)) and len(decoder.codes) == 7


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_on_pytorch_s_modules_requests_join_and_leave_too(kind, engine):
    """Greedy codes, as rounding may differ with what is beside a row."""
    model, rng = tiny(grid=(3, 4), model_type=kind), random.Random(1)
    decoder, running = CodeDecoder(model), {}
    decoder.reserve(5)
    for seed in range(40):
        request = random_request(model, seed)
        request.temperature, request.greedy = 1.0, True
        while not decoder.free or (decoder.active and rng.random() < 0.5):
            check_alone(model, decoder.step(), running)
        running[decoder.join(request)] = (seed, request)
    while decoder.active:
        check_alone(model, decoder.step(), running)
    assert not running


def check_alone(model, finished, running) -> None:
    for done in finished:
        seed, _ = running.pop(done.slot)
        decoder, request = CodeDecoder(model), random_request(model, seed)
        decoder.reserve(1)
        request.temperature, request.greedy = 1.0, True
        decoder.join(request)
        assert torch.equal(done.codes, run(decoder)[0]), seed


def test_a_plan_of_a_plain_raster_is_what_generate_does(engine):
    model, cond = tiny(grid=(3, 4)), torch.arange(3)
    expected = generate(model, cond, 12, cfg_scale=3.0, cfg_interval=4, top_k=9, generators=streams(3))
    decoder = CodeDecoder(model)
    decoder.reserve(4)
    keys = [int(torch.randint(2**62, (), generator=g)) for g in streams(3)]
    scales = np.where(np.arange(12) < 6, 3.0, 1.0)
    for label in (1, 0, 2):
        decoder.join(Request(label, Raster(scales), keys[label], top_k=9))
    assert torch.equal(torch.stack([codes for _, codes in sorted(run(decoder).items())]), expected[[1, 0, 2]])


def test_known_codes_stay_and_the_rest_follows_them(engine):
    model = tiny(grid=(3, 4))
    decoder = CodeDecoder(model)
    decoder.reserve(2)
    whole = Request(1, Raster(np.full(12, 2.0)), 77)
    decoder.join(whole)
    expected = run(decoder)[0]
    for known in (1, 5, 11):
        decoder.join(Request(1, Raster(np.full(12, 2.0), known=known), 77, known=expected[:known]))
        other = (expected[:known] + 1) % V
        slot = decoder.join(Request(1, Raster(np.full(12, 2.0), known=known, window=3), 77, known=other))
        found = run(decoder)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[slot][:known], other)


# ---- any order, with a second stream


def groups(seed: int, length: int, *, known: int = 0) -> SimpleNamespace:
    rng = random.Random(seed)
    order = rng.sample(range(length), length)
    sizes = []
    while (rest := length - known - sum(sizes)) > 0:
        sizes.append(rng.randint(1, min(rest, 5)))
    return SimpleNamespace(order=order, sizes=sizes, scales=scales_of(seed % 5, length), seed=seed,
                           known=[rng.randrange(V) for _ in range(known)])


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_groups_in_any_order_are_those_of_whole_forwards(kv_heads, engine):
    model, length = tiny_arpg(grid=(3, 5), n_kv_head=kv_heads), 15
    plans = [groups(seed, length, known=known) for seed, known in ((0, 0), (1, 0), (2, 4), (3, 0), (4, 14), (6, 1))]
    decoder, slots, found = CodeDecoder(model), {}, {}
    decoder.reserve(4)
    waiting = list(plans)
    while waiting or decoder.active:
        if waiting and decoder.free:  # one joins at every step
            plan = waiting.pop(0)
            slots[decoder.join(Request(plan.seed % 3, Groups(np.array(plan.order), plan.scales, plan.sizes,
                                                             known=len(plan.known)), plan.seed,
                                       known=torch.tensor(plan.known) if plan.known else None))] = plan.seed
        found |= {slots[done.slot]: done.codes.tolist() for done in decoder.step()}
    assert type(decoder.engine) is engine
    for plan in plans:
        def drawn(logits: torch.Tensor, cell: int, plan=plan) -> int:
            return int((logits + gumbel(torch.tensor([plan.seed]), torch.tensor([cell]), V)[0]).argmax())

        assert found[plan.seed] == plain_codes(model, plan.seed % 3, plan, drawn), plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_do_not_depend_on_what_is_beside_them(dtype, native):
    model, together, alone = tiny_arpg(grid=(4, 4)).to(dtype), None, []
    for size in (1, 6):
        decoder = CodeDecoder(model)
        decoder.reserve(size)
        found = []
        for first in range(0, 6, size):
            for seed in range(first, first + size):
                plan = groups(seed, 16)
                decoder.join(Request(seed % 3, Groups(np.array(plan.order), plan.scales, plan.sizes), seed))
            found += [codes for _, codes in sorted(run(decoder).items())]
        together, alone = torch.stack(found), together
    assert torch.equal(together, alone)


# ---- room, errors


def test_what_does_not_fit_is_refused_and_nothing_is_taken(engine):
    model = tiny(grid=(3, 4))
    decoder, plan = CodeDecoder(model), Raster(np.ones(12))
    decoder.reserve(1, length=9, guided=False)
    for request, message in (
            (Request(0, plan, 1), "12 codes without guidance does not fit: there is room for 9 without"),
            (Request(0, Raster(np.full(9, 2.0)), 1), "9 codes with guidance does not fit"),
            (Request(4, Raster(np.ones(9)), 1), "class 4 is out of range: the model has 0 to 2"),
            (Request(-1, Raster(np.ones(9)), 1), "class -1"), (Request(0, Raster(np.ones(9)), 1, top_k=-1), "--top-k"),
            (Request(0, Raster(np.ones(9), known=2), 1), "2 known codes, the request 0"),
            (Request(0, Raster(np.ones(9), known=1), 1, known=torch.tensor([V])), "codes lie in"),
            (Request(0, Raster(np.ones(9)), 2**70), "key"),
            (Request(0, Groups(np.arange(9), np.ones(9), [4, 5]), 1), "in raster order: the plan is Groups")):
        with pytest.raises(ValueError, match=message):
            decoder.join(request)
        assert decoder.free == [0] and not decoder.active
    decoder.join(Request(0, Raster(np.ones(9)), 1))
    with pytest.raises(RuntimeError, match="all 1 slots are taken"):
        decoder.join(Request(0, Raster(np.ones(9)), 1))
    any_order = tiny_arpg(grid=(3, 4))
    other = CodeDecoder(any_order)
    other.reserve(1)
    with pytest.raises(ValueError, match="in groups, others in raster order: the plan is Raster"):
        other.join(Request(0, Raster(np.ones(12)), 1))
    with pytest.raises(AssertionError, match="1 requests"):
        decoder.reserve(2)
    decoder.step()
    begun = decoder.active[0].request
    decoder.leave(0)
    with pytest.raises(ValueError, match="the plan has begun"):
        decoder.join(begun)
    with pytest.raises(KeyError):
        decoder.leave(0)
    assert decoder.step() == []


def test_two_requests_do_not_share_a_plan(engine):
    model = tiny()
    decoder, plan = CodeDecoder(model), Raster(np.ones(9))
    decoder.reserve(2)
    decoder.join(Request(0, plan, 1))
    with pytest.raises(ValueError, match="plan is that of another request"):
        decoder.join(Request(1, plan, 2))
    assert len(run(decoder)) == 1


def test_models_in_training_mode_are_refused(engine):
    model = tiny().train()
    with pytest.raises(ValueError, match=r"in training mode, .* model\.eval\(\)"):
        CodeDecoder(model).reserve(1)


def test_a_decoder_made_in_inference_mode_works_outside(engine):
    model = tiny()
    decoder, plain = CodeDecoder(model), CodeDecoder(model)
    with torch.inference_mode():
        decoder.reserve(1)
        decoder.join(Request(0, Raster(np.ones(9)), 1))
        decoder.step()
    plain.reserve(1)
    plain.join(Request(0, Raster(np.ones(9)), 1))
    assert torch.equal(run(decoder)[0], run(plain)[0])


@torch.no_grad()
def test_room_that_could_not_be_had_is_asked_for_again(engine, monkeypatch):
    model = tiny()
    decoder = CodeDecoder(model)
    for name in ("empty", "zeros") if engine is NativeEngine else ("zeros",):
        with monkeypatch.context() as context:
            context.setattr(torch, name, lambda *args, **keywords: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                decoder.reserve(4)
    decoder.reserve(2)
    decoder.join(Request(0, Raster(np.ones(9)), 1))
    assert len(run(decoder)[0]) == 9


@pytest.mark.parametrize("plan", ["one by one", "windows", "groups"])
@pytest.mark.parametrize("place", ["layers", "choice"])
@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_step_that_raised_can_be_done_again(failing, place, plan, engine, monkeypatch):
    model, calls = (tiny_arpg if plan == "groups" else tiny)(grid=(3, 4)), []

    def requests():
        scales = np.full(12, 2.0)
        return [Request(i, Groups(np.roll(range(12), i), scales, [2, 1, 4, 5]) if plan == "groups" else
                        Raster(scales, window=4 if plan == "windows" else 1), i) for i in range(3)]

    decoder = CodeDecoder(model)
    decoder.reserve(3)
    for request in requests():
        decoder.join(request)
    expected = run(decoder)

    home, name = (engine, "forward") if place == "layers" else (module, "choose")
    whole = getattr(home, name)

    def broken(*args, **options):
        found = whole(*args, **options)
        calls.append(1)
        if len(calls) == failing:
            raise MemoryError("now")
        return found

    monkeypatch.setattr(home, name, broken)
    for request in requests():
        decoder.join(request)
    found = {}
    while decoder.active:
        try:
            found |= {done.slot: done.codes for done in decoder.step()}
        except MemoryError:
            assert len(calls) == failing
    assert all(torch.equal(found[slot], codes) for slot, codes in expected.items()) and len(found) == 3


def test_a_long_prefill_is_spread_over_steps(engine, monkeypatch):
    model = tiny(grid=(2, 3), model_type="t2i")
    features = torch.randn(6, TEXT, CAPTION)

    def codes(budget: int) -> tuple[torch.Tensor, int]:
        monkeypatch.setattr(module, "PREFILL_TOKENS", budget)
        decoder, steps, found = CodeDecoder(model), 0, {}
        decoder.reserve(6)
        for i in range(6):
            decoder.join(Request(features[i], Raster(np.full(6, 2.0)), i, greedy=True))
        while decoder.active:
            found |= {done.slot: done.codes for done in decoder.step()}
            steps += 1
        return torch.stack([found[i] for i in range(6)]), steps

    (at_once, few), (spread, more) = codes(4096), codes(2 * TEXT)
    assert torch.equal(at_once, spread) and few == 6 and more == 8


def test_broken_images_are_told_apart(engine):
    model = tiny()
    decoder = CodeDecoder(model)
    decoder.reserve(2)
    decoder.join(Request(0, Raster(np.ones(9)), 1))
    model.cls_embedding.embedding_table.weight.data[1] = float("nan")
    decoder.join(Request(1, Raster(np.ones(9)), 1))
    found = {}
    while decoder.active:
        found |= {done.slot: done.broken for done in decoder.step()}
    assert found == {0: None, 1: 0}
    for slot in range(2):  # what was not a number does not stay in the cache
        assert decoder.join(Request(2, Raster(np.ones(9)), slot)) == slot
    while decoder.active:
        assert all(done.broken is None for done in decoder.step())


def test_what_was_not_a_number_does_not_stay_in_rows_without_conditions(engine):
    """Requests that join together are fed one unconditional prefix, which is copied."""
    model = tiny()
    decoder, sound = CodeDecoder(model), model.tok_embeddings.weight.clone()
    decoder.reserve(3)
    for value, broken in ((float("nan"), 1), (1.0, None)):
        model.tok_embeddings.weight.data.copy_(sound * value)
        for slot in range(3):
            decoder.join(Request(slot, Raster(np.full(9, 2.0)), slot))
            if slot == 0:
                decoder.step(), decoder.step()  # more of the cache is read for it than for the others
        finished = 0
        while decoder.active:
            for done in decoder.step():
                assert done.broken == broken
                finished += 1
        assert finished == 3


def test_a_decoder_does_not_keep_its_model_alive(engine):
    import weakref

    model = tiny()
    decoder, gone = CodeDecoder(model), weakref.ref(model)
    decoder.reserve(1)
    decoder.join(Request(0, Raster(np.ones(9)), 1))
    run(decoder)
    del model
    assert gone() is None
