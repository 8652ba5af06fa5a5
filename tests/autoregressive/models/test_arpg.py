"""ARPG: the numbers of the reference, no look at what is not drawn yet, one function whether cached or not."""
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from autoregressive.models import decoder as decoder_module
from autoregressive.models import planning
from autoregressive.models.arpg import ARPG, ARPG_models
from autoregressive.models.batch import StepLayout
from autoregressive.models.engines import engine_for
from autoregressive.models.generate import generate
from autoregressive.models.native_engine import NativeEngine
from autoregressive.models.quantized import QuantizedLinear, quantize_
from autoregressive.models.registry import facts_of
from autoregressive.models.rope import rope_table
from autoregressive.models.schedule import DrawSchedule
from tests.autoregressive.models.decoding import engine_of, streams
from tests.autoregressive.models.small_arpg import block_masks, tiny
from tests.autoregressive.models.test_gpt import V
from tests.data.references import (
    ARPG_DRAWS,
    DATA,
    arpg_teacher_forced_differences,
    load_arpg,
    wrong_arpg_codes,
)

COUNTS = {"ARPG-L": 319_845_376, "ARPG-XL": 718_997_760, "ARPG-XXL": 1_302_449_664}  # specified by the paper's code
DECAYED = {"ARPG-L": 148, "ARPG-XL": 220, "ARPG-XXL": 292}  # tensors of two dimensions


@pytest.fixture(scope="module")
def reference() -> tuple[ARPG, dict[str, np.ndarray]]:
    return load_arpg()


# ---- the reference


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_and_names_are_those_of_the_checkpoints(name):
    layout = json.loads((DATA / "layouts.json").read_text())[name]
    with torch.device("meta"):
        model = ARPG_models[name]()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == layout
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert sum(p.ndim > 1 for p in model.parameters()) == DECAYED[name]


def test_teacher_forced_logits_are_the_references(reference):
    found = arpg_teacher_forced_differences(*reference)
    assert found["logits"] <= 2e-4 and found["loss"] < 1e-5, found


@pytest.mark.parametrize("draw", [ARPG_DRAWS[0], *(pytest.param(draw, marks=pytest.mark.slow)
                                                   for draw in ARPG_DRAWS[1:])])
def test_whole_decodings_are_the_references(reference, engine, draw):
    wrong, compared = wrong_arpg_codes(*reference, draw)
    assert type(engine_of(reference[0])) is engine
    assert compared > 0.7 and wrong == 0


# ---- the model


def test_a_new_model_knows_nothing():
    model = ARPG_models["ARPG-S"](num_classes=3, grid=(4, 4))
    codes = torch.randint(16384, (2, 16))
    assert model(codes[:, :-1], torch.tensor([0, 3]), codes)[1].item() == pytest.approx(math.log(16384), abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [(2, 2), (3, 1), (0, 2)])
@torch.no_grad()
def test_no_logits_depend_on_codes_that_are_drawn_later(training, depth):
    options = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob"), 0.0)
    model = tiny(n_layer=depth[0], n_query_layer=depth[1], **options).train(training)
    codes, orders = torch.randint(V, (2, 12)), torch.stack([torch.randperm(12) for _ in range(2)])
    labels = torch.tensor([0, 2])
    before, _ = model(codes[:, :-1], labels, orders=orders)
    for at in range(11):
        changed = codes.clone()
        changed[:, at] = (changed[:, at] + 1) % V
        after, _ = model(changed[:, :-1], labels, orders=orders)
        assert torch.equal(after[:, :at + 1], before[:, :at + 1])
        assert not torch.allclose(after[:, at + 1], before[:, at + 1])
    assert not torch.allclose(model(codes[:, :-1], labels, orders=orders.flip(1))[0], before)


@torch.no_grad()
def test_a_dropped_class_is_no_class():
    model = tiny()
    codes = torch.randint(V, (2, 12))
    dropped, _ = model(codes[:, :-1], torch.tensor([0, 1]), dropped=torch.tensor([True, False]))
    plain, _ = model(codes[:, :-1], torch.tensor([3, 1]))
    assert torch.equal(dropped, plain)


