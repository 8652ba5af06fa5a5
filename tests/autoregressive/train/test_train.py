"""What the training command makes of its flags: token noise, dropout or stochastic depth; what it draws for scores."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.train import train
from autoregressive.train.conditions import Classes
from autoregressive.train.task import GPTTask, SampleStream, corrupt


def test_the_share_that_is_asked_for_is_replaced():
    torch.manual_seed(0)
    codes = torch.zeros(100, 100, dtype=torch.long)
    noisy = corrupt(codes, 0.3, vocab_size=10)
    assert (noisy != 0).float().mean().item() == pytest.approx(0.3 * 9 / 10, abs=0.02)
    assert torch.bincount(noisy[noisy != 0], minlength=10)[1:].min() > 200  # of 300 for each code
    assert noisy.max() == 9 and codes.max() == 0
    assert torch.equal(corrupt(codes, 0.0, vocab_size=10), codes)


def test_inputs_are_replaced_and_targets_are_not():
    """The model sees the codes before the last, noisy; it is asked for all, as they are."""
    seen = {}

    class Model(torch.nn.Module):
        config = type("Config", (), {"vocab_size": 10, "block_size": 16, "grid": (4, 4)})

        def forward(self, inputs, cond_idx, targets=None, **options):
            seen.update(inputs=inputs, targets=targets)
            raise StopIteration

    codes = torch.arange(16).repeat(2, 1) % 10
    condition = Classes(SimpleNamespace(classes=None), num_classes=3, cls_token_num=None)
    task = GPTTask(Model(), condition, dtype=torch.float32, tokenizer=None, seed=0, token_noise=0.5, cfg_scale=1.0)
    with pytest.raises(StopIteration):
        task.micro_step({"codes": codes, "labels": torch.zeros(2, dtype=torch.long),
                         "dropped": torch.zeros(2, dtype=torch.bool)}, step=0, backward=None)
    assert torch.equal(seen["targets"], codes)
    kept = seen["inputs"] == codes[:, :-1]
    assert 0.3 < kept.float().mean() < 0.8


@pytest.mark.parametrize(("rate", "dropout"), [(0.0, 0.3), (0.2, 0.0)])
def test_stochastic_depth_takes_the_place_of_dropout_in_blocks(rate, dropout):
    flags = train.GPTTrainFlags(code_path="", dropout_p=0.3, token_dropout_p=0.4, drop_path_rate=rate)
    store = SimpleNamespace(grid=(4, 4), vocab_size=10)
    config = train.build_model(flags, "GPT-S", store, num_classes=3).config
    assert (config.resid_dropout_p, config.ffn_dropout_p, config.drop_path_rate) == (dropout, dropout, rate)
    assert config.token_dropout_p == 0.4


def test_an_evaluation_draws_every_class_equally_often():
    asked = {}

    def sample(model, labels, indices):
        asked.update(zip(indices.tolist(), labels.tolist(), strict=True))
        return np.zeros((len(labels), 8, 8, 3), np.uint8)

    task = SimpleNamespace(sample=sample, tokenizer=SimpleNamespace(downsample=2), condition=SimpleNamespace(count=3))
    model = SimpleNamespace(config=SimpleNamespace(grid=(4, 4)))
    stream = SampleStream(task, model, 7)
    for rank in range(2):
        list(stream.batches(2, rank=rank, world_size=2))
    assert asked == {i: i % 3 for i in range(7)}
