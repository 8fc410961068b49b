"""What a training objective gets and returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenLosses:
    """Unreduced losses and weights of T tokens, and scalar auxiliary losses by name.

    The objective's value is sum(losses * weights) / sum(weights), both sums over the global batch.
    """

    losses_T: Tensor
    weights_T: Tensor
    auxiliary: dict[str, Tensor]


class Temperature(nn.Module):
    """What logits are divided by: `start`, or with `learned` start * exp(c) of a parameter c that begins at 0."""

    def __init__(self, start: float, learned: bool = False) -> None:
        super().__init__()
        self.start = start
        self.log_change = nn.Parameter(torch.zeros(())) if learned else None

    def corrected(self, values: Tensor) -> Tensor:
        """Logits, or queries that a dot product makes logits of, as they are to be divided by `start`."""
        return values if self.log_change is None else values * (-self.log_change).exp()

    def reported(self) -> dict[str, Tensor]:
        """The temperature by its name among the scalars of a step; nothing where it is a constant."""
        return {} if self.log_change is None else {"temperature": self.start * self.log_change.detach().exp()}


class Objective(nn.Module):
    """A module `(queries, positives_T, table_VD, similarity, draws) -> TokenLosses`.

    `queries` are the similarity's features of T post-processed states, `positives_T` the ids they should rank first,
    `table_VD` the raw item table. One of this class alone has the parameters, and no loss: it serves inference.
    """

    def __init__(self, temperature: float = 1.0, learned_temperature: bool = False) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, learned_temperature)
