"""Dropout whose mask is a function of (step, layer, user row, position, feature) and of nothing else.

The same token gets the same mask on whichever rank, in whichever batch layout and on whichever device it is computed,
so a run on two ranks equals one rank with the doubled batch, and a resumed run needs no generator state.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from ops.dropout import dropout
from ops.random import fold

# Positions of one row lie below this, so (row, position) is one 64-bit key.
_MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class Draws:
    """What random choices of a training step are keyed by: the step's seed and a key for each token, (T,)."""

    seed: int
    keys_T: Tensor

    @classmethod
    def of(cls, batch: SequenceBatch, seed: int) -> Draws:
        return cls(seed, batch.row_numbers_B[batch.rows_T()] * _MAX_POSITIONS + batch.positions_T())

    @classmethod
    def of_users(cls, batch: SequenceBatch, seed: int) -> Draws:
        """One key a row, (B,), by user and length instead of the row's place in the global batch."""
        return cls(seed, batch.user_ids_B * _MAX_POSITIONS + batch.lengths_B)

    def stream(self, name: int) -> int:
        """A seed for one consumer; consumers with different numbers draw independently."""
        return fold(self.seed, name)


class KeyedDropout(nn.Module):
    """Dropout of x_TD with probability `rate`; `stream` tells the dropouts of one model apart."""

    def __init__(self, rate: float, stream: int) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate: got {rate}, expected 0 <= rate < 1")
        self.rate = rate
        self.stream = stream

    def forward(self, x_TD: Tensor, draws: Draws | None) -> Tensor:
        """Draws None means no randomness is wanted: evaluation, or a model run by hand."""
        if not self.training or self.rate == 0.0 or draws is None:
            return x_TD
        return dropout(x_TD, self.rate, draws.stream(self.stream), draws.keys_T)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, stream={self.stream}"
