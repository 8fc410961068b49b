"""Item embedding tables.

This file is the seam for sharded tables: a model asks for `lookup(ids)` and, where it scores the catalogue, for
`table`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def lookup(self, ids: Tensor) -> Tensor:
        """Embeddings of int64 ids of any shape: (…, D)."""
        return F.embedding(ids, self.table, padding_idx=0)
