"""Exact top-k under Mixture of Logits: the fused op scores every candidate, the item side is projected once."""

from __future__ import annotations

import torch
from torch import Tensor

from generative_recommenders.indexing.exact import seen_of, slices
from ops.mol_score import MoLGate, MoLItems, MoLQueries, mol_rank_of_target, mol_topk


def query_rows(queries: MoLQueries, rows: slice) -> MoLQueries:
    return MoLQueries(queries.components[rows], None if queries.gate is None else queries.gate[rows])


def no_seen(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and ids of `count` empty histories."""
    offsets = torch.zeros(count + 1, dtype=torch.int64, device=device)
    return offsets, offsets[:0]


class MoLBruteForceTopK:
    """All candidates scored in blocks; `max_rows` bounds the queries scored at a time."""

    def __init__(
        self,
        items: MoLItems,
        gate: MoLGate,
        temperature: float,
        candidate_ids_X: Tensor,
        max_rows: int | None = None,
    ) -> None:
        self.items = items
        self.gate = gate
        self.temperature = temperature
        self.candidate_ids_X = candidate_ids_X
        self.max_rows = max_rows

    def __len__(self) -> int:
        return self.candidate_ids_X.numel()

    def index_bytes(self) -> int:
        """Memory that is held beside the items themselves."""
        return 0

    def __call__(
        self, queries: MoLQueries, k: int, seen_offsets: Tensor | None = None, seen_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        count = len(queries.components)
        if seen_offsets is None or seen_ids is None:
            seen_offsets, seen_ids = no_seen(count, queries.components.device)
        parts = [
            mol_topk(
                query_rows(queries, rows),
                self.items,
                self.gate,
                self.candidate_ids_X,
                k,
                *seen_of(rows, seen_offsets, seen_ids),
                temperature=self.temperature,
            )
            for rows in slices(count, self.max_rows)
        ]
        return torch.cat([scores for scores, _, _ in parts]), torch.cat([ids for _, ids, _ in parts])

    def rank_of_target(
        self, queries: MoLQueries, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, *, filter_history: bool
    ) -> Tensor:
        parts = [
            mol_rank_of_target(
                query_rows(queries, rows),
                self.items,
                self.gate,
                self.candidate_ids_X,
                targets_B[rows],
                *seen_of(rows, seen_offsets, seen_ids),
                temperature=self.temperature,
                filter_history=filter_history,
            )
            for rows in slices(len(queries.components), self.max_rows)
        ]
        return torch.cat(parts)
