"""One step of the training loop: its random numbers and learning rate, its gradients as they reach the optimizer, what
becomes of averages and buffers.

AdamW's steps hardly depend on the size of the gradients, so losses and weights do not show how they were clipped or
scaled: the gradients themselves are compared, where AdamW receives them.
"""
import math

import pytest
import torch

from autoregressive.train.task import GPTTask
from tests.conftest import TINY_GPT, TINY_VQ, call
from tests.runs import rows, same
from tokenizer.tokenizer_image.vq_train import TokenizerTask
from utils.checkpoints import containers
from utils.seeding import derive_seed
from utils.training import trainer
from utils.training.loss_scale import LossScale
from utils.training.optim import learning_rate

SIX_STEPS = ["--global-batch-size", 6, "--epochs", 1, "--mixed-precision", "none", "--log-every", 1]
ADVERSARIAL = [*TINY_VQ, "--image-size", 24, "--disc-weight", 0.5, "--disc-start", 0]
OPTIMIZERS = {"train_gpt": 1, "train_vq": 2}


@pytest.fixture
def train(code_store, image_folder, tmp_path):
    """Calls a training command, by default for six steps, with results in tmp_path."""
    def run(name: str, *flags) -> None:
        own = ["--code-path", code_store, *TINY_GPT] if name == "train_gpt" else ["--data-path", image_folder,
                                                                                 *ADVERSARIAL]
        call(name, *own, *SIX_STEPS, "--results-dir", tmp_path, *flags)

    return run


@pytest.fixture
def received(monkeypatch) -> list[tuple[float, list[torch.Tensor]]]:
    """What each call of AdamW gets: the learning rate and the gradients."""
    calls, step = [], torch.optim.AdamW.step

    def recording(self, *args, **options):
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        calls.append((self.param_groups[0]["lr"], gradients))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    return calls


@pytest.fixture
def first_gradients(train, received, tmp_path):
    """Trains one step → the gradients of each optimizer."""
    def run(name: str, *flags) -> list[list[torch.Tensor]]:
        received.clear()
        train(name, "--global-batch-size", 36, *flags, "--results-dir", tmp_path / str(len(list(tmp_path.iterdir()))))
        assert len(received) == OPTIMIZERS[name]
        return [gradients for _, gradients in received]

    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizers_gradients_are_clipped_as_torch_does(name, first_gradients):
    plain = first_gradients(name, "--max-grad-norm", 0)  # 0: not clipped
    norms = [torch.nn.utils.get_total_norm(own).item() for own in plain]
    for limit in (0.7 * min(norms), 1.4 * max(norms)):
        for own, found in zip(plain, first_gradients(name, "--max-grad-norm", limit), strict=True):
            parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in own]
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_(parameters, limit)
            for parameter, gradient in zip(parameters, found, strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=0)


def test_the_scale_of_an_fp16_loss_leaves_no_trace(first_gradients, monkeypatch):
    plain, = first_gradients("train_gpt", "--max-grad-norm", 0.1)
    monkeypatch.setattr(trainer, "LossScale", lambda device, *, enabled: LossScale(device, enabled=True))
    scaled, = first_gradients("train_gpt", "--max-grad-norm", 0.1)
    for ours, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_the_learning_rate_of_a_step_is_the_one_in_its_row(train, received, tmp_path):
    train("train_gpt", "--lr", 1e-2, "--lr-schedule", "cosine", "--warmup-steps", 2)
    rates = [learning_rate(step, peak=1e-2, total_steps=6, warmup_steps=2, schedule="cosine") for step in range(6)]
    assert [rate for rate, _ in received] == rates == [row["lr"] for row in rows(tmp_path / "000-GPT-S")]


def test_each_step_has_random_numbers_of_its_own(train, monkeypatch):
    """Else dropout would draw the same masks at each step."""
    seeds, micro_step = [], GPTTask.micro_step

    def recording(self, *args, **options):
        seeds.append(torch.initial_seed())
        return micro_step(self, *args, **options)

    monkeypatch.setattr(GPTTask, "micro_step", recording)
    train("train_gpt", "--global-seed", 7)
    assert seeds == [derive_seed(7, step, 0) for step in range(6)]
    assert len(set(seeds)) == 6


def test_averages_move_by_the_documented_share(train, tmp_path):
    """(1 + n) / (10 + n) of the average stays at step n, from 0 on."""
    train("train_gpt", "--ema", "--ckpt-every", 1, "--global-batch-size", 12)
    before, after = (containers.read(tmp_path / "000-GPT-S" / "checkpoints" / name) for name in ("0000001", "0000002"))
    for name, average in before["ema"].items():
        torch.testing.assert_close(after["ema"][name], average + (1 - 2 / 11) * (after["model"][name] - average),
                                   rtol=1e-5, atol=1e-7)


def test_a_bad_step_leaves_buffers_alone(train, tmp_path, monkeypatch):
    """The codes that were used, and the running means of the discriminator."""
    micro_step = TokenizerTask.micro_step

    def poisoned(self, batch, *, step, backward):
        factor = math.nan if step == 1 else 1.0
        return micro_step(self, batch, step=step,
                          backward=lambda name, loss, weight: backward(name, loss * factor, weight))

    monkeypatch.setattr(TokenizerTask, "micro_step", poisoned)
    train("train_vq", "--ckpt-every", 1, "--global-batch-size", 12)
    first, second, third = (containers.read(tmp_path / "000-VQ-4-S" / "checkpoints" / f"000000{i}") for i in (1, 2, 3))
    for part, name in (("model", "quantize.codebook_used"), ("discriminator", "main.3.running_mean")):
        assert same(first[part], second[part])
        assert not torch.equal(third[part][name], second[part][name])
