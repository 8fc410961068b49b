"""K-means: seeding by k-means++, Lloyd's, mini-batch and balanced iterations, repair of empty clusters.

    seeding     greedy k-means++ (Arthur and Vassilvitskii 2007, section 5): of a few rows drawn with probability
                proportional to their squared distance to the centers so far, the one that lowers the sum most
    lloyd       all rows to the nearest center, all centers to the mean of their rows (Lloyd 1982)
    minibatch   the same by batches, a center being the mean of all rows it had (Sculley 2010, algorithm 1); here the
                rows of the pass before count half as much, those before that a quarter
    balanced    Lloyd's with prices on the centers that make clusters equally large (see `balanced_assignment`)

An empty cluster takes the row that is farthest from its center, at most one of each other cluster a pass.

No more than `rows_per_code` rows a center are fitted on, drawn at random; then all rows get codes, in blocks. So a
million rows cost little more than what is drawn. Rows are handled around their mean, as distances by matrix products
lose what the mean has in common. All is drawn from `seed`; sums do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.balanced_assignment import balancing_prices, even_out
from generative_recommenders.tokenizers.quantizer_base import blocks, check_embeddings, squared_distances, with_prices
from ops.residual_quantize import residual_quantize
from ops.row_sums import row_sums

Algorithm = Literal["lloyd", "minibatch", "balanced"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
ITERATIONS = 50
TOLERANCE = 1e-4
BATCH_SIZE = 4096
ROWS_PER_CODE = 256
# Rows a center and in all that seeding looks at.
_SEEDING_ROWS = (32, 16384)
# Distances of the balanced variant that are held at once, 256 MB of float32.
_BALANCED_DISTANCES = 1 << 26
_REPAIRS = 100
# Part of the rows a mini-batch center had that still counts after a pass; Sculley keeps all, and centers stick early.
_FORGET = 0.5
# Distances below this part of the rows' squared lengths are taken for rounding.
_ROUNDING = 1e-6

Report = Callable[[int, dict[str, float]], None]


class Clusters(NamedTuple):
    """Centers, float32 (C, D); the code of each row, int64 (N,); prices, float32 (C,), if balanced; passes made."""

    centers_CD: Tensor
    codes_N: Tensor
    prices_C: Tensor | None
    passes: int


def kmeans(
    x_ND: Tensor,
    size: int,
    *,
    seed: int,
    algorithm: str = "lloyd",
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    batch_size: int = BATCH_SIZE,
    rows_per_code: int = ROWS_PER_CODE,
    report: Report | None = None,
) -> Clusters:
    """`size` clusters of the rows of x.

    Codes are those of the nearest centers; of the balanced variant they differ in number by one at most, while the
    cheapest centers, distance plus price, are nearly as even.

    Args:
        x_ND: floats of any width, N at least `size`.
        algorithm: "lloyd", "minibatch" or "balanced".
        iterations: passes over the rows at most.
        tolerance: a pass that moves the centers by less ends the fit: sum of squared moves over the mean variance of
            a column.
        batch_size: rows a step, of "minibatch".
        rows_per_code: rows a center that are fitted on at most; 0 is all.
        report: called after every pass with its number and {"mse", "shift", "usage"}: mean squared distance a row,
            move of the centers, part of the centers in use.
    Raises:
        ConfigError: a setting outside its range.
        DataError: x is no matrix of finite floats, or has fewer rows than `size`.
    """
    check_settings("kmeans", (size,), algorithm, iterations, tolerance, batch_size, rows_per_code)
    check_embeddings(x_ND)
    if len(x_ND) < size:
        raise DataError(f"k-means: got {len(x_ND)} rows, expected at least {size}; ask for fewer codes")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sample_nD = _sample(x_ND, size, algorithm, rows_per_code, generator)
        mean_D = sample_nD.mean(dim=0)
        sample_nD -= mean_D
        centers_CD = seeds(sample_nD, size, generator)
        prices_C = None
        limit = tolerance * float(sample_nD.square().mean())
        if algorithm == "balanced":
            centers_CD, prices_C, passes = _balanced(sample_nD, centers_CD, iterations, limit, report)
        else:
            batch = len(sample_nD) if algorithm == "lloyd" else batch_size
            fit = _lloyd if algorithm == "lloyd" else _minibatch
            centers_CD, passes = fit(sample_nD, centers_CD, iterations, limit, batch, generator, report)
            centers_CD = repaired(sample_nD, centers_CD)
        codes_N = _assign(x_ND, mean_D, centers_CD, prices_C)
        if prices_C is not None:
            shifted_ND = x_ND.to(torch.float32) - mean_D
            codes_N = even_out(shifted_ND, centers_CD, prices_C, codes_N)
    return Clusters(centers_CD + mean_D, codes_N, prices_C, passes)


def check_settings(
    owner: str,
    sizes: tuple[int, ...],
    algorithm: str,
    iterations: int,
    tolerance: float,
    batch_size: int,
    rows_per_code: int,
) -> None:
    """Raises ConfigError, in the name of `owner`, where a setting of k-means is outside its range."""
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{owner}.sizes: got {sizes}, expected at least 1 code a level; try (256, 256, 256)")
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"{owner}.algorithm: got {algorithm!r}, expected one of {', '.join(ALGORITHMS)}; choose one")
    for name, value, low in (("iterations", iterations, 1), ("tolerance", tolerance, 0), ("batch_size", batch_size, 1)):
        if not value >= low:
            raise ConfigError(f"{owner}.{name}: got {value}, expected at least {low}; leave it out for the default")
    if rows_per_code < 0:
        raise ConfigError(f"{owner}.rows_per_code: got {rows_per_code}, expected 0 (all rows) or more; try 256")


def seeds(x_nD: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` rows of x, float32 around 0, by greedy k-means++; where fewer are distinct, others follow at random."""
    n = min(len(x_nD), max(_SEEDING_ROWS[0] * size, _SEEDING_ROWS[1]))
    order_n = torch.randperm(len(x_nD), generator=generator).to(x_nD.device)
    if n < len(x_nD):
        x_nD = x_nD[order_n[:n].sort().values]
    norms_n = x_nD.square().sum(dim=1)
    trials = 2 + int(math.log(size))
    chosen = [int(torch.randint(n, (1,), generator=generator))]
    nearest_n = _distances_to_rows(x_nD, norms_n, chosen)[:, 0]
    while len(chosen) < size:
        upto_n = nearest_n.double().cumsum(0)
        total = float(upto_n[-1])
        if not total > 0:
            break
        draws_t = torch.rand(trials, generator=generator, dtype=torch.float64).to(x_nD.device) * total
        tried = torch.searchsorted(upto_n, draws_t, right=True).clamp_(max=n - 1).tolist()
        nearest_nt = torch.minimum(_distances_to_rows(x_nD, norms_n, tried), nearest_n[:, None])
        best = int(nearest_nt.sum(dim=0, dtype=torch.float64).argmin())
        chosen.append(tried[best])
        nearest_n = nearest_nt[:, best]
    if len(chosen) < size:
        left_n = torch.ones(n, dtype=torch.bool, device=x_nD.device)
        left_n[chosen] = False
        rest_n = left_n.nonzero()[:, 0]
        shuffled_n = torch.randperm(len(rest_n), generator=generator).to(x_nD.device)
        chosen += rest_n[shuffled_n][: size - len(chosen)].tolist()
    return x_nD[chosen].clone()


