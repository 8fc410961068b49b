"""Causal layers that can also decode: the project's SASRec and HSTU layers, and a pre-norm softmax Transformer.

A layer works on jagged rows while training. To decode, the prefill keeps each layer's keys and values of the context,
shared by all beams of a request, and every step computes the beams' newest tokens alone: their queries see the context
and, through the ancestor index, the rows that earlier steps appended. Softmax layers merge both parts by log-sum-exp
(`beam_attention`); HSTU's pointwise attention is a sum over keys, so that its parts just add up, each with the bias of
its distance and elapsed time, and are divided by the constant n of the full row.

Letters: B requests, M beams, S tokens of the context (or, of jagged rows, all tokens), J steps stored, H heads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.encoders.hstu import HSTUConfig, HSTULayer
from generative_recommenders.encoders.sasrec import SASRecConfig, SASRecLayer
from generative_recommenders.generative.beam_attention import BeamKV, ContextGroup, ContextKV, beam_attention
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.nn.attention import RowGroups, causal_attention
from generative_recommenders.nn.dropout import Draws, KeyedDropout
from generative_recommenders.nn.relative_bias import NUM_TIME_BUCKETS
from ops.hstu_attention import time_bucket

# Streams of randomness within a layer; the input has stream 0.
_STREAMS_PER_LAYER = 4
# That of `encoders.sasrec`.
_SASREC_EPS = 1e-8


@dataclass(frozen=True)
class Seen:
    """What the beams' queries see in one layer.

    places: laid out as the context, int64: as keys how far a token is from the context's last one, as values the bucket
    of the time from it to the item to predict. beams: rows of earlier steps, to which a step appends its own; None for
    the context's own last token, which is part of it.
    """

    context: ContextKV
    places: ContextKV
    beams: BeamKV | None
    ancestors: Sequence[Tensor]


@dataclass
class Memory:
    """A prefill: state after the last token of each row (B, D), keys and values a layer, and what beams appended."""

    states_BD: Tensor
    places: ContextKV
    layers: tuple[ContextKV, ...]
    beams: tuple[BeamKV, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.beams = tuple(BeamKV() for _ in self.layers)

    def select(self, rows: Tensor) -> Memory:
        """That of the given requests, in that order, without rows of beams. All of them share what is there."""
        everyone = torch.arange(self.places.size, device=rows.device)
        if torch.equal(rows, everyone):
            return Memory(self.states_BD, self.places, self.layers)
        layers = tuple(layer.select(rows) for layer in self.layers)
        return Memory(self.states_BD[rows], self.places.select(rows), layers)

    def branch(self, rows: Tensor | None = None) -> Memory:
        """See `decoding.Context`."""
        found = Memory(self.states_BD, self.places, self.layers) if rows is None else self.select(rows)
        found.beams = tuple(stored.branch(rows) for stored in self.beams)
        return found


class SoftmaxDecoding(nn.Module, ABC):
    """Prefill and steps of a softmax layer that is given in three parts."""

    @abstractmethod
    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the residual adds to (…, D), and queries (…, H, K)."""

    @abstractmethod
    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (…, H, K) each."""

    @abstractmethod
    def finish(self, residual: Tensor, attended: Tensor, draws: Draws | None) -> Tensor:
        """Next states from the attended values (…, H * K)."""

    def prefill(
        self, x_SD: Tensor, rows: SequenceBatch, groups: RowGroups | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Next states, and keys and values, of all tokens."""
        assert groups is not None
        residual, query = self.queries(x_SD)
        key, value = self.keys_values(x_SD)
        attended = causal_attention(query, key, value, groups)
        return self.finish(residual, attended.flatten(1), None), (key, value)

    def step(self, x_BMD: Tensor, seen: Seen) -> Tensor:
        """Next states of the beams' newest tokens."""
        residual, query = self.queries(x_BMD)
        if seen.beams is not None:
            seen.beams.append(*self.keys_values(x_BMD))
        attended = beam_attention(query, seen.context, seen.beams or BeamKV(), seen.ancestors)
        return self.finish(residual, attended.flatten(2), None)


