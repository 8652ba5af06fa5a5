"""A folder of text-to-image samples: which picture belongs to which caption, and the pictures as the scores see them.

Both scores look at the centre square, resized by Pillow's Lanczos filter to one size (GigaGAN's evaluation, arXiv
2303.05511, which LlamaGen uses).
"""
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from dataset.image_folders import scan
from dataset.loader import worker_count
from dataset.pictures import PictureReader
from evaluations.c2i.image_sets import natural
from utils import dist
from utils.cli import REQUIRED, flag, message
from utils.dist import Process

INDEX_NAME = re.compile(r"\d{6}")  # as samplers write them; COCO's own names have twelve digits


@dataclass(kw_only=True)
class SampleFolderFlags:
    """Which samples."""

    fake_dir: str = flag(REQUIRED, "folder of samples: images/ and captions.txt")


def read_samples(folder: Path) -> tuple[list[Path], list[str], int]:
    """(pictures, their captions, number of pictures without one) of <folder>/images and <folder>/captions.txt.

    Names of six digits are line numbers from 0; pictures beyond the last line are padding of LlamaGen's sampler and are
    left out. Other names are taken in natural order, and there must be as many as lines. Raises FileNotFoundError, or
    ValueError where pictures and captions could be paired wrongly.
    """
    captions = read_captions(folder / "captions.txt")
    files = sorted(image_files(folder / "images", "--fake-dir"), key=lambda file: natural(file.name))
    if all(INDEX_NAME.fullmatch(file.stem) for file in files):
        numbered = {int(file.stem): file for file in files}
        missing = [i for i in range(len(captions)) if i not in numbered]
        if missing:
            raise ValueError(f"{folder}/images lacks {len(missing)} of the {len(captions)} images that captions.txt "
                             f"lists, the first is {missing[0]:06d}.png: sample them, or shorten captions.txt")
        if len(numbered) < len(files):
            raise ValueError(f"{folder}/images has {len(files) - len(numbered)} numbers twice: one file for each")
        return [numbered[i] for i in range(len(captions))], captions, len(files) - len(captions)
    if len(files) != len(captions):
        raise ValueError(f"{folder} has {len(files)} images for {len(captions)} lines of captions.txt, and their names "
                         "do not say which belong together: one per line, named 000000.png, 000001.png, …")
    return files, captions, 0


def read_captions(path: Path) -> list[str]:
    """The lines of captions.txt. Raises ValueError for an empty one."""
    if not path.is_file():
        raise FileNotFoundError(f"no captions at {path}: --fake-dir should hold images/ and captions.txt")
    captions = [line.strip() for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    if "" in captions:
        raise ValueError(f"{path}, line {captions.index('') + 1}: the caption is empty")
    return captions


def image_files(folder: Path, name: str) -> list[Path]:
    """Every image below a folder that flag `name` gave. Raises FileNotFoundError or ValueError if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: {folder} is not a folder")
    files = scan(folder)
    if not files:
        raise ValueError(f"{name}: no images below {folder}")
    return files


class Squares(Dataset):
    """(index, view(centre square resized to `size`)) of each file."""

    def __init__(self, files: list[Path], size: int, view: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.size, self.view = files, size, view
        self.reader = PictureReader()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        """Raises UnreadableError."""
        image = self.reader(self.files[index])
        image = center_crop(image, min(image.size)).resize((self.size, self.size), Image.Resampling.LANCZOS)
        return index, self.view(image)


def share_of(squares: Squares, process: Process, *, batch_size: int, num_workers: int, title: str,
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the pictures, in batches: (indices (B,), views (B, …)), with a progress bar.

    All processes must read it to the end: when one of them cannot read a picture, all raise ValueError.
    """
    mine = Subset(squares, range(process.rank, len(squares), process.world_size))
    batches = DataLoader(mine, batch_size=batch_size, num_workers=worker_count(num_workers))
    problems = []
    with tqdm(total=len(squares), desc=title, unit="image", mininterval=1.0, disable=not process.is_main) as bar:
        try:
            for indices, views in batches:
                yield indices, views
                bar.update(min(len(indices) * process.world_size, len(squares) - bar.n))
        except ValueError as error:  # only the loader's errors, not those of the code that uses the batches
            problems.append(message(error))
    problems = dist.gather_lists(problems)
    if problems:
        raise ValueError(problems[0])
