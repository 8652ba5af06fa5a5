"""FID, sFID, Inception Score, precision and recall as ADM's evaluator computes them (arXiv 2105.05233), in PyTorch.

    python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/SETTINGS.npz --preset gfid

Either set may be an npz (`arr_0`) or a folder of PNGs. Stored statistics (`mu`, `sigma`, `mu_s`, `sigma_s`) are used
where a file has them. Writes <sample>.json with every number and how it was computed, <sample>.txt with ADM's lines.
"""
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.build import PictureFlags
from evaluations.c2i.comparison_rules import (
    accept,
    check_acceptance,
    check_preset,
    check_sets,
    known_references,
    set_warnings,
)
from evaluations.c2i.features import SPLIT, load_network, measure_with_stored
from evaluations.c2i.image_sets import ImageSet, open_image_set
from evaluations.c2i.scores import NEIGHBOURS, TITLES, MetricFlags, chosen_metrics, compute, needed, result_warnings
from utils import cli, dist
from utils.cli import flag
from utils.files import replacing
from utils.options import BatchFlags, DeviceFlags, OutputFlags, SeedFlags


@dataclass(kw_only=True)
class EvaluatorFlags(MetricFlags, PictureFlags, SeedFlags, BatchFlags, OutputFlags, DeviceFlags):
    """The evaluation command."""

    reference: str = flag(cli.REQUIRED, "npz or folder that samples are compared with", positional=True)
    sample: str = flag(cli.REQUIRED, "npz or folder of samples", positional=True)
    preset: Literal["gfid", "rfid"] | None = flag(None, "refuse a reference of the wrong kind. gfid: generated "
                                                  "images against statistics of a training set; rfid: reconstructions "
                                                  "against the same crops of the same images", choices=("gfid", "rfid"))
    acceptance: bool = flag(False, "compare with ADM's published numbers for its published sample files")
    output: str | None = None
    per_proc_batch_size: int = 64


def origin_of(sample: Path, name: str) -> dict[str, Any] | None:
    """What the sampler wrote about the images, in file `name` of the folder or of the folder that the npz packs."""
    sample = sample.resolve()  # of a link (LlamaGen's name of a set of ours) the set that it leads to
    folder = sample if sample.is_dir() else sample.with_suffix("")
    try:
        found = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_report(results: dict[str, float], protocol: dict[str, Any], path: Path) -> None:
    """Write the numbers and how they were computed as JSON, and ADM's lines as text beside it."""
    lines = [f"{title}: {results[name]}" for name, title in TITLES.items() if name in results]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**results, "protocol": protocol}, indent=2) + "\n")
    with replacing(path.with_suffix(".txt")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"report: {path}")


def about(images: ImageSet, sha256: str) -> dict[str, Any]:
    """What the report says of a set."""
    return {"name": images.name, "sha256": sha256, "images": images.count if images.size else None, "size": images.size,
            "statistics": f"stored ({', '.join(images.stored)})" if images.stored else "of its images"}


def tell(warnings: list[str], process: dist.Process) -> None:
    """Print warnings on rank 0."""
    for text in warnings if process.is_main else []:
        cli.warn(text)


def report_path(flags: EvaluatorFlags) -> Path:
    """--output, else the sample's path as .json: the path that was given, beside a link and not where it leads to.

    Raises ValueError for an --output that is no .json.
    """
    if flags.output is None:
        sample = Path(os.path.abspath(flags.sample))
        return sample.parent / f"{sample.name.removesuffix('.npz')}.json"
    if not flags.output.endswith(".json"):
        raise ValueError(f"--output {flags.output}: expected a name that ends in .json (.txt goes beside it)")
    return Path(flags.output)


def main(flags: EvaluatorFlags) -> None:
    """Measure a sample set against a reference."""
    process = dist.setup(flags.device)
    metrics, output, sample_path = chosen_metrics(flags), report_path(flags), Path(flags.sample)
    if flags.acceptance:
        check_acceptance(sample_path.stem, features=flags.features)
    if flags.per_proc_batch_size < 1:
        raise ValueError(f"--per-proc-batch-size is {flags.per_proc_batch_size}, expected at least 1")
    reference, sample = (open_image_set(path, exif_orientation=flags.exif_orientation)
                         for path in (flags.reference, sample_path))
    network = load_network(flags, device=process.device)
    check_sets(reference, sample, metrics, network=network)
    reference_hash = dist.broadcast_object(reference.sha256() if process.is_main else None)
    known_as = dist.broadcast_object(known_references().get(reference_hash))
    if flags.preset:
        check_preset(flags.preset, reference, sample, known_as=known_as)
    sampler = origin_of(sample_path, "config.json")
    warnings = set_warnings(reference, sample, metrics, network=network)
    warnings += [f"the sampler said: {text}" for text in (sampler or {}).get("warnings", [])]
    tell(warnings, process)
    remember_as = reference_hash if flags.exif_orientation else f"{reference_hash} as stored"
    common = {"network": network, "process": process, "batch": flags.per_proc_batch_size}
    with ThreadPoolExecutor(1) as hashing:  # ten gigabytes take a while: at the same time as the features
        sample_hash = hashing.submit(sample.sha256 if process.is_main else str)
        of_reference = measure_with_stored(reference, wanted=needed(metrics, of=1), title=f"reference {reference.name}",
                                           remember_as=remember_as, **common)
        of_sample = measure_with_stored(sample, wanted=needed(metrics, of=0), title=f"samples {sample.name}",
                                        seed=flags.global_seed, **common)
    results = compute(metrics, of_reference, of_sample, pr_dtype=flags.pr_dtype, device=process.device)
    found = [*reference.reading_notes(), *sample.reading_notes(), *result_warnings(results, of_reference, of_sample)]
    if sample_hash.result() == reference_hash:
        found.append("samples and reference are the same file")
    tell(found, process)
    if not process.is_main:
        return
    write_report(results, {
        "preset": flags.preset or "none",
        "exif_orientation": flags.exif_orientation,
        "reference": {**about(reference, reference_hash), "kind": known_as or "custom"},
        "sample": about(sample, sample_hash.result()),
        "network": network.described,
        "resize": "TensorFlow 1 bilinear to 299x299" if network.is_inception else "none",
        "precision_mode": "fp32 features (no TF32), float64 statistics",
        "pr_dtype": flags.pr_dtype, "neighbours": NEIGHBOURS,
        "inception_score_split": SPLIT, "shuffle_seed": flags.global_seed,
        "processes": process.world_size, "device": str(process.device),
        "sampler": sampler, "reconstructor": origin_of(sample_path, "results.json"),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "warnings": warnings + found}, output)
    if flags.acceptance:
        accept(sample_path.stem, results, reference, reference_hash)


if __name__ == "__main__":
    cli.run(main, EvaluatorFlags)
