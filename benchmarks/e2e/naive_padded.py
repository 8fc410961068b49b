"""A deliberately naive training step of the published HSTU, for comparison only.

Everything is padded to N = max_sequence_length + gr_output_length + 1: N x N scores and bias are materialized in
every layer, negatives are gathered into a (tokens, R, D) tensor, and evaluation sorts the top 2,500 + N candidates of
every user. The mathematics is that of the published code; it takes its parameters from our model, so both steps start
alike.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.encoders.hstu import HSTU
from generative_recommenders.retrieval.config import RetrievalConfig
from generative_recommenders.retrieval.model import RetrievalModel

_MAX_K = 2500


def padded(values_T: Tensor, batch: SequenceBatch, length: int, last: Tensor | None = None) -> Tensor:
    """Rows of a batch right-padded with zeros to `length`; `last` (B,) is written after each row's end."""
    out = values_T.new_zeros(batch.size, length)
    out[torch.arange(length, device=out.device) < batch.lengths_B[:, None]] = values_T
    if last is not None:
        out[torch.arange(batch.size, device=out.device), batch.lengths_B] = last.to(out.dtype)
    return out


class NaivePadded:
    """Forward, loss and ranks of a `RetrievalModel` with an HSTU encoder, the slow way."""

    def __init__(self, model: RetrievalModel, config: RetrievalConfig) -> None:
        assert isinstance(model.encoder, HSTU)
        self.model, self.config, self.encoder = model, config, model.encoder
        self.length = config.num_positions

    def states(self, batch: SequenceBatch, training: bool) -> Tensor:
        """Post-processed states, (B, N, D)."""
        n, dim = self.length, self.config.item_embedding_dim
        ids = padded(batch.item_ids_T, batch, n, batch.target_ids_B if training else None)
        times = padded(batch.timestamps_T, batch, n, batch.target_timestamps_B)
        place = torch.arange(n, device=ids.device)
        valid = (place < batch.lengths_B[:, None])[..., None]
        table, positions = self.model.items.table, self.encoder.input.position_embedding
        x = F.embedding(ids, table) * math.sqrt(dim) + positions[None, :n]
        x = F.dropout(x, self.config.dropout_rate, training) * valid
        relative = n - 1 + place[None, :] - place[:, None]
        following = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
        elapsed = (following[:, :, None] - times[:, None, :]).abs().clamp(min=1)
        buckets = (elapsed.float().log() / 0.301).long().clamp(0, 128)
        causal = table.new_ones(n, n).tril()
        for layer in self.encoder.layers:
            c = layer.config
            h = c.num_heads
            u, v, q, k = F.silu(F.layer_norm(x, (dim,), eps=1e-6) @ layer.uvqk).split(
                [h * c.dv, h * c.dv, h * c.dqk, h * c.dqk], dim=-1
            )
            q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in (q, k, v))
            bias = layer.bias.position_weights[relative] + layer.bias.time_weights[buckets]
            weights = F.silu(q @ k.transpose(-1, -2) + bias[:, None]) / n * causal
            y = F.layer_norm((weights @ v).transpose(1, 2).flatten(2), (h * c.dv,), eps=1e-6)
            x = x + layer.output(F.dropout(u * y, c.linear_dropout_rate, training))
            x = x * valid
        return self.model.output(x)

    def loss(self, batch: SequenceBatch) -> Tensor:
        """Sampled softmax over gathered negatives, all materialized."""
        states = self.states(batch, training=True)
        queries = states[torch.arange(self.length, device=states.device) < batch.lengths_B[:, None]]
        catalog, table = self.model.catalog_X, self.model.items.table
        drawn = (queries.shape[0], self.config.num_negatives)
        negatives = catalog[torch.randint(0, catalog.numel(), drawn, device=catalog.device)]
        positive = F.normalize(F.embedding(batch.next_item_ids_T, table), dim=-1, eps=1e-6)
        negative = F.normalize(F.embedding(negatives, table), dim=-1, eps=1e-6)
        positive_logits = (queries * positive).sum(-1, keepdim=True)
        negative_logits = torch.einsum("td,trd->tr", queries, negative)
        collides = negatives == batch.next_item_ids_T[:, None]
        logits = torch.cat([positive_logits, negative_logits], dim=1) / self.config.temperature
        logits = logits.masked_fill(F.pad(collides, (1, 0)), -5e4)
        return -logits.log_softmax(dim=1)[:, 0].mean()

    @torch.no_grad()
    def ranks(self, batch: SequenceBatch) -> Tensor:
        """Ranks of the targets from a sorted candidate list, (B,); a miss is 2,501."""
        rows = torch.arange(batch.size, device=batch.lengths_B.device)
        queries = self.states(batch, training=False)[rows, batch.lengths_B - 1]
        catalog = self.model.catalog_X
        items = F.normalize(self.model.items.table[catalog], dim=-1, eps=1e-6)
        k = min(_MAX_K + self.length, catalog.numel())
        found = catalog[(queries @ items.T).topk(k).indices]
        seen = padded(batch.item_ids_T, batch, self.length)
        keep = ~(found[:, :, None] == seen[:, None, :]).any(-1)
        order = torch.where(keep, keep.cumsum(1), _MAX_K + 1)
        hit = (found == batch.target_ids_B[:, None]) & keep
        return torch.where(hit, order, _MAX_K + 1).min(dim=1).values.clamp(max=_MAX_K + 1)
