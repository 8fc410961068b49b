"""HSTU attention in plain PyTorch: pads the rows, builds scores, bias and mask in full, and reads like the formula.

Memory grows with B * H * N * N. Differentiable by autograd for q, k, v and both bias tables, in any float type;
bfloat16 and float16 are computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.hstu_attention.buckets import time_bucket
from ops.random import drop_threshold, lane_bits, token_hash


def _pad(values: Tensor, offsets: Tensor, padded_length: int) -> Tensor:
    """Jagged (T, ...) to dense (B, N, ...), zeros after the end of each row."""
    positions_N = torch.arange(padded_length, device=values.device)
    inside_BN = positions_N < offsets.diff()[:, None]
    # One row of zeros at the end stands for everything outside.
    extended = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return extended[torch.where(inside_BN, offsets[:-1, None] + positions_N, values.shape[0])]


def valid_mask(
    query_positions_BM: Tensor,
    lengths_B: Tensor,
    padded_length: int,
    *,
    num_targets: Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    min_full_attn_seq_len: int = 0,
) -> Tensor:
    """Which keys each query sees: bool (B, M, N).

    query_positions_BM: int64 positions of the queries in their rows; lengths_B: int64 row lengths, with context and
    targets. All `contextual_seq_len` leading positions share id 0 and all targets share the id after the history. A
    query sees itself and keys of smaller id; `max_attn_len` bounds the distance in ids, except for queries whose id is
    among the last `min_full_attn_seq_len` before the targets; context queries see the whole history, but no target.
    """
    shift = max(contextual_seq_len - 1, 0)
    max_id_B11 = (lengths_B - shift)[:, None, None]
    if num_targets is not None:
        max_id_B11 = max_id_B11 - num_targets[:, None, None]

    def ids(positions: Tensor) -> Tensor:
        result = (positions - shift).clamp(min=0)
        return result if num_targets is None else torch.minimum(result, max_id_B11)

    key_positions_11N = torch.arange(padded_length, device=lengths_B.device)[None, None, :]
    query_positions_BM1 = query_positions_BM[:, :, None]
    query_ids, key_ids = ids(query_positions_BM1), ids(key_positions_11N)
    valid = (query_positions_BM1 == key_positions_11N) | (query_ids > key_ids)
    if max_attn_len > 0:
        near = query_ids - key_ids <= max_attn_len
        if min_full_attn_seq_len > 0:
            near = near | (query_ids >= max_id_B11 - min_full_attn_seq_len)
        valid = valid & near
    if contextual_seq_len > 0:
        valid = valid | ((query_ids == 0) & (key_ids < max_id_B11))
    return valid & (key_positions_11N < lengths_B[:, None, None])


def _bias(
    query_positions_BM: Tensor,
    padded_length: int,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_times_BM: Tensor | None,
    key_times_BN: Tensor | None,
) -> Tensor | float:
    """Sum of the two tables' entries: (B or 1, heads or 1, M, N), or 0.0 without tables."""
    bias: Tensor | float = 0.0
    if position_weights is not None:
        key_positions_N = torch.arange(padded_length, device=position_weights.device)
        steps_BMN = (padded_length - 1) + key_positions_N - query_positions_BM[:, :, None]
        bias = torch.atleast_2d(position_weights)[:, steps_BMN].transpose(0, 1)
    if time_weights is not None:
        assert query_times_BM is not None
        assert key_times_BN is not None
        table = torch.atleast_2d(time_weights)
        buckets_BMN = time_bucket(query_times_BM[:, :, None] - key_times_BN[:, None, :], table.shape[1] - 1)
        bias = bias + table[:, buckets_BMN].transpose(0, 1)
    return bias


def _dropped(weights_BHMN: Tensor, tokens_BM: Tensor, rate: float) -> Tensor:
    """Weights of keys whose bits (lane: head * N + key) fall below the rate are dropped, the others scaled up."""
    heads, n = weights_BHMN.shape[1], weights_BHMN.shape[3]
    lanes_HN = torch.arange(heads * n, device=weights_BHMN.device).view(heads, n)
    kept_BHMN = lane_bits(tokens_BM[:, None, :, None], lanes_HN[None, :, None, :]) >= drop_threshold(rate)
    return torch.where(kept_BHMN, weights_BHMN / (1.0 - rate), weights_BHMN.new_zeros(()))


