"""What is done about pictures that cannot be read: each is told once, and a class without readable ones is refused."""
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dataset.build import ImageDataset
from dataset.pictures import UnreadableError
from utils import cli, dist

MOST_TOLD = 100  # unreadable images that a process names on the screen


class LeftOut(str):
    """Why an image is left out; `kind` is what it is counted under."""

    def __new__(cls, text: object, kind: str = UnreadableError.kind) -> "LeftOut":
        made = super().__new__(cls, text)
        made.kind = kind
        return made


class PassedOver:
    """The unreadable images that a process has met, each told once."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def tell(self, reasons: list[str]) -> None:
        """Say of each image, by its name and the reason, that it is passed over; of very many only the first."""
        for reason in reasons:
            if reason in self.told:
                continue
            self.told.add(reason)
            if len(self.told) <= MOST_TOLD:
                more = ", further ones are counted only" if len(self.told) == MOST_TOLD else ""
                cli.warn(f"passed over: {reason}; {len(self.told)} so far{more}", every_rank=True)


def split_readable(batch: list[tuple[int, Any | str]],
                   passed_over: PassedOver) -> tuple[list[int], list[Any], list[int]]:
    """A batch of (index, views, or why there are none) → (indices, their views, indices of unreadable ones, told)."""
    readable = [(index, views) for index, views in batch if not isinstance(views, str)]
    passed_over.tell([views for _, views in batch if isinstance(views, str)])
    return ([index for index, _ in readable], [views for _, views in readable],
            [index for index, views in batch if isinstance(views, str)])


def check_readable(data: ImageDataset) -> None:
    """Raise ValueError if of a class, or of images without classes, none can be read. All processes call this together.

    One picture of each class is read, more only where the first ones are damaged.
    """
    with dist.failing_together():
        if dist.env_rank() > 0:
            return
        classes = range(1 if data.classes is None else len(data.classes))
        members = np.argsort(data.labels, kind="stable")
        ends = np.searchsorted(data.labels[members], [*classes, len(classes)])
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda label: why_unreadable(data, members[ends[label]:ends[label + 1]]), classes))
        empty = [(label, why) for label, why in enumerate(found) if why is not None]
        if empty:
            label, why = empty[0]
            named = f"class {data.classes[label]!r}" if data.classes else f"all {len(data)} images"
            more = f" (and of {len(empty) - 1} more classes)" if len(empty) > 1 else ""
            raise ValueError(f"nothing of {named} can be read{more}, such as {why}")


def why_unreadable(data: ImageDataset, indices: np.ndarray) -> str | None:
    """None if one of the images can be read, else the first one's reason. No images at all: None."""
    first = None
    for index in indices.tolist():
        try:
            data.image(index)
        except UnreadableError as error:
            first = first or str(error)
        else:
            return None
    return first
