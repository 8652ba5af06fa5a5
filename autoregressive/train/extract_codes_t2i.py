"""Turn captioned pictures into a packed store of codes with their captions.

    bash scripts/autoregressive/extract_codes_t2i.sh --data-path /data/laion --code-path /data/codes --image-size 256

--data-path: any layout of `dataset/t2i.py`. The store is <code-path>/t2i<size>_codes (with --data-start or --data-end
t2i<size>_<first>-<last>_codes, so that machines can each make a part), which training takes as its --data-path. It has
the columns `name`, `caption` and, if any pair has one, `short_caption` ("" where a pair has none). One view, the centre
crop, not mirrored. Run again to continue after an interruption. Pairs that cannot be used are left out and counted by
reason in the manifest (`unusable`: what is no pair; `left_out`: pictures; `skipped`: the first names).
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.train.extraction import Row, Views, check_extraction, extract
from dataset.augmentation import code_views
from dataset.build import PairPictureFlags, flagged_pairs
from dataset.code_manifest import FORMAT, Column
from dataset.codes import CodePathFlags
from dataset.pairs import TOO_SMALL, Pairs, Problems
from dataset.pictures import PictureReader, UnreadableError
from tokenizer.build import TokenizerFlags, check_image_size, load_tokenizer
from utils import cli, dist
from utils.files import plain
from utils.options import BatchFlags, RecipeFlags, SeedFlags, WorkerFlags

LOOKED_AT = 512  # pictures, drawn by --global-seed, of which one should be usable before a long extraction begins
CROPS = {"ten_crop": False, "crop_range": 1.0, "mirror": False}
TAKE_SMALL = "--min-size 0 takes small pictures too, enlarged"


@dataclass(kw_only=True)
class TextExtractFlags(CodePathFlags, PairPictureFlags, TokenizerFlags, BatchFlags, SeedFlags, WorkerFlags,
                       RecipeFlags):
    """The extraction command for captioned pictures."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("extract",)


class PairViews(Views):
    """The centre crop of a picture, its name and captions."""

    def __init__(self, data: Pairs, size: tuple[int, int]) -> None:
        super().__init__(data)
        self.size = size

    def views(self, index: int, image: Image.Image) -> Row:
        """See `Views`."""
        long, short = self.data.captions(index)
        return code_views(image, self.size, **CROPS), {"name": self.data.name(index), "caption": long,
                                                       "short_caption": short or ""}


def check_usable(pairs: Pairs, *, seed: int) -> None:
    """Raise ValueError if of many pictures, drawn by the seed, none can be used. All processes call this together."""
    with dist.failing_together():
        if dist.env_rank() > 0:
            return
        problems, count = Problems(), min(len(pairs), LOOKED_AT)
        places = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
        for index in np.sort(places).tolist():
            try:
                pairs.image(index)
            except UnreadableError as error:
                problems.add(error.kind, str(error))
            else:
                return
        tried = f"all {count} pictures" if count == len(pairs) else f"{count} pictures, drawn from all {len(pairs)},"
        hint = f"; {TAKE_SMALL}" if TOO_SMALL in problems.counts else ""
        raise ValueError(f"none of {tried} can be used: {problems}{hint}")


def pair_recipe(flags: TextExtractFlags, pairs: Pairs, *, grid: tuple[int, int]) -> dict[str, Any]:
    """What a store of these pairs is made by, for its manifest; without the tokenizer. Only rank 0 asks the disk."""
    columns = ["name", "caption", *["short_caption"] * pairs.has_short]
    states = pairs.states() if dist.env_rank() == 0 else {}
    return {"format": FORMAT, "dataset": flags.dataset, "images": len(pairs), **states,
            "unusable": dict(sorted(pairs.problems.counts.items())), "smallest": list(flags.smallest),
            "image_size": list(flags.image_size), "exif_orientation": flags.exif_orientation, "grid": list(grid),
            "views": 1, "crop": {"ten_crop": False, "range": 1.0, "mirror": False}, "classes": None,
            "columns": [{**vars(Column(name, "text", "uint8")), "shape": []} for name in columns]}


def store_name(flags: TextExtractFlags) -> str:
    """The store's folder."""
    kind = flags.dataset if flags.dataset.startswith("t2i") else f"{flags.dataset}_t2i"
    some = flags.data_start is not None or flags.data_end is not None
    part = f"_{flags.data_start or 0}-{'end' if flags.data_end is None else flags.data_end}" if some else ""
    return f"{kind}{cli.shown_size(flags.image_size)}{part}_codes"


def main(flags: TextExtractFlags) -> None:
    """Extract the codes of captioned pictures."""
    process = dist.setup()
    check_extraction(flags.code_path, flags.per_proc_batch_size)
    pairs = flagged_pairs(flags, reader=PictureReader(exif_orientation=flags.exif_orientation),
                          smallest=flags.smallest, emoji_size=max(flags.image_size))
    check_usable(pairs, seed=flags.global_seed)
    name, tokenizer = load_tokenizer(flags, device=process.device)
    grid = check_image_size(flags.image_size, tokenizer.downsample)
    folder = Path(flags.code_path) / store_name(flags)
    manifest = extract(PairViews(pairs, flags.image_size), folder, recipe=pair_recipe(flags, pairs, grid=grid),
                       tokenizer=tokenizer, name=name, process=process, batch_size=flags.per_proc_batch_size,
                       num_workers=flags.num_workers, by_kind=True)
    if manifest is not None:
        lost = manifest["left_out"]
        more = f"; left out: {', '.join(f'{count} {kind}' for kind, count in lost.items())}, such as " if lost else ""
        hint = f"; {TAKE_SMALL}" if TOO_SMALL in lost else ""
        print(f"{manifest['count']} pairs of {grid[0]}x{grid[1]} codes and captions in {folder}{more}"
              f"{plain(manifest['skipped'][0]) if lost else ''}{hint}")
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, TextExtractFlags)
