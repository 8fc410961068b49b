"""Dot-product similarity, and what any similarity offers.

A similarity projects queries and items, each side once, and scores pairs of what comes out. `DotProduct` marks the case
in which scoring is a matrix product, for which losses and top-k have fused ops; every other similarity goes through
these methods.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generative_recommenders.nn.dropout import Draws

AuxiliaryLosses = dict[str, Tensor]
Features = tuple[Tensor, ...]
"""A side of the similarity after its projection: tensors whose first dimension is the query or the item."""


class Similarity(nn.Module):
    """The dot product in general form; a subclass overrides what differs."""

    def project_queries(
        self, queries_TD: Tensor, user_ids_T: Tensor, draws: Draws | None
    ) -> tuple[Features, AuxiliaryLosses]:
        """Features of T queries and, in training, the auxiliary losses that depend on queries alone.

        Auxiliary losses are those of all ranks' queries, with gradients as `global_sum` gives them. draws None is
        evaluation.
        """
        return (queries_TD,), {}

    def project_items(self, items_XD: Tensor, item_ids_X: Tensor, draws: Draws | None) -> Features:
        """Features of X items; what is random about an item is keyed by its id, one draw a step."""
        return (items_XD,)

    def score(self, queries: Features, items: Features, draws: Draws | None) -> Tensor:
        """Scores (T, X) of items that all queries share, or (T, R) of each query's own: features (T, R, ...)."""
        (queries_TD,), (embeddings,) = queries, items
        if embeddings.dim() == 2:
            return queries_TD @ embeddings.T
        return torch.einsum("td,trd->tr", queries_TD, embeddings)

    def pair_losses(self, queries: Features, positives: Features, draws: Draws | None) -> AuxiliaryLosses:
        """In training, the auxiliary losses of the pairs of each query with its positive, features (T, 1, ...)."""
        return {}


class DotProduct(Similarity):
    """Score = <query, item>."""


SIMILARITIES = ("DotProduct", "MoL")
