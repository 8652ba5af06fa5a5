"""What the tokenizer is trained by: reconstruction, adversarial and perceptual losses, the discriminators."""
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer.tokenizer_image import vq_loss
from tokenizer.tokenizer_image.discriminator import DownBlock, PatchGAN, StyleGANDiscriminator
from tokenizer.tokenizer_image.lpips import perceptual_loss
from tokenizer.tokenizer_image.quantize import CodebookLosses
from tokenizer.tokenizer_image.vq_loss import LossFlags, VQLoss, adaptive_weight, discriminator_loss, generator_loss
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.training.trainer import frozen

CPU = torch.device("cpu")


# ---- sums and weights


def test_adversarial_losses_are_their_formulas():
    real, fake = torch.randn(2, 50, dtype=torch.float64).mul(2).tolist()

    def mean(values) -> float:
        return sum(values) / 50

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    pair = torch.tensor(real), torch.tensor(fake)
    hinge = 0.5 * (mean(max(0, 1 - x) for x in real) + mean(max(0, 1 + x) for x in fake))
    cross = -0.5 * (mean(math.log(sigmoid(x)) for x in real) + mean(math.log(1 - sigmoid(x)) for x in fake))
    assert discriminator_loss("hinge", *pair).item() == pytest.approx(hinge, rel=1e-5)
    assert discriminator_loss("vanilla", *pair).item() == pytest.approx(cross, rel=1e-5)
    assert discriminator_loss("non-saturating", *pair).item() == pytest.approx(cross, rel=1e-5)
    assert generator_loss("hinge", pair[1]).item() == pytest.approx(-mean(fake), rel=1e-5)
    assert generator_loss("non-saturating", pair[1]).item() == pytest.approx(
        -mean(math.log(sigmoid(x)) for x in fake), rel=1e-5)


class Critic(nn.Module):
    """A discriminator that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.scale * images.square().mean((1, 2, 3))


def losses_of(flags: LossFlags, *, step: int):
    torch.manual_seed(0)
    last = nn.Parameter(torch.tensor(0.7))
    images, base = torch.rand(2, 2, 3, 4, 4)
    made, critic = last * base, Critic()
    codebook = CodebookLosses(*torch.tensor([0.3, 0.2, 0.1]))
    with frozen(critic):
        loss, parts = VQLoss(flags, device=CPU)(images, made, codebook, step=step, discriminator=critic,
                                                last_layer=last)
    return images, made, last, critic, loss, parts


def test_the_adversarial_term_starts_at_disc_start():
    flags = LossFlags(perceptual_weight=0, disc_start=10, disc_weight=0.5, codebook_weight=2.0,
                      reconstruction_weight=3.0)
    images, made, _, critic, loss, parts = losses_of(flags, step=9)
    plain = 3.0 * (images - made).square().mean() + 2.0 * 0.6
    assert critic.calls == 0 and "generator" not in parts
    torch.testing.assert_close(loss, plain)
    images, made, _, critic, loss, parts = losses_of(flags, step=10)
    assert critic.calls == 1
    torch.testing.assert_close(loss, plain - 0.5 * critic(made).mean())
    assert torch.equal(parts["loss"], loss)


def test_l1_and_no_discriminator():
    flags = LossFlags(perceptual_weight=0, disc_start=0, disc_weight=0, reconstruction_loss="l1")
    images, made, _, critic, loss, _ = losses_of(flags, step=5)
    torch.testing.assert_close(loss, (images - made).abs().mean() + 0.6)
    assert critic.calls == 0


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    last = nn.Parameter(torch.randn(5))
    a, b = torch.randn(2, 5)
    found = adaptive_weight((a * last).sum(), (b * last).sum(), last)
    torch.testing.assert_close(found, a.norm() / (b.norm() + 1e-4))
    assert not found.requires_grad
    assert adaptive_weight((1e9 * last).sum(), (0 * last).sum(), last) == 1e4
    flags = LossFlags(perceptual_weight=0, disc_start=0, disc_adaptive_weight=True)
    images, made, last, critic, loss, parts = losses_of(flags, step=0)
    likeness = (images - made).square().mean()
    weight = adaptive_weight(likeness, -critic(made).mean(), last)
    torch.testing.assert_close(loss, likeness + 0.6 + 0.5 * weight * -critic(made).mean())
    torch.testing.assert_close(parts["adaptive_weight"], weight)


def test_the_tokenizers_step_leaves_the_discriminator_alone():
    flags = LossFlags(perceptual_weight=0, disc_start=0)
    _, _, last, critic, loss, _ = losses_of(flags, step=0)
    loss.backward()
    assert last.grad is not None and critic.scale.grad is None and critic.scale.requires_grad
    flags = LossFlags(perceptual_weight=0, reconstruction_weight=0, codebook_weight=0, disc_start=0)
    _, _, last, _, loss, _ = losses_of(flags, step=0)
    loss.backward()
    assert last.grad != 0  # the adversarial gradient flows through it


# ---- the perceptual loss


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> tuple:
    """(file with a torchvision VGG-16 state dict, the vgg features it is of)."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    features = make_layers(cfgs["D"])
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    classifier = {"classifier.0.weight": torch.zeros(2, 2)}
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()} | classifier, path)
    return path, features.eval()


