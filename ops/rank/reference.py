"""Rank and top-k by sorting the full score matrix: the definition, for small catalogues."""

from __future__ import annotations

import torch

from ops.rows import find_sorted

Seen = tuple[torch.Tensor, torch.Tensor] | None


def _order(
    queries_BD: torch.Tensor, table_XD: torch.Tensor, candidate_ids_X: torch.Tensor, seen: Seen
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, X) sorted descending, ties by position, seen ones at -inf; and the candidates' positions so sorted."""
    dtype = torch.promote_types(queries_BD.dtype, torch.float32)
    scores_BX = queries_BD.to(dtype) @ table_XD[candidate_ids_X].to(dtype).T
    if seen is not None:
        offsets, seen_ids_S = seen
        row_S = torch.arange(len(queries_BD), device=offsets.device).repeat_interleave(offsets.diff())
        position_S, found_S = find_sorted(candidate_ids_X, seen_ids_S)
        scores_BX[row_S[found_S], position_S[found_S]] = float("-inf")
    sorted_BX, order_BX = scores_BX.sort(dim=1, descending=True, stable=True)
    return sorted_BX, order_BX


def rank_of_target(
    queries_BD: torch.Tensor,
    table_XD: torch.Tensor,
    candidate_ids_X: torch.Tensor,
    target_ids_B: torch.Tensor,
    seen: Seen,
) -> torch.Tensor:
    sorted_BX, order_BX = _order(queries_BD, table_XD, candidate_ids_X, seen)
    hit_BX = (candidate_ids_X[order_BX] == target_ids_B[:, None]) & (sorted_BX > float("-inf"))
    ranks_X = torch.arange(1, len(candidate_ids_X) + 1, device=hit_BX.device)
    return (hit_BX * ranks_X).sum(dim=1)


def topk(
    queries_BD: torch.Tensor, table_XD: torch.Tensor, candidate_ids_X: torch.Tensor, k: int, seen: Seen
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sorted_BX, order_BX = _order(queries_BD, table_XD, candidate_ids_X, seen)
    kept = min(k, len(candidate_ids_X))
    scores_BK = sorted_BX.new_full((len(queries_BD), k), float("-inf"))
    ids_BK = candidate_ids_X.new_zeros(len(queries_BD), k)
    scores_BK[:, :kept] = sorted_BX[:, :kept]
    ids_BK[:, :kept] = candidate_ids_X[order_BX[:, :kept]]
    valid_BK = scores_BK > float("-inf")
    return scores_BK, torch.where(valid_BK, ids_BK, 0), valid_BK.sum(dim=1)
