"""Blocks that keep little for the backward: they are the plain ones, and keep as little as they say."""
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from autoregressive.models import lean
from autoregressive.models.gpt import Transformer
from tests.autoregressive.models.decoding import attention_mask
from tests.autoregressive.models.test_gpt import PLAIN, TEXT, V, condition, tiny


def gradients(model: Transformer, codes: torch.Tensor, cond: torch.Tensor, mask: torch.Tensor | None) -> list:
    """[logits, loss, every gradient], the model's own and the embeddings' included."""
    model.zero_grad()
    logits, loss = model(codes[:, :-1], cond, targets=codes, mask=mask)
    loss.backward()
    return [logits.detach(), loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("rows", [512, 7])  # one part; several, the last one short
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"model_type": "t2i"}, {"drop_path_rate": 0.5}], ids=str)
def test_lean_blocks_are_the_plain_ones(options, rows, monkeypatch):
    monkeypatch.setattr(lean, "ROWS", rows)
    model = tiny(dim=64, **PLAIN, **options).train()  # head size 16: pairs fill the vector registers, no ulp is lost
    codes, (cond, valid) = torch.randint(V, (4, 9)), condition(model, 4)
    mask = attention_mask(valid, TEXT, TEXT + 8) if valid is not None else None

    def found() -> list:
        torch.manual_seed(1)  # for drop path
        return gradients(model, codes, cond, mask)

    ours = found()
    monkeypatch.setattr(lean, "applies", lambda *linears: False)
    plain = found()
    if rows == 512:  # products of few rows have kernels of their own, which round differently
        assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_lean_blocks_in_bf16(half, monkeypatch):
    model = tiny(dim=64, **PLAIN).train()
    codes, cond = torch.randint(V, (4, 9)), torch.arange(4) % 3
    exact = gradients(model, codes, cond, None)
    if half == "weights":
        model.bfloat16()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
            found.append(gradients(model, codes, cond, None))
        monkeypatch.setattr(lean, "applies", lambda *linears: False)
    ours, plain = found
    assert torch.equal(ours[0], plain[0]) and ours[-1].dtype == plain[-1].dtype
    for wanted, a, b in zip(exact[2:], ours[2:], plain[2:], strict=True):  # no further from fp32 than the plain ones
        assert (a - wanted).norm() <= 1.5 * (b - wanted).norm() + 1e-3 * wanted.norm()


@pytest.mark.parametrize("tokens", [9, 8])  # 8: as many as heads and key heads together
@pytest.mark.parametrize("half", [None, "autocast", "weights"])
@pytest.mark.parametrize("tables", [4, 1, None])  # one per row; one for all rows, with and without a row dimension
def test_lean_rotations_by_tables_of_rows(tables, half, tokens, monkeypatch):
    model = tiny(dim=64, **PLAIN).train()
    if half == "weights":
        model.bfloat16()
    table = model.rope(torch.device("cpu"))
    places = torch.rand(tables or 1, len(table)).argsort(1)[:, :tokens]
    rope = table[places] if tables else table[places[0]]
    values, weights = torch.randn(2, 4, tokens, 64, dtype=model.output.weight.dtype)

    def found() -> list:
        model.zero_grad()
        x = values.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
            out = model.hidden_states(x, mask=None, rope=rope)
        (out * weights).sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in model.layers.parameters())]

    ours = found()
    with monkeypatch.context() as plain_ones:
        plain_ones.setattr(lean, "applies", lambda *linears: False)
        plain = found()
        if half:
            rope, other = rope.flip(-3), rope  # what another table gives: rounding is far smaller than that
            turned, rope = found(), other
    if not half:
        assert torch.equal(ours[0], plain[0])
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert (a - b).norm() <= ((turned[i] - b).norm() / 4 if half else 1e-5 * b.norm())


def test_lean_blocks_under_checkpointing_and_without_gradients():
    options = {"token_dropout_p": 0.0, "class_dropout_prob": 0.0}  # dropout in the blocks: its masks come back
    model = tiny(dim=64, **options).train()
    codes, cond = torch.randint(V, (4, 9)), torch.arange(4) % 3
    torch.manual_seed(3)
    wanted = gradients(model, codes, cond, None)
    with torch.no_grad():
        torch.manual_seed(3)
        alone = model(codes[:, :-1], cond)[0]
    torch.testing.assert_close(alone, wanted[0])
    for block in model.layers:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, codes, cond, None), wanted, strict=True))


def test_blocks_keep_little_for_the_backward(monkeypatch):
    def floats_per_token() -> float:  # of distinct storages that autograd keeps, without the weights
        model = tiny(dim=64, n_layer=3, grid=(8, 8)).train()
        weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(4, 64, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = x
            for i, layer in enumerate(model.layers):
                out = layer(out, model.rope(x.device)[:64], None, None, i)
        return sum(kept.values()) / 4 / x[..., 0].numel() / 3

    width, hidden = 64, 176
    ours = floats_per_token()
    assert ours < 1.1 * (6 * width + 2 * hidden)  # x twice, q, k, v, attention's output; w1 x and w3 x
    monkeypatch.setattr(lean, "applies", lambda *linears: False)
    assert floats_per_token() > 1.7 * ours


def test_dropout_s_backward_has_the_forward_s_mask():
    layer, x = lean.Dropout(0.1), torch.ones(1000, 1001, requires_grad=True)
    torch.manual_seed(0)
    out = layer(x)
    following = torch.rand(3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    out.backward(torch.ones_like(out))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x.grad, out.detach())
    dropped = (out == 0).float()
    assert dropped.mean().item() == pytest.approx(6554 / 65536, abs=1e-3)
    assert dropped.mean(0).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.1)  # columns are independent
    assert out.max().item() == pytest.approx(65536 / (65536 - 6554))
    torch.manual_seed(0)
    assert torch.equal(layer(x), out) and torch.equal(torch.rand(3), following)
    assert layer.eval()(x) is x


def test_wrapped_frozen_and_hooked_layers_are_called():
    model = tiny(dim=64, **PLAIN).train()
    attention, codes = model.layers[0].attention, torch.randint(V, (2, 9))
    assert lean.applies(attention.wqkv)
    seen = []
    handle = attention.wqkv.register_forward_hook(lambda *_: seen.append(1))
    wanted = model(codes[:, :-1], torch.tensor([0, 1]))[0]
    assert seen and not lean.applies(attention.wqkv)
    handle.remove()
    attention.wqkv.weight.requires_grad_(False)
    assert not lean.applies(attention.wqkv)
    attention.wqkv = nn.Sequential(attention.wqkv)
    assert not lean.applies(attention.wqkv)
    assert torch.equal(model(codes[:, :-1], torch.tensor([0, 1]))[0], wanted)
