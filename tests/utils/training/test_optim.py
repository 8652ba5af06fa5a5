"""Muon beside AdamW: who updates what, with which step, and how it is skipped and resumed."""
import pytest
import torch
from torch import nn

from autoregressive.models.gpt import ModelArgs, Transformer
from utils.training.loss_scale import step_unless
from utils.training.optim import adamw, build_optimizer

SETTINGS = {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.9, 0.95)}
muon_only = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


def gpt() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelArgs(dim=32, n_layer=2, n_head=2, multiple_of=16, num_classes=3, vocab_size=20,
                                 grid=(3, 3)))


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def test_adamw_is_what_it_was():
    model = gpt()
    ours, plain = (make(model, **SETTINGS) for make in (lambda m, **s: build_optimizer(m, kind="adamw", **s), adamw))
    assert type(ours) is torch.optim.AdamW
    assert [{**group, "params": len(group["params"])} for group in ours.param_groups] == \
        [{**group, "params": len(group["params"])} for group in plain.param_groups]


def test_moments_made_beforehand_change_no_step():
    models = gpt(), gpt()
    lazy = torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    early = adamw(models[0], **{**SETTINGS, "weight_decay": 0.0})
    assert all(not value.any() for state in early.state.values() for value in state.values())
    for seed in range(3):
        for model, optimizer in zip(models, (early, lazy), strict=True):
            give_gradients(model, seed)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert early.state[p].keys() == lazy.state[q].keys()
        assert all(torch.equal(value, lazy.state[q][key]) for key, value in early.state[p].items())


@muon_only
def test_each_parameter_has_one_rule():
    model = gpt()
    optimizer = build_optimizer(model, kind="muon", **SETTINGS)
    names = {p: name for name, p in model.named_parameters()}
    groups = [(sorted(names[p] for p in group["params"]), group) for group in optimizer.param_groups]
    (matrices, muon), (decayed, first), (plain, second) = groups
    assert matrices == sorted(f"layers.{i}.{part}.weight" for i in range(2) for part in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"))
    assert decayed == ["cls_embedding.embedding_table.weight", "output.weight", "tok_embeddings.weight"]
    assert sorted(matrices + decayed + plain) == sorted(names.values())
    assert [group["weight_decay"] for group in (muon, first, second)] == [0.05, 0.05, 0.0]
    assert muon["adjust_lr_fn"] == "match_rms_adamw" and first["betas"] == (0.9, 0.95) and first["fused"]


@muon_only
def test_steps_are_those_of_the_two_optimizers_and_of_one_size():
    model, other = gpt(), gpt()
    optimizer = build_optimizer(model, kind="muon", **SETTINGS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrix, head = (lambda m: m.layers[0].attention.wqkv.weight), (lambda m: m.output.weight)
    alone = [torch.optim.Muon([matrix(other)], lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW([head(other)], lr=1e-2, weight_decay=0.05, betas=(0.9, 0.95), fused=True)]
    for m in (model, other):
        give_gradients(m)
    for part in (optimizer, *alone):
        part.step()
    assert torch.equal(matrix(model), matrix(other)) and torch.equal(head(model), head(other))
    sizes = {name: (p - before[name]).square().mean().sqrt().item() / 1e-2 for name, p in model.named_parameters()}
    assert all(0.1 < size < 1.1 for size in sizes.values()), sizes  # AdamW's first step is the learning rate itself


@muon_only
def test_the_schedule_the_guard_and_zero_grad_reach_both():
    model = gpt()
    optimizer = build_optimizer(model, kind="muon", **SETTINGS)
    before = [p.detach().clone() for p in model.parameters()]

    def moved() -> list[bool]:
        return [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]

    give_gradients(model)
    step_unless(optimizer, torch.tensor(True))
    assert not any(moved())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step_unless(optimizer, torch.tensor(False))
    assert not any(moved()) and len(optimizer.state) == len(before)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    step_unless(optimizer, torch.tensor(False))
    assert all(moved())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


@muon_only
def test_a_state_by_parameter_goes_on_bit_for_bit():
    models = gpt(), gpt()
    first, second = (build_optimizer(model, kind="muon", **SETTINGS) for model in models)
    for seed in range(2):
        give_gradients(models[0], seed)
        first.step()
    models[1].load_state_dict(models[0].state_dict())
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        second.state[q] = {key: value.clone() for key, value in first.state[p].items()}
    assert {tuple(state) for state in first.state.values()} == {("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")}
    for model, optimizer in zip(models, (first, second), strict=True):
        give_gradients(model, 7)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@muon_only
def test_frozen_parameters_and_models_without_blocks():
    model = gpt()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("layers."))
    optimizer = build_optimizer(model, kind="muon", **SETTINGS)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * 7
    with pytest.raises(ValueError, match="--optimizer muon is for models with trained matrices in their blocks"):
        build_optimizer(nn.Linear(3, 3), kind="muon", **SETTINGS)


def test_a_torch_without_muon_is_refused(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"--optimizer muon needs torch >= 2\.9, this is .*: use adamw"):
        build_optimizer(gpt(), kind="muon", **SETTINGS)
