"""K-means against brute force, exhaustive search and other libraries; what it does with awkward rows."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.balanced_assignment import balancing_prices, even_out
from generative_recommenders.tokenizers.kmeans import ALGORITHMS, kmeans, repaired, seeds
from generative_recommenders.tokenizers.quantizer_base import squared_distances


def blobs(size: int, each: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around far-apart corners, in random order, and the corner of each."""
    draw = torch.Generator().manual_seed(seed)
    corner_n = torch.arange(size).repeat(each)[torch.randperm(size * each, generator=draw)]
    corners_CD = 100 * torch.randn(size, width, generator=draw)
    return corners_CD[corner_n] + torch.randn(size * each, width, generator=draw), corner_n


def rows(n: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def error(x_ND: Tensor, centers_CD: Tensor) -> float:
    return float(torch.cdist(x_ND.double(), centers_CD.double()).square().amin(dim=1).mean())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_far_apart_clusters_are_found(algorithm: str) -> None:
    x_ND, corner_N = blobs(7, 20)
    found = kmeans(x_ND, 7, seed=3, algorithm=algorithm)
    pairs = set(zip(found.codes_N.tolist(), corner_N.tolist(), strict=True))
    assert len(pairs) == 7
    assert {code for code, _ in pairs} == set(range(7))


def test_lloyd_ends_where_codes_are_nearest_and_centers_are_means() -> None:
    x_ND = rows(400)
    found = kmeans(x_ND, 12, seed=0, tolerance=0.0, iterations=300)
    assert found.passes < 300
    assert torch.equal(found.codes_N, torch.cdist(x_ND.double(), found.centers_CD.double()).argmin(dim=1))
    means_CD = torch.stack([x_ND[found.codes_N == code].mean(dim=0) for code in range(12)])
    torch.testing.assert_close(found.centers_CD, means_CD, rtol=1e-4, atol=1e-5)


def test_lloyd_error_never_rises_and_is_reported() -> None:
    errors: list[float] = []
    kmeans(rows(500), 20, seed=1, report=lambda done, metrics: errors.append(metrics["mse"]))
    assert len(errors) > 3
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))


def test_error_is_that_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x_ND = rows(1500, 16)
    theirs = cluster.KMeans(30, n_init=3, random_state=0).fit(x_ND.numpy()).inertia_ / len(x_ND)
    assert error(x_ND, kmeans(x_ND, 30, seed=0).centers_CD) < 1.03 * theirs


@pytest.mark.parametrize(("algorithm", "factor"), [("lloyd", 1.02), ("minibatch", 1.04)])
def test_error_is_that_of_faiss(algorithm: str, factor: float) -> None:
    faiss = pytest.importorskip("faiss")
    x_ND = rows(3000, 16)
    theirs = faiss.Kmeans(16, 40, niter=40, nredo=3, seed=1, min_points_per_centroid=1)
    theirs.train(x_ND.numpy())
    ours = kmeans(x_ND, 40, seed=0, algorithm=algorithm, batch_size=500).centers_CD
    assert error(x_ND, ours) < factor * error(x_ND, torch.from_numpy(theirs.centroids.copy()))


def test_seeds_are_spread_as_the_rows_are() -> None:
    """Greedy k-means++ hits each of the far-apart groups; uniform draws would miss some almost surely."""
    x_ND, corner_N = blobs(30, 10)
    found_CD = seeds(x_ND - x_ND.mean(dim=0), 30, torch.Generator().manual_seed(0)) + x_ND.mean(dim=0)
    assert len(corner_N[torch.cdist(found_CD, x_ND).argmin(dim=1)].unique()) == 30


