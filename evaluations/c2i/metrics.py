"""ADM's metrics from features: Fréchet distance, Inception Score, precision and recall.

The same numbers as those of guided-diffusion's evaluator (arXiv 2105.05233) on the same features, in less time and
memory: statistics and score are streamed in float64, and the distances between all pairs are never held at once. Under
torchrun all processes must call `merge`, `manifold_radii` and `precision_recall` together.
"""
import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from evaluations.c2i.inception import exact_fp32
from utils import dist

ADM_BLOCK = 10_000  # side of the blocks that ADM's evaluator computes in float32 when float16 overflows
BLOCK = {"cpu": 1000, "cuda": 5000}  # side of the blocks that are computed at once; only the speed depends on it
PANEL = 512  # columns of a covariance computed at once
CHUNK = 1024  # rows of features widened to float64 at once
NOT_A_COVARIANCE = 1e-3  # relative asymmetry or negative eigenvalue that cannot be rounding
HUGE = 1e100  # beyond it products of covariances overflow float64

PRDtype = Literal["fp16", "fp32"]


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Context manager and decorator: within it CUDA multiplies fp32 as fp32 and sums fp16 products in fp32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    with exact_fp32():
        try:
            matmul.allow_fp16_reduced_precision_reduction = False
            yield
        finally:
            matmul.allow_fp16_reduced_precision_reduction = before


