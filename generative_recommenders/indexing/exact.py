"""Exact top-k over the catalogue and exact ranks of targets."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ops.rank import rank_of_target, topk

Queries = TypeVar("Queries", contravariant=True)


class TopK(Protocol[Queries]):
    """What every top-k module offers, exact or approximate.

    Queries are the similarity's: (B, D) for the dot product, `MoLQueries` for Mixture of Logits.
    """

    def __len__(self) -> int:
        """Number of candidates."""

    def __call__(
        self, queries: Queries, k: int, seen_offsets: Tensor | None = None, seen_ids: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids (B, k), best first; ids are 0 where fewer than k candidates are left."""

    def rank_of_target(
        self, queries: Queries, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, /, *, filter_history: bool
    ) -> Tensor:
        """1-based ranks (B,) among the candidates not seen, 0 for a target that is seen or no candidate."""


class MIPSBruteForceTopK:
    """Maximum inner product over all candidates, streamed in blocks; `max_rows` bounds the queries scored at a time."""

    def __init__(self, table_VD: Tensor, candidate_ids_X: Tensor, max_rows: int | None = None) -> None:
        self.table_VD = table_VD
        self.candidate_ids_X = candidate_ids_X
        self.max_rows = max_rows

    def __len__(self) -> int:
        return self.candidate_ids_X.numel()

    def __call__(
        self, queries_BD: Tensor, k: int, seen_offsets: Tensor | None = None, seen_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if seen_offsets is None or seen_ids is None:
            seen_offsets = torch.zeros(queries_BD.shape[0] + 1, dtype=torch.int64, device=queries_BD.device)
            seen_ids = seen_offsets[:0]
        parts = [
            topk(queries_BD[rows], self.table_VD, self.candidate_ids_X, k, *seen_of(rows, seen_offsets, seen_ids))
            for rows in slices(queries_BD.shape[0], self.max_rows)
        ]
        return torch.cat([scores for scores, _, _ in parts]), torch.cat([ids for _, ids, _ in parts])

    def rank_of_target(
        self, queries_BD: Tensor, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, *, filter_history: bool
    ) -> Tensor:
        parts = [
            rank_of_target(
                queries_BD[rows],
                self.table_VD,
                self.candidate_ids_X,
                targets_B[rows],
                *seen_of(rows, seen_offsets, seen_ids),
                filter_history=filter_history,
            )
            for rows in slices(queries_BD.shape[0], self.max_rows)
        ]
        return torch.cat(parts)


def slices(rows: int, max_rows: int | None) -> list[slice]:
    """`rows` in pieces of at most `max_rows`, one empty piece for none."""
    step = max_rows or max(rows, 1)
    return [slice(first, min(first + step, rows)) for first in range(0, max(rows, 1), step)]


def seen_of(rows: slice, offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The jagged seen lists of a slice of the rows."""
    if rows.start == 0 and rows.stop == offsets.numel() - 1:
        return offsets, ids
    own = offsets[rows.start : rows.stop + 1]
    return own - own[0], ids[int(own[0]) : int(own[-1])]
