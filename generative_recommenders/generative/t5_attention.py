"""Attention of T5 (arXiv 1910.10683, section 2.1) over jagged rows: unscaled products plus a bias of positions.

    softmax(q k^T + bias(query positions, key positions)) v        bias: (H, Q, S), shared by all rows and layers

Rows are laid out in rectangles of similar length (`RowRectangles`), made once a batch for all layers; no rectangle and
no bias spans the batch. Differences from T5's code: dropout of the attention weights is keyed, so a run does not depend
on ranks or layout; the buckets are a table by distance, equal on every device; a row without keys gets zeros.

Letters: G rows of a rectangle, S tokens of all rows or keys of a rectangle, Q queries of a row, K width of a head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.nn.attention import RowGroups
from generative_recommenders.nn.dropout import Draws
from ops import jagged
from ops.dropout import dropout


class PositionBias(nn.Module):
    """A learned bias of attention logits that depends on positions alone."""

    @abstractmethod
    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """int64 (Q,) and (S,), places in a row from 0 -> (H, Q, S)."""


class RelativePositionBias(PositionBias):
    """T5's buckets of key - query: one a distance up to a half, then logarithmic up to `max_distance`.

    Bidirectional: half of the buckets are for keys before the query and half for keys after it. Otherwise all keys
    after the query count as distance 0, since a causal mask hides them.
    """

    bucket_of_distance: Tensor

    def __init__(
        self, heads: int, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128, std: float = 1.0
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.per_side = num_buckets // 2 if bidirectional else num_buckets
        exact = self.per_side // 2
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"relative positions: got {num_buckets} buckets up to distance {max_distance}, expected more than "
                f"{exact} distances and {4 if bidirectional else 2} buckets at least"
            )
        self.table = nn.Parameter(torch.empty(num_buckets, heads).normal_(std=std))
        distance = torch.arange(max_distance + 1)
        # In float32, as the published models were trained.
        share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
        far = (exact + (share * (self.per_side - exact)).to(torch.int64)).clamp(max=self.per_side - 1)
        self.register_buffer("bucket_of_distance", torch.where(distance < exact, distance, far), persistent=False)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        relative_QS = key_positions - query_positions[:, None]
        distance_QS = relative_QS.abs() if self.bidirectional else (-relative_QS).clamp(min=0)
        buckets_QS = self.bucket_of_distance[distance_QS.clamp(max=self.bucket_of_distance.numel() - 1)]
        if self.bidirectional:
            buckets_QS = buckets_QS + self.per_side * (relative_QS > 0)
        return F.embedding(buckets_QS, self.table).permute(2, 0, 1)


@dataclass(frozen=True)
class RowRectangles:
    """`RowGroups` of B jagged rows, and for each group which rows it holds, (G,); empty rows are in none."""

    groups: RowGroups
    rows: tuple[Tensor, ...]
    offsets: Tensor

    @classmethod
    def of(cls, offsets: Tensor, count: int) -> RowRectangles:
        """Rows of `count` tokens in all; waits for the device once."""
        groups = RowGroups.of(offsets)
        row_S = jagged.rows(offsets, count)
        return cls(groups, tuple(row_S[tokens[:, 0]] for tokens in groups.tokens), offsets)

    @property
    def longest(self) -> int:
        return self.groups.tokens[0].shape[1] if self.groups.tokens else 0


class WeightDropout(nn.Module):
    """Dropout of attention weights, keyed by (query token, head, key place)."""

    def __init__(self, rate: float, stream: int) -> None:
        super().__init__()
        self.rate = rate
        self.stream = stream

    def acts(self, draws: Draws | None) -> bool:
        return self.training and self.rate > 0.0 and draws is not None

    def forward(self, weights_GHQS: Tensor, keys_GQ: Tensor, draws: Draws) -> Tensor:
        heads = weights_GHQS.shape[1]
        keys_GHQ = keys_GQ[:, None] * heads + torch.arange(heads, device=keys_GQ.device)[:, None]
        flat = weights_GHQS.reshape(-1, weights_GHQS.shape[-1])
        return dropout(flat, self.rate, draws.stream(self.stream), keys_GHQ.reshape(-1)).view_as(weights_GHQS)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, stream={self.stream}"


def rectangle_attention(
    q_GHQK: Tensor,
    k_GHSK: Tensor,
    v_GHSK: Tensor,
    bias: Tensor | None,
    weight_dropout: WeightDropout,
    keys_GQ: Tensor | None,
    draws: Draws | None,
) -> Tensor:
    """softmax(q k^T + bias) v, (G, H, Q, K). `bias` broadcasts to (G, H, Q, S) and is -inf where a key is hidden."""
    if draws is None or keys_GQ is None or not weight_dropout.acts(draws):
        mask = None if bias is None else bias.to(q_GHQK.dtype)
        return F.scaled_dot_product_attention(q_GHQK, k_GHSK, v_GHSK, attn_mask=mask, scale=1.0)
    logits_GHQS = torch.matmul(q_GHQK, k_GHSK.transpose(-1, -2)).float()
    if bias is not None:
        logits_GHQS = logits_GHQS + bias
    weights_GHQS = weight_dropout(logits_GHQS.softmax(-1), keys_GQ, draws)
    return torch.matmul(weights_GHQS.to(v_GHSK.dtype), v_GHSK)


def hide_padding(valid_GS: Tensor) -> Tensor:
    """Additive mask (G, 1, 1, S): -inf where a key holds no token."""
    return torch.zeros(valid_GS.shape, device=valid_GS.device).masked_fill(~valid_GS, -math.inf)[:, None, None]


def rectangle_biases(rectangles: RowRectangles, bias_HQN: Tensor | None, *, square: bool) -> list[Tensor]:
    """What is added to the logits of each rectangle, (G, H or 1, Q or 1, S); the same in all layers, so made once.

    `bias_HQN` covers at least the longest row; with `square` its queries are the tokens of the row themselves.
    """
    biases = []
    for valid in rectangles.groups.valid:
        bias, length = hide_padding(valid), valid.shape[1]
        if bias_HQN is not None:
            bias = bias + bias_HQN[:, : length if square else None, :length]
        biases.append(bias)
    return biases


def jagged_self_attention(
    qkv_S3HK: Tensor,
    rectangles: RowRectangles,
    biases: Sequence[Tensor],
    weight_dropout: WeightDropout,
    draws: Draws | None,
) -> Tensor:
    """Every token attends to all tokens of its row: (S, H, K) from queries, keys and values side by side.

    `biases` are those of `rectangle_biases`.
    """
    if not rectangles.rows:
        # An empty share of a batch still takes part in the graph.
        return qkv_S3HK.sum(1)
    pieces, cells = [], []
    for tokens, valid, bias in zip(rectangles.groups.tokens, rectangles.groups.valid, biases, strict=True):
        q, k, v = qkv_S3HK[tokens].permute(2, 0, 3, 1, 4)
        keys = None if draws is None else draws.keys_T[tokens]
        attended = rectangle_attention(q, k, v, bias, weight_dropout, keys, draws)
        pieces.append(attended.transpose(1, 2)[valid])
        cells.append(tokens[valid])
    found = torch.cat(pieces)
    return torch.empty_like(found).index_copy(0, torch.cat(cells), found)


def jagged_cross_attention(
    q_BQHK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    rectangles: RowRectangles,
    biases: Sequence[Tensor],
    weight_dropout: WeightDropout,
    draws: Draws | None,
) -> Tensor:
    """The queries of row b attend to the tokens of row b: (B, Q, H, K); zeros where there are none.

    `biases` are those of `rectangle_biases`; the keys of `draws` are those of the queries, (B * Q,).
    """
    # Without any token the keys still take part in the graph.
    out_BQHK = 0.0 * q_BQHK if rectangles.rows else 0.0 * (q_BQHK + k_SHK.sum() + v_SHK.sum())
    keys_BQ = None if draws is None else draws.keys_T.view(q_BQHK.shape[:2])
    for rows, tokens, bias in zip(rectangles.rows, rectangles.groups.tokens, biases, strict=True):
        q, k, v = (x.transpose(1, 2) for x in (q_BQHK[rows], k_SHK[tokens], v_SHK[tokens]))
        keys = None if keys_BQ is None else keys_BQ[rows]
        attended = rectangle_attention(q, k, v, bias, weight_dropout, keys, draws)
        out_BQHK = out_BQHK.index_copy(0, rows, attended.transpose(1, 2).to(out_BQHK.dtype))
    return out_BQHK