class FeatureStatistics:
    """Streaming mean and covariance of features in float64, of one process or, after `merge`, of all."""

    def __init__(self, dim: int, *, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.count = 0
        self._shift = torch.zeros(dim, dtype=torch.float64, device=device)  # subtracted: sums of squares stay small
        self._sum = torch.zeros_like(self._shift)
        self._products = self._shift.new_zeros(dim, dim)  # only the blocks on and right of the diagonal are used

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add rows (B, D) of any float type. Raises ValueError for another shape, NaN or infinity."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(features.shape)}, expected (B, {self.dim})")
        for rows in features.split(CHUNK):
            rows = rows.to(self._shift.device, torch.float64)
            if self.count == 0 and len(rows):
                self._shift = rows.mean(0)
            rows = rows - self._shift
            sums = rows.sum(0)
            if not sums.isfinite().all():
                raise ValueError("features hold NaN or infinite values")
            self._sum += sums
            for start in range(0, self.dim, PANEL):  # x'x is symmetric: nearly half the work saved
                self._products[start:start + PANEL, start:].addmm_(rows[:, start:start + PANEL].T, rows[:, start:])
            self.count += len(rows)

    def merge(self) -> None:
        """Make these the statistics of all processes' rows (Chan et al. 1979). To be called once, after all rows."""
        if dist.world_size() == 1:
            return
        count = int(dist.total(torch.tensor(self.count, device=self._shift.device)))
        mean = dist.total(self._shift * self.count + self._sum) / max(count, 1)
        own = self.count * (self._shift - mean)  # over this process's rows, sum(x - mean) = sum(x - shift) + own
        outer = torch.outer(self._sum, self._shift - mean)
        self._products = dist.total(self._products + outer + outer.T + torch.outer(own, self._shift - mean))
        self._shift, self._sum, self.count = mean, torch.zeros_like(mean), count

    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.count < 1:
            raise ValueError("no features to take the mean of")
        return self._shift + self._sum / self.count

    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by count - 1). Raises ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows of features, got {self.count}")
        upper = (self._products - torch.outer(self._sum, self._sum) / self.count).triu_()
        return (upper + upper.triu(1).T) / (self.count - 1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians (arXiv 1706.08500): |a - b|² + tr A + tr B - 2 tr (A B)^½, in float64.

    tr (A B)^½ = tr (L' B L)^½ with A = L L': two symmetric eigenvalue problems in place of a general square root,
    equal to 5e-12 and several times faster. Rounding may leave a distance of nought slightly negative.

    Raises ValueError for shapes that do not fit, values that are not finite, and matrices that are no covariances.
    """
    dim = mean_a.numel()
    values = [value.to(torch.float64) for value in (mean_a, cov_a, mean_b, cov_b)]
    shapes = [tuple(value.shape) for value in values]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"means and covariances of shapes {shapes}, expected (D,), (D, D), (D,), (D, D)")
    if not all((value.abs() < HUGE).all() for value in values):  # nor NaN
        raise ValueError("means or covariances hold NaN, infinite or absurd values")
    mean_a, cov_a, mean_b, cov_b = values
    variances, axes = torch.linalg.eigh(cov_a)
    factor = axes * variances.clamp_min(0).sqrt()  # L
    squares = torch.linalg.eigvalsh(factor.T @ cov_b @ factor)
    largest_a, largest_b = variances.max(), cov_b.diagonal().max()
    if (_asymmetry(cov_a) > NOT_A_COVARIANCE or _asymmetry(cov_b) > NOT_A_COVARIANCE
            or variances.min() < -NOT_A_COVARIANCE * largest_a
            or cov_b.diagonal().min() < -NOT_A_COVARIANCE * largest_b
            or squares.min() < -NOT_A_COVARIANCE * largest_a * largest_b):
        raise ValueError("a covariance is not symmetric or has negative eigenvalues")
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
            - 2 * squares.clamp_min(0).sqrt().sum()).item()


def _asymmetry(matrix: Tensor) -> Tensor:
    """Largest difference from the transpose, relative to the largest entry."""
    return (matrix - matrix.T).abs().max() / matrix.abs().max().clamp_min(1 / HUGE)


class InceptionScore:
    """Streaming Inception Score (arXiv 1606.03498): of consecutive chunks, then averaged; only chunk sums are kept.

    `order` (count,): image i's place in the order that is cut into chunks of `split`; None: as they come.
    """

    def __init__(self, count: int, classes: int, *, split: int = 5000, order: Tensor | None = None,
                 device: torch.device | str = "cpu") -> None:
        if count < 1 or split < 1:
            raise ValueError(f"an Inception Score of {count} images in chunks of {split}: expected at least 1 of each")
        if order is not None and not torch.equal(order.long().sort().values.cpu(), torch.arange(count)):
            raise ValueError(f"order is no permutation of {count} images")
        self._count, self._split = count, split
        self._order = None if order is None else order.to(device)
        chunks = -(-count // split)
        self._seen = torch.zeros(chunks, dtype=torch.long, device=device)
        self._probabilities = torch.zeros(chunks, classes, dtype=torch.float64, device=device)  # sum of p
        self._negative_entropies = torch.zeros(chunks, dtype=torch.float64, device=device)  # sum of p log p

    @torch.no_grad()
    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Add images `indices` (B,) of the file with their class `logits` (B, C). Raises ValueError for bad ones."""
        chunks, classes = self._probabilities.shape
        if logits.shape != (len(indices), classes):
            raise ValueError(f"logits of shape {tuple(logits.shape)}, expected ({len(indices)}, {classes})")
        if len(indices) == 0:
            return
        indices, logits = indices.to(self._seen.device), logits.to(self._seen.device, torch.float64)
        if indices.min() < 0 or indices.max() >= self._count:
            raise ValueError(f"images {int(indices.min())} to {int(indices.max())} of {self._count}")
        if not logits.isfinite().all():
            raise ValueError("logits hold NaN or infinite values")
        chunk = (indices if self._order is None else self._order[indices]) // self._split
        logs = logits.log_softmax(1)
        probabilities = logs.exp()
        self._seen += chunk.bincount(minlength=chunks)
        self._probabilities.index_add_(0, chunk, probabilities)
        self._negative_entropies.index_add_(0, chunk, (probabilities * logs).sum(1))

    def merge(self) -> None:
        """Take in all processes' images. To be called once, after the last image."""
        for sums in (self._seen, self._probabilities, self._negative_entropies):
            dist.total(sums)

    def value(self) -> float:
        """Mean over chunks of exp(mean KL(p | q)); a shorter last chunk counts like the others.

        Raises ValueError when images are missing or came twice.
        """
        sizes = torch.full_like(self._seen, self._split)
        sizes[-1] = self._count - self._split * (len(sizes) - 1)
        if not torch.equal(self._seen, sizes):
            raise ValueError(f"the Inception Score saw {int(self._seen.sum())} images, expected each of {self._count} "
                             "once")
        marginals = self._probabilities / sizes[:, None]
        divergences = self._negative_entropies / sizes - torch.xlogy(marginals, marginals).sum(1)
        return divergences.exp().mean().item()


@exact_products()
def manifold_radii(features: Tensor, *, k: int = 3, pr_dtype: PRDtype = "fp32") -> Tensor:
    """Squared distance from each row of (N, D) float32 to its k-th neighbour, (N,) float32; a row is its own 0-th.

    Raises ValueError for N <= k and for features that are not finite.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} rows of features: neighbour {k} of each needs more than {k}")
    distances = _Distances(features, features, pr_dtype)
    nearest = torch.full((len(features), k + 1), math.inf, device=features.device)
    pairs = [(rows, columns) for rows, columns in distances.blocks if rows.start <= columns.start]
    for rows, columns in _shared(pairs, "radii"):
        _keep_smallest(nearest[rows], distances.block(rows, columns))
        if rows != columns:
            _keep_smallest(nearest[columns], distances.block(rows, columns, mirrored=True).T)
    rank, world_size = _place()
    everyones = nearest.new_zeros(world_size, *nearest.shape)
    everyones[rank] = nearest  # the others add zeros
    everyones = dist.total(everyones).transpose(0, 1).flatten(1)  # (N, world_size * (k + 1))
    return everyones.topk(k + 1, largest=False).values.amax(1).clamp_min(0)


@exact_products()
def precision_recall(reference: Tensor, sample: Tensor, *, k: int = 3,
                     pr_dtype: PRDtype = "fp32") -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of sample (N2, D) against reference (N1, D), both float32.

    Precision is the share of samples within the k-neighbour radius of some reference, recall the reverse; a point
    on the edge counts. `pr_dtype` fp16 rounds distances as ADM's evaluator does, which published numbers contain: an
    upward bias of 0.001 to 0.003 with Inception features. On a CPU float16 products are summed in float32.

    Raises ValueError as `manifold_radii` does, and for differing D.
    """
    if reference.ndim != 2 or sample.ndim != 2 or reference.shape[1] != sample.shape[1]:
        raise ValueError(f"features of shapes {tuple(reference.shape)} and {tuple(sample.shape)}, expected (N1, D) and "
                         "(N2, D)")
    reference_radii = manifold_radii(reference, k=k, pr_dtype=pr_dtype)
    sample_radii = manifold_radii(sample, k=k, pr_dtype=pr_dtype)
    distances = _Distances(reference, sample, pr_dtype)
    recalled = torch.zeros(len(reference), dtype=torch.int32, device=reference.device)
    precise = torch.zeros(len(sample), dtype=torch.int32, device=sample.device)
    for rows, columns in _shared(distances.blocks, "precision and recall"):
        block = distances.block(rows, columns).float()
        recalled[rows] |= (block <= sample_radii[columns]).any(1)
        precise[columns] |= (block <= reference_radii[rows, None]).any(0)
    return tuple((dist.total(inside) > 0).double().mean().item() for inside in (precise, recalled))


class _Distances:
    """Squared distances between the rows of u (N1, D) and of v (N2, D), block by block: |u|² - 2 u.v + |v|².

    Not clamped at 0: neither the order nor a comparison with a radius depends on that.

    In fp16, as ADM's evaluator: u, v, norms, products and each sum are rounded to float16; a block of ADM_BLOCK x
    ADM_BLOCK with an entry that is not finite is computed in float32 as a whole.
    """

    def __init__(self, u: Tensor, v: Tensor, pr_dtype: PRDtype) -> None:
        assert pr_dtype in get_args(PRDtype), pr_dtype
        self._u, self._v = u.float(), v.float()
        self._norms = {half: (_squared_norms(self._u, half=half)[:, None], _squared_norms(self._v, half=half)[None])
                       for half in ((False, True) if pr_dtype == "fp16" else (False,))}
        if not all((4 * norms).isfinite().all() for norms in self._norms[False]):  # no distance is longer
            raise ValueError("features hold NaN or infinite values, or their squares overflow float32")
        self.blocks = [(rows, columns) for rows in _spans(len(u), u.device) for columns in _spans(len(v), v.device)]
        self._in_half: dict[tuple[int, int, bool], bool] = {}
        self._last = None, None

    def block(self, rows: slice, columns: slice, *, mirrored: bool = False) -> Tensor:
        """(R, C) from u[rows] to v[columns]. `mirrored`, where u is v: v[columns] to u[rows], transposed.

        The same products, so that the block on the other side of the diagonal costs no second matrix product; only the
        order of rounded sums differs.
        """
        return self._sum(rows, columns, half=self._stays_half(rows, columns, mirrored=mirrored), mirrored=mirrored)

    def _sum(self, rows: slice, columns: slice, *, half: bool, mirrored: bool) -> Tensor:
        norms_u, norms_v = self._norms[half]
        norms = [norms_u[rows], norms_v[:, columns]]
        first, second = reversed(norms) if mirrored else norms
        return torch.add(self._products(rows, columns, half=half), first).add_(second)

    def _products(self, rows: slice, columns: slice, *, half: bool) -> Tensor:
        """-2 u.v of a block (R, C); the last result is kept for the mirrored block."""
        key = rows.start, columns.start, half
        if self._last[0] != key:
            u, v = self._u[rows], self._v[columns]
            if half:
                u, v = u.half(), v.half()
                if u.device.type == "cpu":  # no fast float16 product there
                    u, v = u.float(), v.float()
            products = torch.empty(len(u), len(v), dtype=u.dtype, device=u.device).addmm_(u, v.T, beta=0, alpha=-2)
            self._last = key, products.half() if half else products
        return self._last[1]

    def _stays_half(self, rows: slice, columns: slice, *, mirrored: bool) -> bool:
        """Whether ADM computes its own block, of which this one is a part, in float16."""
        if True not in self._norms:
            return False
        key = rows.start // ADM_BLOCK, columns.start // ADM_BLOCK, mirrored
        if key not in self._in_half:
            self._in_half[key] = self._all_finite(*key)
        return self._in_half[key]

    def _all_finite(self, row: int, column: int, mirrored: bool) -> bool:
        """Whether no float16 distance in ADM's block (row, column) overflows: by a bound, else by computing them."""
        around = [slice(i * ADM_BLOCK, (i + 1) * ADM_BLOCK) for i in (row, column)]
        largest_u, largest_v = (norms.flatten()[span].max().item() for norms, span in
                                zip(self._norms[True], around, strict=True))
        bound = (math.sqrt(largest_u) + math.sqrt(largest_v)) ** 2
        if bound < 60_000 or math.isinf(bound):  # surely below float16's 65504 after any rounding; surely above
            return bound < 60_000
        inside = [(rows, columns) for rows, columns in self.blocks
                  if rows.start // ADM_BLOCK == row and columns.start // ADM_BLOCK == column]
        return all(self._sum(*pair, half=True, mirrored=mirrored).clamp_min_(0).isfinite().all() for pair in inside)


def _squared_norms(features: Tensor, *, half: bool) -> Tensor:
    """(N,) squared length of each row, float32 or rounded to float16 as ADM's are."""
    parts = []
    for rows in features.split(CHUNK):
        rows = rows.half() if half else rows
        norms = rows.square().float().sum(1)
        parts.append(norms.half() if half else norms)
    return torch.cat(parts)


def _spans(count: int, device: torch.device) -> list[slice]:
    """Cut `count` rows into blocks, none of which crosses a border of ADM's blocks."""
    size = BLOCK[device.type]
    return [slice(start, min(start + size, outer + ADM_BLOCK, count))
            for outer in range(0, count, ADM_BLOCK) for start in range(outer, min(outer + ADM_BLOCK, count), size)]


def _shared(pairs: list[tuple[slice, slice]], title: str) -> Iterable[tuple[slice, slice]]:
    """This process's share of the work, with a progress bar if it takes long."""
    rank, world_size = _place()
    return tqdm(pairs[rank::world_size], desc=title, unit="block", delay=5, mininterval=1, disable=rank > 0)


def _place() -> tuple[int, int]:
    """Rank and world size; from torchrun's environment while there is no process group yet."""
    world_size = dist.world_size()
    return dist.env_rank() if world_size > 1 else 0, world_size


def _keep_smallest(nearest: Tensor, distances: Tensor) -> None:
    """Update the smallest entries of each row (R, K), in place, with those of distances (R, C)."""
    closer = (distances.amin(1) < nearest.amax(1)).nonzero().squeeze(1)  # after the first blocks only few rows
    count = min(nearest.shape[1], distances.shape[1])
    smallest = distances[closer].float().topk(count, largest=False).values
    nearest[closer] = torch.cat([nearest[closer], smallest], 1).topk(nearest.shape[1], largest=False).values
