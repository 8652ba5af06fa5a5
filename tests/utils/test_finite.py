"""NaN and inf are found in every type and place, and told apart; numbers of any size are left alone."""
import pytest
import torch

from utils.finite import NotFiniteError, check_finite, fault, finite_images

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", [0, 12_345, 99_999])
def test_every_place_is_looked_at(dtype, place):
    values = torch.linspace(-1, 1, 100_000).to(dtype)
    for found, said in (([], None), (["nan"], "nan"), (["inf"], "inf"), (["-inf"], "inf"), (["nan", "inf"],) * 2):
        spoilt = values.clone()
        for i, value in enumerate(found):
            spoilt[place - i] = float(value)
        assert fault(spoilt) == (said and " and ".join(found) if len(found) > 1 else said)
        assert fault(spoilt.view(100, 1000).T) == fault(spoilt)


@pytest.mark.parametrize("dtype", TYPES)
def test_all_finite_numbers_pass(dtype):
    limits = torch.finfo(dtype)
    assert fault(torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=dtype)) is None
    assert fault(torch.zeros(0, 3, dtype=dtype)) is None and fault(torch.zeros((), dtype=dtype)) is None
    assert fault(torch.nn.Parameter(torch.tensor(float("nan"), dtype=dtype))) == "nan"


def test_other_types():
    assert fault(torch.tensor([float("nan")]).to(torch.float8_e4m3fn)) == "nan"
    assert fault(torch.tensor([float("inf")]).to(torch.float8_e5m2)) == "inf"
    assert fault(torch.tensor([2**62])) is None and fault(torch.tensor([True])) is None


def test_the_first_tensors_are_named():
    weights = {f"layer.{i}": torch.full((2,), float(("nan", "inf", "-inf", "1", "nan", "nan")[i])) for i in range(6)}
    check_finite({"layer.3": weights["layer.3"], "step": torch.tensor(3)}, "a.pt")
    with pytest.raises(NotFiniteError, match=r"^a\.pt holds weights that are not finite: layer\.0 \(nan\), layer\.1 "
                                             r"\(inf\), layer\.2 \(inf\), layer\.4 \(nan\) and 1 more: "):
        check_finite(weights, "a.pt")


def test_the_first_image_is_named():
    images = torch.randn(5, 3, 4, 4)
    assert finite_images(images, "VQ-16") is images
    images[3, 1, 2, 2] = images[4, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"VQ-16 gave images that are not finite \(2 of 5 .* number 3\)"):
        finite_images(images, "VQ-16")
