"""Refuses arguments of HSTU attention that do not fit, in one line that says what was got and what was expected.

Only shapes, types and host numbers are looked at: values on a GPU are never waited for.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ops.hstu_attention.arguments import CachedInputs, Inputs, Settings
from ops.tracing import check_offsets


def _fail(what: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"hstu_attention: {what}: got {got}, expected {expected}")


def _int64(name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None and (tensor.dtype != torch.int64 or tuple(tensor.shape) != (length,)):
        _fail(name, f"{tensor.dtype} {tuple(tensor.shape)}", f"torch.int64 ({length},)")


def _offsets(name: str, offsets: Tensor) -> int:
    """Checks the offsets and returns the number of rows."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1:
        _fail(name, f"{offsets.dtype} {tuple(offsets.shape)}", "torch.int64 (B + 1,)")
    return offsets.shape[0] - 1


def _table(name: str, table: Tensor | None, heads: int, length: int | None) -> None:
    if table is None:
        return
    shape = tuple(table.shape)
    wrong_heads = table.dim() not in (1, 2) or (table.dim() == 2 and shape[0] != heads)
    if wrong_heads or shape[-1] == 0 or (length is not None and shape[-1] != length):
        last = "buckets + 1" if length is None else str(length)
        _fail(name, shape, f"({last},) or ({heads}, {last})")


def _heads_and_dims(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        _fail("q, k, v", f"{q.dim()}, {k.dim()} and {v.dim()} dimensions", "three each: (T, heads, dim)")
    if q.shape[1:] != k.shape[1:]:
        _fail("q", tuple(q.shape), f"the heads and dim of k, {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        _fail("v", tuple(v.shape), f"the rows and heads of k, {tuple(k.shape)}")
    if 0 in (*q.shape[1:], v.shape[2]):
        _fail("heads and dims of q and v", f"{tuple(q.shape[1:])} and {tuple(v.shape[1:])}", "at least one each")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        _fail("dtypes of q, k, v", f"{q.dtype}, {k.dtype}, {v.dtype}", "one floating point type")


def constant_scale(scale: float | Tensor | None, max_seq_len: int) -> float:
    """What weights are multiplied by where there is no value a row."""
    if max_seq_len < 1:
        _fail("max_seq_len", max_seq_len, "at least 1")
    return 1.0 / max_seq_len if scale is None or isinstance(scale, Tensor) else float(scale)


def _shared(x: Inputs | CachedInputs, s: Settings, batch: int) -> None:
    heads = x.q.shape[1]
    if not isinstance(s.alpha, int | float):
        _fail("alpha", type(s.alpha).__name__, "a number; multiply q by what is a tensor")
    if x.scales is not None:
        if tuple(x.scales.shape) != (batch,) or not x.scales.is_floating_point():
            got = f"{x.scales.dtype} {tuple(x.scales.shape)}"
            _fail("scale", got, f"a number or floats ({batch},), one a jagged row")
        if x.scales.requires_grad:
            _fail("scale", "a tensor that requires gradients", "a constant; try scale.detach()")
    _table("position_weights", x.position_weights, heads, 2 * s.max_seq_len - 1)
    _table("time_weights", x.time_weights, heads, None)
    _int64("num_targets", x.num_targets, batch)
    for name in ("max_attn_len", "contextual_seq_len", "min_full_attn_seq_len"):
        if getattr(s, name) < 0:
            _fail(name, getattr(s, name), "at least 0")


def attention(x: Inputs, s: Settings) -> None:
    """Raises ValueError where the arguments of `hstu_attention` do not fit."""
    _heads_and_dims(x.q, x.k, x.v)
    if x.q.shape[0] != x.k.shape[0]:
        _fail("rows of q", x.q.shape[0], f"the {x.k.shape[0]} of k; try hstu_attention_cached for some of the queries")
    if not 0.0 <= s.dropout_rate < 1.0:
        _fail("dropout_rate", s.dropout_rate, "0 <= rate < 1")
    _shared(x, s, _offsets("offsets", x.offsets))
    check_offsets("hstu_attention: offsets", x.offsets, x.q.shape[0])
    if x.time_weights is not None and (x.query_times is None or x.key_times is None):
        _fail("time_weights", "no query_times or no key_times", "both times")
    for name in ("query_times", "key_times", "row_keys"):
        _int64(name, getattr(x, name), x.q.shape[0])


def cached_attention(x: CachedInputs, s: Settings) -> None:
    """Raises ValueError where the arguments of `hstu_attention_cached` do not fit."""
    _heads_and_dims(x.q, x.k_cache, x.v_cache)
    queries, cached = x.q.shape[0], x.k_cache.shape[0]
    if (x.k is None) != (x.v is None):
        _fail("k_QHK and v_QHV", "one of them", "both or neither")
    if x.k is not None and x.v is not None:
        _heads_and_dims(x.q, x.k, x.v)
        if x.k.shape[0] != queries or x.v.shape[2] != x.v_cache.shape[2] or x.k.dtype != x.k_cache.dtype:
            got = f"{x.k.dtype} {tuple(x.k.shape)} and {tuple(x.v.shape)}"
            _fail("k_QHK and v_QHV", got, f"{x.q.dtype} with the {queries} rows of q and the dims of the cache")
    batch = _offsets("q_offsets", x.q_offsets)
    if _offsets("cache_offsets", x.cache_offsets) != batch:
        _fail("cache_offsets", tuple(x.cache_offsets.shape), f"the rows of q_offsets, ({batch + 1},)")
    check_offsets("hstu_attention: q_offsets", x.q_offsets, queries)
    check_offsets("hstu_attention: cache_offsets", x.cache_offsets, cached)
    if s.max_queries < 1 and queries > 0:
        _fail("max_queries", s.max_queries, "at least 1")
    _shared(x, s, batch)
    if x.time_weights is not None:
        missing = x.query_times is None or x.cache_times is None or (x.k is not None and x.key_times is None)
        if missing:
            _fail("time_weights", "a missing time", "query_times, cache_times and, with k_QHK, key_times")
    _int64("cache_lengths", x.cache_lengths, batch)
    _int64("query_times", x.query_times, queries)
    _int64("key_times", x.key_times, queries)
    _int64("cache_times", x.cache_times, cached)
    differentiable = (x.q, x.k_cache, x.v_cache, x.k, x.v, x.position_weights, x.time_weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        _fail("hstu_attention_cached", "inputs that require gradients", "forward only; try torch.no_grad()")
