"""Rank of a target, and the k best, among all candidates minus the seen ones: exact, without the (B, X) score matrix.

    score[b, x] = <queries[b], table[candidate_ids[x]]>
    rank[b]     = 1 + #{x unseen : score > target's, or equal to it and earlier in candidate_ids}

The target's own score is read from the same product as the scores it is compared with, so rounding cannot let it pass
itself, and ties go by position, so a model that scores everything alike gains nothing. Counting replaces the published
protocol's "2,500 best plus history, then remove history": same ranks, any catalogue size. A target in the history is a
miss there as here. Half precisions are scored in float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.rank import blocked, gpu, operator, reference
from ops.rank.checks import check_candidates, check_k, check_products, check_seen, check_targets

__all__ = ["rank_of_target", "topk"]

_rank_of_target = Op(
    "rank_of_target",
    reference.rank_of_target,
    {
        "triton": Implementation(partial(operator.rank_of_target, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.rank_of_target, triton=False), blocked.refuses),
    },
)
_topk = Op(
    "topk",
    reference.topk,
    {
        "triton": Implementation(partial(operator.topk, triton=True), gpu.topk_refuses),
        "cpu": Implementation(partial(operator.topk, triton=False), blocked.refuses),
    },
)


def rank_of_target(
    queries_BD: Tensor,
    table_XD: Tensor,
    candidate_ids_X: Tensor,
    target_ids_B: Tensor,
    seen_offsets: Tensor,
    seen_ids_S: Tensor,
    *,
    filter_history: bool = True,
    backend: str | None = None,
) -> Tensor:
    """1-based rank of each row's target, int64 (B,); 0 marks a miss.

    table_XD: (V, D), indexed by id; candidate_ids_X: int64, ascending, unique; the seen ids of row b are
    `seen_ids_S[seen_offsets[b]:seen_offsets[b + 1]]`, in any order, where duplicates and ids that are no candidates are
    harmless. A target misses when it is no candidate or, with `filter_history`, when it is among its row's seen ids.
    Without `filter_history` the seen ids are ignored. No gradient.

    Raises ValueError for shapes that do not fit, unsorted candidates, and queries or rows that are NaN or too large.
    On a GPU the last would have to wait for the device: there a score that is NaN is not above any other, and a target
    misses whose score is NaN or -inf.
    """
    _check(queries_BD, table_XD, candidate_ids_X, seen_offsets, seen_ids_S)
    check_targets(target_ids_B, queries_BD.shape[0])
    seen = (seen_offsets, seen_ids_S) if filter_history else None
    with torch.no_grad():
        ranks_B: Tensor = _rank_of_target(queries_BD, table_XD, candidate_ids_X, target_ids_B, seen, backend=backend)
    return ranks_B


def topk(
    queries_BD: Tensor,
    table_XD: Tensor,
    candidate_ids_X: Tensor,
    k: int,
    seen_offsets: Tensor,
    seen_ids_S: Tensor,
    *,
    filter_history: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best unseen candidates of each row: scores (B, k) descending, ids int64 (B, k), valid_count int64 (B,).

    Equal scores go by position in `candidate_ids_X`. Where fewer than k candidates are left the rest is score -inf, id
    0. Arguments and errors as in `rank_of_target`; k >= 1. On a GPU candidates whose score is NaN or -inf are left out.
    """
    _check(queries_BD, table_XD, candidate_ids_X, seen_offsets, seen_ids_S)
    check_k(k)
    seen = (seen_offsets, seen_ids_S) if filter_history else None
    with torch.no_grad():
        scores_BK, ids_BK, valid_B = _topk(queries_BD, table_XD, candidate_ids_X, k, seen, backend=backend)
    return scores_BK, ids_BK, valid_B


def _check(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, seen_offsets: Tensor, seen_ids_S: Tensor
) -> None:
    if queries_BD.dim() != 2 or table_XD.dim() != 2 or queries_BD.shape[1] != table_XD.shape[1]:
        got = f"{tuple(queries_BD.shape)} and {tuple(table_XD.shape)}"
        raise ValueError(f"rank queries and table: got {got}, expected (B, D) and (V, D)")
    check_seen(seen_offsets, seen_ids_S, queries_BD.shape[0])
    check_candidates(candidate_ids_X, table_XD.shape[0])
    check_products(queries_BD, table_XD)
