"""Convolutional encoder and decoder of the image tokenizer (VQGAN, arXiv 2012.09841, in LlamaGen's layout).

The attribute names are the state-dict names of the released checkpoints: change one and they no longer load.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image import convolution
from tokenizer.tokenizer_image.convolution import PointwiseConv, convolve


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or groups of 4 channels where the layer is narrower than 128."""
    return nn.GroupNorm(min(32, max(1, channels // 4)), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, in, h, w) → (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else PointwiseConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = convolve(self.conv1, x, norm=self.norm1)
        return convolve(self.conv2, h, norm=self.norm2, dropout=self.dropout, residual=self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head softmax attention over all h·w positions, (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = PointwiseConv(channels, channels)
        self.k = PointwiseConv(channels, channels)
        self.v = PointwiseConv(channels, channels)
        self.proj_out = PointwiseConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.q, self.k, self.v
        if convolution.ready(self.q, x, self.norm, self.k, self.v):
            z = [convolution.run_kernel(x, layer.weight, layer.bias, norm=self.norm) for layer in layers]
        else:
            normed = self.norm(x)
            z = [layer(normed) for layer in layers]
        q, k, v = (part.flatten(2).transpose(1, 2) for part in z)  # (B, h*w, C)
        z = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # scale C^-1/2
        return convolve(self.proj_out, z.transpose(1, 2).reshape(x.shape), residual=x)


class Downsample(nn.Module):
    """Halve h and w: one zero row below and one zero column right, then a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x)


class Upsample(nn.Module):
    """Double h and w: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x, upsample=True)


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention if asked, then a resampling."""

    def __init__(self, in_channels: int, out_channels: int, *, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, dropout=dropout) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


def middle(channels: int, *, dropout: float) -> nn.ModuleList:
    """Residual block, attention, residual block at the lowest resolution."""
    return nn.ModuleList([ResnetBlock(channels, channels, dropout=dropout), AttnBlock(channels),
                          ResnetBlock(channels, channels, dropout=dropout)])


class Encoder(nn.Module):
    """Images (B, 3, H, W) → features (B, z_channels, H/p, W/p), p = 2 ** (len(ch_mult) - 1)."""

    def __init__(self, *, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int,
                 dropout: float = 0.0) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([ch, *widths])):
            last = i == len(widths) - 1
            level = Level(before, width, blocks=num_res_blocks, attention=last, dropout=dropout)
            level.downsample = None if last else Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1], dropout=dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = convolve(self.conv_in, x)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)
        return convolve(self.conv_out, x, norm=self.norm_out)


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) → images (B, 3, h*p, w*p); the mirror of Encoder with one more block a level."""

    def __init__(self, *, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int,
                 dropout: float = 0.0) -> None:
        super().__init__()
        widths = [ch * mult for mult in reversed(ch_mult)]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], dropout=dropout)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
            level = Level(before, width, blocks=num_res_blocks + 1, attention=i == 0, dropout=dropout)
            level.upsample = None if i == len(widths) - 1 else Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients the adaptive adversarial weight compares."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        x = convolve(self.conv_in, z)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)
        return convolve(self.conv_out, x, norm=self.norm_out)


def to_channels_last(module: nn.Module) -> nn.Module:
    """Store 4-d weights channels-last, the layout in which convolutions are fastest on CPU and tensor cores."""
    return module.to(memory_format=torch.channels_last)