def hstu_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    *,
    max_seq_len: int,
    alpha: float = 1.0,
    scale: float | Tensor | None = None,
    position_weights: Tensor | None = None,
    time_weights: Tensor | None = None,
    query_times: Tensor | None = None,
    key_times: Tensor | None = None,
    num_targets: Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    min_full_attn_seq_len: int = 0,
    dropout_rate: float = 0.0,
    dropout_seed: int = 0,
    row_keys: Tensor | None = None,
    query_rows: Tensor | None = None,
) -> Tensor:
    """The formula of `ops.hstu_attention.hstu_attention`, whose docstring holds for the arguments."""
    n = max_seq_len
    device, out_dtype = q_THK.device, v_THV.dtype
    dtype = torch.float64 if q_THK.dtype == torch.float64 else torch.float32
    lengths_B = offsets.diff()
    if row_keys is None:
        row_keys = query_rows if query_rows is not None else torch.arange(q_THK.shape[0], device=device)
    k_BNHK, v_BNHV = _pad(k_THK.to(dtype), offsets, n), _pad(v_THV.to(dtype), offsets, n)
    key_times_BN = None if key_times is None else _pad(key_times, offsets, n)

    # `chosen` names the jagged row behind each dense batch entry, `dense` brings a per-query tensor to (B, M, ...). In
    # full attention an entry is a jagged row with M = N queries; with query_rows every query is an entry, and M = 1.
    if query_rows is None:
        chosen = torch.arange(len(lengths_B), device=device)
        query_positions_BM = torch.arange(n, device=device).expand(len(lengths_B), n)

        def dense(values: Tensor) -> Tensor:
            return _pad(values, offsets, n)
    else:
        chosen = torch.searchsorted(offsets, query_rows, right=True) - 1
        query_positions_BM = (query_rows - offsets[chosen])[:, None]

        def dense(values: Tensor) -> Tensor:
            return values[:, None]

    scores_BHMN = alpha * torch.einsum("bmhd,bnhd->bhmn", dense(q_THK.to(dtype)), k_BNHK[chosen])
    scores_BHMN = scores_BHMN + _bias(
        query_positions_BM,
        n,
        None if position_weights is None else position_weights.to(dtype),
        None if time_weights is None else time_weights.to(dtype),
        None if query_times is None else dense(query_times),
        None if key_times_BN is None else key_times_BN[chosen],
    )
    weights_BHMN = F.silu(scores_BHMN)
    if scale is None:
        scale = 1.0 / n
    weights_BHMN = weights_BHMN * (scale.to(dtype)[chosen, None, None, None] if isinstance(scale, Tensor) else scale)
    valid_BMN = valid_mask(
        query_positions_BM,
        lengths_B[chosen],
        n,
        num_targets=None if num_targets is None else num_targets[chosen],
        max_attn_len=max_attn_len,
        contextual_seq_len=contextual_seq_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
    )
    # A select, not a product: a masked infinity must not turn into NaN.
    weights_BHMN = torch.where(valid_BMN[:, None], weights_BHMN, weights_BHMN.new_zeros(()))
    if dropout_rate > 0.0:
        weights_BHMN = _dropped(weights_BHMN, dense(token_hash(dropout_seed, row_keys)), dropout_rate)
    out_BMHV = torch.einsum("bhmn,bnhv->bmhv", weights_BHMN, v_BNHV[chosen])
    if query_rows is not None:
        return out_BMHV[:, 0].to(out_dtype)
    out_THV = out_BMHV[query_positions_BM < lengths_B[:, None]]
    if out_THV.shape[0] != q_THK.shape[0]:
        raise ValueError(f"hstu_attention: offsets: got rows past max_seq_len {n} or not from 0 to {q_THK.shape[0]}")
    return out_THV.to(out_dtype)
