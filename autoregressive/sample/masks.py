"""What is drawn anew in an edit: masks in pixels, cells, and the windows in which a model draws them. Geometry alone.

All masks are true where something is drawn anew. Sizes are (height, width); boxes (x, y, width, height).
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

WHITE = 128  # from this grey on a pixel of a mask is redrawn


@dataclass(frozen=True)
class Canvas:
    """A picture on a canvas of whole cells. The cells are counted from the picture's upper left corner, so that its
    codes do not depend on where it lies. There is room for at least one of the model's grids; what sticks out of `size`
    is drawn and thrown away.
    """

    picture: tuple[int, int]  # in pixels
    size: tuple[int, int]  # of the result, in pixels
    place: tuple[int, int]  # top, left: where in the result the picture lies
    patch: int  # pixels along a cell's side
    grid: tuple[int, int]  # of the model, in cells

    def __post_init__(self) -> None:
        ends = [place + picture for place, picture in zip(self.place, self.picture, strict=True)]
        if min(self.place) < 0 or ends[0] > self.size[0] or ends[1] > self.size[1]:
            (h, w), (height, width), (top, left) = self.picture, self.size, self.place
            raise ValueError(f"a picture of {h}x{w} pixels at x={left}, y={top} does not lie on a canvas of {height}x"
                             f"{width}: give a larger --canvas (height x width), another --place (x,y), or a smaller "
                             "picture")

    @classmethod
    def around(cls, picture: tuple[int, int], size: tuple[int, int] | None, place: tuple[int, int] | None, *,
               patch: int = 1, grid: tuple[int, int] = (1, 1)) -> "Canvas":
        """The canvas of `size` (None: the picture's) with the picture at `place` (x, y) (None: in the middle)."""
        size = picture if size is None else size
        middle = [(outer - inner) // 2 for outer, inner in zip(size, picture, strict=True)]
        return cls(tuple(picture), tuple(size), tuple(middle if place is None else place[::-1]), patch, tuple(grid))

    @property
    def before(self) -> tuple[int, int]:
        """Cells above and left of the picture."""
        return -(-self.place[0] // self.patch), -(-self.place[1] // self.patch)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the whole canvas."""
        return tuple(max(grid, before - (place - size) // self.patch) for grid, before, place, size in zip(
            self.grid, self.before, self.place, self.size, strict=True))

    @property
    def picture_cells(self) -> tuple[slice, slice]:
        """Where the picture's cells lie among them; the last of them may be covered in part."""
        return tuple(slice(before, before - (-picture // self.patch)) for before, picture in zip(
            self.before, self.picture, strict=True))

    @property
    def result(self) -> tuple[slice, slice]:
        """Where the result's pixels lie among those of the cells."""
        corner = [before * self.patch - place for before, place in zip(self.before, self.place, strict=True)]
        return tuple(slice(first, first + size) for first, size in zip(corner, self.size, strict=True))

    def opened(self, hole: np.ndarray, *, dilate: int) -> np.ndarray:
        """The picture's cells that a mask of its pixels opens: those it touches, `dilate` cells around them, and those
        that the picture covers in part where the canvas goes on."""
        rests = [-picture % self.patch for picture in self.picture]
        whole = np.pad(hole, [(0, rest) for rest in rests])
        h, w = (side // self.patch for side in whole.shape)
        cells = dilated(whole.reshape(h, self.patch, w, self.patch).any((1, 3)), dilate)
        goes_on = [place + picture < size for place, picture, size in zip(
            self.place, self.picture, self.size, strict=True)]
        cells[h - bool(rests[0] and goes_on[0]):] = True
        cells[:, w - bool(rests[1] and goes_on[1]):] = True
        return cells

    def whole(self, cells: np.ndarray, *, beyond: object = True) -> np.ndarray:
        """The picture's cells (…, h, w) on the canvas, with the value `beyond` around them."""
        everywhere = np.full((*cells.shape[:-2], *self.cells), beyond)
        everywhere[(..., *self.picture_cells)] = cells
        return everywhere

    def pixels(self, cells: np.ndarray) -> np.ndarray:
        """The canvas's cells (…, rows, columns) as pixels of the result."""
        return cells.repeat(self.patch, -2).repeat(self.patch, -1)[(..., *self.result)]

    def laid(self, pixels: np.ndarray, *, beyond: object) -> np.ndarray:
        """The picture's pixels (h, w, …) on the result, with the value `beyond` around them."""
        everywhere = np.full((*self.size, *pixels.shape[2:]), beyond, pixels.dtype)
        everywhere[tuple(slice(at, at + side) for at, side in zip(self.place, self.picture, strict=True))] = pixels
        return everywhere


def as_mask(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask, bool or grey uint8, for a picture of `size` → bool: true where something is drawn anew.

    A mask of another size, but of the picture's aspect, is stretched. Raises ValueError for one of another aspect.
    """
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype not in (bool, np.uint8) or not values.size:
        raise ValueError(f"the mask is {values.dtype} of shape {values.shape}, expected bool, or uint8 (white is drawn "
                         "anew), of shape (height, width)")
    mask = values if values.dtype == bool else values >= WHITE
    (h, w), (height, width) = mask.shape, size
    if abs(w * height - h * width) > max(size):  # a pixel of rounding
        raise ValueError(f"the mask is {h}x{w} pixels, the picture {height}x{width}: expected the same size, or at "
                         "least the same ratio of the sides")
    return stretched(mask, size, corner=(0, 0), kept=size)


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """The rectangle (x, y, width, height) as a mask of `size`; what lies outside is cut off.

    Raises ValueError where all of it does.
    """
    x, y, width, height = box
    mask = np.zeros(size, bool)
    if min(width, height) > 0:
        mask[max(0, y):max(0, y + height), max(0, x):max(0, x + width)] = True
    if not mask.any():
        raise ValueError(f"--box {x},{y},{width},{height} (x,y,width,height) lies outside of the picture of "
                         f"{size[0]}x{size[1]} pixels (height x width): nothing is to be drawn")
    return mask


def stretched(mask: np.ndarray, whole: tuple[int, int], *, corner: tuple[int, int],
              kept: tuple[int, int]) -> np.ndarray:
    """Stretch a mask to the size `whole` and cut `kept` out at `corner` (top, left). A pixel is true where any part of
    it was."""
    edges = []
    for old, new, first, count in zip(mask.shape, whole, corner, kept, strict=True):
        steps = np.arange(first, first + count)
        edges.append((steps * old // new, -(-(steps + 1) * old // new)))
    return area_sums(mask, *edges) > 0


def dilated(mask: np.ndarray, reach: int) -> np.ndarray:
    """The mask and all within `reach` of it, diagonally too."""
    edges = [((steps := np.arange(side)).clip(reach) - reach, (steps + reach + 1).clip(max=side))
             for side in mask.shape]
    return area_sums(mask, *edges) > 0


def chosen(cells: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    """A share of the true cells (h, w), at least one of them, drawn from `generator`."""
    found = np.flatnonzero(cells)
    order = torch.randperm(len(found), generator=generator).numpy()
    taken = np.zeros_like(cells)
    taken.flat[found[order[:max(1, round(share * len(found)))]]] = True
    return taken


def windows(cells: np.ndarray, grid: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Windows of `grid` in which the true cells (rows, columns) are drawn one after the other.

    Each time that one of which half is there already, if there is one, else the one with most; among those the one with
    most to draw, and then the one in whose middle that lies. So a picture grows by half a window, and a small hole is
    drawn at once with what is around it.
    """
    (h, w), (rows, columns) = grid, cells.shape
    tops, lefts = np.arange(rows - h + 1), np.arange(columns - w + 1)
    edges, left = ((tops, tops + h), (lefts, lefts + w)), cells.copy()
    row, column = np.mgrid[:rows, :columns]
    while left.any():
        todo = area_sums(left, *edges)
        down, across = (area_sums(left * place, *edges) / todo.clip(1) for place in (row, column))
        beside = np.hypot(down - tops[:, None] - (h - 1) / 2, across - lefts - (w - 1) / 2)
        there = np.where(todo > 0, np.minimum(h * w - todo, h * w // 2), -1)
        top, first = np.unravel_index(np.lexsort([beside.ravel(), -todo.ravel(), -there.ravel()])[0], todo.shape)
        window = slice(int(top), int(top) + h), slice(int(first), int(first) + w)
        left[window] = False
        yield window


def area_sums(values: np.ndarray, rows: tuple[np.ndarray, np.ndarray],
              columns: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Sums over rectangles, by a summed-area table: [i, j] is that of values[rows[0][i]:rows[1][i],
    columns[0][j]:columns[1][j]]."""
    table = np.pad(values.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (top, bottom), (left, right) = rows, columns
    return (table[np.ix_(bottom, right)] - table[np.ix_(top, right)] - table[np.ix_(bottom, left)]
            + table[np.ix_(top, left)])
