"""Holes filled from their surroundings, known pixels pasted back, PSNR of a part, strips."""
import numpy as np
import pytest

from autoregressive.sample.seams import filled, pasted, psnr_where, strip
from tests.autoregressive.sample.editing import SIZE, block, picture


def test_holes_are_filled_with_their_surroundings():
    image = np.zeros((9, 14, 3), np.uint8)
    image[:, 7:] = (200, 100, 50)
    hole = block(2, 2, 4, 10, (9, 14))
    made = filled(image, hole)
    assert np.array_equal(made[~hole], image[~hole])
    assert made[3, 3].max() < 60 and np.abs(made[3, 11].astype(int) - (200, 100, 50)).max() < 60
    assert made[hole].max() <= 200
    flat = np.full((33, 5, 3), 77, np.uint8)
    assert (filled(flat, block(0, 0, 32, 5, (33, 5))) == 77).all()
    assert (filled(flat, np.ones((33, 5), bool)) == 127).all()


def test_psnr_of_part_of_a_picture():
    image, other = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    other[0] = 100
    assert psnr_where(image, other, block(1, 0, 2, 4, (4, 4))) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr_where(image, other, block(0, 0, 2, 4, (4, 4))) == pytest.approx(10 * np.log10(2 * 255**2 / 100))
    assert psnr_where(image, other, block(0, 0, 1, 4, (4, 4))) is None  # identical
    assert psnr_where(image, other, block(0, 0, 0, 0, (4, 4))) is None


def test_the_mixture_of_both_sides_falls_off_evenly():
    made, original = np.full((1, 8, 3), 200, np.uint8), np.full((1, 8, 3), 100, np.uint8)
    hole = block(0, 0, 1, 2, (1, 8))
    assert pasted(made, original, hole, feather=3)[0, :, 0].tolist() == [200, 200, 175, 150, 125, 100, 100, 100]
    assert pasted(made, original, hole, feather=10**9)[0, :, 0].tolist() == [200] * 8
    assert pasted(made, original, hole, feather=0)[0, :, 0].tolist() == [200, 200, *[100] * 6]


def test_strips_have_a_row_for_each_mask():
    pictures, masks = np.stack([picture(), picture(seed=1)]), np.zeros((2, *SIZE), np.uint8)
    one = strip(picture(), masks, pictures, names=["cat", "dog"])
    masks[1] = 255
    two = strip(picture(), masks, pictures, names=["cat", "dog"])
    assert one.shape[1] > 4 * 128 and two.shape[1] < one.shape[1] and two.shape[0] > one.shape[0]
    assert (one[2, 148:148 + 144] == 127).all() and (one[3, 149:148 + 143] == 0).all()  # the mask, in its frame
    assert np.array_equal(one[2:2 + 96, 2:2 + 144], picture().repeat(6, 0).repeat(6, 1))
