"""Pointwise SiLU attention of HSTU on jagged rows: relative bias, the whole mask contract, dropout, cached keys.

Source: "Actions Speak Louder than Words" (arXiv 2402.17152), section 3.3 and, for cached keys, section 3.4 (M-FALCON).
The bias (a position table plus a table over bucketed time differences) is read inside the kernel, so that no N x N
tensor exists in forward or backward. Differences from the published code: the normalizer is the constant `max_seq_len`
or what the caller passes, never the longest row of the batch; the fused kernels take the bias; time buckets are exact
integers (`ops.hstu_attention.buckets`); attention dropout works, and is the same on every back-end; new queries attend
to cached keys without the cache being copied or the attention of old queries computed again.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.hstu_attention import checks, cpu, gpu, operator, reference
from ops.hstu_attention.arguments import CachedInputs, Inputs, Settings
from ops.hstu_attention.buckets import time_bucket, time_bucket_thresholds

__all__ = ["hstu_attention", "hstu_attention_cached", "time_bucket", "time_bucket_thresholds"]

_attention = Op(
    "hstu_attention",
    reference.hstu_attention,
    {
        "triton": Implementation(partial(operator.hstu_attention, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.hstu_attention, triton=False), cpu.refuses),
    },
)
_cached = Op(
    "hstu_attention_cached",
    reference.hstu_attention_cached,
    {
        "triton": Implementation(partial(operator.hstu_attention_cached, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.hstu_attention_cached, triton=False), cpu.refuses),
    },
)


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
    sort_by_length: bool = True,
    backend: str | None = None,
) -> Tensor:
    """HSTU attention of each jagged row with itself: `dropout(SiLU(alpha q k^T + bias) * scale, where valid) v`.

    q_THK, k_THK (T, H, K) and v_THV (T, H, V), one floating point type; offsets int64 (B + 1,), from 0 to T. Returns
    (T, H, V). With n = max_seq_len, which no row may exceed, for query i and key j of one row and head h:

        bias[h, i, j] = position_weights[h, (n - 1) + j - i]
                        + time_weights[h, time_bucket(query_times[i] - key_times[j])]

    - scale: None = 1 / max_seq_len; a number; or (B,), one value a jagged row (no gradient).
    - position_weights (2n - 1,) or (H, 2n - 1); time_weights (buckets + 1,) or (H, buckets + 1), with query_times and
      key_times int64 (T,), any unit. Which time a query carries is the caller's choice (HSTU: that of the next event).
    - Mask: causal with the diagonal, and then as `reference.valid_mask` says: num_targets int64 (B,) trailing targets a
      row that see the history and themselves only; max_attn_len > 0, a window; the last min_full_attn_seq_len ids are
      exempt from it; contextual_seq_len leading positions that see the whole history. 0 turns each off.
    - Dropout keeps weight (i, h, j) iff `lane_bits(token_hash(dropout_seed, row_keys[i]), h * n + j)` is at least
      floor(dropout_rate * 2^32), and divides what it keeps by 1 - dropout_rate. row_keys int64 (T,), default 0..T-1.
    - sort_by_length: start with the longest rows, so that none is left to a single worker at the end (on a GPU; the CPU
      always does). Changes no result.

    Gradients: q, k, v, position_weights, time_weights; the same bits in every run, as nothing is summed in an order
    that scheduling decides. On a CPU bfloat16 and float16 are computed in float32 and rounded once; on a GPU matrix
    products take them as they are and accumulate in float32, the weights being rounded to the type of v.
    Raises ValueError for shapes and types that do not fit and, on CPU, for rows longer than max_seq_len and offsets
    out of range; a GPU is not asked, which would make it wait: what lies past max_seq_len in a row is NaN there.
    """
    x = Inputs(
        *(q_THK, k_THK, v_THV, position_weights, time_weights, offsets, query_times, key_times, num_targets),
        scale if isinstance(scale, Tensor) else None,
        row_keys,
    )
    s = Settings(
        max_seq_len=max_seq_len,
        max_attn_len=max_attn_len,
        contextual_seq_len=contextual_seq_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        dropout_seed=dropout_seed,
        sort_by_length=sort_by_length,
        alpha=alpha,
        scale=checks.constant_scale(scale, max_seq_len),
        dropout_rate=dropout_rate,
    )
    checks.attention(x, s)
    result: Tensor = _attention(x, s, backend=backend)
    return result


def hstu_attention_cached(
    q_QHK: Tensor,
    q_offsets: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_offsets: Tensor,
    *,
    max_seq_len: int,
    k_QHK: Tensor | None = None,
    v_QHV: Tensor | None = None,
    cache_lengths: Tensor | None = None,
    alpha: float = 1.0,
    scale: float | Tensor | None = None,
    position_weights: Tensor | None = None,
    time_weights: Tensor | None = None,
    query_times: Tensor | None = None,
    cache_times: Tensor | None = None,
    key_times: Tensor | None = None,
    num_targets: Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    min_full_attn_seq_len: int = 0,
    max_queries: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The last rows of `hstu_attention`: new queries, one or many a row, against keys and values kept from before.

    Row b holds the `cache_lengths[b]` keys at k_cache[cache_offsets[b]:] (default: all up to cache_offsets[b + 1], so a
    cache may have room to grow) and, where k_QHK and v_QHV are given, the new ones of its queries behind them. Its
    queries, q_QHK[q_offsets[b]:q_offsets[b + 1]], are the last positions of that row. Returns (Q, H, V), equal to the
    last q_offsets[b + 1] - q_offsets[b] rows of `hstu_attention` on the row as a whole: incremental inference passes
    the new events, M-FALCON (arXiv 2402.17152, section 3.4) a microbatch of candidates with num_targets. Nothing cached
    is copied or computed again; the cost grows with queries x keys.

    q_QHK, k_QHK (Q, H, K), v_QHV (Q, H, V), k_cache (S, H, K), v_cache (S, H, V), one floating point type; offsets
    int64 (B + 1,), counts of queries may differ and be 0; cache_lengths int64 (B,). query_times and key_times int64
    (Q,): the queries' times as queries and as keys; cache_times int64 (S,). num_targets int64 (B,) counts the whole
    row's targets. max_queries: the most queries of a row, where the caller knows it; a GPU launches for Q otherwise.
    The rest as in `hstu_attention`. No gradient, no dropout.
    Raises ValueError for shapes and types that do not fit and, on CPU, for rows longer than max_seq_len.
    """
    x = CachedInputs(
        *(q_QHK, k_cache, v_cache, k_QHK, v_QHV, position_weights, time_weights, q_offsets, cache_offsets),
        *(cache_lengths, query_times, cache_times, key_times, num_targets),
        scale if isinstance(scale, Tensor) else None,
    )
    s = Settings(
        max_seq_len=max_seq_len,
        max_attn_len=max_attn_len,
        contextual_seq_len=contextual_seq_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        max_queries=min(q_QHK.shape[0] if max_queries is None else max_queries, max_seq_len),
        alpha=alpha,
        scale=checks.constant_scale(scale, max_seq_len),
    )
    checks.cached_attention(x, s)
    result: Tensor = _cached(x, s, backend=backend)
    return result
