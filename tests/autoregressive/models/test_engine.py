"""One step of each engine against plain attention over all its tokens; halves, quantised weights, and the graphs."""
import copy

import pytest
import torch

from autoregressive.models import quantized
from autoregressive.models.engine import Engine, TorchEngine
from autoregressive.models.generate import generate, take_engine
from autoregressive.models.gpt import Transformer
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.native_engine import NativeEngine
from tests.autoregressive.models.decoding import streams
from tests.autoregressive.models.test_gpt import V, condition, tiny

SHAPES = [{}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"dim": 200, "n_head": 2}, {"dim": 40, "n_head": 2},
          {"dim": 64, "vocab_size": 1, "n_layer": 1}]


def plain_step(model: Transformer, before: torch.Tensor, new: torch.Tensor, rope: tuple, *,
               causal: bool) -> torch.Tensor:
    """Logits (T, V) of tokens `new` (T, D) after those of `before` (n, D), with rotary rows for both."""
    n, total = len(before), len(before) + len(new)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    if not causal:
        mask[n:] = True
    hidden = model.hidden_states(torch.cat([before, new])[None], mask=mask[None, None], rope=torch.cat(rope))
    return model.output(hidden)[0, n:]


def fill(engine: Engine, before: torch.Tensor, rope: torch.Tensor, *, tokens: int = 32) -> None:
    """Cache `before` (R, n, D), in two steps."""
    rows = len(before)
    engine.reserve(rows, tokens)
    for first, end in ((0, 2), (2, before.shape[1])):
        engine.step(before[:, first:end].clone(), rope[:, first:end], torch.full((rows,), first), rows=slice(0, rows),
                    longest=first, uniform=True)


