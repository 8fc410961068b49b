"""Causal softmax attention over jagged rows, on PyTorch's own attention.

PyTorch's attention wants rectangles. Rows are laid out in groups of similar length, longest first, so the rectangles
are nearly full: on MovieLens-1M a batch of 128 windows computes 2.2 M score pairs where one rectangle would compute
5.1 M. No rectangle spans the batch; a group holds at most `_GROUP_TOKENS` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.nn.dropout import Draws
from ops import jagged
from ops.dropout import dropout

_GROUP_TOKENS = 4096
# bias(query tokens (G, N), key tokens (G, N)) -> (G, N, N): added to the logits, given the flat token of each cell.
BiasFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RowGroups:
    """The layout of a batch: for each group the flat token of every cell (G, N) and which cells hold a token."""

    tokens: list[Tensor]
    valid: list[Tensor]

    @classmethod
    def of(cls, offsets: Tensor) -> RowGroups:
        """Needs the lengths on the host: one synchronization a batch, shared by all layers."""
        lengths = offsets.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        host = lengths[order].tolist()
        tokens, valid = [], []
        for first, last, longest in _spans(host, similar=offsets.device.type == "cpu"):
            rows = order[first:last]
            columns = torch.arange(longest, device=offsets.device)
            inside = columns < lengths[rows, None]
            cells = offsets[rows, None] + columns
            tokens.append(torch.where(inside, cells, offsets[rows, None]))
            valid.append(inside)
        return cls(tokens, valid)


def _spans(lengths: list[int], similar: bool) -> Iterator[tuple[int, int, int]]:
    """Cut descending lengths into runs of at most `_GROUP_TOKENS` padded tokens; empty rows are left out.

    With `similar` a run ends before a row of less than half its longest too: a CPU pays for padding, a GPU for calls.
    """
    first = 0
    while first < len(lengths) and lengths[first] > 0:
        count = max(1, _GROUP_TOKENS // lengths[first])
        least = max(1, (lengths[first] + 1) // 2) if similar else 1
        last = first
        while last < min(first + count, len(lengths)) and lengths[last] >= least:
            last += 1
        yield first, last, lengths[first]
        first = last


def causal_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    groups: RowGroups,
    *,
    scale: float | None = None,
    bias: BiasFunction | None = None,
    dropout_rate: float = 0.0,
    stream: int = 0,
    draws: Draws | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias, over keys not after the query) v within each row: (T, H, V).

    `scale` defaults to 1/sqrt(K). Dropout falls on the probabilities, keyed by (token, head, key position).
    """
    out = torch.empty(q_THK.shape[0], v_THV.shape[1], v_THV.shape[2], dtype=v_THV.dtype, device=v_THV.device)
    pieces, cells = [], []
    for tokens, valid in zip(groups.tokens, groups.valid, strict=True):
        q, k, v = (x[tokens].transpose(1, 2) for x in (q_THK, k_THK, v_THV))
        if bias is None and (dropout_rate == 0.0 or draws is None):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            y = _explicit(q, k, v, tokens, scale, bias, dropout_rate, stream, draws)
        pieces.append(y.transpose(1, 2)[valid])
        cells.append(tokens[valid])
    if not pieces:
        # An empty share of a batch still takes part in the graph.
        return out + 0.0 * (q_THK.sum() + k_THK.sum() + v_THV.sum())
    return torch.empty_like(out).index_copy(0, torch.cat(cells), torch.cat(pieces))


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    scale: float | None,
    bias: BiasFunction | None,
    dropout_rate: float,
    stream: int,
    draws: Draws | None,
) -> Tensor:
    """The same with bias or keyed dropout: q, k (G, H, N, K), v (G, H, N, V) -> (G, H, N, V)."""
    groups, heads, length, width = q.shape
    logits = torch.matmul(q, k.transpose(-1, -2)) * (1.0 / math.sqrt(width) if scale is None else scale)
    if bias is not None:
        logits = logits + bias(tokens, tokens)[:, None]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    probabilities = logits.masked_fill(future, -math.inf).softmax(-1)
    if dropout_rate > 0.0 and draws is not None:
        keys = draws.keys_T[tokens][:, None] * heads + torch.arange(heads, device=q.device)[:, None]
        flat = probabilities.reshape(groups * heads * length, length)
        probabilities = dropout(flat, dropout_rate, draws.stream(stream), keys.reshape(-1)).view_as(probabilities)
    return torch.matmul(probabilities, v)


def last_query_attention(q_BHK: Tensor, k_THK: Tensor, v_THV: Tensor, offsets: Tensor) -> Tensor:
    """Softmax attention of one query a row over that row's keys: (B, H, V); an empty row gives zeros.

    What the last layer needs to predict the next item. Jagged throughout: a segment softmax over the tokens.
    """
    rows_T = jagged.rows(offsets, k_THK.shape[0])
    logits_TH = (q_BHK[rows_T] * k_THK).sum(-1) / math.sqrt(q_BHK.shape[-1])
    index = rows_T[:, None].expand_as(logits_TH)
    highest = torch.full_like(q_BHK[..., 0], -math.inf).scatter_reduce(0, index, logits_TH, "amax")
    weights_TH = (logits_TH - highest[rows_T]).exp()
    total = torch.zeros_like(highest).index_add(0, rows_T, weights_TH)
    summed = torch.zeros(*total.shape, v_THV.shape[-1], dtype=v_THV.dtype, device=v_THV.device)
    return summed.index_add(0, rows_T, weights_TH[..., None] * v_THV) / total.clamp(min=1e-30)[..., None]
