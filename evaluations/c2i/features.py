"""From image sets to what metrics need: features, statistics, class probabilities; streamed, sharded, cached.

The feature network is the Inception of 2015, or with --features any other; distances in other features are no FID and
get another name.
"""
import hashlib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from evaluations.c2i.image_sets import ImageSet
from evaluations.c2i.inception import CLASSES, exact_fp32, resize_tf1
from evaluations.c2i.inception_weights import (
    InceptionFlags,
    is_torchscript,
    load_inception,
    load_torchscript,
    weights_hash,
)
from evaluations.c2i.metrics import FeatureStatistics, InceptionScore
from utils import dist
from utils.cli import flag, message, warn
from utils.files import cache_folder, file_hash, first_line, replacing
from utils.finite import NotFiniteError, check_finite
from utils.seeding import derive_seed

SPLIT = 5000  # images per chunk of the Inception Score, in the order of the set
CACHE_VERSION = 2  # of the cache files: to be raised when features change


@dataclass(kw_only=True)
class FeatureFlags(InceptionFlags):
    """Which features images are compared by."""

    shapes_run: ClassVar[bool] = False
    features: str | None = flag(None, "instead of Inception: a TorchScript file, or package.module:function that gives "
                                      "a network, which maps (B, 3, H, W) in [-1, 1] to (B, D); no FID then")


