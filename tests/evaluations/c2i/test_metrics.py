"""Metrics from features are ADM's: its own numbers, two other libraries, numpy; streamed, sharded, refused."""
import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks import bench_metrics
from evaluations.c2i import metrics
from evaluations.c2i.metrics import (
    FeatureStatistics,
    InceptionScore,
    frechet_distance,
    manifold_radii,
    precision_recall,
)
from tests.conftest import ROOT
from utils import cli

DATA = ROOT / "tests" / "data" / "evaluation"


def fixture(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def gaussian(count: int, dim: int = 24, *, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, dim, generator=generator) @ mix + shift


def whole(count: int, *, seed: int, top: int, dim: int = 16) -> torch.Tensor:
    """Whole numbers: products and sums are exact in float32, whoever adds them up."""
    return torch.randint(0, top + 1, (count, dim), generator=torch.Generator().manual_seed(seed)).float()


def statistics(features: torch.Tensor, *batches: int) -> FeatureStatistics:
    found = FeatureStatistics(features.shape[1])
    for part in features.split(list(batches) or len(features)):
        found.update(part)
    return found


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = statistics(features)
    return found.mean(), found.covariance()


def score(logits: torch.Tensor, *, batch: int = 64, **options) -> float:
    found = InceptionScore(len(logits), logits.shape[1], **options)
    for indices in torch.arange(len(logits)).split(batch):
        found.update(indices, logits[indices])
    return found.value()


def adm_radii(features: torch.Tensor, *, block: int, half: bool = True) -> torch.Tensor:
    with ThreadPool(2) as pool:
        return torch.from_numpy(bench_metrics.adm_radii(features.numpy(), k=3, half=half, block=block, pool=pool))


@pytest.fixture(params=[(10_000, 1000), (40, 7), (64, 64)], ids=str)
def blocks(request, monkeypatch) -> tuple[int, int]:
    """Rows of ADM's blocks and of ours."""
    adm, ours = request.param
    monkeypatch.setattr(metrics, "ADM_BLOCK", adm)
    monkeypatch.setitem(metrics.BLOCK, "cpu", ours)
    return adm, ours


@pytest.mark.parametrize("name", ["acts_small", "acts_overflow"])
def test_adm_numbers(name):
    data = fixture(name)
    mean, covariance = moments(data["ref"])
    torch.testing.assert_close(mean.float(), data["mu_ref"], rtol=3e-6, atol=0)  # ADM's mean is a float32 sum
    torch.testing.assert_close(covariance, data["sigma_ref"], rtol=1e-10, atol=1e-10 * covariance.max().item())
    of_sample = moments(data["sample"])
    assert frechet_distance(*of_sample, mean, covariance) == pytest.approx(data["fid"].item(), rel=5e-7)
    rounded = torch.from_numpy(data["sample"].numpy().mean(0))  # with ADM's means, the distance is ADM's
    found = frechet_distance(rounded, of_sample[1], data["mu_ref"], covariance)
    assert found == pytest.approx(data["fid"].item(), rel=3e-8)
    for split in (5000, 100, 150):
        found = score(data["sample"] @ data["W"], split=split)
        assert found == pytest.approx(data[f"is_split{split}"].item(), rel=1e-6)
    for dtype in ("fp16", "fp32"):
        for part in ("ref", "sample"):
            tolerance = 1e-6 if name == "acts_overflow" else 6.5e-3  # float32 and float16 in ADM
            radii = manifold_radii(data[part], pr_dtype=dtype)
            assert radii.dtype == torch.float32
            torch.testing.assert_close(radii, data[f"radii_{part}"][:, 0], rtol=tolerance, atol=0)
        found = precision_recall(data["ref"], data["sample"], pr_dtype=dtype)
        assert found == (data["precision"].item(), data["recall"].item())


def test_half_precision_is_that_of_adm():
    data = fixture("acts_small")
    rounded, exact = (manifold_radii(data["ref"], pr_dtype=dtype) for dtype in ("fp16", "fp32"))
    assert torch.equal(rounded, rounded.half().float())
    assert not torch.equal(rounded, exact)
    same = (rounded == data["radii_ref"][:, 0]).double().mean()
    assert same > 0.5  # to the bit, though the order in which TensorFlow sums a row in float16 is its own


def test_adm_frechet_cases():
    data = fixture("frechet_cases")
    x, y, u, v, v2 = (moments(data[key]) for key in ("rankdef_x", "rankdef_y", "self_u", "const_v", "const_v2"))
    assert frechet_distance(*y, *x) == pytest.approx(data["rankdef"].item(), rel=1e-6)
    assert frechet_distance(*v, *v2) == pytest.approx(data["const_dim"].item(), rel=1e-6)
    assert frechet_distance(*u, *u) == pytest.approx(0, abs=1e-11)
    zeros = moments(torch.zeros(50, 16))
    assert frechet_distance(*zeros, *u) == pytest.approx(u[1].trace() + u[0].square().sum())
    assert frechet_distance(*u, *zeros) == pytest.approx(frechet_distance(*zeros, *u))


def test_other_libraries_agree():
    reference, sample = gaussian(400, seed=0), gaussian(300, seed=1, shift=0.3)
    theirs = [fid_features_to_statistics(x.double()) for x in (sample, reference)]
    ours = frechet_distance(*moments(sample), *moments(reference))
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(expected, rel=1e-9)
    expected = calculate_frechet_distance(*(found[key] for found in theirs for key in ("mu", "sigma")))
    assert ours == pytest.approx(expected, rel=1e-9)

    logits = gaussian(300, seed=2)
    expected = isc_features_to_metric(logits, splits=6, shuffle=False)["inception_score_mean"]
    assert score(logits, split=50) == pytest.approx(expected, rel=1e-9)

    found = precision_recall(reference, sample)
    theirs = prc_features_to_metric(sample, reference, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False,
                                    verbose=False)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
    assert 0.3 < found[0] < 1 and 0.3 < found[1] < 1 and found[0] != found[1]


@pytest.mark.parametrize("batches", [(), (1, 2, 97, 0, 900), (999, 1)])
@pytest.mark.parametrize("panel", [512, 7])
def test_statistics_are_streamed_exactly(batches, panel, monkeypatch):
    monkeypatch.setattr(metrics, "PANEL", panel)
    monkeypatch.setattr(metrics, "CHUNK", 300)
    features = gaussian(1000, seed=3, shift=1000.0)  # far from the origin
    found = statistics(features, *batches)
    assert found.count == 1000
    np.testing.assert_allclose(found.mean(), features.double().mean(0), rtol=1e-13)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(found.covariance(), expected, rtol=1e-10, atol=1e-11)
    half = statistics(features.half(), *batches)
    np.testing.assert_allclose(half.mean(), features.half().double().mean(0), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_blocks_do_not_matter(blocks, dtype):
    reference, sample = whole(150, seed=4, top=40), whole(131, seed=5, top=36)
    radii = manifold_radii(reference, pr_dtype=dtype)
    half = dtype == "fp16"
    assert torch.equal(radii, adm_radii(reference, block=10_000, half=half))
    expected = bench_metrics.adm_precision_recall(reference.numpy(), sample.numpy(), half=half, threads=2)
    assert precision_recall(reference, sample, pr_dtype=dtype) == expected
    assert 0.1 < expected[0] < 1 and 0.1 < expected[1] < 1


def test_overflow_is_decided_block_by_block(blocks):
    """Rows 70 to 79 and 90 to 99 lie so far out that their squares are no float16."""
    reference, sample = whole(100, seed=6, top=40), whole(120, seed=7, top=40)
    reference[70:80] += 45
    reference[90:] *= 8
    sample[80:] += 47
    radii = manifold_radii(reference, pr_dtype="fp16")
    assert torch.equal(radii, adm_radii(reference, block=blocks[0]))
    exact = radii == manifold_radii(reference, pr_dtype="fp32")
    assert exact.all() if blocks[0] == 10_000 else exact[64:].all() and not exact[:40].all()
    expected = bench_metrics.adm_precision_recall(reference.numpy(), sample.numpy(), half=True, threads=2,
                                                  block=blocks[0])
    assert precision_recall(reference, sample, pr_dtype="fp16") == expected


def test_finite_norms_may_still_overflow(monkeypatch):
    """|u|² of 36,864 each is a float16; at right angles the distance is none, at a small angle it is one."""
    monkeypatch.setattr(metrics, "ADM_BLOCK", 40)
    monkeypatch.setitem(metrics.BLOCK, "cpu", 16)
    features = whole(80, seed=8, top=3)
    features[:20, 0] += 192
    features[20:40, 1] += 192
    features[40:, 2] += 192
    distances = metrics._Distances(features, features, "fp16")
    halves = [distances._stays_half(slice(row, row + 1), slice(column, column + 1), mirrored=mirrored)
              for row, column in ((0, 0), (0, 40), (40, 40)) for mirrored in (False, True)]
    assert halves == [False] * 4 + [True] * 2
    assert torch.equal(manifold_radii(features, pr_dtype="fp16"), adm_radii(features, block=40))


def test_ties_and_duplicates():
    corners = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2], [9, 9]])
    for dtype in ("fp16", "fp32"):
        assert manifold_radii(corners, k=2, pr_dtype=dtype).tolist() == [4, 4, 4, 4, 130]
        assert manifold_radii(torch.ones(5, 3), pr_dtype=dtype).tolist() == [0] * 5
        on_the_edge = torch.tensor([[-2.0, 0], [-2, 0], [-2, 0], [-3, 0]])  # at 4 from a corner of radius 4; outside
        assert precision_recall(corners[:4], on_the_edge, k=2, pr_dtype=dtype) == (0.75, 0)
        twice = whole(20, seed=9, top=9).repeat(2, 1)
        assert precision_recall(twice, twice, pr_dtype=dtype) == (1, 1)
        assert manifold_radii(twice, k=1, pr_dtype=dtype).tolist() == [0] * 40


