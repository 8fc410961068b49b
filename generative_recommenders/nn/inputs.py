"""From item ids to the encoder's input (Actions Speak Louder than Words, public code).

x = Dropout(e * sqrt(D) + P[position]); positions count from the oldest event in the window, P has
max_sequence_length + gr_output_length + 1 rows. There is no padding here, hence no mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.nn.dropout import Draws, KeyedDropout
from generative_recommenders.nn.embeddings import ItemEmbedding
from ops.position_embedding import position_embedding


class PositionalInput(nn.Module):
    """Scaled item embedding plus a learned absolute position."""

    def __init__(self, num_positions: int, dim: int, dropout_rate: float, stream: int) -> None:
        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(num_positions, dim))
        self.dropout = KeyedDropout(dropout_rate, stream)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.position_embedding.shape[1] ** -0.5
        nn.init.trunc_normal_(self.position_embedding, std=std, a=-2 * std, b=2 * std)

    def forward(self, batch: SequenceBatch, items: ItemEmbedding, draws: Draws | None) -> Tensor:
        """x_TD for every event of the batch."""
        embeddings_TD = items.lookup(batch.item_ids_T)
        x_TD = position_embedding(
            embeddings_TD, batch.offsets, self.position_embedding, alpha=math.sqrt(items.dim), count_from="oldest"
        )
        return self.dropout(x_TD, draws)
