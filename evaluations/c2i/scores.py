"""Which metrics there are, what of the image sets each needs, and their values from that."""
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from evaluations.c2i.features import FeatureFlags, Measured
from evaluations.c2i.metrics import frechet_distance, precision_recall
from utils.cli import flag

NEIGHBOURS = 3  # k of precision and recall
NEEDS = {  # metric: what of the sample set, what of the reference
    "fid": ({"pooled"}, {"pooled"}),
    "sfid": ({"spatial"}, {"spatial"}),
    "is": ({"scores"}, set()),
    "precision": ({"features"}, {"features"}),
    "recall": ({"features"}, {"features"}),
    "frechet_distance": ({"pooled"}, {"pooled"}),
}
OF_INCEPTION = ("fid", "sfid", "is", "precision", "recall")
OF_OTHERS = ("frechet_distance", "precision", "recall")
TITLES = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "frechet_distance": "Fréchet distance",
          "precision": "Precision", "recall": "Recall"}  # in the order in which ADM prints them


@dataclass(kw_only=True)
class MetricFlags(FeatureFlags):
    """What is measured."""

    shapes_run: ClassVar[bool] = False
    metrics: str | None = flag(None, f"comma-separated from {', '.join(OF_INCEPTION)} (with --features: "
                                     f"{', '.join(OF_OTHERS)}); None: all")
    pr_dtype: Literal["fp16", "fp32"] = flag("fp16", "arithmetic of precision and recall: fp16 as ADM's published "
                                             "numbers, a little higher than fp32; the report has both",
                                             choices=("fp16", "fp32"))


def chosen_metrics(flags: MetricFlags) -> list[str]:
    """The metrics to compute, in the order of printing. Raises ValueError for what the features do not offer."""
    offered = OF_INCEPTION if flags.features is None else OF_OTHERS
    if flags.metrics is None:
        return [name for name in TITLES if name in offered]
    asked = [word for word in flags.metrics.replace(" ", "").split(",") if word]
    unknown = [word for word in asked if word not in offered]
    if unknown or not asked:
        other = " in these features (FID, sFID and IS are Inception's)" if flags.features else ""
        raise ValueError(f"--metrics {flags.metrics}: choose from {', '.join(offered)}{other}")
    return [name for name in TITLES if name in asked]


def needed(metrics: list[str], *, of: int) -> set[str]:
    """What the metrics need of the sample set (0) or the reference (1)."""
    return set().union(*(NEEDS[name][of] for name in metrics))


def compute(metrics: list[str], reference: Measured, sample: Measured, *, pr_dtype: str,
            device: torch.device) -> dict[str, float]:
    """The numbers, computed on `device`. Every process takes part in precision and recall."""
    results: dict[str, float] = {}
    for name, features in (("fid", "pooled"), ("sfid", "spatial"), ("frechet_distance", "pooled")):
        if name in metrics:
            values = (*sample.statistics[features], *reference.statistics[features])
            results[name] = frechet_distance(*(value.to(device) for value in values))
    if "is" in metrics:
        results["is"], results["is_shuffled"] = sample.inception_scores
    if {"precision", "recall"} & set(metrics):
        pooled = reference.pooled.to(device), sample.pooled.to(device)
        for dtype in ("fp16", "fp32"):
            values = precision_recall(*pooled, k=NEIGHBOURS, pr_dtype=dtype)
            for name, value in zip(("precision", "recall"), values, strict=True):
                if name in metrics:
                    results[f"{name}_{dtype}"] = value
                    if dtype == pr_dtype:
                        results[name] = value
    wrong = [name for name, value in results.items() if not np.isfinite(value)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} came out as no finite number: the features are not sound")
    return results


def result_warnings(results: dict[str, float], *measured: Measured) -> list[str]:
    """What the numbers say about themselves."""
    found = []
    for part in measured if "frechet_distance" in results else ():
        if part.count <= (dim := len(part.statistics["pooled"][0])):
            found.append(f"the Fréchet distance is of {part.count} images in {dim} dimensions: mostly noise")
    if "is" in results and abs(results["is"] / results["is_shuffled"] - 1) > 0.05:
        found.append(f"the Inception Score is {results['is']:.2f} in the file's order and {results['is_shuffled']:.2f} "
                     "in a random one: the images are sorted, by class perhaps")
    for name in ("precision", "recall"):
        if name in results and abs(results[f"{name}_fp16"] - results[f"{name}_fp32"]) > 0.01:
            found.append(f"{name} is {results[f'{name}_fp16']:.4f} in fp16 and {results[f'{name}_fp32']:.4f} in fp32: "
                         "distances are as small as fp16's rounding, trust fp32 (near-duplicates?)")
    return found