@pytest.mark.parametrize("algorithm", ["lloyd", "minibatch"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_every_distinct_row_gets_a_center_where_there_are_as_many(algorithm: str, offset: float) -> None:
    distinct_CD = rows(16, seed=4) + offset
    x_ND = distinct_CD[torch.arange(16).repeat_interleave(torch.arange(1, 17))]
    found = kmeans(x_ND, 16, seed=0, algorithm=algorithm)
    assert len(found.codes_N.unique()) == 16
    assert error(x_ND, found.centers_CD) < 1e-6


def test_what_all_rows_have_in_common_changes_no_code() -> None:
    x_ND = rows(300).mul(64).round() / 64
    plain, moved = kmeans(x_ND, 10, seed=0), kmeans(x_ND + 1024.0, 10, seed=0)
    assert (plain.codes_N == moved.codes_N).float().mean() > 0.99


def test_empty_clusters_are_refilled() -> None:
    x_ND = rows(200)
    far_CD = torch.full((8, 8), 1e3) + torch.arange(8.0)[:, None]
    found_CD = repaired(x_ND, torch.cat([x_ND[:1], far_CD]))
    used = torch.cdist(x_ND, found_CD).argmin(dim=1).unique()
    assert len(used) == 9


def test_equal_rows_leave_codes_unused_without_an_endless_repair() -> None:
    found = kmeans(torch.ones(50, 3), 4, seed=0)
    assert torch.equal(found.centers_CD, torch.ones(4, 3))
    assert len(found.codes_N.unique()) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_cluster_is_the_mean(algorithm: str) -> None:
    x_ND = rows(50)
    found = kmeans(x_ND, 1, seed=0, algorithm=algorithm)
    torch.testing.assert_close(found.centers_CD[0], x_ND.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert not found.codes_N.any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_seed_same_bytes(algorithm: str) -> None:
    x_ND = rows(600)
    first, second = (kmeans(x_ND, 16, seed=5, algorithm=algorithm, batch_size=100) for _ in range(2))
    assert first.centers_CD.numpy().tobytes() == second.centers_CD.numpy().tobytes()
    assert first.codes_N.numpy().tobytes() == second.codes_N.numpy().tobytes()
    other = kmeans(x_ND, 16, seed=6, algorithm=algorithm, batch_size=100)
    assert not torch.equal(first.centers_CD, other.centers_CD)


def test_a_sample_is_fitted_and_all_rows_get_codes() -> None:
    x_ND, corner_N = blobs(5, 400)
    found = kmeans(x_ND.half(), 5, seed=0, rows_per_code=10)
    assert len(set(zip(found.codes_N.tolist(), corner_N.tolist(), strict=True))) == 5


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), data=st.data())
def test_balanced_sizes_differ_by_one_at_most(n: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, n))
    # Few distinct rows: ties no price can part.
    x_ND = rows(n, 3, seed=n).mul(data.draw(st.sampled_from([0.5, 100.0]))).round()
    counts_C = kmeans(x_ND, size, seed=0, algorithm="balanced", iterations=3).codes_N.bincount(minlength=size)
    assert counts_C.sum() == n
    assert counts_C.max() - counts_C.min() <= 1


def test_balanced_prices_alone_make_clusters_nearly_even() -> None:
    """The rows are lopsided: nearest centers alone are far from even."""
    x_ND = torch.cat([rows(900, seed=1), 4 + 0.5 * rows(100, seed=2)])
    found = kmeans(x_ND, 20, seed=0, algorithm="balanced")
    assert found.prices_C is not None
    assert float(found.prices_C.min()) == 0
    cost_NC = torch.cdist(x_ND.double(), found.centers_CD.double()).square() + found.prices_C
    share_C = cost_NC.argmin(dim=1).bincount(minlength=20) / len(x_ND)
    assert math.exp(-float(torch.xlogy(share_C, share_C).sum())) > 19.7
    plain_C = torch.cdist(x_ND, kmeans(x_ND, 20, seed=0).centers_CD).argmin(dim=1).bincount(minlength=20)
    assert plain_C.max() > 1.5 * plain_C.min()


def test_even_assignment_is_near_the_best_of_all() -> None:
    ratios = []
    for seed in range(20):
        x_ND, centers_CD = rows(8, 2, seed), rows(2, 2, seed + 100)
        distances_NC = squared_distances(x_ND, centers_CD)
        prices_C = torch.zeros(2)
        for epsilon in (0.5, 0.1, 0.05, 0.02):
            prices_C = balancing_prices(distances_NC, prices_C, epsilon=epsilon, iterations=50)
        codes_N = even_out(x_ND, centers_CD, prices_C, (distances_NC + prices_C).argmin(dim=1))
        found = float(distances_NC.gather(1, codes_N[:, None]).sum())
        best = math.inf
        for first in itertools.combinations(range(8), 4):
            inside_N = torch.zeros(8, dtype=torch.bool)
            inside_N[list(first)] = True
            best = min(best, float(torch.where(inside_N, distances_NC[:, 0], distances_NC[:, 1]).sum()))
        ratios.append(found / best)
    assert np.mean(ratios) < 1.01
    assert max(ratios) < 1.1


def test_even_out_moves_only_what_it_must() -> None:
    x_ND = torch.tensor([[0.0], [0.1], [0.2], [0.9], [5.0], [5.1]])
    centers_CD, codes_N = torch.tensor([[0.0], [5.0]]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert even_out(x_ND, centers_CD, torch.zeros(2), codes_N).tolist() == [0, 0, 0, 1, 1, 1]
    even_N = torch.tensor([0, 0, 1, 1, 0, 1])
    assert torch.equal(even_out(x_ND, centers_CD, torch.zeros(2), even_N), even_N)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"size": 0}, r"sizes: got \(0,\)"),
        ({"algorithm": "fuzzy"}, "algorithm: got 'fuzzy', expected one of lloyd"),
        ({"iterations": 0}, "iterations: got 0"),
        ({"tolerance": float("nan")}, "tolerance: got nan"),
        ({"rows_per_code": -1}, "rows_per_code: got -1"),
    ],
)
def test_settings_outside_their_range_are_named(given_settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kmeans(rows(10), **{"size": 2, "seed": 0, **given_settings})


def test_rows_that_cannot_be_clustered_are_named() -> None:
    with pytest.raises(DataError, match="got 3 rows, expected at least 4"):
        kmeans(rows(3), 4, seed=0)
    x_ND = rows(10)
    x_ND[7, 2] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity in row 7"):
        kmeans(x_ND, 2, seed=0)
