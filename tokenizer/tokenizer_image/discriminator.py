"""Discriminators for the tokenizer's adversarial loss: images (B, 3, H, W) in [-1, 1] → logits, high for real."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """One logit per patch (pix2pix, arXiv 1611.07004): 4x4 convolutions, BatchNorm, LeakyReLU 0.2."""

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            following = width * min(2**i, 8)
            blocks += [nn.Conv2d(channels, following, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                       nn.BatchNorm2d(following), nn.LeakyReLU(0.2)]
            channels = following
        self.main = nn.Sequential(*blocks, nn.Conv2d(channels, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)  # (B, 1, h, w)


class DownBlock(nn.Module):
    """Residual block that halves h and w, blurring before each stride (arXiv 1904.11486)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", torch.outer(kernel, kernel)[None, None] / 16, persistent=False)

    def blur(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel.to(x.dtype).expand(channels, 1, 3, 3),
                        groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(self.blur(h)), 0.2)
        return (h + self.skip(self.blur(x)[:, :, ::2, ::2])) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """One logit per image (StyleGAN2's residual discriminator, arXiv 1912.04958) for any image size from 8 pixels."""

    def __init__(self, *, image_size: tuple[int, int], base: int = 16384, max_width: int = 512) -> None:
        super().__init__()
        side = min(image_size)

        def width(resolution: int) -> int:
            return min(max_width, base // max(resolution, 1))

        self.input = nn.Conv2d(3, width(side), 1)
        blocks = []
        while side > 7:
            blocks.append(DownBlock(width(side), width(side // 2)))
            side //= 2
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(width(side) + 1, width(4), 3, padding=1)
        self.hidden = nn.Linear(width(4) * 16, width(4))
        self.output = nn.Linear(width(4), 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.leaky_relu(self.input(images), 0.2))
        spread = x.float().std(0, unbiased=False).mean().to(x.dtype)  # minibatch deviation: one extra channel
        x = torch.cat([x, spread.expand(x.shape[0], 1, *x.shape[2:])], dim=1)
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.conv(x), 0.2), 4).flatten(1)
        return self.output(F.leaky_relu(self.hidden(x), 0.2))  # (B, 1)
