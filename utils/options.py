"""Flags that commands of several rooms share, in classes to inherit from."""
from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.cli import flag, image_size
from utils.dist import Precision
from utils.seeding import seed_number

SCORED_AT = 256  # pixels: LlamaGen's default of --image-size-eval


@dataclass(kw_only=True)
class SeedFlags:
    """Randomness."""

    global_seed: int = flag(0, "every random choice derives from it, whatever the number of processes",
                            parse=seed_number)


@dataclass(kw_only=True)
class WorkerFlags:
    """Loading of images."""

    shapes_run: ClassVar[bool] = False
    num_workers: int = flag(24, "data loading processes per rank, at most one per core")


@dataclass(kw_only=True)
class BatchFlags:
    """Images at a time."""

    per_proc_batch_size: int = flag(32, "images at a time on each process; the results do not depend on it")


@dataclass(kw_only=True)
class DeviceFlags:
    """Device."""

    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute; auto: on the GPU if there is one",
                                                  choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class SizeFlags:
    """Image size. What is left out is taken from the data or the checkpoint."""

    shapes_run: ClassVar[bool] = False
    image_size: tuple[int, int] | None = flag(None, "height x width in pixels, such as 256 or 256x384",
                                              parse=image_size)


@dataclass(kw_only=True)
class CompileFlags:
    """Compilation."""

    shapes_run: ClassVar[bool] = False
    compile: bool = flag(False, "use torch.compile: faster after a slow start (training with it was reported to end "
                                "worse on torch >= 2.7: compare losses)")


@dataclass(kw_only=True)
class OutputFlags:
    """Output."""

    output: str = flag("output", "the file or folder to write; None: named after the input")


@dataclass(kw_only=True)
class SampleDirFlags:
    """Where sets of images go."""

    sample_dir: str = flag("samples", "folder for image sets; each is named by its settings")


@dataclass(kw_only=True)
class SetFlags(SampleDirFlags):
    """The set of images that is written."""

    image_size_eval: tuple[int, int] | None = flag(
        None, "resize (bicubic) to this for scoring; None: squares of more than 256 pixels to 256, as LlamaGen does "
        "(samples, and reconstructions by vq), all else stays as made", parse=image_size)

    def scored_size(self, made: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which images of size `made` are kept for scoring. Smaller ones are never enlarged."""
        if self.image_size_eval is None and made[0] == made[1] > SCORED_AT:
            return SCORED_AT, SCORED_AT
        return self.image_size_eval or made


@dataclass(kw_only=True)
class RecipeFlags:
    """Recipe."""

    shapes_run: ClassVar[bool] = False
    recipe_sections: ClassVar[tuple[str, ...]] = ("train",)  # whose flags the command takes
    recipe_in_part: ClassVar[bool] = False  # they are another command's: leave those out that this one does not take
    recipe: str | None = flag(None, "a name in scripts/recipes, or a JSON file like those: its flags where you type "
                                    "none")


@dataclass(kw_only=True)
class PrecisionFlags:
    """Type of the weights."""

    precision: Precision = flag("bf16", "type of the weights (of text features too); none is fp32, as is fp16 on a CPU",
                                choices=("none", "fp16", "bf16"))
