"""One step of the training loop: its random numbers, and its gradients as they reach the optimizer.

AdamW's steps hardly depend on the size of the gradients, so losses and weights do not show how they were clipped or
scaled: the gradients themselves are compared, where AdamW receives them.
"""
import pytest
import torch

from autoregressive.train.train import GPTTask
from tests.conftest import TINY_GPT, TINY_VQ, call
from utils.seeding import derive_seed

ONE_STEP = ["--global-batch-size", 36, "--epochs", 1, "--mixed-precision", "none"]


@pytest.mark.parametrize(("name", "optimizers"), [("train_gpt", 1), ("train_vq", 2)])
def test_each_optimizers_gradients_are_clipped_as_torch_does(name, optimizers, image_folder, code_store, tmp_path,
                                                             monkeypatch):
    command = [name, "--code-path", code_store, *TINY_GPT] if name == "train_gpt" else \
        [name, "--data-path", image_folder, *TINY_VQ, "--image-size", 24, "--disc-weight", 0.5, "--disc-start", 0]
    received, step = [], torch.optim.AdamW.step

    def recording(self, *args, **options):
        received.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args, **options)

    def gradients(limit: float) -> list[list[torch.Tensor]]:
        """What each optimizer gets in the first step."""
        received.clear()
        call(*command, *ONE_STEP, "--max-grad-norm", limit, "--results-dir", tmp_path / str(limit))
        assert len(received) == optimizers
        return list(received)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    plain = gradients(0)  # 0: not clipped
    norms = [torch.nn.utils.get_total_norm(own).item() for own in plain]
    for limit in (0.7 * min(norms), 1.4 * max(norms)):
        for own, found in zip(plain, gradients(limit), strict=True):
            parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in own]
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_(parameters, limit)
            for parameter, gradient in zip(parameters, found, strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=0)


def test_each_step_has_random_numbers_of_its_own(code_store, tmp_path, monkeypatch):
    """Else dropout would draw the same masks at each step."""
    seeds, micro_step = [], GPTTask.micro_step

    def recording(self, *args, **options):
        seeds.append(torch.initial_seed())
        return micro_step(self, *args, **options)

    monkeypatch.setattr(GPTTask, "micro_step", recording)
    call("train_gpt", "--code-path", code_store, *TINY_GPT, "--global-batch-size", 12, "--epochs", 2, "--global-seed",
         7, "--results-dir", tmp_path)
    assert seeds == [derive_seed(7, step, 0) for step in range(6)]
    assert len(set(seeds)) == 6