def inputs(model: Transformer, rows: int, cached: int, new: int) -> tuple[torch.Tensor, ...]:
    """Embeddings before and new, and rotary rows of arbitrary places for them."""
    table = model.rope(torch.device("cpu"))
    width = model.config.dim
    ropes = (table[torch.randint(len(table), (rows, n))] for n in (cached, new))
    return (torch.randn(rows, cached, width), torch.randn(rows, new, width), *ropes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", SHAPES, ids=str)
@torch.no_grad()
def test_a_step_is_plain_attention(options, causal, engine):
    model = tiny(**options)
    decoder, exact = take_engine(model), copy.deepcopy(model).double()
    assert type(decoder) is engine
    for new in (1, 3, 5):
        for lengths in ([7, 7, 7, 7], [7, 2, 1, 5]):  # rows that go back see the beginning of what was cached
            before, x, rope_before, rope = inputs(model, 4, 7, new)
            fill(decoder, before, rope_before)
            found = decoder.step(x.clone(), rope, torch.tensor(lengths), rows=slice(0, 4), causal=causal, longest=7,
                                 uniform=lengths == [7] * 4).clone()
            expected = torch.cat([
                plain_step(exact, before[r, :n].double(), x[r].double(), (rope_before[r, :n], rope[r]), causal=causal)
                for r, n in enumerate(lengths)])
            assert found.dtype == torch.float32 and found.shape == (4 * new, model.config.vocab_size)
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_only_wanted_logits_and_rotary_rows_for_all(engine):
    model = tiny(n_kv_head=2)
    decoder = take_engine(model)
    before, x, rope_before, rope = inputs(model, 3, 4, 5)
    fill(decoder, before, rope_before)
    step = {"rows": slice(0, 3), "longest": 4, "uniform": True}
    lengths = torch.full((3,), 4)
    every = decoder.step(x.clone(), rope[:1], lengths, **step).clone()
    wanted = torch.tensor([14, 0, 6, 6])
    torch.testing.assert_close(decoder.step(x.clone(), rope[:1], lengths, wanted=wanted, **step), every[wanted])
    repeated = decoder.step(x.clone(), rope[:1].expand(3, -1, -1, -1), lengths, **step)
    torch.testing.assert_close(repeated, every)


@torch.no_grad()
def test_rows_can_be_picked_and_copied(native):
    model = tiny()
    decoder = take_engine(model)
    before, x, rope_before, rope = inputs(model, 4, 7, 3)
    fill(decoder, before, rope_before)
    lengths = torch.tensor([7, 3, 5, 7])
    every = decoder.step(x.clone(), rope, lengths, rows=slice(0, 4), longest=7, uniform=False).clone().view(4, 3, V)
    picked = torch.tensor([2, 0])
    some = decoder.step(x[picked].clone(), rope[picked], lengths[picked], rows=picked, longest=7, uniform=False)
    assert torch.equal(some.view(2, 3, V), every[picked])
    part = decoder.step(x[1:3].clone(), rope[1:3], lengths[1:3], rows=slice(1, 3), longest=5, uniform=False)
    assert torch.equal(part.view(2, 3, V), every[1:3])


@torch.no_grad()
def test_copied_rows_go_on_as_the_first(engine):
    model = tiny()
    decoder = take_engine(model)
    before, x, rope_before, rope = inputs(model, 2, 7, 1)
    fill(decoder, before, rope_before)
    decoder.copy_row(0, 1, length=7)
    found = decoder.step(x[:1].repeat(2, 1, 1), rope[:1], torch.tensor([7, 7]), rows=slice(0, 2), longest=7,
                         uniform=True)
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_a_row_has_the_same_bits_beside_any_others(native):
    for options in ({"dim": 128, "vocab_size": 257}, {"dim": 48}, {"dim": 64, "n_kv_head": 1, "vocab_size": 90}):
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny(n_layer=1, **options).to(dtype)
            decoder, lengths = take_engine(model), torch.zeros(60, dtype=torch.long)
            decoder.reserve(60, 8)
            x, rope = torch.randn(1, 1, model.config.dim), model.rope(torch.device("cpu"))[None, :1]
            alone = decoder.step(x.clone(), rope, lengths[:1], rows=slice(0, 1), longest=0, uniform=True).clone()
            for rows in (2, 3, 4, 5, 6, 7, 8, 9, 13, 48, 49, 50, 51, 60):
                found = decoder.step(x.repeat(rows, 1, 1), rope, lengths[:rows], rows=slice(0, rows), longest=0,
                                     uniform=True)
                assert torch.equal(found, alone.expand(rows, -1)), (options, dtype, rows)


# ---- bfloat16, int8, int4


def logits_after(model: Transformer, codes: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Logits (L, B, V), from one step per code."""
    decoder, rope = take_engine(model), model.rope(torch.device("cpu"))[None]
    batch, length = codes.shape
    decoder.reserve(batch, length + 1)
    x, found = model.cls_embedding(cond, drop=False), []
    for i in range(length + 1):
        found.append(decoder.step(x, rope[:, i:i + 1], torch.full((batch,), i), rows=slice(0, batch), longest=i,
                                  uniform=True).clone())
        x = model.tok_embeddings(codes[:, min(i, length - 1)])[:, None]
    model.engines.append(decoder)
    return torch.stack(found)


@torch.no_grad()
def test_bfloat16_weights_are_computed_with_in_fp32(native, monkeypatch):
    """Errors relative to the norm; the cache, which is bfloat16 (8 bits), is all that is rounded."""
    model = tiny(dim=192, n_layer=3, grid=(4, 4)).bfloat16()
    exact, codes, cond = copy.deepcopy(model).double(), torch.randint(V, (8, 15)), torch.arange(8) % 3
    expected = exact(codes, cond)[0].transpose(0, 1)
    ours = logits_after(model, codes, cond).double()
    assert type(model.engines[0]) is NativeEngine
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    plain = logits_after(model, codes, cond).double()
    assert type(model.engines[0]) is TorchEngine
    errors = [((found - expected).norm() / expected.norm()).item() for found in (ours, plain)]
    assert errors[0] < 0.015 and errors[0] < 0.5 * errors[1], errors  # found: 0.009 and 0.030


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_within_half_a_step(bits):
    torch.manual_seed(0)
    linear = torch.nn.Linear(192, 31, bias=False)
    linear.weight.data[3] = 0
    layer = quantized.QuantizedLinear(linear, bits)
    scale = layer.scale.repeat_interleave(192 // layer.scale.shape[1], dim=1)
    assert layer.weight.numel() * 32 == linear.weight.numel() * bits and scale.shape == (31, 192)
    distance = (layer.dequantized() - linear.weight).abs()
    assert (distance <= scale * 0.5001).all() and distance.max() > 0.3 * scale.max()
    groups = linear.weight.unflatten(1, (layer.scale.shape[1], -1))
    torch.testing.assert_close(layer.scale, groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
    x = torch.randn(5, 192)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_widths_that_no_group_fits_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wqkv has 48 inputs, no multiple of 64"):
        quantized.quantize_(model, 4)
    assert type(model.output) is torch.nn.Linear  # nothing was replaced


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_models_decode_as_their_dequantised_weights(bits, kind, native, monkeypatch):
    model = tiny(dim=128, multiple_of=64, model_type=kind)
    names = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    exact = copy.deepcopy(model)
    embeddings = {name: value.clone() for name, value in model.state_dict().items() if "embed" in name}
    quantized.quantize_(model, bits)
    assert embeddings and all(torch.equal(model.state_dict()[name], value) for name, value in embeddings.items())
    replaced = {name for name, module in model.named_modules() if type(module) is quantized.QuantizedLinear}
    assert replaced == {name for name in names if name == "output" or name.startswith("layers.")}
    for name in replaced:
        exact.get_submodule(name).weight.copy_(model.get_submodule(name).dequantized())

    cond, valid = condition(model, 5)
    codes = generate(model, cond, 9, emb_masks=valid, generators=streams(5), decode="jacobi", window=3)
    assert type(model.engines[0]) is NativeEngine and model.engines[0].weights == {8: 2, 4: 3}[bits]
    assert torch.equal(generate(model, cond, 9, emb_masks=valid, generators=streams(5), decode="sequential"), codes)
    if kind == "c2i":
        found = logits_after(model, codes[:, :-1], cond)
        expected = exact(codes[:, :-1], cond)[0].transpose(0, 1)
        assert (found - expected).norm() < 0.015 * expected.norm()  # the cache is bfloat16: 0.006
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    plain = generate(model, cond, 9, emb_masks=valid, generators=streams(5))
    assert type(model.engines[0]) is TorchEngine
    assert torch.equal(plain, generate(exact, cond, 9, emb_masks=valid, generators=streams(5)))


@pytest.mark.parametrize("change", [
    lambda model: model.output.register_forward_hook(lambda *_: None),
    lambda model: setattr(model, "output", torch.nn.Linear(48, V)), lambda model: model.layers[0].bfloat16(),
    lambda model: model.double()], ids=["hook", "bias", "two types", "fp64"])
def test_models_that_the_kernels_do_not_fit_run_on_pytorch(change, native):
    model = tiny()
    assert type(take_engine(model)) is NativeEngine
    change(model)
    assert type(take_engine(model)) is TorchEngine
    assert type(take_engine(tiny(dim=36, n_head=3))) is TorchEngine


def test_autocast_takes_pytorch_s_kernels(native):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert type(take_engine(tiny())) is TorchEngine


# ---- graphs


def test_graphs_run_the_step_and_reuse_buffers_of_their_kind():
    graphs, done = StepGraphs(), []
    first = graphs.adopt("a", {"x": torch.tensor([1.0]), "y": torch.tensor([2])})
    graphs.run("shape", lambda: done.append(1))
    graphs.run("shape", lambda: done.append(2))
    assert done == [1, 2] and first["x"].item() == 1
    again = graphs.adopt("a", {"x": torch.tensor([3.0]), "y": torch.tensor([4])})
    assert again["x"].data_ptr() == first["x"].data_ptr() and (again["x"].item(), again["y"].item()) == (3, 4)
    other = graphs.adopt("b", {"x": torch.tensor([5.0, 6.0])})
    assert other["x"].data_ptr() != first["x"].data_ptr() and set(other) == {"x"} and first["x"].item() == 3
    assert graphs.adopt("a", {"x": torch.tensor([7.0])})["x"].item() == 7
