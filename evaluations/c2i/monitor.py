"""Metrics while a model trains: its present images against a reference, without writing files."""
from dataclasses import dataclass
from typing import ClassVar

from evaluations.c2i.comparison_rules import check_sets, count_warnings
from evaluations.c2i.features import load_network, measure, measure_with_stored
from evaluations.c2i.image_sets import FirstImages, ImageSet, open_image_set
from evaluations.c2i.scores import NEIGHBOURS, MetricFlags, chosen_metrics, compute, needed
from utils import cli, dist
from utils.cli import flag

BATCH = 32


@dataclass(kw_only=True)
class MonitorFlags(MetricFlags):
    """Evaluation during training."""

    shapes_run: ClassVar[bool] = False
    eval_every: int = flag(0, "steps between evaluations, each after a checkpoint; one is made at the end too; 0: none")
    eval_images: int = flag(10000, "images made for each evaluation. FIDs compare only if of equally many: published "
                                   "ones are of 50000; fewer than 2048 give mostly noise")
    eval_reference: str | None = flag(None, "npz or folder that they are compared with (tokenizers reconstruct it)")


class Monitor:
    """Holds the feature network and the measured reference; all processes call it with the images to evaluate."""

    def __init__(self, flags: MonitorFlags, process: dist.Process, *, reconstructs: tuple[int, int] | None,
                 exif_orientation: bool = True) -> None:
        if flags.eval_reference is None:
            raise ValueError("--eval-every needs --eval-reference: the images to compare the model's with")
        if flags.eval_images <= NEIGHBOURS:
            raise ValueError(f"--eval-images is {flags.eval_images}, expected more than {NEIGHBOURS}")
        self.metrics, self.process, self.pr_dtype = chosen_metrics(flags), process, flags.pr_dtype
        reference = self.reference = open_image_set(flags.eval_reference, exif_orientation=exif_orientation)
        sha256 = dist.broadcast_object(reference.sha256() if process.is_main else None)
        sha256 += "" if exif_orientation else " as stored"
        if reconstructs:
            if reference.stored or reference.size is None:
                raise ValueError(f"--eval-reference {flags.eval_reference} holds statistics of a training set: give "
                                 "the images to reconstruct, as scripts/tokenizer/val.sh writes them")
            if reference.size != reconstructs:
                raise ValueError(f"--eval-reference {flags.eval_reference} holds images of {reference.size[0]}x"
                                 f"{reference.size[1]}, expected {reconstructs[0]}x{reconstructs[1]}: see --image-size")
            self.reference = FirstImages(reference, flags.eval_images)
            sha256 += f" first {self.reference.count}"
        self.network = load_network(flags, device=process.device)
        check_sets(self.reference, None, self.metrics, network=self.network)
        sets = [self.reference] + ([] if reconstructs else [ImageSet("each evaluation", flags.eval_images, None)])
        warnings = [text for images in sets for text in count_warnings(images, self.metrics)]
        for text in [*reference.notes, *warnings] if process.is_main else []:
            cli.warn(text)
        self.measured = measure_with_stored(self.reference, self.network, process, wanted=needed(self.metrics, of=1),
                                            batch=BATCH, title=f"reference {self.reference.name}", remember_as=sha256)

    @classmethod
    def wanted(cls, flags: MonitorFlags, process: dist.Process, *,
               reconstructs: tuple[int, int] | None = None, exif_orientation: bool = True) -> "Monitor | None":
        """A monitor if --eval-every asks for one.

        `reconstructs`: it will see the reference's first images, of this size, reconstructed. `exif_orientation`: turn
        the pictures of a reference folder upright.
        """
        if flags.eval_every < 0:
            raise ValueError(f"--eval-every is {flags.eval_every}, expected steps, or 0 for never")
        if not flags.eval_every:
            return None
        return cls(flags, process, reconstructs=reconstructs, exif_orientation=exif_orientation)

    def __call__(self, images: ImageSet) -> dict[str, float]:
        """{"eval_fid": …} of the metrics of --metrics."""
        made = measure(images, self.network, self.process, wanted=needed(self.metrics, of=0), batch=BATCH,
                       title=images.name)
        values = compute(self.metrics, self.measured, made, pr_dtype=self.pr_dtype, device=self.process.device)
        return {f"eval_{name}": value for name, value in values.items()}
