"""Rank of a target, and the k best, among all candidates minus the seen ones: exact, without the (B, X) score matrix.

    score[b, x] = <queries[b], table[candidate_ids[x]]>
    rank[b]     = 1 + #{x unseen : score > target's, or equal to it and earlier in candidate_ids}

The target's own score is read from the same product as the scores it is compared with, so rounding cannot let it pass
itself, and ties go by position, so a model that scores everything alike gains nothing. Counting replaces the published
protocol's "2,500 best plus history, then remove history": same ranks, any catalogue size. A target in the history is a
miss there as here. Half precisions are scored in float32.
"""

from __future__ import annotations

import torch

from ops.dispatch import Implementation, Op
from ops.rank import blocked, reference

__all__ = ["rank_of_target", "topk"]

_rank_of_target = Op(
    "rank_of_target",
    reference.rank_of_target,
    {"cpu": Implementation(blocked.rank_of_target, blocked.refuses)},
)
_topk = Op("topk", reference.topk, {"cpu": Implementation(blocked.topk, blocked.refuses)})


def rank_of_target(
    queries_BD: torch.Tensor,
    table_XD: torch.Tensor,
    candidate_ids_X: torch.Tensor,
    target_ids_B: torch.Tensor,
    seen_offsets: torch.Tensor,
    seen_ids_S: torch.Tensor,
    *,
    filter_history: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """1-based rank of each row's target, int64 (B,); 0 marks a miss.

    table_XD: (V, D), indexed by id; candidate_ids_X: int64, ascending, unique; the seen ids of row b are
    `seen_ids_S[seen_offsets[b]:seen_offsets[b + 1]]`, in any order, where duplicates and ids that are no candidates are
    harmless. A target misses when it is no candidate or, with `filter_history`, when it is among its row's seen ids.
    Without `filter_history` the seen ids are ignored. No gradient.
    Raises ValueError for shapes that do not fit, unsorted candidates, and queries or rows that are NaN or too large.
    """
    _check(queries_BD, table_XD, candidate_ids_X, seen_offsets)
    if target_ids_B.shape != queries_BD.shape[:1] or target_ids_B.dtype != torch.int64:
        got = f"{target_ids_B.dtype} {tuple(target_ids_B.shape)}"
        raise ValueError(f"rank targets: got {got}, expected int64 ({queries_BD.shape[0]},)")
    seen = (seen_offsets, seen_ids_S) if filter_history else None
    with torch.no_grad():
        ranks_B: torch.Tensor = _rank_of_target(
            queries_BD, table_XD, candidate_ids_X, target_ids_B, seen, backend=backend
        )
    return ranks_B


def topk(
    queries_BD: torch.Tensor,
    table_XD: torch.Tensor,
    candidate_ids_X: torch.Tensor,
    k: int,
    seen_offsets: torch.Tensor,
    seen_ids_S: torch.Tensor,
    *,
    filter_history: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best unseen candidates of each row: scores (B, k) descending, ids int64 (B, k), valid_count int64 (B,).

    Equal scores go by position in `candidate_ids_X`. Where fewer than k candidates are left the rest is score -inf, id
    0. Arguments and errors as in `rank_of_target`; k >= 1.
    """
    _check(queries_BD, table_XD, candidate_ids_X, seen_offsets)
    if k < 1:
        raise ValueError(f"topk k: got {k}, expected at least 1")
    seen = (seen_offsets, seen_ids_S) if filter_history else None
    with torch.no_grad():
        scores_BK, ids_BK, valid_B = _topk(queries_BD, table_XD, candidate_ids_X, k, seen, backend=backend)
    return scores_BK, ids_BK, valid_B


def _check(
    queries_BD: torch.Tensor, table_XD: torch.Tensor, candidate_ids_X: torch.Tensor, seen_offsets: torch.Tensor
) -> None:
    if queries_BD.dim() != 2 or table_XD.dim() != 2 or queries_BD.shape[1] != table_XD.shape[1]:
        got = f"{tuple(queries_BD.shape)} and {tuple(table_XD.shape)}"
        raise ValueError(f"rank queries and table: got {got}, expected (B, D) and (V, D)")
    if seen_offsets.shape != (queries_BD.shape[0] + 1,):
        raise ValueError(f"rank seen_offsets: got {tuple(seen_offsets.shape)}, expected ({queries_BD.shape[0] + 1},)")
    ids, rows = candidate_ids_X, table_XD.shape[0]
    if ids.numel() and (bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= rows):
        raise ValueError(f"rank candidate_ids: expected ascending unique ids in 0 to {rows - 1}; try torch.unique")
    # By Cauchy-Schwarz no score, nor any partial sum of one, can then be NaN or infinite.
    largest = [_largest_magnitude(queries_BD), _largest_magnitude(table_XD)]
    if not largest[0] * largest[1] * queries_BD.shape[1] < torch.finfo(torch.float32).max:
        raise ValueError(
            f"rank scores: got queries up to {largest[0]} and table rows up to {largest[1]}, expected finite products; "
            "try a lower learning rate"
        )


def _largest_magnitude(x: torch.Tensor) -> float:
    """NaN where there is one; without a copy of x."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))
