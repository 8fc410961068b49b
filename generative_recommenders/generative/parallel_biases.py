"""Position biases of Parallel TIGER: one table by distance between items, one by distance within the ID.

    bias(q, k) = item_table[bucket(item(q), item(k))] + codebook_table[place(k) - place(q) + n - 1]

An encoder token t of a history is code t mod n of item t // n; the decoder's n queries are the codes of one item, the
next. After the public code of Parallel TIGER. Differences: histories are laid out newest item first, so that in
cross-attention the distance is how long ago an item was, whatever the history's length; there all buckets lie on that
side, since the next item has nothing after it.

A table that adds one number to all keys of a query changes no softmax, so it is not built: distance of items among the
queries, which belong to one item, and distance within the ID where the encoder has one token an item.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.generative.t5_attention import PositionBias, RelativePositionBias


class HistoryItemBias(PositionBias):
    """Between tokens of a history: T5's buckets of the distance of their items, `tokens` a token's item has."""

    def __init__(self, buckets: RelativePositionBias, tokens: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.tokens = tokens

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        bias_HQS: Tensor = self.buckets(query_positions // self.tokens, key_positions // self.tokens)
        return bias_HQS


class RecencyBias(PositionBias):
    """From the next item to tokens of a history: T5's buckets of how many items ago, 1 is the newest.

    `buckets` must be one-sided.
    """

    def __init__(self, buckets: RelativePositionBias, tokens: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.tokens = tokens

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        ago_S = key_positions // self.tokens + 1
        bias_HQS: Tensor = self.buckets(torch.zeros_like(query_positions), -ago_S)
        return bias_HQS


class CodebookBias(PositionBias):
    """By distance within the ID: table (2n - 1, H), row n - 1 + place of the key - place of the query."""

    def __init__(self, heads: int, levels: int, *, std: float) -> None:
        super().__init__()
        self.levels = levels
        self.table = nn.Parameter(torch.empty(2 * levels - 1, heads).normal_(std=std))

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        places_QS = key_positions % self.levels - query_positions[:, None] % self.levels
        return F.embedding(places_QS + self.levels - 1, self.table).permute(2, 0, 1)


class SummedBias(PositionBias):
    """The sum of several biases of the same shape."""

    def __init__(self, parts: Iterable[PositionBias]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return torch.stack([part(query_positions, key_positions) for part in self.parts]).sum(0)


def summed(*parts: PositionBias | None) -> PositionBias | None:
    """The sum of those parts that there are, None for none at all."""
    present = [part for part in parts if part is not None]
    return SummedBias(present) if present else None
