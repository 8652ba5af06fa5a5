"""The loop that turns pictures into a packed store of codes, by any number of processes, and goes on where it was cut.

What differs between data sets is handed in: the views of a picture with what stands beside its codes (`Views`), and
the recipe that the manifest keeps. `extract_codes.py` is for classes, `extract_codes_t2i.py` for captions.
"""
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import code_writer
from dataset.build import ImageDataset
from dataset.code_manifest import Manifest
from dataset.loader import worker_count
from dataset.pairs import PairProblemError
from dataset.part_work import Part, complete_store
from dataset.pictures import UnreadableError
from dataset.remote import is_url
from dataset.unreadable import LeftOut, PassedOver, split_readable
from tokenizer.build import describe_tokenizer, encode_images
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli, dist
from utils.images import to_float

Row = tuple[np.ndarray, dict[str, Any]]  # views (V, H, W, 3) uint8; {column: value}
Batch = list[tuple[int, Row | LeftOut]]


class Views(Dataset):
    """Image i → (i, its views and its values of the columns; or why it is left out)."""

    def __init__(self, data: ImageDataset) -> None:
        self.data = data

    def views(self, index: int, image: Image.Image) -> Row:
        """The views of an image that was read, and what its row holds beside the codes."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[int, Row | LeftOut]:
        try:
            return index, self.views(index, self.data.image(index))
        except (UnreadableError, PairProblemError) as error:
            return index, LeftOut(error, error.kind)


@dataclass
class EncodedPart:
    """What became of the images of a part."""

    codes: list[np.ndarray] = field(default_factory=list)  # of each batch, (n, V, L)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    read: list[int] = field(default_factory=list)  # indices of the images
    left_out: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # why they are left out


def part_batches(views: Views, parts: list[range], *, size: int, num_workers: int) -> Iterator[Iterator[Batch]]:
    """The batches of each part, all loaded by the same workers, which go on with the next part meanwhile."""
    batches = (part[start:start + size] for part in parts for start in range(0, len(part), size))
    loaded = iter(()) if not parts else iter(DataLoader(
        views, batch_sampler=batches, num_workers=worker_count(num_workers), collate_fn=list))
    for part in parts:
        yield itertools.islice(loaded, -(-len(part) // size))


@torch.inference_mode()
def encode_part(tokenizer: VQModel, batches: Iterable[Batch], *, columns: list[str], device: torch.device, bar: tqdm,
                passed_over: PassedOver) -> EncodedPart:
    """Encode the views of some images."""
    done = EncodedPart(columns={name: [] for name in columns})
    for batch in batches:
        indices, found, left_out = split_readable(batch, passed_over)
        if indices:
            pixels = to_float(np.concatenate([views for views, _ in found])).to(device)
            codes = encode_images(tokenizer, pixels)  # (n*V, L)
            done.codes.append(codes.view(len(indices), -1, codes.shape[-1]).cpu().numpy())
            for name, values in done.columns.items():
                values += [beside[name] for _, beside in found]
        done.read += indices
        done.left_out += left_out
        done.kinds.update(found.kind for _, found in batch if isinstance(found, LeftOut))
        bar.update(len(batch))
    return done


def check_extraction(code_path: str, batch_size: int) -> None:
    """Raise ValueError for what no extraction can do."""
    if batch_size < 1:
        raise ValueError(f"--per-proc-batch-size is {batch_size}, expected at least 1")
    if is_url(code_path):
        raise ValueError(f"--code-path {code_path} is a URL: extract to a folder, and upload that")


def extract(views: Views, folder: Path, *, recipe: dict[str, Any], tokenizer: VQModel, name: str, process: dist.Process,
            batch_size: int, num_workers: int, by_kind: bool = False) -> Manifest | None:
    """Extract the parts that are not there yet, join them, write the manifest. All processes call this together.

    `recipe`: what rank 0 writes, without the tokenizer, which is called `name`; `by_kind`: the manifest counts what is
    left out by kind. Returns the manifest on rank 0 if the store was not complete before.
    """
    data, (height, width) = views.data, recipe["grid"]
    recipe = recipe | {"dtype": str(code_writer.code_dtype(tokenizer.codebook_size)),
                       "tokenizer": describe_tokenizer(name, tokenizer)}
    columns = [column["name"] for column in recipe.get("columns", [])]

    def write_parts(parts: list[Part]) -> None:
        with tqdm(total=sum(len(rows) for _, rows in parts), desc=f"{name} codes", unit="image", mininterval=1.0,
                  disable=not process.is_main) as bar:
            passed_over = PassedOver()
            loaded = part_batches(views, [rows for _, rows in parts], size=batch_size, num_workers=num_workers)
            for (i, _), batches in zip(parts, loaded, strict=True):
                done = encode_part(tokenizer, batches, columns=columns, device=process.device, bar=bar,
                                   passed_over=passed_over)
                codes = np.concatenate(done.codes) if done.codes else np.empty((0, 0, 0))
                codes = codes.astype(recipe["dtype"]).reshape(len(done.read), recipe["views"], height * width)
                code_writer.write_part(folder, i, codes, data.labels[done.read].tolist(),
                                       [data.name(index) for index in done.left_out], columns=done.columns,
                                       left_out=dict(done.kinds) if by_kind else None)

    manifest, new = complete_store(folder, recipe, len(data), write_parts=write_parts,
                                   tell_begun=lambda begun: tell_other_times(begun, recipe))
    if not new and process.is_main:
        tell_complete(manifest, recipe, folder)
    return manifest if new and process.is_main else None


def tell_complete(made: dict[str, Any], recipe: dict[str, Any], folder: Path) -> None:
    """Say that a finished store is kept, and why. `made`: its manifest; `recipe`: of what would be made now."""
    when = "image_times"
    if when not in recipe:
        print(f"{folder} is complete: nothing to do")
    elif when not in made:  # an older version's
        print(f"{folder} is complete: nothing to do. It does not say of which size and time the image files were, and "
              "contents are not compared: if pictures were replaced, extract to another --code-path")
    elif made.get(when) == recipe[when]:
        print(f"{folder} is complete: nothing to do (names, sizes and times of the image files are those of then)")
    else:
        print(f"{folder} is complete: nothing to do. Names and sizes of the image files are those of then, their times "
              "are not, and contents are not compared: if pictures were replaced, extract to another --code-path")


def tell_other_times(begun: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Warn if image files have other times than when an extraction began. `begun`: its recipe; `recipe`: as of now."""
    if begun.get("image_times", now := recipe.get("image_times")) != now:
        cli.warn("some image files have other times than when this extraction began, and contents are not compared: "
                 "if pictures were replaced, extract to another --code-path")
