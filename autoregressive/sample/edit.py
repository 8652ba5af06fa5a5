"""Edit a picture: fill holes, redraw parts as another class, vary it, continue it beyond its edges.

    python3 autoregressive/sample/edit.py --gpt-ckpt ARPG.pt --vq-ckpt VQ.pt --image cat.png --mask hole.png
    python3 autoregressive/sample/edit.py … --image cat.png --box 64,64,96,96 --classes 207,360 --variants 4
    python3 autoregressive/sample/edit.py … --image cat.png --redraw 0.3 --variants 4
    python3 autoregressive/sample/edit.py … --image cat.png --canvas 256x1024

An ARPG draws any part; a GPT, which draws row by row, only the lower part: all from some cell on. The picture is
cropped and resized to the model's size as pictures for training are, its mask or box with it; with --keep-size it keeps
its own size, and is edited in windows of the model's. An edit that would redraw nothing (an empty mask) is refused.

Into the folder --output go the results, 000000.png …, strip.png (original | mask | the first 64 results; in the mask
white is what was marked, grey what was redrawn around it) and config.json with settings and numbers. What an earlier,
longer edit left there stays, and is pointed out. In config.json `seam_psnr` is that of the known pixels near what was
drawn, in dB (null if there are none, or all are identical), `seam_psnr_decoded` the same before --paste, `known_psnr`
that of all known pixels, compared with the cropped and resized picture.
"""
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.batch_size import batch_that_fits, even_batch
from autoregressive.sample.editing import Edited, check_edit, edit, model_view
from autoregressive.sample.masks import Canvas, as_mask, box_mask
from autoregressive.sample.options import ClassesFlags, SampleFlags
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from autoregressive.sample.seams import GREY, strip
from dataset.build import PictureFlags
from dataset.pictures import PictureReader, endings
from utils import cli, dist, images
from utils.cli import REQUIRED, flag
from utils.files import few
from utils.options import OutputFlags

RESULT = re.compile(r"[0-9]{6,}\.png")  # names of results
MOST_SHOWN = 64  # results in the strip, which is made as a whole


def pixel_counts(text: str, *, names: str) -> tuple[int, ...]:
    """Parse whole numbers with commas between them, as many as `names` has."""
    if not re.fullmatch(",".join([r"\s*-?[0-9]{1,9}\s*"] * len(names.split(","))), text):
        raise ValueError(f"expected {names}: whole numbers of pixels")
    return tuple(map(int, text.split(",")))


@dataclass(kw_only=True)
class EditFlags(SampleFlags, ClassesFlags, PictureFlags, OutputFlags):
    """The edit."""

    image: str = flag(REQUIRED, "the picture to edit")
    mask: str | None = flag(None, "a picture of what to redraw: white (grey from 128 of 255 on, or transparent); of "
                                  "the picture's size, or of another with the same ratio of the sides")
    box: tuple[int, int, int, int] | None = flag(
        None, "x,y,width,height: redraw this rectangle, in pixels of the picture; what lies outside is cut off (with a "
        "negative x: --box=-8,0,32,32); with --mask: both", parse=partial(pixel_counts, names="x,y,width,height"))
    redraw: float | None = flag(None, "redraw only this share of the cells, chosen by chance: variations of the "
                                      "picture, or of what --mask and --box mark")
    canvas: tuple[int, int] | None = flag(None, "height x width of the result: the picture is continued to this size",
                                          parse=cli.image_size)
    place: tuple[int, int] | None = flag(None, "x,y: where on the --canvas the picture's upper left corner lies; None: "
                                               "the picture lies in the middle",
                                         parse=partial(pixel_counts, names="x,y"))
    keep_size: bool = flag(False, "keep the picture's own size and edit it in windows of the model's size; else it is "
                                  "cropped and resized to the model's size")
    variants: int = flag(1, "results for each class")
    dilate: int = flag(1, "cells around the mask that are redrawn with it, since each code also depends on its "
                          "surroundings")
    paste: int | None = flag(None, "take the known pixels from the picture as they were, mixed with the result up to "
                                   "this many pixels from the mask (0: a hard edge); None: all are the tokenizer's")
    output: str = "edited"


def asked_mask(flags: EditFlags, size: tuple[int, int], reader: PictureReader) -> np.ndarray | None:
    """What --mask and --box mark of a picture of `size`, bool; None if neither is given."""
    mask = None
    if flags.mask is not None:
        mask = as_mask(np.asarray(reader(flags.mask).convert("L")), size)
    if flags.box is not None:
        marked = box_mask(flags.box, size)
        mask = marked if mask is None else mask | marked
    return mask


def overwrites(output: str, path: str) -> bool:
    """Whether an edit into the folder `output` may write to `path`: an earlier result, edited once more, say."""
    place = Path(path).resolve()
    return place.parent == Path(output).resolve() and (
        RESULT.fullmatch(place.name) is not None or place.name == "strip.png")


