"""Masks, cells and windows: which parts of a picture are drawn anew, and in which order."""
import numpy as np
import pytest
import torch

from autoregressive.sample.masks import Canvas, as_mask, box_mask, chosen, dilated, stretched, windows


def spot(size: tuple[int, int], *places: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    for place in places:
        mask[place] = True
    return mask


def test_greys_are_white_from_the_middle_on_and_other_sizes_are_stretched():
    grey = np.array([[0, 127], [128, 255]], np.uint8)
    assert as_mask(grey, (2, 2)).tolist() == [[False, False], [True, True]]
    assert as_mask(grey, (4, 4)).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    assert np.array_equal(as_mask(spot((90, 60), (45, 31)), (6, 4)), spot((6, 4), (3, 2)))  # a single pixel stays
    assert as_mask(spot((333, 500), (0, 0)), (2 * 333 + 1, 1000)).any()  # a pixel of rounding


@pytest.mark.parametrize(("values", "message"), [
    (np.zeros((4, 6), bool), r"the mask is 4x6 pixels, the picture 4x4"),
    (np.zeros((4, 4)), r"float64 of shape \(4, 4\), expected bool, or uint8"),
    (np.zeros((4, 4, 3), np.uint8), r"of shape \(4, 4, 3\)"),
    (np.zeros((0, 4), bool), r"of shape \(0, 4\)"),
])
def test_what_is_no_mask_of_the_picture_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        as_mask(values, (4, 4))


def test_boxes_are_cut_at_the_edges_and_refused_outside():
    assert np.argwhere(box_mask((1, 2, 2, 1), (4, 4))).tolist() == [[2, 1], [2, 2]]
    assert np.argwhere(box_mask((-3, -1, 4, 2), (4, 4))).tolist() == [[0, 0]]
    assert np.argwhere(box_mask((3, 3, 99, 99), (4, 4))).tolist() == [[3, 3]]
    for box in ((4, 0, 2, 2), (-2, 0, 2, 2), (0, 9, 1, 1), (0, 0, 0, 2), (2, 2, -1, -1), (5, 5, -3, -3)):
        with pytest.raises(ValueError, match="lies outside of the picture of 4x4"):
            box_mask(box, (4, 4))


def test_a_stretched_mask_keeps_every_part():
    rng = np.random.default_rng(0)
    for _ in range(50):
        old, new = rng.integers(1, 30, (2, 2))
        mask = rng.random(old) < 0.1
        wanted = np.zeros(new, bool)
        for y, x in np.argwhere(mask):  # the pixels of the new size that share some area with this one
            rows, columns = (np.arange(size) for size in new)
            wanted |= ((rows * old[0] < (y + 1) * new[0]) & ((rows + 1) * old[0] > y * new[0]))[:, None] \
                & ((columns * old[1] < (x + 1) * new[1]) & ((columns + 1) * old[1] > x * new[1]))
        assert np.array_equal(stretched(mask, new, corner=(0, 0), kept=new), wanted)
        corner = [int(rng.integers(size)) for size in new]
        kept = [int(size - first) for size, first in zip(new, corner, strict=True)]
        assert np.array_equal(stretched(mask, new, corner=corner, kept=kept), wanted[corner[0]:, corner[1]:])


@pytest.mark.parametrize("reach", [0, 1, 3, 50])
def test_dilation_reaches_in_all_directions(reach):
    mask = spot((7, 9), (0, 8), (4, 2))
    y, x = np.mgrid[:7, :9]
    wanted = (np.maximum(y, 8 - x) <= reach) | (np.maximum(abs(y - 4), abs(x - 2)) <= reach)
    assert np.array_equal(dilated(mask, reach), wanted)


def test_a_share_of_the_cells_is_chosen_by_chance():
    cells = np.ones((5, 8), bool)
    cells[0] = False
    picks = [chosen(cells, 0.25, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert [pick.sum() for pick in picks] == [8, 8, 8] and not picks[0][0].any()
    assert np.array_equal(picks[0], picks[1]) and not np.array_equal(picks[0], picks[2])
    assert chosen(cells, 1e-9, torch.Generator()).sum() == 1
    assert np.array_equal(chosen(cells, 1.0, torch.Generator()), cells)


# ---- canvases


def test_every_known_pixel_lies_in_a_known_cell():
    """Against pixels: what a cell that is kept shows is the picture's own, beyond it all is drawn."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        picture = rng.integers(1, 30, 2)
        size = picture + rng.integers(0, 20, 2) * rng.integers(0, 2, 2)
        place = [int(rng.integers(room + 1)) for room in size - picture]
        layout = Canvas.around(picture, size, place[::-1], patch=4, grid=(3, 5))
        hole = rng.random(picture) < 0.02
        cells = layout.opened(hole, dilate=0)
        known = ~layout.pixels(layout.whole(cells))
        assert known.shape == tuple(size) and layout.cells[0] >= 3 and layout.cells[1] >= 5
        assert not (known & layout.laid(hole, beyond=True)).any()
        covered = layout.pixels(layout.whole(np.zeros_like(cells)))
        whole = picture // 4 * 4  # the cells that the picture covers whole, counted from its corner, can be kept
        kept = ~covered[place[0]:place[0] + whole[0], place[1]:place[1] + whole[1]]
        assert kept.all()
        if not hole.any():
            assert known[place[0]:place[0] + whole[0], place[1]:place[1] + whole[1]].all()
            assert known.all() == (size == picture).all()


def test_a_canvas_that_does_not_hold_the_picture_is_refused():
    for size, place in (((8, 7), None), ((7, 8), None), ((20, 20), (13, 0)), ((20, 20), (0, -1))):
        with pytest.raises(ValueError, match="larger --canvas"):
            Canvas.around((8, 8), size, place)
    assert Canvas.around((8, 8), (9, 20), None).place == (0, 6)
    assert Canvas.around((8, 8), (9, 20), (3, 1)).place == (1, 3)


# ---- windows


def visited(cells: np.ndarray, grid: tuple[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Corners of the windows, and how many cells were there already in each; checks that they cover all cells."""
    left, corners, there = cells.copy(), [], []
    for window in windows(cells, grid):
        part = left[window]
        assert part.shape == tuple(grid) and part.any()
        corners.append((window[0].start, window[1].start))
        there.append(int((~part).sum()))
        part[:] = False
    assert not left.any()
    return corners, there


def test_a_picture_grows_by_half_a_window():
    cells = np.ones((4, 16), bool)
    cells[:, :4] = False
    assert visited(cells, (4, 4)) == ([(0, 2 * i) for i in range(1, 7)], [8] * 6)
    cells[:, :4], cells[:, 7:11] = True, False
    assert min(visited(cells, (4, 4))[1]) == 8
    cells = np.ones((12, 12), bool)  # in both directions, then the corners
    cells[4:8, 4:8] = False
    assert min(visited(cells, (4, 4))[1]) >= 8
    assert visited(np.ones((4, 5), bool), (4, 4)) == ([(0, 0), (0, 1)], [0, 12])  # a single column is left


def test_a_small_hole_lies_in_the_middle_of_its_window():
    assert visited(spot((20, 30), (9, 11), (10, 12)), (8, 8)) == ([(6, 8)], [62])
    assert visited(spot((20, 30), (0, 29)), (8, 8)) == ([(0, 22)], [63])
    assert visited(np.ones((3, 5), bool), (3, 5)) == ([(0, 0)], [0])
    far = spot((8, 40), (4, 2), (4, 37))
    assert len(visited(far, (8, 8))[0]) == 2
    assert visited(np.zeros((8, 8), bool), (4, 4)) == ([], [])


def test_windows_cover_anything():
    rng = np.random.default_rng(2)
    for _ in range(100):
        grid = rng.integers(1, 6, 2)
        visited(rng.random(grid + rng.integers(0, 12, 2)) < rng.random(), tuple(grid))