@torch.no_grad()
def test_one_order_for_all_is_that_order_for_each():
    model = tiny()
    codes, order = torch.randint(V, (3, 12)), torch.randperm(12)
    labels = torch.arange(3)
    shared, _ = model(codes[:, :-1], labels, orders=order)
    assert torch.equal(shared, model(codes[:, :-1], labels, orders=order.repeat(3, 1))[0])
    assert torch.equal(model(codes[:, :-1], labels)[0], model(codes[:, :-1], labels, orders=torch.arange(12))[0])


@torch.no_grad()
def test_the_first_step_is_blind_and_places_are_relative():
    model = tiny(grid=(6, 8))
    codes, order = torch.randint(V, (1, 47)), torch.randperm(48)
    blind = [model(codes[:, :0], torch.tensor([1]), orders=torch.tensor([cell] * 48))[0] for cell in (0, 17, 47)]
    assert torch.equal(blind[0], blind[1]) and torch.equal(blind[0], blind[2])
    rows, columns = order[(order // 8 < 3) & (order % 8 < 4)].div(8, rounding_mode="floor"), \
        order[(order // 8 < 3) & (order % 8 < 4)] % 8
    near, far = ((rows + down) * 8 + columns + right for down, right in ((0, 0), (3, 4)))
    one, other = (model(codes[:, :11], torch.tensor([1]), orders=cells)[0] for cells in (near, far))
    torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    assert not torch.allclose(one[:, 1:], model(codes[:, :11], torch.tensor([1]), orders=near.flip(0))[0][:, 1:])


@torch.no_grad()
def test_with_the_class_at_the_origin_places_are_absolute():
    codes, near = torch.randint(V, (1, 3)), torch.tensor([0, 1, 4, 5])
    far = near + 4 + 2  # a row and two columns on, in a grid of 3 x 4
    for at_origin in (False, True):
        model = tiny(class_at_origin=at_origin)
        one, other = (model(codes, torch.tensor([1]), orders=cells)[0] for cells in (near, far))
        assert torch.allclose(one, other, atol=2e-5, rtol=0) != at_origin
    at_origin = {name: ARPG_models[name](vocab_size=8, num_classes=2, **shape).config.class_at_origin
                 for name, shape in (("ARPG-S", {}), ("ARPG-L", {"n_layer": 1}))}
    assert at_origin == {"ARPG-S": True, "ARPG-L": False}  # released weights are of the latter kind


def test_gradients_of_the_lean_backward_are_the_plain_ones(monkeypatch):
    """In both halves and the projections between them, for an order per sample."""
    codes, orders = torch.randint(V, (2, 12)), torch.stack([torch.randperm(12) for _ in range(2)])

    def gradients(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        model = tiny(class_dropout_prob=0.0).to(dtype)
        model(codes[:, :-1], torch.tensor([0, 2]), codes, orders=orders)[1].backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    lean = gradients()
    monkeypatch.setattr("autoregressive.models.lean.applies", lambda *linears: False)
    for name, plain in gradients(torch.float64).items():
        torch.testing.assert_close(lean[name].double(), plain, atol=1e-4, rtol=0, msg=name)


def test_what_makes_no_arpg_is_refused():
    with pytest.raises(ValueError, match="at least one of queries"):
        tiny(n_query_layer=0)


# ---- decoding


@pytest.mark.parametrize(("steps", "sample_schedule"), [(12, "arccos"), (5, "cosine"), (3, "arccos"), (1, "cosine")])
@pytest.mark.parametrize("options", [
    {}, {"n_kv_head": 2}, {"n_layer": 0, "n_query_layer": 2}, {"n_layer": 3, "n_query_layer": 1},
    {"dim": 64, "n_head": 2}, {"class_at_origin": True}], ids=str)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(options, steps, sample_schedule, engine):
    """Greedy codes are the best logits of one forward over all of them, masked so that groups see as in decoding."""
    model, labels = tiny(**options), torch.tensor([0, 2, 1])
    schedule = DrawSchedule(steps, sample_schedule)
    orders = torch.stack([torch.randperm(12) for _ in range(3)])
    codes = generate(model, labels, 12, sample_logits=False, schedule=schedule, orders=orders)
    assert type(engine_of(model)) is engine
    drawn = codes.gather(1, orders)
    logits, _ = model(drawn[:, :-1], labels, masks=block_masks(schedule.sizes(12)), orders=orders)
    best = logits.topk(2, -1)
    clear = best.values[..., 0] - best.values[..., 1] > 1e-3
    assert clear.float().mean() > 0.9 and torch.equal(best.indices[..., 0][clear], drawn[clear])


@torch.no_grad()
def test_steps_may_be_causal_as_training_is(engine):
    """Then greedy codes are the best logits of the plain forward, without masks, known codes too."""
    model, labels, known = tiny(step_attention="causal"), torch.tensor([0, 2]), torch.full((2, 12), -1)
    known[0, [1, 7]] = torch.tensor([4, 36])
    order, schedule = torch.randperm(12), DrawSchedule(4)
    codes = generate(model, labels, 12, sample_logits=False, schedule=schedule, orders=order, known=known)
    for image in range(2):
        given = known[image, order] >= 0
        cells, at = torch.cat([order[given], order[~given]]), int(given.sum())
        sizes = [at, *schedule.sizes(12, known=at)] if at else schedule.sizes(12)
        queries = block_masks(sizes)[1]  # codes of one step still do not see each other
        logits, _ = model(codes[image, cells][None, :-1], labels[image:image + 1], masks=(None, queries), orders=cells)
        best = logits[0, at:].topk(2, -1)
        clear = best.values[:, 0] - best.values[:, 1] > 1e-3
        assert clear.sum() > 8 and torch.equal(best.indices[clear, 0], codes[image, cells][at:][clear])
    block = DrawSchedule(4, step_attention="block")
    other = generate(model, labels, 12, sample_logits=False, schedule=block, orders=order, known=known)
    assert not torch.equal(other, codes)
    with pytest.raises(ValueError, match="--step-attention is 'none', expected one of block, causal"):
        generate(model, labels, 12, schedule=DrawSchedule(4, step_attention="none"))


@torch.no_grad()
def test_known_codes_come_back_and_are_what_the_rest_follows(engine):
    """The class in a block of its own, then all known codes at once, in any order."""
    model, labels, schedule = tiny(), torch.tensor([0, 2]), DrawSchedule(6)
    known = torch.full((2, 12), -1)
    known[0, [1, 5, 7, 11]], known[1, [0]] = torch.tensor([4, 36, 0, 9]), torch.tensor([3])
    order = torch.randperm(12)
    codes = generate(model, labels, 12, sample_logits=False, schedule=schedule, orders=order, known=known)
    assert torch.equal(codes[known >= 0], known[known >= 0])
    for image in range(2):
        given = known[image, order] >= 0
        cells = torch.cat([order[given], order[~given]])
        sizes = [int(given.sum()), *schedule.sizes(12, known=int(given.sum()))]
        drawn = codes[image, cells][None]
        logits, _ = model(drawn[:, :-1], labels[image:image + 1], masks=block_masks(sizes), orders=cells)
        assert torch.equal(logits.argmax(-1)[:, sizes[0]:], drawn[:, sizes[0]:])
    whole = torch.arange(24).view(2, 12) % V
    assert torch.equal(generate(model, labels, 12, known=whole), whole)
    other = generate(model, labels, 12, sample_logits=False, schedule=schedule, orders=order.flip(0), known=known)
    assert not torch.equal(other, codes)  # another order, other codes


def test_the_class_writes_keys_of_zero(engine):
    model = tiny()
    generate(model, torch.tensor([1]), 12, schedule=DrawSchedule(3), generators=streams(1))
    used = engine_of(model)
    native = isinstance(used, NativeEngine)
    keys, values = (used.keys, used.values) if native else (used.cache.keys, used.cache.values)
    assert len(keys) == 3  # of both layers, and what the queries share
    for key, value in zip(keys, values, strict=True):
        first, second = (key[0, :, 0, :, at] if native else key[0, :, at] for at in range(2))
        assert not first.any() and second.any() and value[0, :, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 3.0}, {"cfg_scale": [1.0, 4.0, 0.0, 2.0, 1.5], "top_k": 5},
                                      {"cfg_scale": 2.0, "top_p": 0.8, "temperature": 0.7}], ids=str)
def test_an_image_is_the_same_in_any_batch(settings, dtype, engine):
    model, labels = tiny(dim=64).to(dtype), torch.arange(5) % 3
    schedule = DrawSchedule(5)
    together = generate(model, labels, 12, generators=streams(5), schedule=schedule, **settings)
    for image in range(5):
        alone = {name: value[image] if isinstance(value, list) else value for name, value in settings.items()}
        codes = generate(model, labels[image:image + 1], 12, generators=streams(5)[image:image + 1], schedule=schedule,
                         **alone)
        assert torch.equal(codes[0], together[image])


def test_guidance_of_one_runs_one_row(engine, monkeypatch):
    model, rows = tiny(), []
    kind = type(engine_for(model))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, batch: rows.append(len(batch.rows)) or forward(self, x, batch))
    generate(model, torch.tensor([1, 2]), 12, cfg_scale=1.0, schedule=DrawSchedule(4))
    assert set(rows) == {2}
    rows.clear()
    generate(model, torch.tensor([1, 2]), 12, cfg_scale=2.0, cfg_interval=1, schedule=DrawSchedule(6))
    assert rows == [4, 4, 4, 2, 2, 2]  # the prefill and two more steps are guided


@pytest.mark.parametrize(("place", "call"), [("order", 2), ("room", 1), ("layers", 1), ("layers", 3), ("choice", 1),
                                             ("choice", 3), ("choice", 4), ("tensors", 2)])
def test_an_error_anywhere_leaves_nothing_behind(place, call, engine, monkeypatch):
    """Also an interrupt, after which what was begun is left as it is."""
    model, labels = tiny().train(), torch.tensor([0, 1])
    settings = {"cfg_scale": 3.0, "schedule": DrawSchedule(4)}
    other = {"cfg_scale": [1.0, 5.0], "schedule": DrawSchedule(6, order="raster"), "top_k": 3,
             "known": [[5, *[-1] * 11], [-1] * 12]}
    good = generate(model, labels, 12, generators=streams(2), **settings)
    home, name = {"order": (planning, "cell_order"), "room": (engine, "reserve"), "layers": (engine, "forward"),
                  "choice": (decoder_module, "choose"), "tensors": (StepLayout, "batch")}[place]
    whole = getattr(home, name)
    for error in (RuntimeError, KeyboardInterrupt, MemoryError):
        calls = []

        def failing(*args, whole=whole, calls=calls, error=error, **options):
            calls.append(1)
            found = whole(*args, **options)  # so that what it does is done
            if len(calls) == call:
                raise error("in the middle")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(home, name, failing)
            with pytest.raises(error, match="in the middle"):
                generate(model, labels, 12, generators=streams(2, seed=1), **other)
        assert model.training and (engine_of(model) is None or place == "order")
        assert torch.equal(generate(model, labels, 12, generators=streams(2), **settings), good)


def test_decoding_in_training_mode_is_that_of_eval_mode():
    model = tiny()
    codes = generate(model, torch.tensor([1]), 12, generators=streams(1), schedule=DrawSchedule(3))
    assert torch.equal(generate(model.train(), torch.tensor([1]), 12, generators=streams(1),
                                schedule=DrawSchedule(3)), codes)
    assert model.training


@pytest.mark.parametrize(("options", "message"), [
    ({"schedule": DrawSchedule(13)}, "--step is 13, expected 1 to 12"), ({"schedule": DrawSchedule(0)}, "--step is 0"),
    ({"schedule": DrawSchedule(order="outside-in")}, "--order is 'outside-in'"),
    ({"decode": "jacobi"}, "for a GPT"), ({"window": 4}, "for a GPT")], ids=str)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), torch.tensor([1]), 12, **options)
    with pytest.raises(ValueError, match="all 12 codes"):
        generate(tiny(), torch.tensor([1]), 11)


def test_the_table_is_the_gpts():
    model = tiny()
    assert torch.equal(model.rope(torch.device("cpu")), rope_table((3, 4), 12, 1))
    model.set_grid((5, 2))
    assert generate(model, torch.tensor([0]), 10, schedule=DrawSchedule(4)).shape == (1, 10)


# ---- what others give


@pytest.mark.parametrize("bits", [8, 4])
def test_all_of_a_quantised_model_but_its_embeddings_is_quantised_and_runs_on_the_kernels(bits, native):
    model = tiny(dim=128, multiple_of=64)
    before = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    quantize_(model, bits)
    assert {name for name, module in model.named_modules() if type(module) is QuantizedLinear} == before
    assert type(engine_for(model)) is NativeEngine


@pytest.mark.parametrize("table", [(V + 6,), (V + 3, 48), (20, 48)])
def test_a_table_without_room_for_classes_is_no_arpg(table):
    state = {"embeddings.weight": torch.zeros(table), "head.weight": torch.zeros(V, 48)}
    assert facts_of(state) is None
