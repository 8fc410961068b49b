"""Rank and top-k by sorting the full score matrix: the definition, for small catalogues."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rows import find_sorted

# Offsets (B + 1) and ids of the seen candidates, None where none are hidden.
Seen = tuple[Tensor, Tensor] | None


def seen_of(offsets: Tensor | None, ids_S: Tensor | None) -> Seen:
    return None if offsets is None or ids_S is None else (offsets, ids_S)


def _products(queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor) -> Tensor:
    dtype = torch.promote_types(queries_BD.dtype, torch.float32)
    return queries_BD.to(dtype) @ table_XD[candidate_ids_X].to(dtype).T


def _order(scores_BX: Tensor, candidate_ids_X: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """Scores sorted descending, ties by position, seen ones at -inf; and the candidates' positions so sorted."""
    if seen is not None:
        offsets, seen_ids_S = seen
        ids_s = seen_ids_S[int(offsets[0]) : int(offsets[-1])]
        row_s = torch.arange(len(scores_BX), device=offsets.device).repeat_interleave(offsets.diff())
        position_s, found_s = find_sorted(candidate_ids_X, ids_s)
        scores_BX = scores_BX.index_put((row_s[found_s], position_s[found_s]), scores_BX.new_tensor(float("-inf")))
    sorted_BX, order_BX = scores_BX.sort(dim=1, descending=True, stable=True)
    return sorted_BX, order_BX


def rank_by_scores(scores_BX: Tensor, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: Seen) -> Tensor:
    sorted_BX, order_BX = _order(scores_BX, candidate_ids_X, seen)
    hit_BX = (candidate_ids_X[order_BX] == target_ids_B[:, None]) & (sorted_BX > float("-inf"))
    ranks_X = torch.arange(1, len(candidate_ids_X) + 1, device=hit_BX.device)
    return (hit_BX * ranks_X).sum(dim=1)


def topk_by_scores(scores_BX: Tensor, candidate_ids_X: Tensor, k: int, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    sorted_BX, order_BX = _order(scores_BX, candidate_ids_X, seen)
    kept = min(k, len(candidate_ids_X))
    scores_BK = sorted_BX.new_full((len(scores_BX), k), float("-inf"))
    ids_BK = candidate_ids_X.new_zeros(len(scores_BX), k)
    scores_BK[:, :kept] = sorted_BX[:, :kept]
    ids_BK[:, :kept] = candidate_ids_X[order_BX[:, :kept]]
    valid_BK = scores_BK > float("-inf")
    return scores_BK, torch.where(valid_BK, ids_BK, 0), valid_BK.sum(dim=1)


def rank_of_target(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: Seen
) -> Tensor:
    scores_BX = _products(queries_BD, table_XD, candidate_ids_X)
    return rank_by_scores(scores_BX, candidate_ids_X, target_ids_B, seen)


def topk(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, k: int, seen: Seen
) -> tuple[Tensor, Tensor, Tensor]:
    return topk_by_scores(_products(queries_BD, table_XD, candidate_ids_X), candidate_ids_X, k, seen)