def _distances_to_rows(x_nD: Tensor, norms_n: Tensor, rows: list[int]) -> Tensor:
    """(n, rows): squared distances, 0 where they are no more than rounding, so that no row is drawn twice."""
    norms_nt = norms_n[:, None] + norms_n[rows]
    distances_nt = torch.addmm(norms_nt, x_nD, x_nD[rows].T, alpha=-2)
    return distances_nt.masked_fill_(distances_nt <= _ROUNDING * norms_nt, 0)


def _sample(x_ND: Tensor, size: int, algorithm: str, rows_per_code: int, generator: torch.Generator) -> Tensor:
    """A float32 copy of the rows to fit on."""
    rows = rows_per_code * size if rows_per_code else len(x_ND)
    if algorithm == "balanced":
        rows = min(rows, max(_BALANCED_DISTANCES // size, size))
    if rows >= len(x_ND):
        return x_ND.to(torch.float32, copy=True)
    drawn_n = torch.randperm(len(x_ND), generator=generator)[:rows].sort().values
    return x_ND[drawn_n.to(x_ND.device)].to(torch.float32)


def _lloyd(
    x_nD: Tensor,
    centers_CD: Tensor,
    iterations: int,
    limit: float,
    batch: int,
    generator: torch.Generator,
    report: Report | None,
) -> tuple[Tensor, int]:
    before_n = None
    for done in range(1, iterations + 1):
        code_n, residual_nD = nearest(x_nD, centers_CD)
        moved_CD, counts_C = moved(centers_CD, code_n, residual_nD)
        errors_n = residual_nD.square().sum(dim=1)
        moved_CD = refilled(moved_CD, counts_C, x_nD, code_n, errors_n)
        shift = float((moved_CD - centers_CD).square().sum())
        centers_CD = moved_CD
        _tell(report, done, errors_n, shift, counts_C)
        # Rounding may keep centers moving where no row changes its code any more.
        if shift <= limit or (before_n is not None and torch.equal(code_n, before_n)):
            break
        before_n = code_n
    return centers_CD, done


def _minibatch(
    x_nD: Tensor,
    centers_CD: Tensor,
    iterations: int,
    limit: float,
    batch: int,
    generator: torch.Generator,
    report: Report | None,
) -> tuple[Tensor, int]:
    seen_C = torch.zeros(len(centers_CD), dtype=torch.float64, device=x_nD.device)
    for done in range(1, iterations + 1):
        before_CD, before_C = centers_CD, seen_C
        errors = []
        for rows_b in torch.randperm(len(x_nD), generator=generator).to(x_nD.device).split(batch):
            code_b, residual_bD = nearest(x_nD[rows_b], centers_CD)
            counts_C = torch.bincount(code_b, minlength=len(centers_CD))
            seen_C = seen_C + counts_C
            sums_CD = row_sums(code_b, residual_bD, num_rows=len(centers_CD))
            # The mean of all rows a center had is the old one, moved by the mean of what the new ones differ.
            centers_CD = centers_CD + sums_CD / seen_C.clamp(min=1).to(torch.float32)[:, None]
            errors.append(residual_bD.square().sum(dim=1))
        counts_C = seen_C - before_C
        centers_CD = refilled(centers_CD, counts_C, x_nD[rows_b], code_b, errors[-1])
        seen_C = torch.where(counts_C > 0, _FORGET * seen_C, 0.0)
        shift = float((centers_CD - before_CD).square().sum())
        _tell(report, done, torch.cat(errors), shift, counts_C)
        if shift <= limit:
            break
    return centers_CD, done


def _balanced(
    x_nD: Tensor, centers_CD: Tensor, iterations: int, limit: float, report: Report | None
) -> tuple[Tensor, Tensor, int]:
    prices_C = torch.zeros(len(centers_CD), device=x_nD.device)
    for done in range(1, iterations + 1):
        distances_nC = squared_distances(x_nD, centers_CD)
        prices_C = _cheaper(distances_nC, prices_C, done)
        code_n = even_out(x_nD, centers_CD, prices_C, distances_nC.add_(prices_C).argmin(dim=1))
        residual_nD = x_nD - centers_CD[code_n]
        moved_CD, counts_C = moved(centers_CD, code_n, residual_nD)
        shift = float((moved_CD - centers_CD).square().sum())
        centers_CD = moved_CD
        _tell(report, done, residual_nD.square().sum(dim=1), shift, counts_C)
        if shift <= limit:
            break
    return centers_CD, _settled(x_nD, centers_CD, prices_C), done


def nearest(x_nD: Tensor, centers_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Code of each row, int64 (n,), and what its center leaves of it, (n, D)."""
    codes_n1, residual_nD = residual_quantize(x_nD, [centers_CD])
    return codes_n1[:, 0], residual_nD


def moved(centers_CD: Tensor, code_n: Tensor, residual_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the rows of each code, and their numbers (C,); a code without rows stays where it is."""
    counts_C = torch.bincount(code_n, minlength=len(centers_CD))
    sums_CD = row_sums(code_n, residual_nD, num_rows=len(centers_CD))
    return centers_CD + sums_CD / counts_C.clamp(min=1)[:, None], counts_C


def refilled(centers_CD: Tensor, counts_C: Tensor, x_nD: Tensor, code_n: Tensor, errors_n: Tensor) -> Tensor:
    """Centers with those of empty clusters on the rows farthest from their centers, one of a cluster at most."""
    empty_E = (counts_C == 0).nonzero()[:, 0]
    if len(empty_E) == 0:
        return centers_CD
    order_n = errors_n.argsort(descending=True, stable=True)
    # A cluster of one row would be empty in its turn, and rows on their centers are none that are far.
    far_n = (counts_C[code_n] > 1) & (errors_n > _ROUNDING * x_nD.square().sum(dim=1))
    order_n = order_n[far_n[order_n]]
    first_n = _first_of_group(code_n[order_n], len(centers_CD))
    rows_E = order_n[first_n][: len(empty_E)]
    centers_CD = centers_CD.clone()
    centers_CD[empty_E[: len(rows_E)]] = x_nD[rows_E]
    return centers_CD


def _first_of_group(groups_n: Tensor, groups: int) -> Tensor:
    """Whether a row is the first of its group, bool (n,)."""
    places_n = torch.arange(len(groups_n), device=groups_n.device)
    first_G = torch.full((groups,), len(groups_n), device=groups_n.device)
    first_G = first_G.scatter_reduce(0, groups_n, places_n, "amin")
    return first_G[groups_n] == places_n


def repaired(x_nD: Tensor, centers_CD: Tensor) -> Tensor:
    """Centers that all have rows, if there are as many distinct ones."""
    for _ in range(_REPAIRS):
        code_n, residual_nD = nearest(x_nD, centers_CD)
        counts_C = torch.bincount(code_n, minlength=len(centers_CD))
        repaired_CD = refilled(centers_CD, counts_C, x_nD, code_n, residual_nD.square().sum(dim=1))
        if torch.equal(repaired_CD, centers_CD):
            break
        centers_CD = repaired_CD
    return centers_CD


def _cheaper(distances_nC: Tensor, prices_C: Tensor, done: int) -> Tensor:
    """Prices after one more pass, the entropy falling from pass to pass."""
    share = max(0.1 * 0.8 ** (done - 1), 0.02)
    return balancing_prices(distances_nC, prices_C, epsilon=share * _spread(distances_nC), iterations=10)


def _settled(x_nD: Tensor, centers_CD: Tensor, prices_C: Tensor) -> Tensor:
    """Prices of the final centers, from 0 up."""
    distances_nC = squared_distances(x_nD, centers_CD)
    for share in (0.1, 0.05, 0.05, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01):
        epsilon = share * _spread(distances_nC)
        prices_C = balancing_prices(distances_nC, prices_C, epsilon=epsilon, iterations=10)
    return prices_C - prices_C.min()


def _spread(distances_nC: Tensor) -> float:
    return max(float(distances_nC.std(correction=0)), 1e-30)


def _assign(x_ND: Tensor, mean_D: Tensor, centers_CD: Tensor, prices_C: Tensor | None) -> Tensor:
    codes_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
    codebook_CD = centers_CD if prices_C is None else with_prices(centers_CD, prices_C, 0, 1)
    for rows in blocks(*x_ND.shape):
        x_nD = x_ND[rows].to(torch.float32) - mean_D
        codes_N[rows] = nearest(F.pad(x_nD, (0, codebook_CD.shape[1] - x_nD.shape[1])), codebook_CD)[0]
    return codes_N


def _tell(report: Report | None, done: int, errors_n: Tensor, shift: float, counts_C: Tensor) -> None:
    if report is not None:
        usage = float((counts_C > 0).to(torch.float32).mean())
        report(done, {"mse": float(errors_n.mean()), "shift": shift, "usage": usage})
