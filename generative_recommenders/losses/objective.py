"""What a training objective gets and returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class TokenLosses:
    """Unreduced losses and weights of T tokens, and scalar auxiliary losses by name.

    The objective's value is sum(losses * weights) / sum(weights), both sums over the global batch.
    """

    losses_T: Tensor
    weights_T: Tensor
    auxiliary: dict[str, Tensor]


class Objective(nn.Module):
    """A module `(queries, positives_T, table_VD, similarity, draws) -> TokenLosses`.

    `queries` are the similarity's features of T post-processed states, `positives_T` the ids they should rank first,
    `table_VD` the raw item table.
    """