def test_inception_score_takes_the_order_given():
    logits = gaussian(130, seed=10)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    rearranged = torch.empty_like(logits)
    rearranged[order] = logits  # image i at place order[i]
    expected = score(rearranged, split=50)
    assert score(logits, split=50, order=order) == pytest.approx(expected, rel=1e-12)
    assert score(logits, split=50) != pytest.approx(expected, rel=1e-4)
    assert score(logits, split=50, batch=130) == pytest.approx(score(logits, split=50, batch=1), rel=1e-12)
    assert score(torch.eye(20).repeat(5, 1) * 1e4) == pytest.approx(20)  # sure and even: the number of classes
    assert score(torch.zeros(9, 20)) == pytest.approx(1)


def test_the_settings_of_products_are_given_back(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_fp16_reduced_precision_reduction
    seen = []
    monkeypatch.setattr(metrics, "_keep_smallest", lambda *_: seen.append(
        (matmul.allow_tf32, matmul.allow_fp16_reduced_precision_reduction)))
    try:
        matmul.allow_tf32 = True
        manifold_radii(torch.eye(5))
        with pytest.raises(ValueError, match="NaN"):
            manifold_radii(torch.eye(5) * torch.nan)
        assert seen == [(False, False)]
        assert (matmul.allow_tf32, matmul.allow_fp16_reduced_precision_reduction) == (True, before[1])
    finally:
        matmul.allow_tf32 = before[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_features_that_are_no_numbers_are_refused(value):
    good, bad = gaussian(50, seed=11), gaussian(50, seed=12)
    bad[31, 5] = value
    for dtype in ("fp16", "fp32"):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="NaN or infinite values, or their squares overflow"):
                precision_recall(*pair, pr_dtype=dtype)
    if value == 1e30:
        return
    with pytest.raises(ValueError, match="NaN or infinite values"):
        statistics(bad)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        score(bad)


def test_too_few_rows_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="needs at least 2 rows of features, got 1"):
        statistics(torch.ones(1, 4)).covariance()
    with pytest.raises(ValueError, match="no features"):
        FeatureStatistics(4).mean()
    with pytest.raises(ValueError, match=r"shape \(5, 3\), expected \(B, 4\)"):
        FeatureStatistics(4).update(torch.ones(5, 3))
    with pytest.raises(ValueError, match="3 rows of features: neighbour 3 of each needs more than 3"):
        precision_recall(torch.ones(3, 4), torch.ones(9, 4))
    with pytest.raises(ValueError, match=r"\(9, 5\), expected \(N1, D\) and"):
        precision_recall(torch.ones(9, 4), torch.ones(9, 5))


