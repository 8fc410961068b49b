"""HSTU attention in plain PyTorch: pads the rows, builds scores, bias and mask in full, and reads like the formula.

Memory grows with B * H * M * N for M queries a row. Differentiable by autograd for q, k, v and both bias tables, in any
float type; bfloat16 and float16 are computed in float32 and rounded once at the end, or throughout in the
`compute_dtype` that is asked for: what ordinary PyTorch makes of that type.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.hstu_attention.arguments import CachedInputs, Inputs, Settings
from ops.hstu_attention.buckets import time_bucket
from ops.random import drop_threshold, lane_bits, token_hash


def _pad(values: Tensor, starts: Tensor, lengths: Tensor, padded_length: int) -> Tensor:
    """Rows of (T, ...) that start at `starts`, as dense (B, N, ...); zeros after the end of each."""
    positions_N = torch.arange(padded_length, device=values.device)
    inside_BN = positions_N < lengths[:, None]
    # One row of zeros at the end stands for everything outside.
    extended = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return extended[torch.where(inside_BN, starts[:, None] + positions_N, values.shape[0])]


def valid_mask(
    query_positions_BM: Tensor, lengths_B: Tensor, padded_length: int, num_targets: Tensor | None, s: Settings
) -> Tensor:
    """Which keys each query sees: bool (B, M, N).

    query_positions_BM: int64 positions of the queries in their rows; lengths_B: int64 row lengths, with context and
    targets. All `contextual_seq_len` leading positions share id 0 and all targets share the id after the history. A
    query sees itself and keys of smaller id; `max_attn_len` bounds the distance in ids, except for queries whose id is
    among the last `min_full_attn_seq_len` before the targets; context queries see the whole history, but no target.
    """
    shift = max(s.contextual_seq_len - 1, 0)
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
    if s.max_attn_len > 0:
        near = query_ids - key_ids <= s.max_attn_len
        if s.min_full_attn_seq_len > 0:
            near = near | (query_ids >= max_id_B11 - s.min_full_attn_seq_len)
        valid = valid & near
    if s.contextual_seq_len > 0:
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


def _dense_attention(
    q_BMHK: Tensor,
    query_positions_BM: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    lengths_B: Tensor,
    bias: Tensor | float,
    x: Inputs | CachedInputs,
    s: Settings,
    tokens_BM: Tensor | None,
) -> Tensor:
    """Queries at these positions of rows of N = max_seq_len padded keys: (B, M, H, V)."""
    scores_BHMN = s.alpha * torch.einsum("bmhd,bnhd->bhmn", q_BMHK, k_BNHK) + bias
    scale = s.scale if x.scales is None else x.scales.to(scores_BHMN.dtype)[:, None, None, None]
    weights_BHMN = F.silu(scores_BHMN) * scale
    valid_BMN = valid_mask(query_positions_BM, lengths_B, k_BNHK.shape[1], x.num_targets, s)
    # A select, not a product: a masked infinity must not turn into NaN.
    weights_BHMN = torch.where(valid_BMN[:, None], weights_BHMN, weights_BHMN.new_zeros(()))
    if tokens_BM is not None:
        weights_BHMN = _dropped(weights_BHMN, tokens_BM, s.dropout_rate)
    return torch.einsum("bhmn,bnhv->bmhv", weights_BHMN, v_BNHV)


def _compute_dtype(q: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    return wanted or (torch.float64 if q.dtype == torch.float64 else torch.float32)


def _cast(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if table is None else table.to(dtype)


def hstu_attention(x: Inputs, s: Settings, compute_dtype: torch.dtype | None = None) -> Tensor:
    """The formula of `ops.hstu_attention.hstu_attention`, whose docstring holds for the arguments."""
    n, device, dtype = s.max_seq_len, x.q.device, _compute_dtype(x.q, compute_dtype)
    starts_B, lengths_B = x.offsets[:-1], x.offsets.diff()

    def dense(values: Tensor) -> Tensor:
        return _pad(values, starts_B, lengths_B, n)

    positions_BN = torch.arange(n, device=device).expand(len(lengths_B), n)
    bias = _bias(
        positions_BN,
        n,
        _cast(x.position_weights, dtype),
        _cast(x.time_weights, dtype),
        None if x.query_times is None else dense(x.query_times),
        None if x.key_times is None else dense(x.key_times),
    )
    tokens_BN = None
    if s.dropout_rate > 0.0:
        row_keys = torch.arange(x.q.shape[0], device=device) if x.row_keys is None else x.row_keys
        tokens_BN = dense(token_hash(s.dropout_seed, row_keys))
    q, k, v = (dense(values.to(dtype)) for values in (x.q, x.k, x.v))
    out_BNHV = _dense_attention(q, positions_BN, k, v, lengths_B, bias, x, s, tokens_BN)
    out_THV = out_BNHV[positions_BN < lengths_B[:, None]]
    if out_THV.shape[0] != x.q.shape[0]:
        raise ValueError(f"hstu_attention: offsets: got rows past max_seq_len {n} or not from 0 to {x.q.shape[0]}")
    return out_THV.to(x.v.dtype)


def hstu_attention_cached(x: CachedInputs, s: Settings) -> Tensor:
    """The formula of `ops.hstu_attention.hstu_attention_cached`: rows are put together, then attended to as above."""
    n, dtype = s.max_seq_len, _compute_dtype(x.q, None)
    q_starts_B, q_lengths_B = x.q_offsets[:-1], x.q_offsets.diff()
    cached_B = x.cache_offsets.diff() if x.cache_lengths is None else x.cache_lengths
    lengths_B = cached_B if x.k is None else cached_B + q_lengths_B
    if bool((lengths_B > n).any()):
        raise ValueError(
            f"hstu_attention_cached: got rows of {int(lengths_B.max())}, expected at most max_seq_len = {n}"
        )
    most = min(n, x.q.shape[0])
    own_BM = torch.arange(most, device=x.q.device)
    positions_BM = (lengths_B - q_lengths_B)[:, None] + own_BM

    def queries(values: Tensor) -> Tensor:
        return _pad(values, q_starts_B, q_lengths_B, most)

    def whole(cache: Tensor, new: Tensor | None) -> Tensor:
        """The row's cached values and, behind them, its new ones: (B, N, ...)."""
        row = _pad(cache, x.cache_offsets[:-1], cached_B, n)
        if new is None:
            return row
        places_BN = torch.arange(n, device=cache.device) - cached_B[:, None]
        added = (places_BN >= 0) & (places_BN < q_lengths_B[:, None])
        picked = new[torch.where(added, q_starts_B[:, None] + places_BN, 0)] if new.shape[0] else row
        return torch.where(added.view(*added.shape, *[1] * (cache.dim() - 1)), picked, row)

    bias = _bias(
        positions_BM,
        n,
        _cast(x.position_weights, dtype),
        _cast(x.time_weights, dtype),
        None if x.query_times is None else queries(x.query_times),
        None if x.cache_times is None else whole(x.cache_times, x.key_times),
    )
    k, v = whole(x.k_cache.to(dtype), _cast(x.k, dtype)), whole(x.v_cache.to(dtype), _cast(x.v, dtype))
    out_BMHV = _dense_attention(queries(x.q.to(dtype)), positions_BM, k, v, lengths_B, bias, x, s, None)
    return out_BMHV[own_BM < q_lengths_B[:, None]].to(x.v_cache.dtype)
