"""Pointwise SiLU attention of HSTU on jagged rows: relative bias, the whole mask contract, dropout, subsets of queries.

Source: "Actions Speak Louder than Words" (arXiv 2402.17152), section 3.3. The bias (a position table plus a table over
bucketed time differences) is read inside the kernel, so that no N x N tensor exists in forward or backward. Differences
from the published code: the normalizer is the constant `max_seq_len` or what the caller passes, never the longest row
of the batch; time buckets are exact integers (`ops.hstu_attention.buckets`); attention dropout works, and is the same
on every back-end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.hstu_attention import cpu, reference
from ops.hstu_attention.buckets import time_bucket, time_bucket_thresholds

__all__ = ["hstu_attention", "time_bucket", "time_bucket_thresholds"]

_attention = Op(
    "hstu_attention",
    reference.hstu_attention,
    {"cpu": Implementation(cpu.hstu_attention, cpu.refuses)},
)


def _fail(what: str, got: object, expected: str) -> None:
    raise ValueError(f"hstu_attention: {what}: got {got}, expected {expected}")


def _check_int64(name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None and (tensor.dtype != torch.int64 or tuple(tensor.shape) != (length,)):
        _fail(name, f"{tensor.dtype} {tuple(tensor.shape)}", f"torch.int64 ({length},)")


def _check_table(name: str, table: Tensor | None, heads: int, length: int | None) -> None:
    if table is None:
        return
    shape = tuple(table.shape)
    wrong_heads = table.dim() not in (1, 2) or (table.dim() == 2 and shape[0] != heads)
    if wrong_heads or shape[-1] == 0 or (length is not None and shape[-1] != length):
        last = "buckets + 1" if length is None else str(length)
        _fail(name, shape, f"({last},) or ({heads}, {last})")


def _check_values(q: Tensor, k: Tensor, v: Tensor, query_rows: Tensor | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        _fail("q, k, v", f"{q.dim()}, {k.dim()} and {v.dim()} dimensions", "three each: (T, heads, dim)")
    if q.shape[1:] != k.shape[1:]:
        _fail("q", tuple(q.shape), f"the heads and dim of k, {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        _fail("v", tuple(v.shape), f"the rows and heads of k, {tuple(k.shape)}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        _fail("dtypes of q, k, v", f"{q.dtype}, {k.dtype}, {v.dtype}", "one floating point type")
    if query_rows is None:
        if q.shape[0] != k.shape[0]:
            _fail("rows of q", q.shape[0], f"the {k.shape[0]} of k (pass query_rows for a subset of queries)")
        return
    _check_int64("query_rows", query_rows, q.shape[0])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _fail("query_rows", "inputs that require gradients", "forward only; try torch.no_grad()")


def _check_scale(scale: float | Tensor | None, batch: int) -> None:
    if not isinstance(scale, Tensor):
        return
    if tuple(scale.shape) != (batch,) or not scale.is_floating_point():
        _fail("scale", f"{scale.dtype} {tuple(scale.shape)}", f"a number or floats ({batch},), one a jagged row")
    if scale.requires_grad:
        _fail("scale", "a tensor that requires gradients", "a constant; try scale.detach()")


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
    - query_rows int64 (Q,): compute only these flat rows, in any order and number a jagged row. q_THK, query_times and
      row_keys (default: query_rows) then hold one entry a query, and the result is (Q, H, V). Forward only.

    Gradients: q, k, v, position_weights, time_weights. bfloat16 and float16 are computed in float32. Raises ValueError
    for shapes and types that do not fit and, on CPU, for rows longer than max_seq_len and offsets or query_rows out of
    range.
    """
    _check_values(q_THK, k_THK, v_THV, query_rows)
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1:
        _fail("offsets", f"{offsets.dtype} {tuple(offsets.shape)}", "torch.int64 (B + 1,)")
    batch, heads = offsets.shape[0] - 1, q_THK.shape[1]
    if max_seq_len < 1:
        _fail("max_seq_len", max_seq_len, "at least 1")
    if not 0.0 <= dropout_rate < 1.0:
        _fail("dropout_rate", dropout_rate, "0 <= rate < 1")
    _check_scale(scale, batch)
    _check_table("position_weights", position_weights, heads, 2 * max_seq_len - 1)
    _check_table("time_weights", time_weights, heads, None)
    if time_weights is not None and (query_times is None or key_times is None):
        _fail("time_weights", "no query_times or no key_times", "both times")
    _check_int64("query_times", query_times, q_THK.shape[0])
    _check_int64("key_times", key_times, k_THK.shape[0])
    _check_int64("row_keys", row_keys, q_THK.shape[0])
    _check_int64("num_targets", num_targets, batch)
    for name, value in (
        ("max_attn_len", max_attn_len),
        ("contextual_seq_len", contextual_seq_len),
        ("min_full_attn_seq_len", min_full_attn_seq_len),
    ):
        if value < 0:
            _fail(name, value, "at least 0")
    result: Tensor = _attention(
        q_THK,
        k_THK,
        v_THV,
        offsets,
        max_seq_len=max_seq_len,
        alpha=alpha,
        scale=scale,
        position_weights=position_weights,
        time_weights=time_weights,
        query_times=query_times,
        key_times=key_times,
        num_targets=num_targets,
        max_attn_len=max_attn_len,
        contextual_seq_len=contextual_seq_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        row_keys=row_keys,
        query_rows=query_rows,
        backend=backend,
    )
    return result
