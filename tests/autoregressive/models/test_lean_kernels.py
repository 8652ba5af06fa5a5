"""native/train.cpp against PyTorch's operations, in any number of threads."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autoregressive.models import lean, lean_kernels
from tests.autoregressive.models.test_gpt import V, tiny

pytestmark = pytest.mark.skipif(lean_kernels.training_kernels() is None, reason="no kernels here")
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SIZES = pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 40), (130, 77), (65, 768)])


def near(found: Tensor, exact: Tensor) -> None:
    """As near as numbers of that type can be."""
    bound = 2.0**-8 if found.dtype == torch.bfloat16 else 1e-6
    assert (found.double() - exact).norm() <= bound * exact.norm()


@HALF
@SIZES
def test_norm_and_its_gradients(rows, dim, dtype):
    torch.manual_seed(dim)
    x, weight = torch.randn(rows, dim) * 3, torch.rand(dim) + 0.5
    grad = torch.randn(rows, dim).to(dtype)
    rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(lean_kernels.norm(x, rms, weight, dtype), (x * rms * weight).to(dtype))
    wide = [part.double().requires_grad_() for part in (x, weight)]
    out = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-5) * wide[1]
    expected = torch.autograd.grad(out, wide, grad.double())
    grad_x, grad_weight = torch.empty_like(x), torch.ones(dim)
    lean_kernels.norm_backward(grad, x, rms, weight, grad_x, grad_weight)
    if dim > 1:  # the gradient of one number, divided by itself, is zero
        torch.testing.assert_close(grad_x, expected[0].float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grad_weight, expected[1].float() + 1, atol=1e-4, rtol=1e-4)


@HALF
@SIZES
def test_gradients_of_swiglu(rows, dim, dtype):
    torch.manual_seed(dim)
    a, b, grad = (torch.randn(3, rows, dim) * 4).to(dtype)
    wide = [part.double().requires_grad_() for part in (a, b)]
    out = F.silu(wide[0]) * wide[1]
    exact = out, *torch.autograd.grad(out, wide, grad.double())
    for found, wanted in zip(lean_kernels.swiglu_backward(a, b, grad.clone()), exact, strict=True):
        assert found.dtype == dtype
        near(found, wanted)


@HALF
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("heads", "width", "tables"), [(3, 16, 1), (1, 100, 2), (5, 2, 2), (2, 64, 1)])
def test_rotation_in_place(heads, width, tables, transposed, dtype):
    torch.manual_seed(width)
    x = torch.randn(2, 7, heads + 2, width).to(dtype)  # two more heads, which stay
    table = torch.randn(tables, 7, width // 2, 2)
    matrix = torch.stack([torch.stack([table[..., 0], -table[..., 1]], -1),
                          torch.stack([table[..., 1], table[..., 0]], -1)], -2)
    matrix = matrix.mT if transposed else matrix
    pairs = x[:, :, :heads].double().unflatten(-1, (-1, 2, 1))
    wanted, rest = (matrix[:, :, None].double() @ pairs).flatten(-3), x[:, :, heads:].clone()
    lean_kernels.rotate_(x[:, :, :heads], table, transposed=transposed)
    near(x[:, :, :heads], wanted)
    assert torch.equal(x[:, :, heads:], rest)


@HALF
def test_dropout_draws_by_key_and_place(dtype):
    x = torch.ones(300, 1000, dtype=dtype)
    out = lean_kernels.drop(x, 6554, 5)
    dropped = out == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert torch.equal(out[~dropped], (x[~dropped] * (65536 / (65536 - 6554))).to(dtype))
    assert torch.equal(lean_kernels.drop(x[:7], 6554, 5), out[:7])
    twice = (lean_kernels.drop(x, 6554, 6) == 0) & dropped
    assert twice.float().mean().item() == pytest.approx(0.01, abs=2e-3)
    assert torch.equal(lean_kernels.drop(x, 0, 5), x)


def test_numbers_that_are_not_finite_stay_so():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40]).repeat(9)[None]
    found = lean_kernels.norm(x, torch.ones(1, 1), torch.ones(45), torch.bfloat16)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found.nan_to_num(), x.to(torch.bfloat16).nan_to_num())


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 32), (31, 2, 64), (32, 1, 64), (77, 3, 96),
                                                        (160, 2, 64)])
def test_gradients_of_attention(tokens, heads, width):
    torch.manual_seed(tokens)
    packed = torch.randn(3, tokens, 3 * heads, width).bfloat16()
    q, k, v = (part.detach().requires_grad_() for part in packed.split(heads, dim=2))
    if not lean_kernels.ready_for_attention(q, k, v):
        pytest.skip("no AMX")
    out, grad = lean.causal_attention(q, k, v), torch.randn(3, tokens, heads * width).bfloat16()
    found = torch.autograd.grad(out, (q, k, v), grad)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    exact = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in wide), is_causal=True)
    exact = exact.transpose(1, 2).flatten(2)
    near(out, exact.detach())
    for one, wanted in zip(found, torch.autograd.grad(exact, wide, grad.double()), strict=True):
        assert one.shape == wanted.shape and (one.double() - wanted).norm() <= 2.0**-7 * wanted.norm() + 1e-6


def test_threads_change_no_bit():
    torch.manual_seed(0)
    x, weight, rms = torch.randn(700, 96), torch.rand(96), torch.rand(700, 1)
    a, b, grad = torch.randn(3, 700, 96).bfloat16()
    packed = torch.randn(2, 350, 9, 64).bfloat16()
    grad_out = torch.randn(2, 350, 192).bfloat16()

    def everything() -> list[Tensor]:
        grad_x, grad_weight = torch.empty_like(x), torch.zeros(96)
        lean_kernels.norm_backward(grad, x, rms, weight, grad_x, grad_weight)
        found = [grad_x, grad_weight, lean_kernels.norm(x, rms, weight, torch.bfloat16), lean_kernels.drop(x, 900, 1),
                 *lean_kernels.swiglu_backward(a, b, grad.clone())]
        q, k, v = (part.detach().requires_grad_() for part in packed.split(3, dim=2))
        if (out := lean.causal_attention(q, k, v)) is not None:
            found += torch.autograd.grad(out, (q, k, v), grad_out)
        return found

    before, wanted = torch.get_num_threads(), everything()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(one, other) for one, other in zip(everything(), wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_shapes_that_do_not_fit_are_refused_as_ever():
    model = tiny(grid=(3, 3)).train()
    with pytest.raises(RuntimeError):  # more codes than the model has places
        model(torch.randint(V, (2, 40)), torch.arange(2), targets=torch.randint(V, (2, 41)))
    x, weight, table = torch.randn(2, 8, 64, requires_grad=True), torch.randn(192, 64), torch.randn(8, 8, 2)
    rotated = lean.normed_qkv(x, torch.ones(64), 1e-5, weight, table, (4, 4))
    assert all(part.isfinite().all() for part in rotated)
    ones = torch.ones(64)
    for norm, other in ((ones[:32], table), (ones, table[:4]), (ones, table.expand(3, 8, 8, 2))):
        with pytest.raises(RuntimeError):
            lean.normed_qkv(x, norm, 1e-5, weight, other, (4, 4))


def test_second_derivatives_are_right_or_refused():
    x = torch.randn(3, 5, requires_grad=True)
    slope = torch.autograd.grad(lean.Dropout(0.5)(x * x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(slope.sum(), x)[0]
    assert torch.equal(second == 0, slope == 0) and set(second.unique().tolist()) <= {0.0, 4.0}
    x, norm, weights = torch.randn(1, 4, 16, requires_grad=True), torch.ones(16), torch.randn(3, 16, 16)
    first = torch.autograd.grad(lean.normed_swiglu(x, norm, 1e-5, *weights).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_tensors_without_memory_of_their_own_go_to_pytorch():
    with FakeTensorMode():
        x = torch.randn(4, 8)
        assert not lean_kernels.applicable(x) and not lean_kernels.owns_memory(x)
    with pytest.raises(TypeError, match="LLAMAGEN_NATIVE"):
        lean_kernels.drop(x, 5, 1)
