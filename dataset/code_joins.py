"""Several stores of codes as one: other crops of the same images, or different images mixed by weights."""
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset.code_layouts import CodeStore
from dataset.code_manifest import Column, same_tokenizer, tokenizer_name
from dataset.order import BLOCK_ROWS, WINDOW_ROWS, EndlessOrder
from utils.seeding import hash_choice


class OtherViews(CodeStore):
    """Stores of the same images in other crops, as one with all their views, counted through."""

    def __init__(self, paths: list[str], stores: list[CodeStore]) -> None:
        check_agreement(paths, stores)
        first = stores[0]
        for path, store in zip(paths, stores, strict=True):
            known = [(store.classes, first.classes), [part.manifest.get("image_names") for part in (store, first)]]
            if not np.array_equal(store.labels, first.labels) or any(a and b and a != b for a, b in known):
                raise ValueError(f"{path} does not hold other views of the images in {paths[0]}: {len(store)} images "
                                 f"against {len(first)}, or other names, labels or classes; different images are mixed "
                                 "by --store-weights")
        self.stores, self.offsets = stores, np.cumsum([0, *(store.views for store in stores)])
        super().__init__(labels=first.labels, views=int(self.offsets[-1]), classes=first.classes,
                         columns=agreed_columns(paths, stores), **common(stores))
        self.leave_out(np.unique(np.concatenate([store.damaged for store in stores])))

    def contents(self) -> list[str]:
        """The stores' fingerprints."""
        return [store.fingerprint() for store in self.stores]

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """From the store that has the view."""
        out = np.empty((len(rows), math.prod(self.grid)), dtype=np.int64)
        for home, mine in by_home(self.offsets, views):
            out[mine] = self.stores[home].read(rows[mine], views[mine] - self.offsets[home])
        return out

    def file_of(self, row: int, view: int) -> Path:
        """In the store that has the view."""
        home, = (home for home, _ in by_home(self.offsets, np.array([view])))
        return self.stores[home].where(row, view - int(self.offsets[home]))

    def column_files(self, name: str, rows: np.ndarray) -> list[str] | list[np.ndarray]:
        """From the first store that has it; of kind "views" from all of them."""
        if self.columns[name].kind == "views":
            each = [store.column(name, rows) for store in self.stores]
            return [np.concatenate(parts) for parts in zip(*each, strict=True)]
        return next(store for store in self.stores if name in store.columns).column(name, rows)


    def column_view_files(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """From the store that has the view."""
        return placed((mine, self.stores[home].column_in_view(name, rows[mine], views[mine] - self.offsets[home]))
                        for home, mine in by_home(self.offsets, views))


class Mixture(CodeStore):
    """Different images. Each epoch takes round(weight * n), at least one, of a store's n images.

    A store is an endless stream of passes over all its images, each pass in its own order, and an epoch takes the next
    ones: after any number of epochs every image of a store has come equally often, give or take one.

    Where an epoch is more than a window of the order, neighbouring indices are samples far apart, so that every window
    has its share of each store.
    """

    def __init__(self, paths: list[str], stores: list[CodeStore], weights: tuple[float, ...]) -> None:
        if len(weights) != len(stores):
            raise ValueError(f"--store-weights has {len(weights)} numbers, --code-path {len(stores)} stores")
        check_agreement(paths, stores)
        for store in stores:
            store.leave_out(store.damaged)
        classes = merge_classes(paths, stores)
        self.stores, self.weights = stores, weights
        self.samples = [max(1, round(weight * len(store))) for weight, store in zip(weights, stores, strict=True)]
        self.offsets = np.cumsum([0, *self.samples])
        self.row_offsets = np.cumsum([0, *map(len, stores)])
        self.orders: dict[int, list[EndlessOrder]] = {}
        self.stride = coprime_stride(int(self.offsets[-1]))
        shared = {name: column for name, column in stores[0].columns.items()
                  if all(store.columns.get(name) == column for store in stores)}
        super().__init__(labels=np.concatenate([store.labels for store in stores]), classes=classes,
                         views=max(store.views for store in stores), columns=shared, **common(stores))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def contents(self) -> list[Any]:
        """The stores' fingerprints and weights."""
        return [[store.fingerprint() for store in self.stores], list(self.weights)]

    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Rows counted through the stores; one with fewer views starts again at its first."""
        out = np.empty((len(rows), math.prod(self.grid)), dtype=np.int64)
        for home, mine in by_home(self.row_offsets, rows):
            store = self.stores[home]
            out[mine] = store.read(rows[mine] - self.row_offsets[home], views[mine] % store.views)
        return out

    def file_of(self, row: int, view: int) -> Path:
        """Rows counted through the stores."""
        home, = (home for home, _ in by_home(self.row_offsets, np.array([row])))
        return self.stores[home].where(row - int(self.row_offsets[home]), view % self.stores[home].views)

    def column_files(self, name: str, rows: np.ndarray) -> list[str] | list[np.ndarray]:
        """Rows counted through the stores."""
        found: list[Any] = [None] * len(rows)
        for home, mine in by_home(self.row_offsets, rows):
            values = self.stores[home].column(name, rows[mine] - self.row_offsets[home])
            for place, value in zip(mine.tolist(), values, strict=True):
                found[place] = value
        return found

    def column_view_files(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """As `read_files` does with the codes."""
        return placed((mine, self.stores[home].column_in_view(name, rows[mine] - self.row_offsets[home],
                                                                views[mine] % self.stores[home].views))
                        for home, mine in by_home(self.row_offsets, rows))

    def choose(self, epochs: np.ndarray, indices: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Index i of an epoch is the i-th of what the epoch takes from the first store, then from the second, ….

        (In strides where the epoch is large.) Orders have (seed, pass, store, 1) as their key, which is nobody else's.
        """
        if seed not in self.orders:
            self.orders[seed] = [EndlessOrder(len(store), seed, k, 1, kept=math.ceil(weight) + 2, windows=False)
                                 for k, (store, weight) in enumerate(zip(self.stores, self.weights, strict=True))]
        rows, views = np.empty_like(indices), np.empty_like(indices)
        numbers = indices * self.stride % len(self)
        for home, mine in by_home(self.offsets, numbers):
            positions = epochs[mine] * self.samples[home] + numbers[mine] - self.offsets[home]
            rows[mine] = self.orders[seed][home].visit(positions)[1] + self.row_offsets[home]
            views[mine] = hash_choice(seed, epochs[mine], indices[mine], options=self.stores[home].views)
        return rows, views


def coprime_stride(count: int) -> int:
    """1 where all is one window, else a number without a common divisor with `count`, about count / BLOCK_ROWS.

    Multiples of it, modulo `count`, are all numbers below `count`, and those of a block are spread over all of them.
    """
    stride = 1 if count <= WINDOW_ROWS else count // BLOCK_ROWS
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def agreed_columns(paths: list[str], stores: list[CodeStore]) -> dict[str, Column]:
    """The columns that any of several stores of the same images has, of kind "views" those that all have.

    Raises ValueError where two say something else.
    """
    found: dict[str, tuple[str, Column, dict[str, Any]]] = {}
    for path, store in zip(paths, stores, strict=True):
        for stored in store.manifest.get("columns", []):
            name = stored["name"]
            if stored["kind"] == "views":  # each store has its own: those of its crops
                continue
            first, column, other = found.setdefault(name, (path, store.columns[name], stored))
            rows, hashes = ([[file[key] for file in part["files"]] for part in (stored, other)]
                            for key in ("rows", "sha256"))
            if (store.columns[name] != column or stored["offsets"]["sha256"] != other["offsets"]["sha256"]
                    or (rows[0] == rows[1] and hashes[0] != hashes[1])):
                raise ValueError(f"{path} has another column {name!r} of the same images than {first}")
    of_views = {name: column for name, column in stores[0].columns.items()
                if column.kind == "views" and all(store.columns.get(name) == column for store in stores)}
    return {name: column for name, (_, column, _) in found.items()} | of_views


def placed(parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(places, values) of each part → the values (B, …) at their places."""
    places, values = zip(*parts, strict=True)
    return np.concatenate(values)[np.argsort(np.concatenate(places))]


def by_home(offsets: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(part, places of the values (B,) that fall in it) for each part that has any; `offsets` are where parts start."""
    homes = np.searchsorted(offsets, values, side="right") - 1
    for home in np.unique(homes).tolist():
        yield home, np.flatnonzero(homes == home)


def common(stores: list[CodeStore]) -> dict[str, Any]:
    """What stores together say of themselves."""
    sizes = [store.vocab_size for store in stores if store.vocab_size is not None]
    first = stores[0]
    return {"grid": first.grid, "vocab_size": max(sizes, default=None),
            "manifest": next((store.manifest for store in stores if store.manifest), {}),
            "folder": first.folder, "packed": all(store.packed for store in stores)}


def check_agreement(paths: list[str], stores: list[CodeStore]) -> None:
    """Raise ValueError for codes that no one model can learn: of other grids, or of other tokenizers."""
    for path, store in zip(paths, stores, strict=True):
        if store.grid != stores[0].grid:
            raise ValueError(f"{path} holds grids of {store.grid[0]}x{store.grid[1]} codes, {paths[0]} of "
                             f"{stores[0].grid[0]}x{stores[0].grid[1]}")
    made = [(path, store.manifest["tokenizer"]) for path, store in zip(paths, stores, strict=True) if store.manifest]
    for path, tokenizer in made:
        if same_tokenizer(tokenizer, made[0][1]) is False:
            raise ValueError(f"{path} holds codes of another tokenizer than {made[0][0]}: {tokenizer_name(tokenizer)}, "
                             f"not {tokenizer_name(made[0][1])}")


def merge_classes(paths: list[str], stores: list[CodeStore]) -> list[str] | None:
    """The classes of all stores, by name, first come first; the stores' labels are changed to that numbering.

    Stores without names must all be: their labels are taken to mean the same. Raises ValueError otherwise.
    """
    lists = [store.classes for store in stores]
    if all(names == lists[0] for names in lists):
        return lists[0]
    if None in lists:
        raise ValueError(f"{paths[lists.index(None)]} has no class names, but other stores of --code-path have: which "
                         "labels mean the same cannot be told")
    for path, names in zip(paths, lists, strict=True):
        if len(set(names)) < len(names):
            raise ValueError(f"{path} has two classes of one name: its classes cannot be joined by name with others")
    union = list(dict.fromkeys(name for names in lists for name in names))
    places = {name: place for place, name in enumerate(union)}
    for store, names in zip(stores, lists, strict=True):
        store.labels = np.array([places[name] for name in names])[store.labels]
    return union
