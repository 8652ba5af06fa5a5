"""LlamaGen's tokenizer trainings go on from their files: weights, discriminator, moments by name, step."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, TINY, call
from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoints import containers, sharded
from utils.training import trainer

FLAGS = ["--vq-model", "VQ-4-S", "--perceptual-weight", 0, "--global-batch-size", 6, "--epochs", 1, "--lr", 1e-3,
         "--mixed-precision", "none", "--max-grad-norm", 0, "--weight-decay", 0, *TINY, "--image-size", 24]


class LlamaGenPatchGAN(nn.Module):
    """Three layers, 64 filters, numbered as LlamaGen's modules are."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)], 64
        for wider, stride in ((128, 2), (256, 2), (512, 1)):
            layers += [nn.Conv2d(channels, wider, 4, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            channels = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))


def stepped(module: nn.Module, *, steps: int, seed: int) -> torch.optim.AdamW:
    """A plain AdamW over all parameters in the module's order, after steps with random gradients."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def llamagen_file(path: Path, *, prefix: str = "", ema: bool = False, judged: int = 3) -> dict:
    """A file as LlamaGen's vq_train saves it after three steps, `judged` of them with the discriminator."""
    torch.manual_seed(0)
    model, critic = VQ_models["VQ-4-S"](), LlamaGenPatchGAN()
    model.quantize.codebook_used = torch.zeros(65536)  # LlamaGen's record of used codes begins with zeros
    moments, of_critic = stepped(model, steps=3, seed=1), stepped(critic, steps=judged, seed=2)
    content = {"model": {f"{prefix}{name}": value for name, value in model.state_dict().items()},
               "optimizer": moments.state_dict(), "discriminator": {f"{prefix}{k}": v for k, v in
                                                                    critic.state_dict().items()},
               "optimizer_disc": of_critic.state_dict(), "steps": 3, "args": Namespace(vq_model="VQ-4-S", lr=1e-4)}
    if ema:
        content["ema"] = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(content, path)
    return content


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_parameters_are_in_the_order_of_the_released_models(name):
    """Moments have numbers, not names: they follow this order."""
    with torch.device("meta"):
        ours = VQ_models[name]().state_dict()
    layout = json.loads((ROOT / "tests" / "data" / "layouts.json").read_text())[name]
    assert [key for key in layout if "codebook_used" not in key] == [key for key in ours if "codebook_used" not in key]
    assert [*PatchGAN().state_dict()] == [*LlamaGenPatchGAN().state_dict()]


@pytest.mark.parametrize(("prefix", "judged", "options"), [
    ("", 3, []), ("module.", 3, ["--ema"]), ("module._orig_mod.", 0, []), ("_orig_mod.", 3, ["--disc-start", 0])])
def test_a_further_step_is_that_of_a_plain_adamw(prefix, judged, options, image_folder, tmp_path, monkeypatch, capsys):
    content = llamagen_file(tmp_path / "0000003.pt", prefix=prefix, ema="--ema" in options, judged=judged)
    gradients, step = {}, trainer.step_unless

    def noted(optimizer, bad):
        gradients.setdefault(len(optimizer.state), [
            p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        step(optimizer, bad)

    monkeypatch.setattr(trainer, "step_unless", noted)
    call("train_vq", "--data-path", image_folder, *FLAGS, "--disc-start", 99, *options, "--ckpt-every", 1,
         "--vq-ckpt", tmp_path / "0000003.pt", "--results-dir", tmp_path / "runs")
    assert "at step 3" in capsys.readouterr().out
    made = sharded.read_folder(tmp_path / "runs" / "000-VQ-4-S" / "checkpoints" / "0000004", optimizers=True)
    assert made["steps"] == 4
    trains = options == ["--disc-start", 0]
    for part, module, moments in (("model", VQ_models["VQ-4-S"](), "optimizer"),
                                  ("discriminator", LlamaGenPatchGAN(), "optimizer_disc")):
        module.load_state_dict({name.removeprefix(prefix): value for name, value in content[part].items()})
        plain = torch.optim.AdamW(module.parameters(), lr=1e-3)
        plain.load_state_dict(content[moments])
        plain.param_groups[0]["weight_decay"] = 0.0
        parameters = dict(module.named_parameters())
        if part == "model" or trains:
            ordered = [p for p in parameters.values() if p.ndim >= 2] + [p for p in parameters.values() if p.ndim < 2]
            for p, gradient in zip(ordered, gradients[len(ordered)], strict=True):
                p.grad = gradient
            plain.step()
        for name, p in parameters.items():
            torch.testing.assert_close(made[part][name], p.detach(), atol=1e-7, rtol=1e-5)
            for key, value in plain.state[p].items():
                saved = made[moments][f"{name}.{key}"]
                torch.testing.assert_close(saved, value.reshape(saved.shape), atol=1e-7, rtol=1e-5)
    if "--ema" in options:
        name = "encoder.conv_in.weight"
        assert (made["ema"][name] - content["ema"][name]).abs().max() < 0.9  # went on from the file's averages
        assert (made["ema"][name] - content["model"][prefix + name]).abs().max() > 0.05


def test_a_folder_of_ours_and_a_file_of_theirs_are_one_to_continue(image_folder, tmp_path):
    """Whatever the file, what is saved next is whole."""
    llamagen_file(tmp_path / "0000003.pt")
    call("train_vq", "--data-path", image_folder, *FLAGS, "--resume", tmp_path / "0000003.pt", "--results-dir",
         tmp_path)
    assert containers.read(tmp_path / "000-VQ-4-S")["steps"] == 6
