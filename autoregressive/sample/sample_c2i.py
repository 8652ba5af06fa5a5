"""Draw a labelled grid of class-conditional samples.

    python3 autoregressive/sample/sample_c2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --classes 207,360,88

Class names work too when the checkpoint knows them. The picture goes to --output. A model that was trained with
--control follows pictures of edges, depth or segments:

    python3 autoregressive/sample/sample_c2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --classes dogs \\
        --control-image dog.jpg --control canny
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.models.sampling import check_strength
from autoregressive.sample.options import ClassesFlags, SampleFlags
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from dataset.augmentation import center_crop
from dataset.control import KINDS, CannyFlags, ControlFlags, canny, read_control, read_picture, to_signed
from utils import cli, dist, images
from utils.cli import flag
from utils.options import OutputFlags

IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]  # golden retriever, otter, red panda, geyser, …


@dataclass(kw_only=True)
class GridFlags(SampleFlags, ClassesFlags, ControlFlags, OutputFlags):
    """The grid command."""

    control_image: str | None = flag(None, "picture that the samples follow: edges (white on black), depth or "
                                           "segments, as the model was trained with, or with --control canny a "
                                           "photograph. The centre is taken where its size is not that of the images. "
                                           "Several, comma-separated: one for each class")
    control_strength: float = flag(1.0, "what the control picture adds is multiplied by it, -100 to 100: 1 as in "
                                             "training, 0: none, less: away from it")
    output: str = "sample_c2i.png"
    top_k: int = 2000


def default_classes(pipeline: Pipeline) -> list[int]:
    """A few well-known classes for an ImageNet model, else the first sixteen."""
    return IMAGENET_CLASSES if pipeline.conditions.count == 1000 else list(range(min(16, pipeline.conditions.count)))


def check_follows(flags: GridFlags) -> None:
    """Raise ValueError for flags of control that say nothing together."""
    check_strength(flags.control_strength)
    if flags.control_image is None and (flags.control is not None or flags.control_strength != 1):
        used = "--control" if flags.control is not None else "--control-strength"
        raise ValueError(f"{used} is for --control-image: which picture should the samples follow?")


def pictures_to_follow(flags: GridFlags, pipeline: Pipeline, count: int) -> np.ndarray | None:
    """What `count` samples follow, uint8 (count, C, H, W); None without --control-image.

    Raises ValueError or FileNotFoundError for pictures and flags that do not fit the model.
    """
    if flags.control_image is None:
        return None
    if pipeline.control is None:
        raise ValueError(f"--control-image: {flags.gpt_ckpt} has no control adapter: train one, --init-from "
                         f"{flags.gpt_ckpt} with --control canny, or leave the picture out")
    kind = pipeline.control.get("kind")
    if kind not in KINDS or flags.control not in (None, kind):
        raise ValueError(f"{flags.gpt_ckpt} follows {kind} pictures, not {flags.control or 'known ones'}")
    if flags.control not in (None, "canny"):
        raise ValueError(f"--control {flags.control}: only canny edges can be found in a photograph here; give the "
                         f"{flags.control} picture itself and leave --control out")
    paths = [flags.control_image] if Path(flags.control_image).is_file() else [
        path.strip() for path in flags.control_image.split(",")]
    if len(paths) not in (1, count):
        raise ValueError(f"--control-image names {len(paths)} pictures for {count} classes: expected one, or one for "
                         "each class")
    if any(Path(path).resolve() == Path(flags.output).resolve() for path in paths):
        raise ValueError(f"--output {flags.output} would overwrite the --control-image: give it another name")
    found = []
    for path in paths:
        if flags.control == "canny":
            view = center_crop(read_picture(path), pipeline.image_size)
            found.append(canny(view, low=pipeline.control.get("low", CannyFlags.canny_low),
                               high=pipeline.control.get("high", CannyFlags.canny_high))[None])
            continue
        picture, own = read_control(path, kind, pipeline.image_size)
        found.append(picture)
        if KINDS[kind].bits and picture.mean() > 127.5:
            cli.warn(f"{path} is white in more than half of its pixels, and a model follows white lines on black: "
                     "invert the picture, or give --control canny if it is a photograph")
        if own != pipeline.image_size:
            cli.warn(f"{path} has {cli.shown(own)} pixels: its centre is cut out and brought to "
                     f"{cli.shown(pipeline.image_size)}, the size of the images", kind="note")
    return np.stack(found * (count // len(found)))


def main(flags: GridFlags) -> None:
    """Sample one image per class."""
    process = dist.setup()
    check_follows(flags)
    pipeline = load_pipeline(flags, device=process.device)
    labels = pipeline.conditions.parse(flags.classes) if flags.classes is not None else default_classes(pipeline)
    control = pictures_to_follow(flags, pipeline, len(labels))
    start = time.perf_counter()
    if control is None:
        pipeline.tell_null_control()
        pictures = pipeline(labels, seed=flags.seed, indices=list(range(len(labels))))
    else:
        followed = list(to_signed(torch.from_numpy(control)).to(process.device))
        pictures = pipeline(labels, seed=flags.seed, indices=list(range(len(labels))), control=followed,
                            control_strength=flags.control_strength)
    seconds = time.perf_counter() - start
    names, columns = [pipeline.conditions.name(label) for label in labels], min(8, max(4, len(labels) // 2))
    if control is not None:  # each sample to the right of what it follows
        shown = np.broadcast_to(control.transpose(0, 2, 3, 1), pictures.shape)
        pictures = np.stack([shown, pictures], axis=1).reshape(-1, *pictures.shape[1:])
        names = [name for label in names for name in ("control", label)]
        columns = 2 * -(-columns // 2)
    images.save_png(Path(flags.output), images.grid(pictures, columns=columns, labels=names))
    height, width = pipeline.image_size
    print(f"{len(labels)} images of {height}x{width} in {seconds:.1f} s: {flags.output}")


if __name__ == "__main__":
    cli.run(main, GridFlags)
