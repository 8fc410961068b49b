"""From events to the encoder's input (Actions Speak Louder than Words, public code and a published fork of it).

    item          x = Dropout(e sqrt(D) + P[position])                          one token an event
    rated         x = Dropout(W [e ; r] sqrt(D) + P[position])                  one token an event
    interleaved   x = Dropout([e, r] sqrt(D) + P[position])                     two tokens an event, item then rating

e embeds the item, r the event's rating cut to an integer (or the code of its type); positions count from the oldest
event in the window and P has max_sequence_length + gr_output_length + 1 rows, twice that where interleaved. There is no
padding here, hence no mask. Differences: published rated input is D + Dr wide and fits no encoder until the fork's
W (D + Dr -> D); where tokens are interleaved, the item's token predicts nothing and the rating's token the next item,
since both are given for every event of a history; further columns of an event are embedded and mixed in as r is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.nn.dropout import Draws, KeyedDropout
from generative_recommenders.nn.embeddings import ItemVectors
from ops.position_embedding import position_embedding

InputFeatures = Literal["item", "rated", "interleaved"]


class ItemFeatures(nn.Module):
    """The item's embedding alone."""

    tokens_per_event = 1

    def forward(self, batch: SequenceBatch, items: ItemVectors) -> Tensor:
        """Unscaled features of every token, (T, D)."""
        return items.lookup(batch.item_ids_T)


class RatedFeatures(nn.Module):
    """W [item ; rating ; further columns of the event, by name] + b.

    Ratings lie in [0, num_ratings), None leaves them out; a column's values in [0, event_columns[name]).
    """

    tokens_per_event = 1

    def __init__(
        self, num_ratings: int | None, rating_dim: int, dim: int, event_columns: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.rating_embedding = None if num_ratings is None else _rating_embedding(num_ratings, rating_dim)
        # Sorted: a configuration that is written and read again may list them in another order.
        self.event_columns = sorted(event_columns or {})
        sizes = [(event_columns or {})[name] for name in self.event_columns]
        self.event_embeddings = nn.ModuleList(_rating_embedding(size, rating_dim) for size in sizes)
        columns = len(sizes) + (num_ratings is not None)
        self.mix = nn.Linear(dim + columns * rating_dim, dim)
        # Keeps the scale of the embeddings, of which the default's biases would be many times the size.
        nn.init.xavier_normal_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, batch: SequenceBatch, items: ItemVectors) -> Tensor:
        """Unscaled features of every token, (T, D)."""
        item_TD = items.lookup(batch.item_ids_T)
        parts = [item_TD]
        if self.rating_embedding is not None:
            parts.append(self.rating_embedding(batch.ratings_T.long()))
        for name, embedding in zip(self.event_columns, self.event_embeddings, strict=True):
            parts.append(embedding(batch.events[name]))
        mixed_TD: Tensor = self.mix(torch.cat(parts, dim=1))
        # Autocast narrows the product; positions are added at the width of the table.
        return mixed_TD.to(item_TD.dtype)


class InterleavedFeatures(nn.Module):
    """Item and rating in turn, both D wide, for a batch of `interleaved`."""

    tokens_per_event = 2

    def __init__(self, num_ratings: int, dim: int) -> None:
        super().__init__()
        self.rating_embedding = _rating_embedding(num_ratings, dim)

    def forward(self, batch: SequenceBatch, items: ItemVectors) -> Tensor:
        """Unscaled features of every token, (T, D)."""
        ratings = self.rating_embedding(batch.ratings_T[1::2].long())
        return torch.stack([items.lookup(batch.item_ids_T[::2]), ratings], dim=1).flatten(0, 1)


def _rating_embedding(num_ratings: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(num_ratings, dim)
    nn.init.trunc_normal_(embedding.weight, std=0.02, a=-0.04, b=0.04)
    return embedding


def interleaved(batch: SequenceBatch) -> SequenceBatch:
    """Two tokens an event, both at its time; what follows an item's token is its own rating."""
    return replace(
        batch,
        item_ids_T=batch.item_ids_T.repeat_interleave(2),
        ratings_T=batch.ratings_T.repeat_interleave(2),
        timestamps_T=batch.timestamps_T.repeat_interleave(2),
        next_item_ids_T=batch.next_item_ids_T.repeat_interleave(2),
        next_timestamps_T=torch.stack([batch.timestamps_T, batch.next_timestamps_T], dim=1).flatten(),
        offsets=batch.offsets * 2,
        events={name: column.repeat_interleave(2) for name, column in batch.events.items()},
    )


def build_features(
    kind: InputFeatures, num_ratings: int, rating_dim: int, dim: int, event_columns: Mapping[str, int] | None = None
) -> nn.Module:
    """The features of a binding's value; `interleaved` ratings are `dim` wide."""
    if kind == "rated" or (kind == "item" and event_columns):
        return RatedFeatures(num_ratings if kind == "rated" else None, rating_dim, dim, event_columns)
    return InterleavedFeatures(num_ratings, dim) if kind == "interleaved" else ItemFeatures()


class PositionalInput(nn.Module):
    """Scaled features (of items, unless others are given) plus a learned absolute position."""

    def __init__(
        self, num_positions: int, dim: int, dropout_rate: float, stream: int, features: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.features = features or ItemFeatures()
        self.position_embedding = nn.Parameter(torch.empty(num_positions, dim))
        self.dropout = KeyedDropout(dropout_rate, stream)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.position_embedding.shape[1] ** -0.5
        nn.init.trunc_normal_(self.position_embedding, std=std, a=-2 * std, b=2 * std)

    def tokens(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch as the encoder reads it: a row for each token, of which an event may have two."""
        return interleaved(batch) if self.features.tokens_per_event == 2 else batch

    def of_events(self, states_TD: Tensor) -> Tensor:
        """Of the states after every token those after whole events."""
        return states_TD[1::2] if self.features.tokens_per_event == 2 else states_TD

    def forward(self, batch: SequenceBatch, items: ItemVectors, draws: Draws | None) -> Tensor:
        """x_TD for every token of a batch of `tokens`."""
        x_TD = position_embedding(
            self.features(batch, items),
            batch.offsets,
            self.position_embedding,
            alpha=math.sqrt(items.dim),
            count_from="oldest",
        )
        return self.dropout(x_TD, draws)
