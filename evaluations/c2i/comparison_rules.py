"""What may be compared with what: refusals, warnings, and --acceptance, the proof that we compute ADM's numbers."""
import json
from collections.abc import Sequence

import numpy as np

from evaluations.c2i.features import SPLIT, FeatureNetwork
from evaluations.c2i.image_sets import MADE_WITH, ImageSet
from evaluations.c2i.scores import NEEDS, NEIGHBOURS, OF_INCEPTION, OF_OTHERS, TITLES
from utils.files import cache_folder, replacing

PUBLISHED_COUNT = 50_000
STORED = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # what a file may have in place of images
WIDTHS = {"mu": 2048, "mu_s": 2023}
ACCEPTANCE = {  # ADM's published numbers for its published sample files, each against the reference of its size
    "admnet_guided_upsampled_imagenet256": {"is": 215.837, "fid": 3.94256, "sfid": 6.14043, "precision": 0.8265,
                                            "recall": 0.5309},
    "admnet_guided_imagenet128": {"is": 141.4767, "fid": 2.97329, "sfid": 5.09456, "precision": 0.78138,
                                  "recall": 0.5929},
}
TOLERANCE = {"is": 0.3, "fid": 0.005, "sfid": 0.005, "precision": 0.003, "recall": 0.003}


def check_sets(reference: ImageSet, sample: ImageSet | None, metrics: list[str], *, network: FeatureNetwork) -> None:
    """Raise ValueError when a set cannot give some of the metrics, naming those that both can.

    `sample` None: images that are still to be made, enough of them.
    """
    sides = [(reference, 1)] + ([] if sample is None else [(sample, 0)])
    offered = OF_INCEPTION if network.is_inception else OF_OTHERS

    def missing(images: ImageSet, of: int, names: Sequence[str]) -> dict[str, str]:
        found = {name: obstacle(images, name, of=of, network=network) for name in names}
        return {name: reason for name, reason in found.items() if reason is not None}

    for images, of in sides:
        if not (lacking := missing(images, of, metrics)):
            continue
        left = [name for name in offered if not any(missing(*side, [name]) for side in sides)]
        left = [name for name in left if name in metrics] or left
        advice = f"--metrics {','.join(left)} can" if left else \
            "nor can any other metric: give an npz or a folder of images"
        raise ValueError(f"{images.name} {'; it '.join(dict.fromkeys(lacking.values()))}: "
                         f"{', '.join(TITLES[name] for name in lacking)} cannot be computed, {advice}")


def obstacle(images: ImageSet, metric: str, *, of: int, network: FeatureNetwork) -> str | None:
    """Why a set, as samples (of=0) or as the reference (of=1), cannot give a metric; None if it can.

    Where a file has statistics they stand for its images, as in ADM, which may be a part of those behind them.
    """
    need = next(iter(NEEDS[metric][of]), None)
    if need is None:
        return None
    if need in STORED and images.stored:
        mean, covariance = STORED[need]
        if not network.is_inception:
            return "holds statistics of Inception features, --features are others"
        if mean not in images.stored:
            other = "sFID" if need == "pooled" else "FID"
            return f"holds statistics for {other} and none for {TITLES[metric]} ({mean}, {covariance})"
        width = len(images.stored[mean])
        return None if width == WIDTHS[mean] else \
            f"has {mean} of length {width}, expected {WIDTHS[mean]}: it is of another network"
    if images.size is None:
        return "holds no images (arr_0)"
    if need in STORED and images.count < 2:
        return "holds 1 image: a covariance needs two"
    if need == "features" and images.count <= NEIGHBOURS:
        return f"holds {images.count} images: precision and recall look at the third neighbour of each"
    return None