def test_matrices_that_are_no_covariances_are_refused():
    mean, covariance = moments(gaussian(100, seed=13))
    asymmetric, indefinite = covariance.clone(), covariance.clone()
    asymmetric[0, 1] += covariance.max()
    indefinite[0, 0] = -covariance[0, 0]
    for bad, says in ((asymmetric, "not symmetric"), (indefinite, "negative eigenvalues"), (-covariance, "negative"),
                      (covariance * torch.nan, "NaN"), (covariance * torch.inf, "NaN"), (covariance * 1e200, "absurd"),
                      (covariance[:4, :4], "shapes")):
        for pair in ((mean, covariance, mean, bad), (mean, bad, mean, covariance)):
            with pytest.raises(ValueError, match=says):
                frechet_distance(*pair)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(mean * torch.nan, covariance, mean, covariance)
    assert frechet_distance(mean.float(), covariance.float(), mean, covariance) == pytest.approx(0, abs=1e-4)


def test_inception_score_refuses_what_it_cannot_count():
    logits = gaussian(10, seed=14)
    for indices, says in ((range(9), "saw 9 images, expected each of 10 once"), ([*range(9), 3], "each of 10 once")):
        found = InceptionScore(10, 24, split=5)
        found.update(torch.tensor(indices), logits[:len(indices)])
        with pytest.raises(ValueError, match=says):
            found.value()
    with pytest.raises(ValueError, match="images 3 to 10 of 10"):
        found.update(torch.tensor([3, 10]), logits[:2])
    with pytest.raises(ValueError, match=r"\(2, 24\), expected \(3, 24\)"):
        found.update(torch.arange(3), logits[:2])
    with pytest.raises(ValueError, match="no permutation of 10 images"):
        InceptionScore(10, 24, order=torch.zeros(10, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 1"):
        InceptionScore(0, 24)


@pytest.mark.processes
def test_two_processes_are_one(tmp_path, one_thread, monkeypatch):
    """Rows in uneven shares, or all on one process; pairs of blocks in turns; the same on both ranks afterwards."""
    script = tmp_path / "share.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from evaluations.c2i import metrics
from utils import dist
process = dist.setup()
metrics.BLOCK["cpu"] = 37
rows = torch.arange(230)
logits, reference, sample = torch.load(sys.argv[1])
results = {{}}
for name, share in (("uneven", [rows[:60], rows[60:]]), ("none", [rows[:0], rows])):
    own = share[process.rank]
    found = metrics.FeatureStatistics(24)
    found.update(logits[own])
    found.merge()
    score = metrics.InceptionScore(230, 24, split=50)
    score.update(own, logits[own])
    score.merge()
    results[name] = found.count, found.mean(), found.covariance(), score.value()
for dtype in ("fp16", "fp32"):
    results[dtype] = (metrics.manifold_radii(sample, pr_dtype=dtype),
                      metrics.precision_recall(reference, sample, pr_dtype=dtype))
torch.save(results, sys.argv[1] + str(process.rank))
dist.shutdown()
""")
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = gaussian(230, seed=15, shift=50), gaussian(300, seed=16), gaussian(250, seed=17)
    torch.save(given, tmp_path / "rank")
    command = [sys.executable, str(ROOT / "utils" / "launch.py"), str(script), str(tmp_path / "rank")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    monkeypatch.setitem(metrics.BLOCK, "cpu", 37)
    logits, reference, sample = given
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        for name in ("uneven", "none"):
            count, mean, covariance, inception_score = results[name]
            assert count == 230
            for found, expected in zip((mean, covariance), moments(logits), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert inception_score == pytest.approx(score(logits, split=50), rel=1e-12)
        for dtype in ("fp16", "fp32"):
            radii, shares = results[dtype]
            assert torch.equal(radii, manifold_radii(sample, pr_dtype=dtype))
            assert shares == precision_recall(reference, sample, pr_dtype=dtype)


@pytest.mark.processes
def test_the_benchmark_runs_and_its_sides_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_metrics, "RESULTS", tmp_path / "results" / "metrics.md")
    flags = ["--sample-count", "90", "--reference-count", "70", "--feature-dim", "32", "--runs", "1", "--threads", "1"]
    cli.run(bench_metrics.main, bench_metrics.BenchMetricsFlags, flags)
    text = (tmp_path / "results" / "metrics.md").read_text()
    assert text.startswith("# Metrics") and text.splitlines()[-1].startswith("| 90 / 70 x 32 | fp16 |")
    assert "precision" in capsys.readouterr().out
