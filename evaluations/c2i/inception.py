"""The Inception network of 2015-12-05 behind FID, sFID, IS, precision and recall, as ADM's evaluator uses it.

It differs from torchvision's inception_v3: its average pools do not count the padding, the last block's pool branch is
a maximum, it has 1008 classes, and its input is (x - 128) / 128. Module names are torchvision's, so that the file
of pytorch-fid and torch-fidelity loads as it is. Equal to ADM's graph under TensorFlow to 3e-6 (tests/data).
"""
import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # pixels that the network sees
POOL_DIM = 2048
SPATIAL_CHANNELS = 7  # of the 17 x 17 grid: 2023 numbers for sFID
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008


def resize_tf1(images: Tensor, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """Float images (B, C, H, W) → (B, C, *size) as TensorFlow 1's ResizeBilinear does: corners at i * in / out, no
    antialiasing. The order of operations makes it bit-exact; F.interpolate is up to 24 levels of 255 away.
    """
    if images.shape[2:] == size:
        return images
    low, high, weight = _source(images.shape[3], size[1], images.device)
    left, right = images[..., low], images[..., high]
    images = left + (right - left) * weight  # (B, C, H, W')
    low, high, weight = _source(images.shape[2], size[0], images.device)
    top, bottom = images[:, :, low], images[:, :, high]
    return top + (bottom - top) * weight[:, None]  # (B, C, H', W')


def _source(length: int, new_length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output coordinate: its two source indices and the weight of the second."""
    scale = torch.tensor(length, dtype=torch.float32, device=device) / new_length
    place = torch.arange(new_length, dtype=torch.float32, device=device) * scale
    low = place.floor()
    return low.long(), (low.long() + 1).clamp_max(length - 1), place - low


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Within the block, CUDA computes fp32 as fp32: TF32 and bf16 change features by up to 0.4 %."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class FIDInception(nn.Module):
    """Pixels → pooled and spatial features, and class logits from the pooled ones."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)
        self.fc = nn.Linear(POOL_DIM, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Float pixels (B, 3, 299, 299) in [0, 255] → (pooled (B, 2048), spatial (B, 2023)), both fp32.

        Spatial: seven channels of the seventh mixed block's 1x1 branch, flattened (h, w, c) as in stored statistics.
        """
        with exact_fp32(), torch.autocast(pixels.device.type, enabled=False):
            x = ((pixels.float() - 128) * 0.0078125).contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
            x = F.max_pool2d(x, 3, stride=2)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
            x = F.max_pool2d(x, 3, stride=2)
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # (B, 768, 17, 17)
            x = self.Mixed_6c(self.Mixed_6b(x))
            spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
            x = self.Mixed_6e(self.Mixed_6d(x))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
            return x.mean((2, 3)), spatial

    def logits(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, 2048) → class logits (B, 1008). ADM multiplies by the weights and adds no bias."""
        with exact_fp32():
            return F.linear(pooled, self.fc.weight)


class Conv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], *, stride: int = 1,
                 padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def chain(x: Tensor, *layers: nn.Module) -> Tensor:
    """The layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def average_pool(x: Tensor) -> Tensor:
    """3x3 mean that does not count the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([
            self.branch1x1(x),
            chain(x, self.branch5x5_1, self.branch5x5_2),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(average_pool(x)),
        ], 1)


class BlockB(nn.Module):
    """35 x 35 → 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([
            self.branch3x3(x),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            F.max_pool2d(x, 3, stride=2),
        ], 1)


class BlockC(nn.Module):
    """17 x 17: 1x1, 7x7 in two strips, twice that, pool."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, **row)
        self.branch7x7_3 = Conv(inner, 192, **column)
        self.branch7x7dbl_1 = Conv(inputs, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, **column)
        self.branch7x7dbl_3 = Conv(inner, inner, **row)
        self.branch7x7dbl_4 = Conv(inner, inner, **column)
        self.branch7x7dbl_5 = Conv(inner, 192, **row)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([
            self.branch1x1(x),
            chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4,
                  self.branch7x7dbl_5),
            self.branch_pool(average_pool(x)),
        ], 1)


class BlockD(nn.Module):
    """17 x 17 → 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([
            chain(x, self.branch3x3_1, self.branch3x3_2),
            chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
            F.max_pool2d(x, 3, stride=2),
        ], 1)


class BlockE(nn.Module):
    """8 x 8: 1x1, two forked 3x3, pool (the mean in Mixed_7b, the maximum in Mixed_7c)."""

    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ], 1)
