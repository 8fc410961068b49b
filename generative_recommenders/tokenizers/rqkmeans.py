"""RQ-KMeans: k-means on the embeddings, then level by level on what the levels before left (QARM; GRID's RK-means).

It has no encoder, so nothing is trained by gradient and no code can collapse: an empty cluster is refilled. The
balanced variant makes the codes of a level equally frequent (constrained RQ-KMeans of MiniOneRec); the prices that do
so stay with the quantizer, so that they hold for items that come later too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from generative_recommenders.config import configurable
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.kmeans import (
    BATCH_SIZE,
    ITERATIONS,
    ROWS_PER_CODE,
    TOLERANCE,
    Report,
    check_settings,
    kmeans,
)
from generative_recommenders.tokenizers.quantizer import ResidualQuantizer
from generative_recommenders.tokenizers.quantizer_base import blocks, check_embeddings

Progress = Callable[[str, int, dict[str, float]], None]


@configurable("rq_kmeans")
@dataclass(frozen=True)
class RqKMeans:
    """Settings of RQ-KMeans.

    Attributes:
        sizes: codes a level.
        algorithm: "lloyd", "minibatch" or "balanced"; see `kmeans`.
        iterations: passes over the rows at most, a level.
        tolerance: move of the centers that ends a level's fit; see `kmeans.kmeans`.
        batch_size: rows a step, of "minibatch".
        rows_per_code: rows a code that a level is fitted on at most; 0 is all.
        center: subtract the mean of the embeddings first.
        normalize_residuals: bring what a level quantizes to length 1, the first level's too (GRID).
    Raises:
        ConfigError: a setting outside its range.
    """

    sizes: tuple[int, ...] = (256, 256, 256)
    algorithm: str = "lloyd"
    iterations: int = ITERATIONS
    tolerance: float = TOLERANCE
    batch_size: int = BATCH_SIZE
    rows_per_code: int = ROWS_PER_CODE
    center: bool = True
    normalize_residuals: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        settings = (self.algorithm, self.iterations, self.tolerance, self.batch_size, self.rows_per_code)
        check_settings("RqKMeans", self.sizes, *settings)

    def fit(self, x_ND: Tensor, *, seed: int, progress: Progress | None = None) -> ResidualQuantizer:
        """Fit the levels one after the other; the work is done on the device of x, the result is on the CPU.

        Args:
            x_ND: embeddings, floats of any width; a float32 copy is made.
            progress: called after every pass as ("level 0", pass, {"mse", "shift", "usage"}).
        Raises:
            DataError: x is no matrix of finite floats, or has fewer distinct rows than a level has codes.
        """
        check_embeddings(x_ND)
        check_distinct(x_ND, self.sizes)
        residual_ND = x_ND.detach().to(torch.float32, copy=True)
        mean_D = residual_ND.mean(dim=0) if self.center else None
        if mean_D is not None:
            residual_ND -= mean_D
        codebooks, prices, lengths = [], [], []
        for level, size in enumerate(self.sizes):
            if self.normalize_residuals:
                lengths.append(normalize_rows(residual_ND))
            found = kmeans(
                residual_ND,
                size,
                seed=level_seed(seed, level),
                algorithm=self.algorithm,
                iterations=self.iterations,
                tolerance=self.tolerance,
                batch_size=self.batch_size,
                rows_per_code=self.rows_per_code,
                report=of_stage(progress, f"level {level}"),
            )
            codebooks.append(found.centers_CD)
            if found.prices_C is not None:
                prices.append(found.prices_C)
            subtract_codes(residual_ND, found.centers_CD, found.prices_C)
        return ResidualQuantizer(
            codebooks,
            mean=mean_D,
            normalize_residuals=self.normalize_residuals,
            lengths=torch.tensor(lengths) if lengths else None,
            prices=prices or None,
        ).cpu()


def level_seed(seed: int, level: int) -> int:
    """A seed of a level's own."""
    return (seed * 1_000_003 + level) % (1 << 63)


def check_distinct(x_ND: Tensor, sizes: tuple[int, ...]) -> None:
    """Raises DataError where x has fewer distinct rows than the largest level has codes."""
    wanted = max(sizes)
    found = distinct_rows(x_ND, wanted)
    if found < wanted:
        got = f"{found} distinct embeddings of {len(x_ND)} items"
        raise DataError(f"sizes {sizes}: got {got}, expected at least {wanted}; ask for fewer codes a level")


def distinct_rows(x_ND: Tensor, enough: int) -> int:
    """Number of distinct rows, counted no further than it takes to find `enough`."""
    n = min(len(x_ND), 2 * enough)
    while True:
        # Adding 0 makes -0 and 0 the same.
        found = len(torch.unique(x_ND[:n] + 0.0, dim=0))
        if found >= enough or n == len(x_ND):
            return found
        n = min(len(x_ND), 4 * n)


def of_stage(progress: Progress | None, stage: str) -> Report | None:
    """`progress` under the name of a stage."""
    return None if progress is None else partial(progress, stage)


def normalize_rows(x_ND: Tensor) -> float:
    """Bring rows to length 1 in place; rows of zeros stay. Returns their mean length before."""
    lengths_N = x_ND.norm(dim=1)
    x_ND /= lengths_N.clamp(min=1e-12)[:, None]
    return float(lengths_N.mean())


def subtract_codes(residual_ND: Tensor, codebook_CD: Tensor, prices_C: Tensor | None) -> None:
    """Take from each row, in place, the code that a quantizer gives it."""
    level = ResidualQuantizer([codebook_CD], prices=None if prices_C is None else [prices_C])
    codes_N = level.encode(residual_ND)[:, 0]
    for rows in blocks(*residual_ND.shape):
        residual_ND[rows] -= codebook_CD[codes_N[rows]]