class TransformerLayer(SoftmaxDecoding):
    """x' = x + Dropout(W_o attention(LN(x))); out = x' + Dropout(W_2 Dropout(GELU(W_1 LN(x')))).

    No biases in the attention's matrices. Matrices start Xavier-normal, those that add to the residual divided by
    sqrt(2 num_blocks), which keeps its variance at the start.
    """

    def __init__(self, config: SIDGRConfig, first_stream: int) -> None:
        super().__init__()
        self.heads = config.num_heads
        width = config.num_heads * config.head_width
        self.attention_norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * width, bias=False)
        self.out = nn.Linear(width, config.dim, bias=False)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_hidden_dim)
        self.ffn_out = nn.Linear(config.ffn_hidden_dim, config.dim)
        self.attention_dropout = KeyedDropout(config.dropout_rate, first_stream)
        self.hidden_dropout = KeyedDropout(config.dropout_rate, first_stream + 1)
        self.output_dropout = KeyedDropout(config.dropout_rate, first_stream + 2)
        for linear in (self.qkv, self.out, self.ffn_in, self.ffn_out):
            nn.init.xavier_normal_(linear.weight)
        for linear in (self.ffn_in, self.ffn_out):
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for linear in (self.out, self.ffn_out):
                linear.weight.div_(math.sqrt(2 * config.num_blocks))

    def forward(self, x_SD: Tensor, rows: SequenceBatch, draws: Draws | None, groups: RowGroups) -> Tensor:
        """Next states (S, D)."""
        query, key, value = self._heads(self.qkv(self.attention_norm(x_SD)))
        return self.finish(x_SD, causal_attention(query, key, value, groups).flatten(1), draws)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self._heads(F.linear(self.attention_norm(x), self.qkv.weight[: self.out.in_features]), 1)[0]

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self._heads(F.linear(self.attention_norm(x), self.qkv.weight[self.out.in_features :]), 2)
        return key, value

    def finish(self, residual: Tensor, attended: Tensor, draws: Draws | None) -> Tensor:
        x = residual + self.attention_dropout(self.out(attended), draws)
        hidden = self.hidden_dropout(F.gelu(self.ffn_in(self.ffn_norm(x))), draws)
        finished: Tensor = x + self.output_dropout(self.ffn_out(hidden), draws)
        return finished

    def _heads(self, projected: Tensor, parts: int = 3) -> Sequence[Tensor]:
        return [part.unflatten(-1, (self.heads, -1)) for part in projected.chunk(parts, -1)]


