"""Captioned pictures as people keep them: each file beside a .txt of its stem. And emoji with their names."""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.code_writer import names_hash
from dataset.emoji import EmojiDataset
from dataset.image_folders import ImageFiles, Search, above, chunks
from dataset.pairs import (
    DUPLICATE,
    EMPTY_CAPTION,
    MISSING_IMAGE,
    MOST_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    Captions,
    PairProblemError,
    Pairs,
    clean_name,
    decode_caption,
)
from dataset.path_list import PathList
from dataset.pictures import PictureReader, UnreadableError
from utils.files import plain

THREADS = 16  # caption files read at a time: network disks answer slowly and to many


class PlainPairs(Pairs):
    """Pictures below a folder, each beside a .txt of its stem. In memory a pair is its name and 8 bytes."""

    def __init__(self, root: Path, *, reader: PictureReader | None, smallest: tuple[int, int]) -> None:
        super().__init__(reader=reader, smallest=smallest)
        search = Search(root)
        pictures, self.root = search.pictures(root), root
        kept, stems = [], set()
        with ThreadPoolExecutor(THREADS) as pool:
            for name, problem in zip(pictures, pool.map(self.problem_of, pictures), strict=True):
                stem = os.path.splitext(name)[0]
                if stem in stems:
                    problem = PairProblemError(DUPLICATE, "another picture has the same caption file")
                stems.add(stem)
                if problem is None:
                    kept.append(name)
                else:
                    self.problems.add(problem.kind, plain(f"{clean_name(name)}: {problem}"))
        if search.others[str(root)][".txt"] > len(stems) - self.problems.counts.get(NO_CAPTION, 0):
            self.count_lone_captions(stems)
        self.files = PathList.of(above(root), chunks(kept))

    def problem_of(self, name: str) -> PairProblemError | None:
        """What is wrong with a picture's caption file."""
        try:
            read_caption(above(self.root) + name)
        except PairProblemError as error:
            return error
        return None

    def count_lone_captions(self, stems: set[str]) -> None:
        """Count the caption files beside which there is no picture."""
        for folder, _, names in os.walk(self.root):
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), self.root)
                stem, ending = os.path.splitext(path)
                if ending == ".txt" and not name.startswith(".") and stem not in stems:
                    self.problems.add(NO_IMAGE, plain(f"{clean_name(path)}: there is no picture of this stem"))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """"cats/a.jpg", below the folder."""
        return clean_name(self.files.name(index).removeprefix(self.files.root))

    def captions(self, index: int) -> Captions:
        """See `Pairs`."""
        return read_caption(self.files.name(index))

    def picture(self, index: int) -> Image.Image:
        """See `Pairs`."""
        path = self.files.name(index)
        if not os.path.lexists(path):
            raise UnreadableError(f"{path} is gone", kind=MISSING_IMAGE)
        return self.reader(path)

    def states(self) -> dict[str, str]:
        """Names; sizes and times of the pictures and of the caption files."""
        texts = PathList.of("", chunks(caption_path(self.files.name(i)) for i in range(len(self))))
        both = [ImageFiles(files, reader=self.reader).states() for files in (self.files, texts)]
        joined = {key: hashlib.sha256("".join(one[key] for one in both).encode()).hexdigest() for key in both[0]}
        return {"image_names": names_hash(self.name(i) for i in range(len(self))), **joined}


def caption_path(picture: str) -> str:
    """The caption file of a picture."""
    return os.path.splitext(picture)[0] + ".txt"


def read_caption(picture: str) -> Captions:
    """The caption beside a picture. Raises PairProblemError."""
    try:
        with open(caption_path(picture), "rb") as file:
            text = decode_caption(file.read(MOST_CAPTION + 1))
    except OSError as error:
        raise PairProblemError(NO_CAPTION, f"its .txt cannot be read ({error.strerror})") from None
    if not text:
        raise PairProblemError(EMPTY_CAPTION, "its .txt is empty")
    return Captions(text, None)


class EmojiPairs(Pairs):
    """Emoji with their names; see `dataset/emoji.py`."""

    def __init__(self, emoji: EmojiDataset) -> None:
        super().__init__(reader=None, smallest=(0, 0))
        self.emoji = emoji

    def __len__(self) -> int:
        return len(self.emoji)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 zeros."""
        return np.zeros(len(self), np.int64)

    def name(self, index: int) -> str:
        """The code points, such as "1F1EB-1F1F7"."""
        return self.emoji.points(index)

    def captions(self, index: int) -> Captions:
        """See `Pairs`."""
        return Captions(self.emoji.captions[index], None)

    def picture(self, index: int) -> Image.Image:
        """See `Pairs`."""
        return self.emoji.image(index)

    def states(self) -> dict[str, str]:
        """The names and captions: pictures are those of the font."""
        return {"image_names": names_hash(f"{self.name(i)} {self.emoji.captions[i]}" for i in range(len(self)))}
