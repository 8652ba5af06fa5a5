"""PSNR and SSIM against scikit-image, against values worked out by hand, and against what the fixture stores."""
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from evaluations.similarity import psnr, ssim
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "data" / "evaluation" / "ssim_psnr.npz"


def pairs(count: int = 3, size: tuple[int, int] = (20, 31), *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 pictures (B, H, W, 3) and noisy copies, one of them nearly flat."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    pictures[0] = 250 + pictures[0] % 3
    noise = rng.normal(0, 25, pictures.shape)
    return pictures, np.clip(pictures + noise, 0, 255).astype(np.uint8)


def planes(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def test_values_are_those_of_scikit_image():
    a, b = pairs()
    found = torch.column_stack([psnr(planes(a), planes(b)), ssim(planes(a), planes(b), data_ranges=(1.0, 2.0))])
    expected = [[peak_signal_noise_ratio(x, y, data_range=1.0),
                 *(structural_similarity(x, y, channel_axis=-1, data_range=scale) for scale in (1.0, 2.0))]
                for x, y in zip(a / 255, b / 255, strict=True)]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_values_of_the_fixture():
    """Made by scikit-image 0.26 on pictures divided by 255 in float32; ssim_dr2 is LlamaGen's call."""
    with np.load(FIXTURE) as known:
        a, b = (planes(known[name][None].astype(np.float32) / 255) for name in ("gt", "rec"))
        assert psnr(a, b).item() == pytest.approx(known["psnr"].item(), abs=1e-5)
        one, two = ssim(a, b, data_ranges=(1.0, 2.0))[0].tolist()
        assert one == pytest.approx(known["ssim_dr1_f64"].item(), abs=1e-13)
        assert two == pytest.approx(known["ssim_dr2_f64"].item(), abs=1e-13)
        assert two == pytest.approx(known["ssim_dr2"].item(), abs=3e-6)


def test_flat_pictures_by_hand():
    """Without variance SSIM is (2xy + c1) / (x² + y² + c1), and PSNR that of the one difference."""
    x, y = torch.full((1, 3, 9, 9), 0.2), torch.full((1, 3, 9, 9), 0.7)
    assert psnr(x, y).item() == pytest.approx(20 * math.log10(1 / 0.5), abs=1e-5)
    for scale in (1.0, 2.0):
        c1 = (0.01 * scale) ** 2
        assert ssim(x, y, data_ranges=(scale,)).item() == pytest.approx((0.28 + c1) / (0.53 + c1), abs=1e-6)


def test_identical_pictures():
    a = planes(pairs()[0])
    assert psnr(a, a).isposinf().all()
    np.testing.assert_allclose(ssim(a, a), 1.0, atol=1e-12)


def test_bytes_and_floats_and_batches_agree():
    a, b = (planes(x) for x in pairs(5))
    floats = [x.double() / 255 for x in (a, b)]
    assert torch.equal(psnr(a, b), psnr(*floats)) and torch.equal(ssim(a, b), ssim(*floats))
    assert torch.equal(psnr(floats[0], b), psnr(a, b))  # one of each
    alone = torch.cat([ssim(a[i:i + 1], b[i:i + 1]) for i in range(5)])
    assert torch.equal(ssim(a, b), alone)


def test_pictures_that_cannot_be_compared():
    a = torch.zeros(2, 3, 8, 8)
    for function in (psnr, ssim):
        with pytest.raises(ValueError, match=r"shapes \(2, 3, 8, 8\) and \(1, 3, 8, 8\) cannot be compared"):
            function(a, a[:1])
    with pytest.raises(ValueError, match=r"at least 7x7 pixels, got 8x6"):
        ssim(a[..., :6], a[..., :6])