class SASRecDecoderLayer(SoftmaxDecoding, SASRecLayer):
    """`SASRecLayer` and its parts: queries are normalized, keys and values are not, the residual is on the former."""

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dim = x.shape[-1]
        normed = F.layer_norm(x, (dim,), eps=_SASREC_EPS)
        query = F.linear(normed, self.in_proj.weight[:dim], self.in_proj.bias[:dim])
        return normed, query.unflatten(-1, (self.config.num_heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dim = x.shape[-1]
        both = F.linear(x, self.in_proj.weight[dim:], self.in_proj.bias[dim:])
        key, value = (part.unflatten(-1, (self.config.num_heads, -1)) for part in both.chunk(2, -1))
        return key, value

    def finish(self, residual: Tensor, attended: Tensor, draws: Draws | None) -> Tensor:
        z = F.layer_norm(residual + self.out_proj(attended), residual.shape[-1:], eps=_SASREC_EPS)
        hidden = self.hidden_dropout(self.activation(self.ffn_in(z)), draws)
        finished: Tensor = z + self.output_dropout(self.ffn_out(hidden), draws)
        return finished


class HSTUDecoderLayer(HSTULayer):
    """`HSTULayer`, and the same for beams: the sums over context and ancestors, each with its bias."""

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (S, H, K) and values (S, H, V)."""
        value, key = self._project(self._norm(x), "vk")
        return self._heads(key), self._heads(value)

    def prefill(
        self, x_SD: Tensor, rows: SequenceBatch, groups: RowGroups | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Next states, and keys and values, of all tokens."""
        u, v, q, k = self._project(self._norm(x_SD), "uvqk")
        attended = self._attend(q, k, v, rows, None)
        return self._output(x_SD, u, attended, None), (self._heads(k), self._heads(v))

    def step(self, x_BMD: Tensor, seen: Seen) -> Tensor:
        """Next states of the beams' newest tokens."""
        beams = x_BMD.shape[:2]
        x = x_BMD.flatten(0, 1)
        u, v, q, k = self._project(self._norm(x), "uvqk")
        query, key, value = (self._heads(part).unflatten(0, beams) for part in (q, k, v))
        if seen.beams is not None:
            seen.beams.append(key, value)
        sums_BMHV = self._context_sums(query, seen) + self._ancestor_sums(query, seen)
        attended = (sums_BMHV / self.num_positions).to(q.dtype)
        return self._output(x, u, attended.flatten(2).flatten(0, 1), None).unflatten(0, beams)

    def _context_sums(self, query_BMHK: Tensor, seen: Seen) -> Tensor:
        query_BHMK = query_BMHK.transpose(1, 2)
        width = self.config.dv
        sums_BHMV = torch.zeros(*query_BHMK.shape[:-1], width, device=query_BHMK.device)
        for group, places in zip(seen.context.groups, seen.places.groups, strict=True):
            # All beams of a request ask from the same place and time, so the bias has one row a request.
            bias = self._bias(places.key_bHKS + len(seen.ancestors), places.value_bHSK.transpose(-1, -2))
            logits = torch.matmul(query_BHMK[group.rows_b], group.key_bHKS).float() + bias
            weights = F.silu(logits).masked_fill(~group.valid_bS[:, None, None, :], 0.0)
            summed = torch.matmul(weights.to(group.value_bHSK.dtype), group.value_bHSK).float()
            sums_BHMV = sums_BHMV.index_copy(0, group.rows_b, summed)
        return sums_BHMV.transpose(1, 2)

    def _ancestor_sums(self, query_BMHK: Tensor, seen: Seen) -> Tensor:
        sums_BMHV = torch.zeros(*query_BMHK.shape[:-1], self.config.dv, device=query_BMHK.device)
        if seen.beams is None:
            return sums_BMHV
        query = query_BMHK.float()
        steps = list(zip(seen.beams.keys, seen.beams.values, seen.ancestors, strict=True))
        for back, (keys, values, index) in enumerate(reversed(steps)):
            index = index[..., None, None]
            key = keys.gather(1, index.expand(-1, -1, *keys.shape[2:])).float()
            value = values.gather(1, index.expand(-1, -1, *values.shape[2:])).float()
            # A beam's tokens are all of the item to predict: no time passes between them.
            logits = (query * key).sum(-1) + self._bias(back, 0)
            sums_BMHV = sums_BMHV + F.silu(logits)[..., None] * value
        return sums_BMHV

    def _bias(self, distance: Tensor | int, bucket: Tensor | int) -> Tensor:
        """Of a key so many tokens back, float32."""
        assert self.bias is not None
        return (self.bias.position_weights[self.num_positions - 1 - distance] + self.bias.time_weights[bucket]).float()


DecoderLayer = TransformerLayer | SASRecDecoderLayer | HSTUDecoderLayer


class DecoderStack(nn.Module):
    """`config.num_blocks` layers. `num_tokens`: the longest row, of context and one beam together."""

    def __init__(self, config: SIDGRConfig, num_tokens: int) -> None:
        super().__init__()
        self.needs_groups = config.backbone != "hstu"
        self.activation_checkpoint = config.activation_checkpoint
        self.layers = nn.ModuleList(
            _layer(config, num_tokens, _STREAMS_PER_LAYER * (i + 1)) for i in range(config.num_blocks)
        )

    def forward(self, x_SD: Tensor, rows: SequenceBatch, draws: Draws | None) -> Tensor:
        """States after every token, (S, D)."""
        groups = self._groups(rows)
        for layer in self.layers:
            if self.activation_checkpoint and self.training:
                x_SD = checkpoint(layer, x_SD, rows, draws, groups, use_reentrant=False)
            else:
                x_SD = layer(x_SD, rows, draws, groups)
        return x_SD

    def prefill(self, x_SD: Tensor, rows: SequenceBatch) -> Memory:
        """Keys and values of all tokens; of the last layer only the last token of each row is computed further."""
        groups, cells = self._groups(rows), _cells(rows)
        places = _arranged(cells, _distances(rows), _buckets(rows))
        contexts = []
        *earlier, final = self._decoders()
        for layer in earlier:
            x_SD, (key, value) = layer.prefill(x_SD, rows, groups)
            contexts.append(_arranged(cells, key, value))
        contexts.append(_arranged(cells, *final.keys_values(x_SD)))
        states_B1D = final.step(x_SD[rows.offsets[1:] - 1, None], Seen(contexts[-1], places, None, ()))
        return Memory(states_B1D[:, 0], places, tuple(contexts))

    def step(self, x_BMD: Tensor, memory: Memory, ancestors: Sequence[Tensor]) -> Tensor:
        """States after the beams' newest tokens, whose keys and values are appended to the memory."""
        for layer, context, beams in zip(self._decoders(), memory.layers, memory.beams, strict=True):
            x_BMD = layer.step(x_BMD, Seen(context, memory.places, beams, ancestors))
        return x_BMD

    def _decoders(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers))

    def _groups(self, rows: SequenceBatch) -> RowGroups | None:
        return RowGroups.of(rows.offsets) if self.needs_groups else None


def _layer(config: SIDGRConfig, num_tokens: int, first_stream: int) -> DecoderLayer:
    if config.backbone == "transformer":
        return TransformerLayer(config, first_stream)
    if config.backbone == "sasrec":
        sasrec = SASRecConfig(
            num_blocks=config.num_blocks,
            num_heads=config.num_heads,
            ffn_hidden_dim=config.ffn_hidden_dim,
            ffn_dropout_rate=config.dropout_rate,
        )
        return SASRecDecoderLayer(sasrec, config.dim, first_stream)
    hstu = HSTUConfig(
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        dqk=config.head_width,
        dv=config.head_width,
        linear_dropout_rate=config.dropout_rate,
    )
    return HSTUDecoderLayer(hstu, config.dim, num_tokens, first_stream)


def _distances(rows: SequenceBatch) -> Tensor:
    """Of each token to the last one of its row, (S, 1, 1)."""
    return (rows.lengths_B[rows.rows_T()] - 1 - rows.positions_T())[:, None, None]


def _buckets(rows: SequenceBatch) -> Tensor:
    """Of the time from each token to the item that its row is to predict, (S, 1, 1)."""
    elapsed = rows.target_timestamps_B[rows.rows_T()] - rows.timestamps_T
    return time_bucket(elapsed, NUM_TIME_BUCKETS)[:, None, None]


def _cells(rows: SequenceBatch) -> ContextKV:
    """How a context is laid out: the token of each cell. The lengths are read on the host here, once for all layers."""
    tokens = torch.arange(rows.item_ids_T.numel(), device=rows.offsets.device)[:, None, None]
    return ContextKV.jagged(tokens, tokens, rows.offsets)


def _arranged(cells: ContextKV, key_SHK: Tensor, value_SHV: Tensor) -> ContextKV:
    """Keys and values of all tokens in the layout of `cells`."""
    groups = []
    for group in cells.groups:
        tokens_bS = group.key_bHKS[:, 0, 0]
        key_bHKS = key_SHK[tokens_bS].permute(0, 2, 3, 1).contiguous()
        value_bHSV = value_SHV[tokens_bS].transpose(1, 2).contiguous()
        groups.append(ContextGroup(group.rows_b, key_bHKS, value_bHSV, group.valid_bS))
    return ContextKV(tuple(groups), cells.size)
