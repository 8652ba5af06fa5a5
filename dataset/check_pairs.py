"""Look at captioned pictures before a long run: count every problem, draw a sheet of pictures with their captions.

    python3 dataset/check_pairs.py --data-path /data/laion --image-size 256
    python3 dataset/check_pairs.py --data-path /data/laion --image-size 256 --dry-run 16 --output laion.json

--data-path: any layout of `dataset/t2i.py`. All pictures are read; with --dry-run N only N of them, drawn by
--global-seed, and <output>.png shows them as a training sees them: cropped to --image-size, the long caption and, in
brackets, the short one. The counts, with the first examples of each kind, are printed and written as JSON to --output.
The exit status is 0 if some pairs can be used, else 2.
"""
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.augmentation import center_crop
from dataset.build import FeaturePathFlags, PairPictureFlags, flagged_pairs
from dataset.loader import worker_count
from dataset.pair_sheet import captioned_sheet
from dataset.pairs import SHOWN, TOO_SMALL, Captions, PairProblemError, Pairs, Problems
from dataset.pictures import PictureReader, UnreadableError
from dataset.text_features import lacks_features
from utils import cli
from utils.cli import flag
from utils.files import plain, replacing
from utils.options import OutputFlags, SeedFlags, WorkerFlags

AHEAD = 64  # pictures under way for each thread
MOST_DRAWN = 256  # on a sheet
NO_FEATURES = "missing features"


@dataclass(kw_only=True)
class CheckFlags(PairPictureFlags, FeaturePathFlags, OutputFlags, SeedFlags, WorkerFlags):
    """The check."""

    image_size: tuple[int, int] = (256, 256)
    output: str = "pairs.json"
    dry_run: int = flag(0, f"read this many pairs only, at most {MOST_DRAWN}, and draw them with their captions on "
                           "<output>.png; 0: read all")


def problem_of(pairs: Pairs, index: int, lacks: np.ndarray | None) -> tuple[str, str] | tuple[Image.Image, Captions]:
    """(kind, what is wrong) of a pair, or its picture and captions."""
    try:
        found = pairs.image(index), pairs.captions(index)
    except (UnreadableError, PairProblemError) as error:
        return error.kind, str(error)
    if lacks is not None and lacks[index]:
        return NO_FEATURES, pairs.name(index)
    return found


def read_pairs(pairs: Pairs, indices: Sequence[int], *, lacks: np.ndarray | None, threads: int, problems: Problems,
               crop: tuple[int, int] | None) -> list[tuple[str, Image.Image, Captions]]:
    """Read pairs, in threads; what is wrong is added to `problems`.

    `lacks` (N,): which have no features. With `crop` the sound ones are returned as a training sees them: name, centre
    crop, captions.
    """
    sound, waiting = [], iter(indices)
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(indices), unit="pair", desc="reading pairs",
                                                   mininterval=1.0) as bar:
        while part := list(islice(waiting, AHEAD * threads)):
            found = pool.map(lambda index: problem_of(pairs, index, lacks), part)
            for index, (first, second) in zip(part, found, strict=True):
                if isinstance(first, str):
                    problems.add(first, plain(second))
                elif crop is not None:
                    sound.append((pairs.name(index), Image.fromarray(center_crop(first, crop)), second))
                bar.update()
    return sound


def counts_table(report: dict[str, Any]) -> str:
    """The report as a small table."""
    found = report["pairs"] + sum(report["unusable"]["counts"].values())
    lines = [f"{count:>12,}  {title}" for count, title in (
        (found, "pairs found"), (report["read"], "pairs looked at"), (report["usable"], "of them usable"))]
    for part in (report["unusable"], report["left_out"]):
        for kind, count in part["counts"].items():
            shown = "; ".join(part["examples"][kind][:SHOWN])[:200]
            lines.append(f"{count:>12,}  {kind}: {shown}{'; …' * (count > SHOWN)}")
    return "\n".join(lines)


def check_asked(flags: CheckFlags) -> None:
    """Raise ValueError for flags that make no sense."""
    if not 0 <= flags.dry_run <= MOST_DRAWN:
        raise ValueError(f"--dry-run is {flags.dry_run}, expected 0 to {MOST_DRAWN}")


def main(flags: CheckFlags) -> None:
    """Count, print, write, draw."""
    check_asked(flags)
    pairs = flagged_pairs(flags, reader=PictureReader(exif_orientation=flags.exif_orientation),
                          smallest=flags.smallest, emoji_size=max(flags.image_size))
    lacks = None if flags.t5_feat_path is None else lacks_features(flags.t5_feat_path, pairs)
    indices: Sequence[int] = range(len(pairs))
    if flags.dry_run:
        drawn = np.random.default_rng(flags.global_seed).choice(
            len(pairs), min(flags.dry_run, len(pairs)), replace=False)
        indices = np.sort(drawn).tolist()
    left_out = Problems()
    sound = read_pairs(pairs, indices, lacks=lacks, threads=max(1, worker_count(flags.num_workers)),
                       problems=left_out, crop=flags.image_size if flags.dry_run else None)
    usable = len(indices) - sum(left_out.counts.values())
    report = {"data_path": flags.data_path, "dataset": flags.dataset, "image_size": list(flags.image_size),
              "smallest": list(flags.smallest), "pairs": len(pairs), "read": len(indices), "usable": usable,
              "short_captions": pairs.has_short, "unusable": pairs.problems.described(),
              "left_out": left_out.described()}
    target = Path(flags.output)
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(counts_table(report))
    sheet = target.with_suffix(".png")
    if sound:
        with replacing(sheet) as temporary:
            captioned_sheet(sound).save(temporary, "PNG")
    hint = "; --min-size 0 takes small pictures too, enlarged" if TOO_SMALL in left_out.counts else ""
    if not usable:
        raise ValueError(f"none of the {len(indices)} pairs looked at can be used, see {target}{hint}")
    print(f"{usable} of {len(indices)} pairs can be used{hint}; report: {target}{f', sheet: {sheet}' if sound else ''}")


if __name__ == "__main__":
    cli.run(main, CheckFlags)
