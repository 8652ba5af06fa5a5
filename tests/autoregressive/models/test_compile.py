"""Whether a GPT compiled by inductor trains as the eager one does. (It was reported not to on some releases of torch;
this asks the installed one, on the CPU. benchmarks/gpu_check.py asks it on a GPU.)"""
import shutil

import pytest
import torch
import torch._dynamo.utils

from autoregressive.models.gpt import Transformer
from tests.autoregressive.models.toy_training import BATCH, L, allowed_difference, ends, gpt, losses

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(scope="module")
def compiled() -> Transformer:
    """With dropout 0.1; one compilation serves the module."""
    torch._dynamo.reset()
    return gpt(dropout=0.1, compiled=True)


@pytest.mark.slow
def test_without_dropout_the_losses_are_the_same():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, other = (losses(gpt(dropout=0.0, compiled=on), seed=0, steps=50) for on in (False, True))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled
    assert eager[-1] < 0.6 * eager[0]
    torch.testing.assert_close(other, eager, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_with_dropout_training_ends_at_the_same_loss(compiled):
    """Masks differ by design, so ends are compared: the mean of the last 50 losses, over seeds."""
    eager, other = ends(gpt(dropout=0.1, compiled=False)), ends(compiled)
    assert (eager.mean() - other.mean()).abs().item() < allowed_difference(eager, other), (eager, other)


@pytest.mark.slow
def test_compiled_dropout_has_its_rate_and_one_mask_for_both_directions(compiled):
    block, layer = compiled.layers[0], compiled.layers[0].feed_forward
    x = torch.randn(BATCH, L, 64, requires_grad=True)
    rope = compiled.rope(x.device)[:L]
    kept = []
    with torch.no_grad():
        block.attention.wo.weight.zero_()  # the first half adds nothing
    for round_ in range(10):
        torch.manual_seed(round_)
        out = block.train()(x, rope, None, None, 0)
        kept.append(out.detach() != x.detach())
        one = torch.zeros_like(out)
        one[0, 0] = 1.0  # only this token's mask decides which rows of w2 get a gradient
        layer.w2.weight.grad = None
        out.backward(one)
        assert torch.equal(layer.w2.weight.grad.abs().sum(1) > 0, kept[-1][0, 0])
    share = 1 - torch.stack(kept).float().mean().item()
    assert share == pytest.approx(0.1, abs=4 * (0.09 / (10 * BATCH * L * 64)) ** 0.5)
    per_column = torch.stack(kept).float().flatten(0, 2).mean(0)
    assert per_column.std().item() == pytest.approx((0.09 / (10 * BATCH * L)) ** 0.5, rel=0.35)
    assert not torch.equal(kept[0], kept[1])
