"""Encoder and decoder of T5 (arXiv 1910.10683) on jagged rows: the blocks of the encoder-decoder heads.

    x = x + attention(norm(x))      [decoder: x = x + cross(norm(x), encoder states)]      x = x + ffn(norm(x))
    norm: RMS without mean; attention: `t5_attention`; ffn: W_o relu(W_i x), or W_o (gelu(W_g x) * W_i x); no biases

Checked against the T5 of the transformers package with the same weights. Differences: rows are jagged, nothing spans
the batch; dropout, in T5's places, is keyed; the position biases are modules that a model may replace; a decoder step
takes the beams of a request together, and what it stored for them is reached through an index of ancestors and never
moved (`beam_attention`).

Letters: S tokens of the encoder, B requests, R decoder rows (a multiple of B: row r belongs to request r // (R / B)),
Q positions of a decoder row, M beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.generative.beam_attention import BeamKV, ContextGroup, ContextKV, beam_attention
from generative_recommenders.generative.t5_attention import (
    PositionBias,
    RowRectangles,
    WeightDropout,
    jagged_cross_attention,
    jagged_self_attention,
    rectangle_attention,
    rectangle_biases,
)
from generative_recommenders.nn.dropout import Draws, KeyedDropout
from ops import jagged

EPS = 1e-6
# Streams of randomness: a layer has `_STREAMS_PER_LAYER`, a stack its input and output before them, and the decoder's
# lie behind those of any encoder.
_STREAMS_PER_LAYER = 8
_DECODER_STREAMS = 1 << 16


@dataclass(frozen=True)
class T5Shape:
    """Sizes of a stack: D, heads H of width K, width of the feed-forward layer; dropout; recomputation in backward."""

    dim: int
    num_heads: int
    dkv: int
    ffn_hidden_dim: int
    dropout_rate: float = 0.1
    activation: Literal["relu", "gated-gelu"] = "relu"
    activation_checkpoint: bool = False

    @property
    def inner(self) -> int:
        return self.num_heads * self.dkv


@dataclass(frozen=True)
class Memory:
    """What the decoder attends to: the encoder's states (S, D) of `size` rows, and their layout."""

    states_SD: Tensor
    rectangles: RowRectangles

    @property
    def size(self) -> int:
        return self.rectangles.offsets.numel() - 1


class FeedForward(nn.Module):
    def __init__(self, shape: T5Shape, stream: int) -> None:
        super().__init__()
        self.gated = shape.activation == "gated-gelu"
        self.input = nn.Linear(shape.dim, shape.ffn_hidden_dim * (2 if self.gated else 1), bias=False)
        self.output = nn.Linear(shape.ffn_hidden_dim, shape.dim, bias=False)
        self.dropout = KeyedDropout(shape.dropout_rate, stream)
        nn.init.normal_(self.input.weight, std=shape.dim**-0.5)
        nn.init.normal_(self.output.weight, std=shape.ffn_hidden_dim**-0.5)

    def forward(self, x_TD: Tensor, draws: Draws | None) -> Tensor:
        hidden = self.input(x_TD)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.gelu(gate, approximate="tanh") * hidden
        else:
            hidden = F.relu(hidden)
        return self.output(self.dropout(hidden, draws))


