"""Draw a labelled grid of class-conditional samples.

    python3 autoregressive/sample/sample_c2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --classes 207,360,88

Class names work too when the checkpoint knows them. The picture goes to --output.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.options import ClassesFlags, SampleFlags
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from utils import cli, dist, images
from utils.options import OutputFlags

IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]  # golden retriever, otter, red panda, geyser, …


@dataclass(kw_only=True)
class GridFlags(SampleFlags, ClassesFlags, OutputFlags):
    """The grid command."""

    output: str = "sample_c2i.png"
    top_k: int = 2000


def default_classes(pipeline: Pipeline) -> list[int]:
    """A few well-known classes for an ImageNet model, else the first sixteen."""
    return IMAGENET_CLASSES if pipeline.num_classes == 1000 else list(range(min(16, pipeline.num_classes)))


def main(flags: GridFlags) -> None:
    """Sample one image per class."""
    process = dist.setup()
    pipeline = load_pipeline(flags, device=process.device)
    labels = pipeline.parse_classes(flags.classes) if flags.classes is not None else default_classes(pipeline)
    start = time.perf_counter()
    pictures = pipeline(labels, seed=flags.seed, indices=list(range(len(labels))))
    seconds = time.perf_counter() - start
    names = [pipeline.class_name(label) for label in labels]
    images.save_png(Path(flags.output), images.grid(pictures, columns=min(8, max(4, len(labels) // 2)), labels=names))
    height, width = pipeline.image_size
    print(f"{len(labels)} images of {height}x{width} in {seconds:.1f} s: {flags.output}")


if __name__ == "__main__":
    cli.run(main, GridFlags)
