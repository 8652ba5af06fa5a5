"""Models that follow control pictures: a new adapter changes nothing, each cell gets what its picture says, decoding is
the forward of training, images of a batch do not influence one another."""
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoregressive.control import adapter
from autoregressive.control.adapter import AdapterArgs, attach
from autoregressive.models import decoder as decoder_module
from autoregressive.models.base import CodeModel
from autoregressive.models.generate import control_of, generate
from autoregressive.models.plan import Raster, Request
from autoregressive.models.registry import MODELS
from autoregressive.models.schedule import DrawSchedule
from tests.autoregressive.models.decoding import Record, engine_of, streams

GRID, V, B = (3, 5), 40, 3
L = GRID[0] * GRID[1]
ARGS = AdapterArgs("vit_tiny_patch16_224", 2, (6, 10), layers=1)
SMALL = {"dim": 32, "n_head": 2, "multiple_of": 32, "grid": GRID, "vocab_size": V, "num_classes": 4}
NAMES = ("ARPG-S", "GPT-S")


@torch.no_grad()
def stir(module: nn.Module, *, seed: int = 1) -> None:
    """Change all weights at random."""
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=stream)


def plain(name: str) -> CodeModel:
    """A model that gives different logits to everything, without dropout."""
    torch.manual_seed(0)
    model = MODELS[name](**SMALL, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    stir(model)
    return model.eval()


def controlled(name: str, *, new: bool = False, args: AdapterArgs = ARGS) -> CodeModel:
    """The same model with an adapter; `new`: as a training begins with it."""
    model = plain(name)
    attach(model, args)
    values = dict(model.named_parameters())
    model.init_weights(3, assign=lambda own, start: own.copy_(start) if any(
        own is values[key] for key in values if key.startswith("control.")) else None)
    if not new:
        stir(model.control)
    return model


def pictures(count: int = B, *, seed: int = 5) -> Tensor:
    return torch.rand(count, 1, *ARGS.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch(model: CodeModel) -> dict[str, Tensor]:
    """Codes and, for an ARPG, an order of their own for each image."""
    stream = torch.Generator().manual_seed(7)
    codes = torch.randint(V, (B, L), generator=stream)
    orders = {"orders": torch.stack([torch.randperm(L, generator=stream) for _ in range(B)])}
    return {"idx": codes[:, :-1], "cond_idx": torch.tensor([0, 3, 1]), "targets": codes,
            **(orders if model.any_order else {})}


class Table(nn.Module):
    """Stands in for an adapter: what it adds is known."""

    replaces = False

    def __init__(self, places: int) -> None:
        super().__init__()
        self.terms = nn.Parameter(torch.randn(places, 1, L, SMALL["dim"], generator=torch.Generator().manual_seed(9)))

    def forward(self, pictures: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.terms.expand(-1, len(pictures), -1, -1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trains", [False, True])
def test_a_new_adapter_changes_nothing(name, trains):
    without, model = plain(name).train(trains), controlled(name, new=True).train(trains)
    dropped = torch.tensor([False, True, False])
    expected = without(**batch(model), dropped=dropped)
    found = model(**batch(model), dropped=dropped, control=pictures())
    assert expected[0].std() > 0.1 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    names = [key for key in model.state_dict() if not key.startswith("control.")]
    assert names == list(without.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_adapter(name):
    model = controlled(name, new=True)
    model(**batch(model), control=pictures())[1].backward()
    last = model.control.get_parameter(model.control.zero_at_start()[-1])
    assert last.grad.abs().max() > 0
    model = controlled(name)
    model(**batch(model), control=pictures())[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.control.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_condition_drops_its_control(name):
    model = controlled(name)
    dropped = torch.tensor([True, False, True])
    found = model(**batch(model), dropped=dropped, control=pictures())[0]
    without = model(**batch(model), dropped=dropped)[0]
    assert torch.equal(found[dropped], without[dropped]) and not torch.allclose(found[1], without[1])


@pytest.mark.parametrize("name", NAMES)
def test_in_training_condition_and_control_are_dropped_together_by_chance(name):
    model = controlled(name).train()
    model.config.class_dropout_prob = 0.5
    torch.manual_seed(2)
    found = model(**batch(model), control=pictures())[0]
    options = [model(**batch(model), control=pictures(), dropped=torch.tensor([bool(i & 1 << k) for k in range(B)]))[0]
               for i in range(2**B)]
    assert sum(torch.equal(found, option) for option in options) == 1


def test_arpg_adds_to_the_query_of_the_cell_alone():
    model = plain("ARPG-S")
    model.control = Table(1)
    given = batch(model)
    before = model(**given, control=pictures())[0]
    with torch.no_grad():
        model.control.terms[:, :, 4] += 1
    changed = (model(**given, control=pictures())[0] != before).any(-1)
    assert torch.equal(changed, given["orders"] == 4)


def test_gpt_adds_to_the_token_that_predicts_the_cell():
    model = plain("GPT-S")
    model.control = Table(len(model.control_layers))
    for place in range(3):
        before = model(**batch(model), control=pictures())[0]
        with torch.no_grad():
            model.control.terms[place, :, 4] += 1
        changed = (model(**batch(model), control=pictures())[0] != before).any(-1)
        assert torch.equal(changed, (torch.arange(L) >= 4).expand(B, -1))


def test_gpt_injects_at_thirds_of_its_depth():
    depths = {4: [0, 1, 2], 12: [0, 4, 8], 22: [0, 7, 14], 24: [0, 8, 16], 2: [0, 1], 1: [0]}
    for depth, expected in depths.items():
        assert MODELS["GPT-S"](**SMALL, n_layer=depth).control_layers == expected


@pytest.mark.parametrize(("name", "options"), [
    ("ARPG-S", {"schedule": DrawSchedule(steps=L)}), ("GPT-S", {"decode": "sequential"}),
    ("GPT-S", {"decode": "jacobi", "window": 4})], ids=["arpg", "gpt", "windows"])
def test_decoding_is_the_forward_of_training(name, options, engine, monkeypatch):
    """With guidance: the unconditional row is the model without control."""
    model, record, labels = controlled(name), Record(monkeypatch), torch.tensor([0, 3, 1])
    orders = torch.stack([torch.randperm(L, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    more = {"orders": orders} if model.any_order else {}
    codes = generate(model, labels, L, cfg_scale=3.0, generators=streams(B), control=pictures(), **options, **more)
    assert isinstance(engine_of(model), engine)
    inputs = codes.gather(1, orders) if model.any_order else codes
    expected = [model(inputs[:, :-1], cond, control=control, **more)[0]
                for cond, control in ((labels, pictures()), (torch.full_like(labels, 4), None))]
    drawn_at = orders.argsort(1) if model.any_order else torch.arange(L).expand(B, -1)
    places = [(image, int(drawn_at[image, cell])) for image in range(B) for cell in range(L)]
    for found, place in zip(record.take(B, L), places, strict=True):
        for ours, forward in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, forward[place], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.float32), (2.5, torch.float32), (2.5, torch.bfloat16)])
def test_images_with_and_without_control_share_a_batch(name, scale, dtype, engine):
    model, labels, given = controlled(name).to(dtype), torch.tensor([0, 3, 1, 2]), pictures(4)

    def drawn(images: list[int], control: list[Tensor | None] | None) -> Tensor:
        all_streams = streams(4)
        return generate(model, labels[images], L, cfg_scale=scale, generators=[all_streams[i] for i in images],
                        control=control)

    alone = [drawn([i], [given[i]] if i % 2 else None)[0] for i in range(4)]
    mixed = [None, given[1], None, given[3]]
    assert torch.equal(drawn([0, 1, 2, 3], mixed), torch.stack(alone))
    assert torch.equal(drawn([3, 0, 1], [mixed[3], None, mixed[1]]), torch.stack([alone[i] for i in (3, 0, 1)]))
    assert torch.equal(drawn([0, 2], None), torch.stack(alone[::2]))
    assert not torch.equal(drawn([1], None)[0], alone[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_request_that_takes_the_place_of_another_keeps_its_own_control(name):
    model = controlled(name)
    terms = control_of(model, pictures(1), [1.0])[0]

    def request(control: Tensor | None) -> Request:
        plan = DrawSchedule(steps=1).plan(np.arange(L), cfg_scale=1.0) if model.any_order else Raster(np.ones(L))
        return Request(1, plan, key=7, control=control)

    def first_drawn(before: list[Tensor | None]) -> Tensor:
        decoder = decoder_module.CodeDecoder(model)
        decoder.reserve(1, guided=False)
        for control in before:  # each joins, does its first step and is gone: the next one's looks the same
            decoder.join(request(control))
            if not decoder.step():
                decoder.leave(0)
        decoder.join(request(terms))
        return next(done[0].codes for done in iter(decoder.step, None) if done)

    assert torch.equal(first_drawn([None]), first_drawn([]))


@pytest.mark.parametrize("name", NAMES)
def test_strength(name):
    model, without = controlled(name), plain(name)
    labels, given = torch.tensor([0, 3, 1]), pictures()
    drawn = {strength: generate(model, labels, L, generators=streams(B), control=given, control_strength=strength)
             for strength in (0, 0.5, 1)}
    assert torch.equal(drawn[0], generate(without, labels, L, generators=streams(B)))
    each = generate(model, labels, L, generators=streams(B), control=given, control_strength=[0, 1, 0.5])
    assert torch.equal(each, torch.stack([drawn[0][0], drawn[1][1], drawn[0.5][2]]))
    half, whole = (control_of(model, given, [strength] * B) for strength in (0.5, 1.0))
    for strength in (1e300, -101, [0, 1, 1e30]):
        with pytest.raises(ValueError, match=r"--control-strength is .*, expected -100 to 100"):
            generate(model, labels, L, generators=streams(B), control=given, control_strength=strength)
    assert all(torch.equal(0.5 * a, b) for a, b in zip(whole, half, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_adapter_takes_no_notice_of_its_absence(name):
    model, without = controlled(name), plain(name)
    labels = torch.tensor([0, 3, 1])
    assert torch.equal(*(generate(one, labels, L, cfg_scale=2.0, generators=streams(B)) for one in (model, without)))


@pytest.mark.parametrize("name", NAMES)
def test_after_an_error_in_the_middle_all_is_as_before(name, monkeypatch):
    model, labels, given = controlled(name), torch.tensor([0, 3, 1]), pictures()
    control = [given[0], None, given[2]]
    expected = generate(model, labels, L, generators=streams(B), control=control)
    choose, calls = decoder_module.choose, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return choose(*args, **options)

    monkeypatch.setattr(decoder_module, "choose", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, labels, L, generators=streams(B), control=given)
    assert torch.equal(generate(model, labels, L, generators=streams(B), control=control), expected)


def test_replacing_tokens_are_the_queries():
    model = controlled("ARPG-S", args=AdapterArgs(**{**vars(ARGS), "mode": "replace"}))
    tokens = model.control(pictures(), GRID)
    torch.testing.assert_close(model.query + model.control_terms(pictures()), tokens)
    fresh = controlled("ARPG-S", args=AdapterArgs(**{**vars(ARGS), "mode": "replace"}), new=True)
    assert fresh.control(pictures(), GRID).abs().max() > 0  # a query of zero would attend everywhere alike
    with pytest.raises(ValueError, match="--control-mode replace is for ARPG"):
        controlled("GPT-S", args=AdapterArgs(**{**vars(ARGS), "mode": "replace"}))


@pytest.mark.parametrize("shade", [-1.0, 1.0])
def test_pictures_of_one_shade_are_pictures(shade):
    model = controlled("ARPG-S")
    codes = generate(model, torch.tensor([1]), L, generators=streams(1), control=[torch.full((3, 6, 10), shade)])
    assert codes.shape == (1, L)


def test_another_grid_than_that_of_training():
    model = controlled("ARPG-S")
    model.set_grid((5, 2))
    assert model.control_terms(torch.zeros(1, 1, 10, 4)).shape == (1, 1, 10, 32)


@pytest.mark.parametrize(("control", "said"), [
    (torch.zeros(B, 1, 10, 6), r"are \(1, 1, 10, 6\), expected \(batch, 1 or 3, 6, 10\): one cell is 2 pixels"),
    (torch.zeros(B, 2, 6, 10), r"are \(1, 2, 6, 10\), expected"),
    (torch.zeros(B, 6, 10), r"are \(1, 6, 10\), expected"),
    (torch.zeros(2, 1, 6, 10), "2 control pictures for 3 samples")])
def test_pictures_that_do_not_fit(control, said):
    with pytest.raises(ValueError, match=said):
        generate(controlled("ARPG-S"), torch.tensor([0, 3, 1]), L, control=control)


def test_a_model_without_adapter_takes_no_pictures():
    with pytest.raises(ValueError, match="has no control adapter"):
        generate(plain("GPT-S"), torch.tensor([0, 3, 1]), L, control=pictures())
    with pytest.raises(ValueError, match="has no control adapter"):
        plain("ARPG-S")(**batch(plain("ARPG-S")), control=pictures())


@pytest.mark.parametrize("config", [None, {}, "x", *({**ARGS.described(), **wrong} for wrong in (
    {"patch": -1}, {"layers": 1e9}, {"image_size": [6]}, {"image_size": 6}, {"mode": "x"}, {"mode": []}, {"vit": 3}))])
def test_a_config_that_says_nothing_is_refused(config):
    with pytest.raises(ValueError, match=r"gpt.pt has a control adapter .* its config does not say which"):
        AdapterArgs.from_config(config, "gpt.pt")


def test_a_config_comes_back():
    assert AdapterArgs.from_config({**ARGS.described(), "kind": "canny"}, "gpt.pt") == ARGS


@pytest.mark.parametrize("vit", ["hf-hub:someone/vit_tiny", "local-dir:/tmp", "resnet18", "vit_unknown",
                                 "vit_base_patch16_rope_224", "vit_relpos_small_patch16_224"])
def test_only_plain_vits_of_timm_are_built(vit):
    with pytest.raises(ValueError, match="--control-vit"):
        adapter.build_vit(AdapterArgs(vit, 2, (6, 10)))


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="--control-layers is 13, vit_tiny_patch16_224 has 12"):
        adapter.build_vit(AdapterArgs("vit_tiny_patch16_224", 2, (6, 10), layers=13))


def test_pretrained_weights_are_loaded_by_name(monkeypatch):
    """timm's own loader fills the ViT; nothing is fetched here."""
    import timm

    create, asked = timm.create_model, []

    def create_model(name, *, pretrained, **options):
        asked.append(pretrained)
        vit = create(name, **options)
        stir(vit, seed=11)
        return vit

    monkeypatch.setattr(timm, "create_model", create_model)
    values = adapter.pretrained_values(ARGS)
    assert asked == [True]
    assert {key for key in controlled("ARPG-S").state_dict() if key.startswith("control.vit.")} == set(values)


def test_weights_that_cannot_be_fetched(monkeypatch):
    import timm

    def create_model(name, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"could not be had \(no route to host\): leave --control-pretrained out"):
        adapter.pretrained_values(ARGS)


def test_without_timm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs timm: .* pip install timm"):
        adapter.build_vit(ARGS)
