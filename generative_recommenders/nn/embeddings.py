"""Item vectors: what a model asks of them, and a table of learned ones.

This file is the seam for sharded tables and for vectors that are computed: once a step a model asks its items for the
vectors `at` that step, and then for `lookup(ids)` and, where it scores the catalogue, for `table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.nn.dropout import Draws


class ItemVectors(Protocol):
    """A vector for every id up to the largest; that of id 0 is padding."""

    @property
    def dim(self) -> int: ...

    @property
    def table(self) -> Tensor:
        """(V, D), row = item id."""

    def lookup(self, ids: Tensor) -> Tensor:
        """Vectors of int64 ids of any shape: (…, D)."""


@dataclass(frozen=True)
class ComputedVectors:
    """The vectors of one step."""

    table: Tensor

    @property
    def dim(self) -> int:
        return self.table.shape[1]

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table, padding_idx=0)


class ItemEmbedding(nn.Module):
    """One local table of `max_item_id + 1` rows; row 0 is padding and never trained.

    Rows start from a normal of standard deviation 0.02 truncated at two deviations, as in the published code.
    """

    def __init__(self, max_item_id: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_item_id + 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)

    @property
    def dim(self) -> int:
        return self.table.shape[1]

    def at(self, draws: Draws | None) -> ItemVectors:
        """The vectors of a step: always the table itself."""
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        """Embeddings of int64 ids of any shape: (…, D)."""
        return F.embedding(ids, self.table, padding_idx=0)
