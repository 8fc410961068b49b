"""Ranking metrics of the published experiments.

For a target of rank r (1 is best): hr@K = [r <= K]; ndcg@K = [r <= K] / log2(r + 1), one relevant item being the
ideal; mrr = 1 / r. The published evaluation looks at the best `MAX_RANK` candidates that were not seen: a target
beyond them, or itself in the seen history, is a miss of rank `MAX_RANK + 1`. The `>=4` variants average over users
whose target is rated at least 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_RANK = 2500
HR_AT = (1, 5, 10, 50, 100, 200, 500, 1000)
NDCG_AT = (1, 5, 10, 50, 100, 200)
LIKED_RATING = 4.0
LIKED_SUFFIX = "_>=4"
_LIKED = ("ndcg@10", "hr@10", "hr@50", "mrr")
METRIC_NAMES = (
    *(f"ndcg@{k}" for k in NDCG_AT),
    *(f"hr@{k}" for k in HR_AT),
    "mrr",
    *(f"{name}{LIKED_SUFFIX}" for name in _LIKED),
)

# What is printed of an evaluation, in this order; "loss" is the mean loss of the targets, where it was asked for.
LABELS = {
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "ndcg@50": "NDCG@50",
    "hr@5": "HR@5",
    "hr@10": "HR@10",
    "hr@50": "HR@50",
    "mrr": "MRR",
    "loss": "eval_loss",
}


def published_ranks(ranks_U: Tensor, num_candidates: int) -> Tensor:
    """Ranks as the published evaluation counts them: 0 (a miss) and anything beyond its list become its worst rank."""
    listed = min(MAX_RANK, num_candidates)
    missed = (ranks_U == 0) | (ranks_U > listed)
    return torch.where(missed, MAX_RANK + 1, ranks_U)


def per_user_metrics(ranks_U: Tensor) -> dict[str, Tensor]:
    """Metrics of each user, float64 (U,), from ranks of `published_ranks`."""
    ranks = ranks_U.double()
    gain = math.log(2.0) / torch.log(ranks + 1.0)
    values = {f"ndcg@{k}": torch.where(ranks <= k, gain, 0.0) for k in NDCG_AT}
    values |= {f"hr@{k}": (ranks <= k).double() for k in HR_AT}
    values["mrr"] = 1.0 / ranks
    return values


def mean_metrics(ranks_U: Tensor, target_ratings_U: Tensor) -> dict[str, float]:
    """Means over users by name, `METRIC_NAMES` in order; NaN for a `>=4` mean over nobody."""
    values = per_user_metrics(ranks_U)
    liked = target_ratings_U >= LIKED_RATING
    means = {name: float(value.mean()) for name, value in values.items()}
    means |= {f"{name}{LIKED_SUFFIX}": float(values[name][liked].mean()) for name in _LIKED}
    return means
