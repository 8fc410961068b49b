"""Refusals that everything ranking candidates shares. Values are looked at where that does not hold up a device.

A GPU is waited for once a catalogue, see `ops.rows.extent`. There scores may be NaN or infinite: what `rank_of_target`
says of them holds. Under `torch.compile` no value is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rows import extent
from ops.tracing import check_offsets


def check_candidates(candidate_ids_X: Tensor, rows: int | None = None) -> None:
    """rows: of the table the ids index, None where they only name."""
    if candidate_ids_X.dtype != torch.int64 or candidate_ids_X.dim() != 1:
        got = f"{candidate_ids_X.dtype} {tuple(candidate_ids_X.shape)}"
        raise ValueError(f"rank candidate_ids: got {got}, expected int64 (X,)")
    if torch.compiler.is_compiling() or not candidate_ids_X.numel():
        return
    ids = extent(candidate_ids_X)
    if not ids.ascends or ids.smallest < 0 or (rows is not None and ids.largest >= rows):
        bound = "" if rows is None else f" in 0 to {rows - 1}"
        raise ValueError(f"rank candidate_ids: expected ascending unique ids{bound}; try torch.unique")


def check_targets(target_ids_B: Tensor, batch: int) -> None:
    if target_ids_B.shape != (batch,) or target_ids_B.dtype != torch.int64:
        got = f"{target_ids_B.dtype} {tuple(target_ids_B.shape)}"
        raise ValueError(f"rank targets: got {got}, expected int64 ({batch},)")


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"topk k: got {k}, expected at least 1")


def check_seen(seen_offsets: Tensor, seen_ids_S: Tensor, batch: int) -> None:
    if seen_offsets.shape != (batch + 1,):
        raise ValueError(f"rank seen_offsets: got {tuple(seen_offsets.shape)}, expected ({batch + 1},)")
    if seen_offsets.dtype != torch.int64 or seen_ids_S.dtype != torch.int64 or seen_ids_S.dim() != 1:
        got = f"{seen_offsets.dtype} and {seen_ids_S.dtype} {tuple(seen_ids_S.shape)}"
        raise ValueError(f"rank seen offsets and ids: got {got}, expected int64 (B + 1,) and (S,)")
    check_offsets("rank seen_offsets", seen_offsets, seen_ids_S.numel())


def check_products(queries_BD: Tensor, table_VD: Tensor) -> None:
    """By Cauchy-Schwarz no score, nor any partial sum of one, can be NaN or infinite within this bound."""
    if torch.compiler.is_compiling() or queries_BD.is_cuda:
        return
    largest = [_largest_magnitude(queries_BD), _largest_magnitude(table_VD)]
    if not largest[0] * largest[1] * queries_BD.shape[1] < torch.finfo(torch.float32).max:
        raise ValueError(
            f"rank scores: got queries up to {largest[0]} and table rows up to {largest[1]}, expected finite products; "
            "try a lower learning rate"
        )


def check_scores(scores: Tensor) -> None:
    """The same for scores that no bound foretells."""
    if not scores.is_cuda and not bool(scores.isfinite().all()):
        raise ValueError("rank scores: got NaN or infinite ones, expected finite; try a lower learning rate")


def _largest_magnitude(x: Tensor) -> float:
    """NaN where there is one; without a copy of x."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))
