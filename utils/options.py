"""Flags that commands on more than one floor of the house need, in groups to inherit from."""
from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.cli import flag, image_size


@dataclass(kw_only=True)
class SeedFlags:
    """For commands whose every random choice follows one seed."""

    global_seed: int = flag(0, "every random choice derives from it, whatever the number of processes")


@dataclass(kw_only=True)
class WorkerFlags:
    """For commands that load images."""

    shapes_run: ClassVar[bool] = False
    num_workers: int = flag(24, "data loading processes per rank, at most one per core")


@dataclass(kw_only=True)
class BatchFlags:
    """For commands that run a model without training it."""

    per_proc_batch_size: int = flag(32, "images at a time on each process; the results do not depend on it")


@dataclass(kw_only=True)
class DeviceFlags:
    """For commands that measure."""

    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute; auto: on the GPU if there is one",
                                                  choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class SizeFlags:
    """For commands with one image size. None: what the data or checkpoint says."""

    shapes_run: ClassVar[bool] = False
    image_size: tuple[int, int] | None = flag(None, "height x width in pixels, such as 256 or 256x384",
                                              parse=image_size)


@dataclass(kw_only=True)
class CompileFlags:
    """For commands that may compile."""

    shapes_run: ClassVar[bool] = False
    compile: bool = flag(False, "use torch.compile: faster after a slow start (training with it was reported to end "
                                "worse on torch >= 2.7: compare losses)")


@dataclass(kw_only=True)
class OutputFlags:
    """For commands that write one file."""

    output: str = flag("output", "the file to write; None: named after the input")


@dataclass(kw_only=True)
class SetFlags:
    """For commands that write a set of images."""

    sample_dir: str = flag("samples", "folder for image sets; each is named by its settings")
    image_size_eval: tuple[int, int] | None = flag(None, "resize (bicubic) to this for scoring; None: as made",
                                                   parse=image_size)


@dataclass(kw_only=True)
class RecipeFlags:
    """For commands that a recipe can supply with flags; `recipe_sections` names its sections for this command."""

    shapes_run: ClassVar[bool] = False
    recipe_sections: ClassVar[tuple[str, ...]] = ("train",)
    recipe: str | None = flag(None, "a name in scripts/recipes, or a JSON file like those: its flags where you type "
                                    "none")
