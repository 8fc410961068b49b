"""Metrics of users whose target occurs in training (`_warm`) and of those whose target does not (`_cold`).

A model that learns an item only from its events cannot find the latter, so that one mean over all hides what a model
of texts or semantic IDs does for new items.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

SLICED = ("hr@10", "hr@50", "ndcg@10", "ndcg@50")


def sliced_means(values: Mapping[str, Tensor], trained_U: Tensor) -> dict[str, float]:
    """Means over either group of users, `hr@10_warm`, `hr@10_cold`, ..., then `users_warm` and `users_cold`.

    Args:
        values: metrics of each user, (U,), by name; those of `SLICED` that are among them are used.
        trained_U: bool, whether the user's target occurs in training.
    Returns:
        NaN where a group is empty.
    """
    groups = {"warm": trained_U, "cold": ~trained_U}
    means = {
        f"{name}_{group}": float(values[name][inside_U].mean())
        for group, inside_U in groups.items()
        for name in SLICED
        if name in values
    }
    return means | {f"users_{group}": float(inside_U.sum()) for group, inside_U in groups.items()}
