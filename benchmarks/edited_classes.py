"""How often does an edit to another class show that class?

    python3 benchmarks/edited_classes.py --gpt-ckpt ARPG.pt --vq-ckpt VQ.pt --temperature 0.9 --cfg-scale 4.0

Every held-out emoji is edited to another class, each of the others equally often: a rectangle in its middle and, as
edit.py does by itself, a cell around it. The classifier of `class_accuracy.py`, trained on the training pictures, names
the whole result. Beside it: the same edits without a class (what the classifier takes for the new class by chance), and
whole pictures of the new classes by the same model. Pictures are the tokenizer's own, nothing is pasted.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.sample.editing import edit
from autoregressive.sample.masks import box_mask
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from dataset.build import build_dataset
from evaluations.c2i.class_accuracy import predict, stack_images, train_classifier
from utils import cli, dist
from utils.cli import flag

SHARES = {"the middle half": 1 / 2, "the middle two thirds": 2 / 3}  # of each side
DATASETS = "emoji", "emoji_heldout"


@dataclass(kw_only=True)
class EditedClassesFlags(SampleFlags):
    """The measurement."""

    seeds: int = flag(3, "times that each picture is edited, with seeds 0, 1, …")


def other_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """A class for each picture that is not its own, all others equally often."""
    return (labels + 1 + np.arange(len(labels)) % (count - 1)) % count


def edited(pipeline: Pipeline, pictures: np.ndarray, labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """The pictures uint8 (N, H, W, 3), each with its middle (a `share` of both sides) drawn anew as its label."""
    height, width = pictures.shape[1:3]
    sides = round(share * width), round(share * height)
    mask = box_mask(((width - sides[0]) // 2, (height - sides[1]) // 2, *sides), (height, width))
    made = [edit(pipeline, picture, mask, conditions=[int(label)], seed=seed, indices=[i])
            for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))]
    return np.concatenate([one.pictures for one in made])


def main(flags: EditedClassesFlags) -> None:
    """Edit the held-out emoji and print a line for each kind of picture."""
    if flags.seeds < 1:
        raise ValueError(f"--seeds is {flags.seeds}, expected 1 or more")
    process = dist.setup()
    pipeline = load_pipeline(flags, device=process.device)
    (known, kinds), (pictures, old) = (stack_images(build_dataset(name, None, size=pipeline.image_size),
                                                    pipeline.image_size) for name in DATASETS)
    judge = train_classifier(known, kinds, num_classes=pipeline.conditions.count, device=process.device)
    new, nothing = other_classes(old, pipeline.conditions.count), np.full_like(old, pipeline.conditions.nothing)

    def tell(name: str, made: list[np.ndarray]) -> None:
        seen = np.stack([predict(judge, part, device=process.device)[0] for part in made])  # (seeds, N)
        print(f"{name} ({seen.size}): taken for the new class {np.mean(seen == new):.1%}, for the old one "
              f"{np.mean(seen == old):.1%}", flush=True)

    tell("the pictures as they are", [pictures])
    for name, share in SHARES.items():
        for how, labels in (("as the new class", new), ("without a class", nothing)):
            tell(f"{name}, {how}", [edited(pipeline, pictures, labels, share=share, seed=seed)
                                    for seed in range(flags.seeds)])
    tell("whole pictures of the new classes", [pipeline(new.tolist(), seed=seed, indices=list(range(len(new))))
                                               for seed in range(flags.seeds)])


if __name__ == "__main__":
    cli.run(main, EditedClassesFlags)
