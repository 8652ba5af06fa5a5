"""Token noise: some of the input codes are replaced by random ones, the targets are not."""
import pytest
import torch

from autoregressive.train import train


def test_the_share_that_is_asked_for_is_replaced():
    torch.manual_seed(0)
    codes = torch.zeros(100, 100, dtype=torch.long)
    noisy = train.corrupt(codes, 0.3, vocab_size=10)
    assert (noisy != 0).float().mean().item() == pytest.approx(0.3 * 9 / 10, abs=0.02)
    assert torch.bincount(noisy[noisy != 0], minlength=10)[1:].min() > 200  # of 300 for each code
    assert noisy.max() == 9 and codes.max() == 0
    assert torch.equal(train.corrupt(codes, 0.0, vocab_size=10), codes)


def test_inputs_are_replaced_and_targets_are_not():
    """The model sees the codes before the last, noisy; it is asked for all, as they are."""
    seen = {}

    class Model(torch.nn.Module):
        config = type("Config", (), {"vocab_size": 10, "block_size": 16, "grid": (4, 4)})

        def forward(self, inputs, labels, targets=None, **options):
            seen.update(inputs=inputs, targets=targets)
            raise StopIteration

    codes = torch.arange(16).repeat(2, 1) % 10
    task = train.GPTTask(Model(), dtype=torch.float32, classes=None, tokenizer=None, seed=0, token_noise=0.5,
                         cfg_scale=1.0)
    with pytest.raises(StopIteration):
        task.micro_step({"codes": codes, "labels": torch.zeros(2, dtype=torch.long),
                         "dropped": torch.zeros(2, dtype=torch.bool)}, step=0, backward=None)
    assert torch.equal(seen["targets"], codes)
    kept = seen["inputs"] == codes[:, :-1]
    assert 0.3 < kept.float().mean() < 0.8