def check_preset(preset: str, reference: ImageSet, sample: ImageSet, *, known_as: str | None) -> None:
    """Raise ValueError when the reference is of the kind that the other preset takes.

    gfid's reference has statistics of a whole training set and some of its images; rfid's is the images that were
    reconstructed, as many as there are reconstructions. Mixing them up changes FID by 0.7 to 2 points.
    """
    if preset == "gfid":
        if "mu" not in reference.stored:
            raise ValueError(f"--preset gfid: {reference.name} holds images without statistics of a training set, as "
                             "rfid takes it: give VIRTUAL_imagenet256_labeled.npz, or a reference made by "
                             "evaluations/c2i/reference.py")
    elif reference.stored or known_as:
        known = f" (known: {known_as})" if known_as else ""
        raise ValueError(f"--preset rfid: {reference.name} holds statistics of a training set{known}, as "
                         "gfid takes them: give the crops of the reconstructed images, scripts/tokenizer/val.sh")
    elif reference.count != sample.count:
        raise ValueError(f"--preset rfid: {reference.count} reference images and {sample.count} reconstructions: each "
                         "image should be there once on either side")
    if reference.size and sample.size and reference.size != sample.size:
        raise ValueError(f"--preset {preset}: the reference is of {reference.size[0]}x{reference.size[1]} images, the "
                         f"samples of {sample.size[0]}x{sample.size[1]}: see --image-size-eval")


def set_warnings(reference: ImageSet, sample: ImageSet, metrics: list[str], *, network: FeatureNetwork) -> list[str]:
    """Warnings of what makes the numbers mean something else than they seem to, known before anything is computed."""
    found = [*reference.notes, *sample.notes]
    if reference.size and sample.size and reference.size != sample.size:
        found.append(f"the reference is of {reference.size[0]}x{reference.size[1]} images, the samples of "
                     f"{sample.size[0]}x{sample.size[1]}")
    if sample.stored:
        found.append(f"{sample.name} holds statistics: FID and sFID are computed from them as ADM does, "
                     f"{'not from its images' if sample.size else 'it does not say of how many images'}")
    for images in (reference, sample):
        if images.made_with not in (None, network.described.get(MADE_WITH)):
            found.append(f"the statistics in {images.name} were made with other Inception weights than "
                         f"{network.described['file']}")
        found += count_warnings(images, metrics)
    if sample.size and sample.count != PUBLISHED_COUNT and "fid" in metrics:
        found.append(f"{sample.count} samples: published FIDs are of {PUBLISHED_COUNT}, and fewer samples give a "
                     "higher FID of the same model")
    labels = sample.labels
    if "is" in metrics and labels is not None and labels.max() > labels.min() and (np.diff(labels) >= 0).all():
        found.append(f"{sample.name} is in class order: over {SPLIT} images, the Inception Score of chunks comes out "
                     "far too low, see is_shuffled")
    return found


def count_warnings(images: ImageSet, metrics: list[str]) -> list[str]:
    """What to say of a set with too few images for its statistics, unless it brings those of more."""
    if not {"fid", "sfid"} & set(metrics) or images.stored or images.count >= WIDTHS["mu"]:
        return []
    return [f"{images.name} holds {images.count} images, fewer than features have dimensions ({WIDTHS['mu']}): the "
            "distance is dominated by noise"]


def known_references() -> dict[str, str]:
    """{hash: what it is} of the references that --acceptance has proven on this machine."""
    try:
        return json.loads((cache_folder() / "references.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def accept(name: str, results: dict[str, float], reference: ImageSet, sha256: str) -> None:
    """Compare with ADM's published numbers; a reference that reproduces them is known from now on."""
    rows = [(metric, results[metric], published) for metric, published in ACCEPTANCE[name].items()
            if metric in results]
    for metric, value, published in rows:
        verdict = "ok" if abs(value - published) < TOLERANCE[metric] else "OFF"
        print(f"{verdict:>4} {TITLES[metric]:<16}{value:>12.5f}   published {published} ± {TOLERANCE[metric]}")
    if any(abs(value - published) >= TOLERANCE[metric] for metric, value, published in rows):
        raise ValueError("--acceptance: these are not ADM's numbers: check the hashes of weights, reference, samples")
    if len(rows) == len(TOLERANCE):
        with replacing(cache_folder() / "references.json") as temporary:
            known = known_references() | {sha256: f"{reference.name}, proven by {name}"}
            temporary.write_text(json.dumps(known, indent=2) + "\n")


def check_acceptance(name: str, *, features: str | None) -> None:
    """Raise ValueError when there are no published numbers to compare with."""
    if name not in ACCEPTANCE or features:
        raise ValueError(f"--acceptance: expected one of ADM's sample files, {', '.join(ACCEPTANCE)} (.npz), and "
                         "Inception features")