def main(flags: EditFlags) -> None:
    """Edit one picture."""
    process = dist.setup()
    if process.world_size > 1:
        raise ValueError(f"an edit takes one process, {process.world_size} were started: set nproc_per_node=1")
    if flags.variants < 1:
        raise ValueError(f"--variants is {flags.variants}, expected 1 or more")
    if Path(flags.output).is_file() or Path(flags.output).suffix.lower() in endings():
        raise ValueError(f"--output is {flags.output}, a file: an edit writes pictures, a strip and numbers "
                         "into a folder")
    for name, path in (("image", flags.image), ("mask", flags.mask)):
        if path is not None and overwrites(flags.output, path):
            raise ValueError(f"--{name} {path} would be overwritten by a result: give another --output than "
                             f"{flags.output}")
    reader = PictureReader(exif_orientation=flags.exif_orientation)
    picture = reader(flags.image)
    size = picture.height, picture.width
    mask = asked_mask(flags, size, reader)
    settings = {name: getattr(flags, name) for name in ("dilate", "redraw", "canvas", "place", "paste")}
    check_edit(size if flags.keep_size else None, mask, **settings)
    pipeline = load_pipeline(flags, device=process.device)
    pipeline.tell_null_control()
    labels = [pipeline.conditions.nothing] if flags.classes is None else pipeline.conditions.parse(flags.classes)

    image = original = np.asarray(picture)
    if not flags.keep_size:
        image, original, mask = model_view(picture, mask, pipeline.image_size, fill=flags.redraw is None)
    jobs = [(label, index) for label in labels for index in range(flags.variants)]
    layout = Canvas.around(original.shape[:2], flags.canvas, flags.place)
    drawn = tuple(map(max, layout.size, pipeline.image_size))  # a small canvas still takes a whole window
    start, parts = time.perf_counter(), []
    step = even_batch(len(jobs), batch_that_fits(pipeline, process.device, canvas=drawn))
    for first in range(0, len(jobs), step):
        conditions, indices = zip(*jobs[first:first + step], strict=True)
        parts.append(edit(pipeline, image, mask, conditions=conditions, seed=flags.seed, indices=indices, **settings))
    seconds = time.perf_counter() - start
    results = write(flags, pipeline, jobs, parts, original=layout.laid(original, beyond=GREY))
    print(f"{len(jobs)} images of {layout.size[0]}x{layout.size[1]} in {seconds:.1f} s: {summary(results)}; "
          f"{flags.output}/strip.png")
    tell_earlier(Path(flags.output), results)


def write(flags: EditFlags, pipeline: Pipeline, jobs: list[tuple[int, int]], parts: list[Edited], *,
          original: np.ndarray) -> list[dict]:
    """Write the folder --output: the results of jobs (label, index), the strip, config.json. Returns what is there of
    each result."""
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, masks = ([pixels for part in parts for pixels in getattr(part, name)] for name in ("pictures", "masks"))
    names = [pipeline.conditions.name(label) for label, _ in jobs]
    numbers = [result for part in parts for result in part.results]
    results = [{"file": f"{i:06d}.png", "class": name, "index": index, **found}
               for i, (name, (_, index), found) in enumerate(zip(names, jobs, numbers, strict=True))]
    for result, picture in zip(results, pictures, strict=True):
        images.save_png(folder / result["file"], picture)
    shown = [np.stack(pixels[:MOST_SHOWN]) for pixels in (masks, pictures)]
    images.save_png(folder / "strip.png", strip(original, *shown, names=names[:MOST_SHOWN]))
    cli.save_config(folder / "config.json", flags, models=pipeline.described, results=results)
    return results


def tell_earlier(folder: Path, results: list[dict]) -> None:
    """Say which pictures in the folder are results of an earlier edit: they stay, but config.json says nothing of them.
    """
    ours = {result["file"] for result in results}
    earlier = sorted(path.name for path in folder.iterdir() if RESULT.fullmatch(path.name) and path.name not in ours)
    if earlier:
        cli.warn(f"pictures of an earlier edit stay in {folder} ({few(earlier)}): config.json lists those of this one; "
                 "another --output keeps edits apart", kind="note")


def summary(results: list[dict]) -> str:
    """The numbers in one line, averaged over the results."""
    parts = [f"{np.mean([result['redrawn'] for result in results]):g} of {results[0]['cells']} cells redrawn"]
    for name, key in (("near the seam", "seam_psnr"), ("near it before pasting", "seam_psnr_decoded"),
                      ("of all known pixels", "known_psnr")):
        found = [result[key] for result in results if result[key] is not None]
        if found:
            parts.append(f"PSNR {name} {np.mean(found):.2f} dB")
    return ", ".join(parts)


if __name__ == "__main__":
    cli.run(main, EditFlags)