@pytest.fixture
def quick_vgg(monkeypatch):
    """torchvision's constructor without the classifier's 120M random numbers."""
    from torchvision.models import vgg as module

    monkeypatch.setattr(module.VGG, "__init__", lambda self, features, *args, **kwargs: (
        nn.Module.__init__(self), setattr(self, "features", features))[0])


def test_lpips_with_a_local_backbone_is_the_metric_of_its_paper(vgg, quick_vgg):
    path, features = vgg
    metric = perceptual_loss(str(path), device=CPU)
    assert not metric.training and not any(p.requires_grad for p in metric.parameters())
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    import lpips

    heads = torch.load(f"{lpips.__path__[0]}/weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    x, y, total, taps = (a - shift) / scale, (b - shift) / scale, 0.0, iter(range(5))
    with torch.no_grad():
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in (3, 8, 15, 22, 29):
                unit = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y)]
                weight = heads[f"lin{next(taps)}.model.1.weight"]
                total = total + F.conv2d((unit[0] - unit[1]).square(), weight).mean((2, 3))
        torch.testing.assert_close(metric(a, b)[:, :, 0, 0], total, atol=1e-5, rtol=1e-3)
        assert metric(a, a).abs().max() == 0 and metric(a, b).min() > 0


def test_a_file_that_is_no_vgg_is_refused(vgg, quick_vgg, tmp_path):
    torch.save({"model": VQ_models["VQ-4-S"]().state_dict()}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"no torchvision VGG-16 file"):
        perceptual_loss(str(tmp_path / "vq.pt"), device=CPU)
    state = torch.load(vgg[0], weights_only=True)
    del state["features.28.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"missing slice5\.28\.weight"):
        perceptual_loss(str(tmp_path / "cut.pth"), device=CPU)
    with pytest.raises(FileNotFoundError):
        perceptual_loss(str(tmp_path / "none.pth"), device=CPU)


def test_weight_zero_does_not_load_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # importing it would fail
    assert VQLoss(LossFlags(perceptual_weight=0), device=CPU).perceptual is None
    with pytest.raises(ImportError):
        VQLoss(LossFlags(perceptual_weight=1), device=CPU)


def test_the_perceptual_term_counts_with_its_weight(monkeypatch):
    monkeypatch.setattr(vq_loss, "perceptual_loss", lambda *_, **__: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    images, made, *_, loss, parts = losses_of(LossFlags(perceptual_weight=0.3, disc_start=9), step=0)
    torch.testing.assert_close(parts["perceptual"], (images - made).abs().mean())
    torch.testing.assert_close(loss, (images - made).square().mean() + 0.3 * parts["perceptual"] + 0.6)


# ---- discriminators


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 64)])
def test_discriminators_take_any_size(size):
    images = torch.randn(2, 3, *size, requires_grad=True)
    patches = PatchGAN()(images)
    assert patches.shape == (2, 1, size[0] // 8 - 2, size[1] // 8 - 2)
    logits = StyleGANDiscriminator(image_size=size, base=512, max_width=32)(images)
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (17, 30)])
def test_stylegan_discriminator_trains_on_odd_sizes_and_single_images(size):
    critic = StyleGANDiscriminator(image_size=size, base=256, max_width=16)
    critic(torch.randn(1, 3, *size)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 4)])
def test_blur_keeps_constants_and_halves_rounding_up(size):
    block = DownBlock(3, 5)
    flat = torch.full((1, 3, *size), 1.7)
    torch.testing.assert_close(block.blur(flat), flat)
    x = torch.randn(1, 3, *size)
    padded = np.pad(x[0, 1].numpy(), 1, mode="reflect")
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = sum(kernel[i, j] * padded[i:i + size[0], j:j + size[1]] for i in range(3) for j in range(3))
    np.testing.assert_allclose(block.blur(x)[0, 1].numpy(), expected, atol=1e-6)
    assert block(x).shape == (1, 5, -(-size[0] // 2), -(-size[1] // 2))


def test_a_down_block_adds_its_two_ways_and_keeps_their_variance():
    block, x = DownBlock(3, 5), torch.randn(1, 3, 8, 8)
    way = F.leaky_relu(block.conv2(block.blur(F.leaky_relu(block.conv1(x), 0.2))), 0.2)
    torch.testing.assert_close(block(x), (way + block.skip(block.blur(x)[..., ::2, ::2])) / 2**0.5)


def test_patchgan_is_the_documented_network():
    critic = PatchGAN()
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (64, 4, 2), (128, 4, 2), (256, 4, 2), (512, 4, 1), (1, 4, 1)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in critic.modules()) == 3
    assert {m.negative_slope for m in critic.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
