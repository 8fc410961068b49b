"""Exact top-k over the catalogue and exact ranks of targets."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ops.rank import rank_of_target, topk


class TopK(Protocol):
    """What every top-k module offers, exact or approximate."""

    def __len__(self) -> int:
        """Number of candidates."""

    def __call__(
        self, queries_BD: Tensor, k: int, seen_offsets: Tensor | None = None, seen_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids (B, k), best first; ids are 0 where fewer than k candidates are left."""

    def rank_of_target(
        self, queries_BD: Tensor, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, *, filter_history: bool
    ) -> Tensor:
        """1-based ranks (B,) among the candidates not seen, 0 for a target that is seen or no candidate."""


class MIPSBruteForceTopK:
    """Maximum inner product over all candidates, streamed in blocks."""

    def __init__(self, table_VD: Tensor, candidate_ids_X: Tensor, max_rows: int | None = None) -> None:
        self.table_VD = table_VD
        self.candidate_ids_X = candidate_ids_X
        self.max_rows = max_rows

    def __len__(self) -> int:
        return self.candidate_ids_X.numel()

    def __call__(
        self, queries_BD: Tensor, k: int, seen_offsets: Tensor | None = None, seen_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores, ids, _ = topk(queries_BD, self.table_VD, self.candidate_ids_X, k, seen_offsets, seen_ids)
        return scores, ids

    def rank_of_target(
        self, queries_BD: Tensor, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, *, filter_history: bool
    ) -> Tensor:
        return rank_of_target(
            queries_BD,
            self.table_VD,
            self.candidate_ids_X,
            targets_B,
            seen_offsets,
            seen_ids,
            filter_history=filter_history,
        )


TOP_K_METHODS = {"MIPSBruteForceTopK": MIPSBruteForceTopK}
