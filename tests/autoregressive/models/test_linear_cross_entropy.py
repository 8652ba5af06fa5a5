"""The loss in chunks: equal to the loss of full logits, its gradients too, and never as large."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.linear_cross_entropy import linear_cross_entropy

N, D, V = 37, 24, 101


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (torch.randn(N, D, requires_grad=True), (torch.randn(V, D) * 0.3).requires_grad_(), torch.randint(V, (N,)))


def full(x, weight, targets, valid=None):
    """The same from full logits."""
    per_token = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")
    valid = torch.ones(len(targets)) if valid is None else valid.float()
    return (per_token * valid).sum() / valid.sum().clamp_min(1)


def with_gradients(loss, x, weight):
    loss.backward()
    found = loss.detach(), x.grad, weight.grad
    x.grad = weight.grad = None
    return found


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("valid", [None, "some", "weights"])
def test_equals_the_loss_of_full_logits(chunk, valid):
    x, weight, targets = problem()
    valid = {None: None, "some": torch.arange(N) % 3 > 0, "weights": torch.rand(N) * 3}[valid]
    ours = with_gradients(linear_cross_entropy(x, weight, targets, valid=valid, chunk=chunk), x, weight)
    wanted = with_gradients(full(x, weight, targets, valid), x, weight)
    for a, b in zip(ours, wanted, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-6 and a.dtype == torch.float32


def test_the_incoming_gradient_scales_ours():
    x, weight, targets = problem()
    a = with_gradients(linear_cross_entropy(x, weight, targets), x, weight)
    b = with_gradients(linear_cross_entropy(x, weight, targets) * 8, x, weight)
    assert torch.equal(a[1] * 8, b[1]) and torch.equal(a[2] * 8, b[2])


def test_nothing_valid_is_a_loss_of_zero_without_gradient():
    x, weight, targets = problem()
    loss = linear_cross_entropy(x, weight, targets, valid=torch.zeros(N))
    loss, grad_x, grad_weight = with_gradients(loss, x, weight)
    assert loss == 0 and not grad_x.any() and not grad_weight.any()


def test_without_gradients_there_is_the_loss_alone():
    x, weight, targets = problem()
    with torch.no_grad():
        alone = linear_cross_entropy(x, weight, targets, chunk=10)
    assert not alone.requires_grad
    assert torch.equal(alone, linear_cross_entropy(x, weight, targets, chunk=10).detach())
    frozen = linear_cross_entropy(x, weight.detach(), targets)
    frozen.backward()
    assert x.grad is not None


def test_a_second_backward_is_refused_not_wrong():
    x, weight, targets = problem()
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_full_logits_are(dtype):
    x, weight, targets = problem()
    exact = with_gradients(full(x, weight, targets), x, weight)
    with torch.autocast("cpu", dtype=dtype):
        plain = full(x, weight, targets)
        ours = linear_cross_entropy(x, weight, targets, chunk=10)
    plain, ours = with_gradients(plain, x, weight), with_gradients(ours, x, weight)
    for wanted, a, b in zip(exact, ours, plain, strict=True):
        assert a.dtype == torch.float32
        assert (a - wanted).norm() <= 1.2 * (b - wanted).norm() + 1e-5 * wanted.norm()
        assert ((a - wanted).norm() / wanted.norm()).item() < {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


def test_gradients_of_many_tokens_do_not_vanish_in_fp16():
    torch.manual_seed(0)
    x = torch.randn(20_000, 4, requires_grad=True)
    weight, targets = torch.randn(8, 4, requires_grad=True), torch.randint(8, (20_000,))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(x, weight, targets)
    loss.backward()  # 1 / N alone is below fp16's normal numbers
    exact = torch.autograd.grad(full(x, weight, targets), x)[0]
    assert ((x.grad - exact).norm() / exact.norm()).item() < 1e-3


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.14 has none")
def test_equals_the_library_s():
    x, weight, targets = problem()
    ours = with_gradients(linear_cross_entropy(x, weight, targets), x, weight)
    theirs = with_gradients(F.linear_cross_entropy(x, weight, targets), x, weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def gpt(**options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layer=1, n_head=2, multiple_of=16, num_classes=3, vocab_size=512,
                                  grid=(10, 10), token_dropout_p=0, resid_dropout_p=0, ffn_dropout_p=0,
                                  class_dropout_prob=0, **options))
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model.train()


@pytest.mark.parametrize("summed", [True, False])
def test_a_training_step_never_holds_the_logits(summed):
    model, codes = gpt(), torch.randint(512, (8, 100))
    with Largest() as seen:
        model(codes[:, :-1], torch.zeros(8, dtype=torch.long), targets=codes, summed_loss=summed)[not summed].backward()
    logits = codes.numel() * 512  # 800 tokens; a chunk has 512
    assert seen.elements < logits if summed else seen.elements >= logits


@pytest.mark.parametrize("valid", [None, torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_the_model_s_loss_is_that_of_its_logits(kind, valid):
    model = gpt(**({"model_type": "t2i", "cls_token_num": 4, "caption_dim": 8} if kind == "t2i" else {}))
    codes = torch.randint(512, (3, 100))
    cond = torch.randn(3, 4, 8) if kind == "t2i" else torch.tensor([0, 1, 2])
    found = []
    for summed in (True, False):
        model.zero_grad()
        first, second = model(codes[:, :-1], cond, targets=codes, valid=valid, summed_loss=summed)
        if summed:
            assert second == (300 if valid is None else 200)
        loss = first / second if summed else second
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-5
