"""What may be compared with what: refusals, warnings, and --acceptance, the proof that we compute ADM's numbers."""
import json

import numpy as np

from evaluations.c2i.features import SPLIT, FeatureNetwork
from evaluations.c2i.image_sets import MADE_WITH, ImageSet
from evaluations.c2i.scores import NEIGHBOURS, TITLES
from utils.files import cache_folder, replacing

PUBLISHED_COUNT = 50_000
WIDTHS = {"mu": 2048, "mu_s": 2023}
ACCEPTANCE = {  # ADM's published numbers for its published sample files, each against the reference of its size
    "admnet_guided_upsampled_imagenet256": {"is": 215.837, "fid": 3.94256, "sfid": 6.14043, "precision": 0.8265,
                                            "recall": 0.5309},
    "admnet_guided_imagenet128": {"is": 141.4767, "fid": 2.97329, "sfid": 5.09456, "precision": 0.78138,
                                  "recall": 0.5929},
}
TOLERANCE = {"is": 0.3, "fid": 0.005, "sfid": 0.005, "precision": 0.003, "recall": 0.003}


def check_reference(reference: ImageSet, metrics: list[str], *, network: FeatureNetwork) -> None:
    """Raise ValueError when a reference cannot give these metrics."""
    if reference.size is not None:
        check_images(reference, metrics)
    elif {"precision", "recall"} & set(metrics):
        raise ValueError(f"{reference.name} holds no images (arr_0), which precision and recall need: take the file "
                         "with images, or leave them out with --metrics fid,sfid,is")
    check_stored(reference, metrics, network=network)


def check_sample(sample: ImageSet, metrics: list[str], *, network: FeatureNetwork) -> None:
    """Raise ValueError when samples cannot give these metrics."""
    if sample.size is None:
        raise ValueError(f"{sample.name} holds statistics and no images (arr_0): samples must be images")
    check_images(sample, metrics)
    check_stored(sample, metrics, network=network)


def check_images(images: ImageSet, metrics: list[str]) -> None:
    """Raise ValueError when there are too few images."""
    if images.count < 2:
        raise ValueError(f"{images.name} holds {images.count} image: a covariance needs two")
    if {"precision", "recall"} & set(metrics) and images.count <= NEIGHBOURS:
        raise ValueError(f"{images.name} holds {images.count} images: precision and recall look at the third neighbour "
                         "of each, leave them out with --metrics")


def check_stored(images: ImageSet, metrics: list[str], *, network: FeatureNetwork) -> None:
    """Raise ValueError when a file has statistics of other features, or none for sFID when that is asked for."""
    if images.stored and "sfid" in metrics and "mu_s" not in images.stored:
        raise ValueError(f"{images.name} holds statistics for FID and none for sFID (mu_s, sigma_s): leave it out "
                         "with --metrics fid,is,precision,recall")
    if images.stored and not network.is_inception:
        raise ValueError(f"{images.name} holds statistics of Inception features, --features are others: give a "
                         "file or folder with images alone")
    for key, width in WIDTHS.items():
        if key in images.stored and len(images.stored[key]) != width:
            raise ValueError(f"{images.name} has {key} of length {len(images.stored[key])}, expected {width}: it is "
                             "of another network")


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
    if reference.size and reference.size != sample.size:
        raise ValueError(f"--preset {preset}: the reference is of {reference.size[0]}x{reference.size[1]} images, the "
                         f"samples of {sample.size[0]}x{sample.size[1]}: see --image-size-eval")


def set_warnings(reference: ImageSet, sample: ImageSet, metrics: list[str], *, network: FeatureNetwork) -> list[str]:
    """Warnings of what makes the numbers mean something else than they seem to, known before anything is computed."""
    found = [*reference.notes, *sample.notes]
    if reference.size and reference.size != sample.size:
        found.append(f"the reference is of {reference.size[0]}x{reference.size[1]} images, the samples of "
                     f"{sample.size[0]}x{sample.size[1]}")
    if sample.stored:
        found.append(f"{sample.name} holds statistics: FID and sFID are computed from them as ADM does, not from its "
                     "images")
    for images in (reference, sample):
        if images.made_with not in (None, network.described.get(MADE_WITH)):
            found.append(f"the statistics in {images.name} were made with other Inception weights than "
                         f"{network.described['file']}")
        found += count_warnings(images, metrics)
    if sample.count != PUBLISHED_COUNT and "fid" in metrics:
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
