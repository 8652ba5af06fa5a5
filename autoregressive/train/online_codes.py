"""Codes that a tokenizer makes of captioned pictures whenever they are read, for training without extraction.

Every pass over the data pays for the tokenizer again, and its time and memory come on top of the model's: for more than
a trial, extract first (extract_codes_t2i.py).
"""
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from dataset.augmentation import center_crop
from dataset.code_layouts import CodeStore
from dataset.code_manifest import Column
from dataset.pairs import Pairs
from dataset.pictures import UnreadableError
from dataset.unreadable import PassedOver
from tokenizer.build import check_image_size, describe_tokenizer, encode_images
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import images

MAX_THREADS = 16  # Pillow releases the interpreter lock while it decodes


class OnlineCodes(CodeStore):
    """The centre crops of `pairs`, encoded by `tokenizer` on its device. Pictures that cannot be read, or are too
    small, are told once and carry no loss."""

    def __init__(self, pairs: Pairs, tokenizer: VQModel, *, name: str, size: tuple[int, int]) -> None:
        captions = ["name", "caption", *["short_caption"] * pairs.has_short]
        super().__init__(labels=pairs.labels, views=1, grid=check_image_size(size, tokenizer.downsample),
                         vocab_size=tokenizer.codebook_size, may_lose=True,
                         columns={column: Column(column, "text", "uint8") for column in captions},
                         manifest={"tokenizer": describe_tokenizer(name, tokenizer), "image_size": list(size)})
        self.pairs, self.tokenizer, self.size = pairs, tokenizer, size
        self.passed_over = PassedOver()
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.threads = ThreadPoolExecutor(max(1, min(MAX_THREADS, cores)))

    def contents(self) -> Any:
        """See `CodeStore`."""
        return self.manifest | {key: value for key, value in self.pairs.states().items() if key != "image_times"}

    @torch.no_grad()
    def read_files(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """See `CodeStore`; -1 where there are none."""
        found = np.full((len(rows), self.grid[0] * self.grid[1]), -1, np.int64)
        crops = list(self.threads.map(self.crop, rows.tolist()))
        read = [place for place, crop in enumerate(crops) if not isinstance(crop, str)]
        self.passed_over.tell([crop for crop in crops if isinstance(crop, str)])
        if read:
            pixels = images.to_float(np.stack([crops[place] for place in read]))
            found[read] = encode_images(self.tokenizer, pixels.to(next(self.tokenizer.parameters()).device)).cpu()
        return found

    def crop(self, row: int) -> np.ndarray | str:
        """The centre of a picture, uint8 (H, W, 3), or why there is none."""
        try:
            return center_crop(self.pairs.image(row), self.size)
        except UnreadableError as error:
            return str(error)

    def column_files(self, name: str, rows: np.ndarray) -> list[str]:
        """See `CodeStore`."""
        read: dict[str, Callable[[int], str | None]] = {
            "name": self.pairs.name, "caption": lambda row: self.pairs.captions(row).long,
            "short_caption": lambda row: self.pairs.captions(row).short}
        return [read[name](row) or "" for row in rows.tolist()]
