"""Dot-product similarity, and what any similarity offers.

A similarity scores query states against item embeddings. `DotProduct` marks the case in which scoring is a matrix
product, for which losses and top-k have fused ops; every other similarity goes through `forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

AuxiliaryLosses = dict[str, Tensor]


class DotProduct(nn.Module):
    """Score = <query, item>."""

    def forward(self, queries_TD: Tensor, items: Tensor) -> tuple[Tensor, AuxiliaryLosses]:
        """Scores (T, X) of items (X, D) shared by all queries, (T, R) of items (T, R, D); no auxiliary loss."""
        if items.dim() == 2:
            return queries_TD @ items.T, {}
        return torch.einsum("td,trd->tr", queries_TD, items), {}


SIMILARITIES: dict[str, type[nn.Module]] = {"DotProduct": DotProduct}