class Features(NamedTuple):
    """The features of a batch: pooled (B, D); from Inception also spatial (B, 2023) and logits (B, 1008). float32."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class FeatureNetwork:
    """uint8 images (B, H, W, 3) → Features, on `device`."""

    function: Callable[[Tensor], Features]  # float32 (B, 3, H, W) in [0, 255]
    device: torch.device
    described: dict[str, str]  # name, file, sha256
    is_inception: bool

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return self.function(pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float())


def load_network(flags: FeatureFlags, *, device: torch.device) -> FeatureNetwork:
    """The network of --features, else Inception. Raises ValueError or FileNotFoundError when it cannot be loaded."""
    if flags.features is None:
        return inception_network(flags.inception, device=device)
    network, described = other_network(flags.features)
    network = network.eval().to(device)

    def other_features(pixels: Tensor) -> Features:
        try:
            with exact_fp32():
                pooled = network(pixels / 127.5 - 1)
        except RuntimeError as error:  # such as a size that it does not take
            raise ValueError(f"--features {flags.features} failed on images of {pixels.shape[2]}x{pixels.shape[3]}: "
                             f"{first_line(error)[:200]}") from None
        if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(pixels):
            raise ValueError(f"--features {flags.features} returned {getattr(pooled, 'shape', type(pooled))} for "
                             f"{len(pixels)} images, expected ({len(pixels)}, D)")
        return Features(pooled.float())

    return FeatureNetwork(other_features, device, described, False)


def inception_network(path: str | None, *, device: torch.device) -> FeatureNetwork:
    """Inception with the weights at `path`, fed as ADM feeds it."""
    inception, described = load_inception(path, device=device)

    def features(pixels: Tensor) -> Features:
        pooled, spatial = inception(resize_tf1(pixels))
        return Features(pooled, spatial, inception.logits(pooled))

    return FeatureNetwork(features, device, {"name": "Inception 2015-12-05", **described}, True)


def other_network(source: str) -> tuple[torch.nn.Module, dict[str, str]]:
    """The network of --features and what to call it in a report."""
    path = Path(source)
    if path.is_file():
        if not zipfile.is_zipfile(path) or not is_torchscript(path):
            raise ValueError(f"--features {source} is no TorchScript program, as torch.jit.trace makes")
        described = {"name": f"{path.stem} (TorchScript)", "file": path.name, "sha256": file_hash(path)}
        network = load_torchscript(path)
        check_finite(dict(network.named_parameters()), path)  # buffers may be masks of -inf
        return network, described
    module, _, function = source.partition(":")
    if not function:
        raise FileNotFoundError(f"--features {source} is neither a TorchScript file nor package.module:function")
    sys.path.append(os.getcwd())
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--features {source} cannot be loaded: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"--features {source} returned a {type(network).__name__}, expected a torch.nn.Module")
    return network, {"name": source, "sha256": weights_hash(network)}


@dataclass
class Measured:
    """What metrics need of one set; all processes hold the same."""

    count: int
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # "pooled", "spatial": mean, covariance
    pooled: Tensor | None = None  # (N, D) float32 on the CPU, in the set's order
    inception_scores: tuple[float, float] | None = None  # (in the set's order, in a random order)


class Tally:
    """What a process collects from its share of a set; `join` unites all shares."""

    def __init__(self, images: ImageSet, wanted: set[str], *, device: torch.device, seed: int) -> None:
        self.images, self.wanted, self.device = images, wanted, device
        self.statistics_wanted = wanted & {"pooled", "spatial"}
        self.count = 0
        self.dims: dict[str, int] = {}
        self.statistics: dict[str, FeatureStatistics] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.scores: list[InceptionScore] = []
        if "scores" in wanted:
            shuffled = torch.from_numpy(np.random.default_rng(derive_seed(seed)).permutation(images.count))
            self.scores = [InceptionScore(images.count, CLASSES, split=SPLIT, order=order, device=device)
                           for order in (None, shuffled)]

    def add(self, indices: np.ndarray, features: Features) -> None:
        """Take in images `indices` (B,). Raises ValueError for features that are not finite."""
        if not bool(features.pooled.isfinite().all()):
            raise ValueError(f"{self.images.name}: features of images {indices[0]} to {indices[-1]} are not finite")
        places = torch.from_numpy(indices)
        for name in self.statistics_wanted:
            values = getattr(features, name)
            self.dims[name] = values.shape[1]
            self.statistics.setdefault(name, FeatureStatistics(self.dims[name], device=self.device)).update(values)
        for score in self.scores:
            score.update(places, features.logits)
        if "features" in self.wanted:
            self.kept.append((places, features.pooled.cpu()))
        self.count += len(indices)

    def join(self) -> Measured:
        """The results of all processes, on each of them. Raises ValueError when no process had a readable image."""
        result = Measured(int(dist.total(torch.tensor(self.count, device=self.device))))
        if not result.count:
            raise ValueError(f"none of the {self.images.count} images of {self.images.name} can be read")
        if result.count == 1 and self.statistics_wanted:
            raise ValueError(f"{self.images.name} has 1 image that can be read, expected at least 2: statistics are of "
                             "several")
        for dims in dist.gather_lists([self.dims]):  # this process may have had no image
            self.dims |= dims
        for name in sorted(self.statistics_wanted):
            values = self.statistics.get(name) or FeatureStatistics(self.dims[name], device=self.device)
            values.merge()
            result.statistics[name] = values.mean(), values.covariance()
        for score in self.scores:
            score.merge()
        if self.scores:
            result.inception_scores = tuple(score.value() for score in self.scores)
        if "features" in self.wanted:
            result.pooled = in_order(self.kept, self.images.count, self.device)
        return result


def measure(images: ImageSet, network: FeatureNetwork, process: dist.Process, *, wanted: set[str], batch: int,
            title: str, seed: int = 0) -> Measured:
    """Run a set through the network. `wanted`: any of "pooled" and "spatial" (statistics), "features", "scores".

    The work is shared by all processes; each image counts once. When one process cannot read or measure an image, all
    of them raise ValueError, NotFiniteError where the images come from a model that gives no numbers.
    """
    tally = Tally(images, wanted, device=process.device, seed=seed)
    problems: list[tuple[type[ValueError], str]] = []
    with tqdm(total=images.count, desc=title, unit="image", mininterval=1.0, disable=not process.is_main) as bar:
        try:
            for indices, pictures in images.batches(batch, rank=process.rank, world_size=process.world_size):
                tally.add(indices, network(pictures))
                bar.update(min(len(indices) * process.world_size, images.count - bar.n))
        except (ValueError, OSError) as error:
            problems.append((NotFiniteError if isinstance(error, NotFiniteError) else ValueError, message(error)))
    problems = dist.gather_lists(problems)
    if problems:
        kind, said = problems[0]
        raise kind(said)
    return tally.join()


def in_order(kept: list[tuple[Tensor, Tensor]], count: int, device: torch.device) -> Tensor:
    """Rows (indices (B,), values (B, D)) of all processes → (count, D) on the CPU of each of them."""
    width = max(dist.gather_lists([values.shape[1] for _, values in kept[:1]]))
    pooled = torch.zeros(count, width, device=device)
    for places, values in kept:
        pooled[places.to(device)] = values.to(device)
    return dist.total(pooled).cpu()  # every row comes from one process, the others add zeros


def measure_with_stored(images: ImageSet, network: FeatureNetwork, process: dist.Process, *, wanted: set[str],
                        batch: int, title: str, seed: int = 0, remember_as: str | None = None) -> Measured:
    """`measure`, but with the statistics that the set's file holds, which come before those of its images, as in ADM.

    `remember_as`: the set's hash. With it the measurement is kept in the cache folder and read from there next time, if
    the network has a hash as well.
    """
    stored = {name: (torch.from_numpy(images.stored[mean]).double(), torch.from_numpy(images.stored[cov]).double())
              for name, mean, cov in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
              if name in wanted and mean in images.stored}
    missing = wanted - stored.keys()
    result = None if missing else Measured(images.count)
    if "file" not in network.described:  # a function has no hash: it may change
        remember_as = None
    key = f"{CACHE_VERSION}-{remember_as}-{network.is_inception}-{network.described['sha256']}-{sorted(missing)}"
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if missing and remember_as:
        result = dist.broadcast_object(recall(path) if process.is_main else None)
    if result is None:
        result = measure(images, network, process, wanted=missing, batch=batch, title=title, seed=seed)
        if remember_as and process.is_main:
            remember(result, path)
    result.statistics |= stored
    return result


def remember(measured: Measured, path: Path) -> None:
    """Write a measurement to the cache; when that fails, warn and go on."""
    tensors = {"count": torch.tensor(measured.count)}
    for name, (mean, covariance) in measured.statistics.items():
        tensors |= {f"{name}.mean": mean.cpu(), f"{name}.covariance": covariance.cpu()}
    if measured.pooled is not None:
        tensors["features"] = measured.pooled
    try:
        with replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    except (OSError, SafetensorError) as error:
        warn(f"the reference's features could not be kept for the next time: {error}")


def recall(path: Path) -> Measured | None:
    """A measurement from the cache, None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return Measured(int(tensors["count"]), {
            name.removesuffix(".mean"): (value, tensors[f"{name.removesuffix('.mean')}.covariance"])
            for name, value in tensors.items() if name.endswith(".mean")}, tensors.get("features"))
    except (SafetensorError, OSError, KeyError) as error:
        warn(f"{path} is damaged and will be made again: {error}")
        return None
