"""Rank and top-k over blocks of queries, in PyTorch calls that are each one pass over the block; any device.

A block holds whole score rows, so the target's score and its rivals' come from one matrix product. Time is the product
plus about four passes over memory; the block is sized for the cache, and for 2^26 scores at the very most. Whatever
yields blocks of scores can be ranked: `rank_in_blocks`, `topk_in_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops.rank.reference import Seen
from ops.rows import compute_dtype, find_sorted, select_rows

# 8 MB of float32 scores stay in the last-level cache of a laptop ...
_CACHE_SCORES = 1 << 21
# ... but a product of few rows runs at memory speed, so wide catalogues take 32 rows and up to 256 MB.
_MIN_ROWS = 32
_MAX_SCORES = 1 << 26
# float32 counts 0/1 exactly up to here.
_EXACT_FLOAT = 1 << 24

# Rows of the batch, and their scores in a buffer that is free to be overwritten.
Block = tuple[slice, Tensor]


def refuses(*_: Any) -> str | None:
    return None


def block_rows(candidates: int, device: torch.device) -> int:
    """Whole rows of scores a block should have."""
    if device.type != "cpu":
        return max(_MAX_SCORES // max(candidates, 1), 1)
    wanted = max(_CACHE_SCORES // max(candidates, 1), _MIN_ROWS)
    return max(min(wanted, _MAX_SCORES // max(candidates, 1)), 1)


def _products(queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor) -> Iterator[Block]:
    dtype = compute_dtype(queries_BD)
    rows_XD = select_rows(table_XD, candidate_ids_X).to(dtype)
    step = block_rows(len(candidate_ids_X), queries_BD.device)
    buffer = torch.empty(min(step, len(queries_BD)), len(candidate_ids_X), dtype=dtype, device=queries_BD.device)
    for start in range(0, len(queries_BD), step):
        block_bD = queries_BD[start : start + step].to(dtype)
        scores_bX = torch.mm(block_bD, rows_XD.T, out=buffer[: len(block_bD)])
        yield slice(start, start + len(block_bD)), scores_bX


class _SeenPositions:
    """The seen candidates of all rows, found once for all blocks."""

    def __init__(self, candidate_ids_X: Tensor, seen: Seen) -> None:
        self.offsets: Tensor | None = None
        if seen is not None:
            self.offsets, seen_ids_S = seen
            self.ends = self.offsets.tolist()
            self.position_S, self.found_S = find_sorted(candidate_ids_X, seen_ids_S)

    def hide(self, scores_bX: Tensor, rows: slice) -> None:
        """Scatter -inf to the block's seen candidates."""
        if self.offsets is None:
            return
        offsets_b = self.offsets[rows.start : rows.stop + 1]
        own = slice(self.ends[rows.start], self.ends[rows.stop])
        row_s = torch.arange(len(scores_bX), device=offsets_b.device).repeat_interleave(offsets_b.diff())
        flat_s = (row_s * scores_bX.shape[1] + self.position_S[own])[self.found_S[own]]
        scores_bX.view(-1)[flat_s] = float("-inf")


def _row_counts(flags_bX: Tensor) -> Tensor:
    dtype = None if flags_bX.shape[1] <= _EXACT_FLOAT else torch.float64
    return flags_bX.sum(dim=1, dtype=dtype).long()


def rank_of_target(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: Seen
) -> Tensor:
    return rank_in_blocks(_products(queries_BD, table_XD, candidate_ids_X), candidate_ids_X, target_ids_B, seen)


def rank_in_blocks(blocks: Iterable[Block], candidate_ids_X: Tensor, target_ids_B: Tensor, seen: Seen) -> Tensor:
    """Ranks (B,) from blocks of scores, which are overwritten."""
    ranks_B = torch.zeros_like(target_ids_B)
    if len(candidate_ids_X) == 0:
        return ranks_B
    position_B, known_B = find_sorted(candidate_ids_X, target_ids_B)
    seen_positions = _SeenPositions(candidate_ids_X, seen)
    flags = None
    for rows, scores_bX in blocks:
        seen_positions.hide(scores_bX, rows)
        position_b1 = position_B[rows, None]
        target_b1 = scores_bX.gather(1, position_b1)
        # A target hidden by its history stays a miss; elsewhere scores are finite, so -inf marks nothing else.
        hit_b = known_B[rows] & (target_b1[:, 0] > float("-inf"))
        # Kept as numbers: sums of floats are several times faster than those of booleans.
        flags = scores_bX.new_empty(scores_bX.shape) if flags is None else flags[: len(scores_bX)]
        torch.ge(scores_bX, target_b1, out=flags)
        at_least_b = _row_counts(flags)
        above_b = _row_counts(torch.gt(scores_bX, target_b1, out=flags))
        # The target itself is the one equal score of nearly every row; only the others need to know the order.
        tied = torch.nonzero(hit_b & (at_least_b - above_b > 1))[:, 0]
        if len(tied):
            before_tX = torch.arange(scores_bX.shape[1], device=scores_bX.device) < position_b1[tied]
            above_b[tied] += ((scores_bX[tied] == target_b1[tied]) & before_tX).sum(dim=1)
        ranks_B[rows] = torch.where(hit_b, above_b + 1, 0)
    return ranks_B


def topk(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, k: int, seen: Seen
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(queries_BD)
    blocks = _products(queries_BD, table_XD, candidate_ids_X)
    return topk_in_blocks(blocks, candidate_ids_X, k, seen, len(queries_BD), dtype)


def topk_in_blocks(
    blocks: Iterable[Block], candidate_ids_X: Tensor, k: int, seen: Seen, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and ids (B, k) and valid_count (B,) from blocks of scores, which are overwritten."""
    scores_BK = torch.full((batch, k), float("-inf"), dtype=dtype, device=candidate_ids_X.device)
    ids_BK = candidate_ids_X.new_zeros(batch, k)
    kept = min(k, len(candidate_ids_X))
    if kept:
        seen_positions = _SeenPositions(candidate_ids_X, seen)
        for rows, scores_bX in blocks:
            seen_positions.hide(scores_bX, rows)
            best_bK, position_bK = _stable_topk(scores_bX, kept)
            scores_BK[rows, :kept] = best_bK
            ids_BK[rows, :kept] = candidate_ids_X[position_bK]
    valid_BK = scores_BK > float("-inf")
    return scores_BK, torch.where(valid_BK, ids_BK, 0), valid_BK.sum(dim=1)


def _stable_topk(scores_bX: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk with equal scores by position, which it does not promise.

    Only the k-th value can be shared with positions outside the result; one more than k shows whether it is.
    """
    more = min(k + 1, scores_bX.shape[1])
    best_bM, position_bM = scores_bX.topk(more, dim=1)
    position_bK, by_position = position_bM[:, :k].sort(dim=1)
    best_bK, order = best_bM[:, :k].gather(1, by_position).sort(dim=1, descending=True, stable=True)
    position_bK = position_bK.gather(1, order)
    if more > k:
        shared = torch.nonzero((best_bM[:, k - 1] == best_bM[:, k]) & (best_bM[:, k] > float("-inf")))[:, 0]
        if len(shared):
            all_best, all_positions = scores_bX[shared].sort(dim=1, descending=True, stable=True)
            best_bK[shared], position_bK[shared] = all_best[:, :k], all_positions[:, :k]
    return best_bK, position_bK