class SelfAttention(nn.Module):
    """Projections of attention within a row; `qkv` makes queries, keys and values in one product."""

    def __init__(self, shape: T5Shape, stream: int) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.inner, bias=False)
        self.output = nn.Linear(shape.inner, shape.dim, bias=False)
        self.weight_dropout = WeightDropout(shape.dropout_rate, stream)
        nn.init.normal_(self.qkv.weight, std=shape.dim**-0.5)
        # The missing scale of the products is in the queries' first values.
        nn.init.normal_(self.qkv.weight[: shape.inner], std=(shape.dim * shape.dkv) ** -0.5)
        nn.init.normal_(self.output.weight, std=shape.inner**-0.5)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (…, H, K) each."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def jagged(self, x_SD: Tensor, rectangles: RowRectangles, biases: Sequence[Tensor], draws: Draws | None) -> Tensor:
        qkv_S3HK = self.qkv(x_SD).unflatten(-1, (3, self.heads, -1))
        return self.output(jagged_self_attention(qkv_S3HK, rectangles, biases, self.weight_dropout, draws).flatten(1))

    def dense(self, x_TD: Tensor, length: int, bias_HQQ: Tensor, draws: Draws | None) -> Tensor:
        """Rows of `length` tokens each."""
        q, k, v = (x.unflatten(0, (x.shape[0] // length, length)).transpose(1, 2) for x in self.project(x_TD))
        keys = None if draws is None else draws.keys_T.view(-1, length)
        attended = rectangle_attention(q, k, v, bias_HQQ[None], self.weight_dropout, keys, draws)
        return self.output(attended.transpose(1, 2).flatten(2).flatten(0, 1))

    def step(self, x_BMD: Tensor, stored: BeamKV, ancestors: Sequence[Tensor], bias: Tensor) -> Tensor:
        q, k, v = self.project(x_BMD)
        stored.append(k, v)
        nothing = ContextKV((), x_BMD.shape[0])
        return self.output(beam_attention(q, nothing, stored, ancestors, scale=1.0, ancestor_bias=bias).flatten(2))


class CrossAttention(nn.Module):
    """Projections of attention over the encoder's states."""

    def __init__(self, shape: T5Shape, stream: int) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.query = nn.Linear(shape.dim, shape.inner, bias=False)
        self.key_value = nn.Linear(shape.dim, 2 * shape.inner, bias=False)
        self.output = nn.Linear(shape.inner, shape.dim, bias=False)
        self.weight_dropout = WeightDropout(shape.dropout_rate, stream)
        nn.init.normal_(self.query.weight, std=(shape.dim * shape.dkv) ** -0.5)
        nn.init.normal_(self.key_value.weight, std=shape.dim**-0.5)
        nn.init.normal_(self.output.weight, std=shape.inner**-0.5)

    def keys_values(self, states_SD: Tensor) -> tuple[Tensor, ...]:
        """(S, H, K) each."""
        return self.key_value(states_SD).unflatten(-1, (2, self.heads, -1)).unbind(-3)

    def forward(self, x_TD: Tensor, memory: Memory, biases: Sequence[Tensor], draws: Draws | None) -> Tensor:
        """T = R * Q tokens of the decoder."""
        queries = x_TD.shape[0] // max(memory.size, 1)
        q_BQHK = self.query(x_TD).unflatten(-1, (self.heads, -1)).unflatten(0, (memory.size, queries))
        k, v = self.keys_values(memory.states_SD)
        attended = jagged_cross_attention(q_BQHK, k, v, memory.rectangles, biases, self.weight_dropout, draws)
        return self.output(attended.flatten(2).flatten(0, 1))

    def step(self, x_BMD: Tensor, context: ContextKV, biases: Sequence[Tensor] | None) -> Tensor:
        q_BMHK = self.query(x_BMD).unflatten(-1, (self.heads, -1))
        return self.output(beam_attention(q_BMHK, context, BeamKV(), (), scale=1.0, context_bias=biases).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, shape: T5Shape, stream: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, EPS)
        self.attention = SelfAttention(shape, stream)
        self.attention_dropout = KeyedDropout(shape.dropout_rate, stream + 1)
        self.ffn_norm = nn.RMSNorm(shape.dim, EPS)
        self.ffn = FeedForward(shape, stream + 2)
        self.ffn_dropout = KeyedDropout(shape.dropout_rate, stream + 3)

    def forward(self, x_SD: Tensor, rectangles: RowRectangles, biases: Sequence[Tensor], draws: Draws | None) -> Tensor:
        attended = self.attention.jagged(self.attention_norm(x_SD), rectangles, biases, draws)
        x_SD = x_SD + self.attention_dropout(attended, draws)
        return x_SD + self.ffn_dropout(self.ffn(self.ffn_norm(x_SD), draws), draws)


class DecoderLayer(nn.Module):
    def __init__(self, shape: T5Shape, stream: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, EPS)
        self.attention = SelfAttention(shape, stream)
        self.attention_dropout = KeyedDropout(shape.dropout_rate, stream + 1)
        self.cross_norm = nn.RMSNorm(shape.dim, EPS)
        self.cross = CrossAttention(shape, stream + 2)
        self.cross_dropout = KeyedDropout(shape.dropout_rate, stream + 3)
        self.ffn_norm = nn.RMSNorm(shape.dim, EPS)
        self.ffn = FeedForward(shape, stream + 4)
        self.ffn_dropout = KeyedDropout(shape.dropout_rate, stream + 5)

    def forward(
        self,
        x_TD: Tensor,
        memory: Memory,
        self_bias_HQQ: Tensor,
        cross_biases: Sequence[Tensor],
        draws: Draws | None,
    ) -> Tensor:
        """T = R * Q tokens; the self-attention bias says Q and hides what a position may not see."""
        attended = self.attention.dense(self.attention_norm(x_TD), self_bias_HQQ.shape[-1], self_bias_HQQ, draws)
        x_TD = x_TD + self.attention_dropout(attended, draws)
        x_TD = x_TD + self.cross_dropout(self.cross(self.cross_norm(x_TD), memory, cross_biases, draws), draws)
        return x_TD + self.ffn_dropout(self.ffn(self.ffn_norm(x_TD), draws), draws)

    def step(
        self,
        x_BMD: Tensor,
        stored: BeamKV,
        ancestors: Sequence[Tensor],
        self_bias: Tensor,
        context: ContextKV,
        cross_biases: Sequence[Tensor] | None,
    ) -> Tensor:
        x_BMD = x_BMD + self.attention.step(self.attention_norm(x_BMD), stored, ancestors, self_bias)
        x_BMD = x_BMD + self.cross.step(self.cross_norm(x_BMD), context, cross_biases)
        return x_BMD + self.ffn(self.ffn_norm(x_BMD), None)


class Encoder(nn.Module):
    """A stack of `EncoderLayer`s; all layers share `bias`, None for no position bias at all."""

    def __init__(self, shape: T5Shape, num_layers: int, bias: PositionBias | None) -> None:
        super().__init__()
        self.shape = shape
        self.bias = bias
        self.input_dropout = KeyedDropout(shape.dropout_rate, 0)
        self.layers = nn.ModuleList(EncoderLayer(shape, _STREAMS_PER_LAYER * (i + 1)) for i in range(num_layers))
        self.norm = nn.RMSNorm(shape.dim, EPS)
        self.output_dropout = KeyedDropout(shape.dropout_rate, 1)

    def forward(self, x_SD: Tensor, offsets: Tensor, draws: Draws | None = None) -> Memory:
        """States of the tokens of jagged rows. `draws` has a key a token; None where nothing is dropped."""
        rectangles = RowRectangles.of(offsets, x_SD.shape[0])
        places = torch.arange(rectangles.longest, device=x_SD.device)
        bias_HNN = None if self.bias is None else self.bias(places, places)
        biases = rectangle_biases(rectangles, bias_HNN, square=True)
        x_SD = self.input_dropout(x_SD, draws)
        if bias_HNN is not None and not biases:
            # An empty share of a batch still takes part in the graph.
            x_SD = x_SD + 0.0 * bias_HNN.sum()
        for layer in self.layers:
            x_SD = _run(layer, self.training and self.shape.activation_checkpoint, x_SD, rectangles, biases, draws)
        return Memory(self.output_dropout(self.norm(x_SD), draws), rectangles)


@dataclass(frozen=True)
class DecoderState:
    """For each layer keys and values of the encoder's states, and an append-only store of those of decoded tokens."""

    contexts: tuple[ContextKV, ...]
    stored: tuple[BeamKV, ...]

    @property
    def size(self) -> int:
        return self.contexts[0].size

    def select(self, rows: Tensor) -> DecoderState:
        """The state of the given requests, int64 (b,), in that order and with nothing decoded yet.

        All layers have the same rows in their groups, so what is wanted of a group is looked up once.
        """
        found = [(group.rows_b[:, None] == rows).nonzero(as_tuple=True) for group in self.contexts[0].groups]
        contexts = [
            ContextKV(
                tuple(
                    ContextGroup(wanted, group.key_bHKS[inside], group.value_bHSK[inside], group.valid_bS[inside])
                    for group, (inside, wanted) in zip(context.groups, found, strict=True)
                ),
                rows.numel(),
            )
            for context in self.contexts
        ]
        return DecoderState(tuple(contexts), tuple(BeamKV() for _ in self.stored))

    def branch(self, rows: Tensor | None = None) -> DecoderState:
        """See `decoding.Context`."""
        contexts = self.contexts if rows is None else self.select(rows).contexts
        return DecoderState(contexts, tuple(stored.branch(rows) for stored in self.stored))


def _of_layers(joint: ContextKV, layers: int) -> tuple[ContextKV, ...]:
    """Cut a context whose heads are those of all layers, one layer's after the other's."""
    cut = [
        [
            ContextGroup(group.rows_b, key.contiguous(), value.contiguous(), group.valid_bS)
            for key, value in zip(group.key_bHKS.chunk(layers, 1), group.value_bHSK.chunk(layers, 1), strict=True)
        ]
        for group in joint.groups
    ]
    return tuple(ContextKV(tuple(groups[layer] for groups in cut), joint.size) for layer in range(layers))


class Decoder(nn.Module):
    """A stack of `DecoderLayer`s, causal or not; all layers share the biases."""

    def __init__(
        self,
        shape: T5Shape,
        num_layers: int,
        self_bias: PositionBias | None,
        cross_bias: PositionBias | None = None,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.causal = causal
        self.self_bias = self_bias
        self.cross_bias = cross_bias
        first = _DECODER_STREAMS
        self.input_dropout = KeyedDropout(shape.dropout_rate, first)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, first + _STREAMS_PER_LAYER * (i + 1)) for i in range(num_layers)
        )
        self.norm = nn.RMSNorm(shape.dim, EPS)
        self.output_dropout = KeyedDropout(shape.dropout_rate, first + 1)

    def forward(self, x_RQD: Tensor, memory: Memory, draws: Draws | None = None) -> Tensor:
        """States (R, Q, D). `draws` has a key for each of R * Q tokens; None where nothing is dropped."""
        length = x_RQD.shape[1]
        places = torch.arange(length, device=x_RQD.device)
        self_bias = self._self_bias(places, places)
        if self.causal:
            self_bias = self_bias.masked_fill(places > places[:, None], -torch.inf)
        cross_bias = self._cross_bias(places, memory.rectangles.longest)
        if cross_bias is not None and memory.size:
            # Rows of one request lie side by side.
            cross_bias = cross_bias.repeat(1, x_RQD.shape[0] // memory.size, 1)
        cross_biases = rectangle_biases(memory.rectangles, cross_bias, square=False)
        recompute = self.training and self.shape.activation_checkpoint
        x_TD = self.input_dropout(x_RQD.flatten(0, 1), draws)
        for layer in self.layers:
            x_TD = _run(layer, recompute, x_TD, memory, self_bias, cross_biases, draws)
        return self.output_dropout(self.norm(x_TD), draws).unflatten(0, (x_TD.shape[0] // length, length))

    def _self_bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.self_bias is not None:
            bias_HQS: Tensor = self.self_bias(queries, keys)
            return bias_HQS
        return torch.zeros(1, queries.numel(), keys.numel(), device=queries.device)

    def _cross_bias(self, queries: Tensor, length: int) -> Tensor | None:
        if self.cross_bias is None:
            return None
        bias_HQN: Tensor = self.cross_bias(queries, torch.arange(length, device=queries.device))
        return bias_HQN

    def begin(self, memory: Memory, length: int | None = None) -> DecoderState:
        """The state that decoding starts with: rows in a few rectangles, which waits for the device once.

        With `length` there is one rectangle of so many tokens a row, whatever the batch.

        Raises:
            ValueError: a row is longer than `length`.
        """
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        pairs = [layer.cross.keys_values(memory.states_SD) for layer in layers]
        # All layers at once, so that rows are laid out once.
        keys, values = (torch.stack(parts, 1).flatten(1, 2) for parts in zip(*pairs, strict=True))
        offsets, longest = memory.rectangles.offsets, memory.rectangles.longest
        if length is None:
            joint = ContextKV.jagged(keys, values, offsets)
        elif longest > length:
            raise ValueError(f"decoder context: got a row of {longest} tokens, expected at most {length}")
        else:
            keys, values = (jagged.jagged_to_padded(x, offsets, length) for x in (keys, values))
            joint = ContextKV.padded(keys, values, offsets.diff())
        return DecoderState(_of_layers(joint, len(layers)), tuple(BeamKV() for _ in layers))

    def step(self, x_BMD: Tensor, state: DecoderState, ancestors: Sequence[Tensor]) -> Tensor:
        """States (B, M, D) of the next token of each beam, whose keys and values are appended to `state`.

        `ancestors[j]`, int64 (B, M), is the row of step j that a beam descends from, that of this step the beam's own.
        """
        steps = torch.arange(len(ancestors), device=x_BMD.device)
        self_bias = self._self_bias(steps[-1:], steps)
        longest = max((group.valid_bS.shape[1] for group in state.contexts[0].groups), default=0)
        cross_bias = self._cross_bias(steps[-1:], longest)
        biases = None
        if cross_bias is not None:
            biases = [cross_bias[..., : group.valid_bS.shape[1]] for group in state.contexts[0].groups]
        for layer, stored, context in zip(self.layers, state.stored, state.contexts, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_BMD = layer.step(x_BMD, stored, ancestors, self_bias, context, biases)
        return self.norm(x_BMD)


def _run(layer: nn.Module, recompute: bool, *arguments: Any) -> Tensor:
    result: Tensor = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
    return result
