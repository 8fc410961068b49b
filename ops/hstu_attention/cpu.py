"""The C++ form of HSTU attention (`cpu.cpp`).

float32 and float64 run as they are; bfloat16 and float16 are widened to float32 around the call. Rows of q, k, v and of
the incoming gradient may be strided (slices of one projection): only (head, dim) within a row must be contiguous.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.hstu_attention.arguments import CachedInputs, Inputs, Settings
from ops.hstu_attention.buckets import time_bucket_thresholds
from ops.random import drop_threshold

_SOURCE = Path(__file__).with_name("cpu.cpp")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATUS = {
    1: "offsets: got values that decrease, or do not go from 0 to the rows of k, expected a cumulative sum of lengths",
    2: "offsets: got a row longer than max_seq_len, expected at most max_seq_len; try a larger one",
    3: "q_offsets or cache_lengths: got values that do not fit the rows, expected a cumulative sum of counts from 0 to "
    "the rows of q, each at most its row, and lengths within cache_offsets",
}

_POINTERS_IN = (
    *("q", "k", "v", "scales", "position_weights", "time_weights"),
    *("offsets", "query_times", "key_times", "num_targets", "row_keys", "thresholds"),
    *("q_offsets", "row_lengths", "key_counts", "key_origins"),
)
_POINTERS_OUT = ("out", "grad_out", "grad_q", "grad_k", "grad_v", "grad_position", "grad_time")
_INTEGERS = (
    *("batch", "total", "queries", "heads", "key_dim", "value_dim"),
    *("q_stride", "k_stride", "v_stride", "grad_out_stride"),
    *("max_seq_len", "position_heads", "time_heads", "num_buckets"),
    *("max_attn_len", "contextual_seq_len", "min_full_attn_seq_len"),
    *("dropout", "dropout_threshold", "dropout_seed", "threads", "accumulate"),
)


class _Problem(ctypes.Structure):
    """`Problem` of cpu.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS_IN, *_POINTERS_OUT)),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("alpha", "scale", "dropout_factor")),
    ]


def refuses(x: Inputs | CachedInputs | None = None, *_: Any) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None; without arguments, about this machine."""
    for value in x or ():
        if value is not None and value.device.type != "cpu":
            return f"a tensor is on {value.device.type}"
    if x is not None and x.q.dtype not in _DTYPES:
        return f"no kernel for {x.q.dtype}"
    return native.reason(_SOURCE)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The (T, H, D) tensor in this type, copied only where (H, D) is not contiguous within a row."""
    tensor = tensor.to(dtype)
    heads, dim = tensor.shape[1:]
    dense = (dim == 1 or tensor.stride(2) == 1) and (heads == 1 or tensor.stride(1) == dim)
    return tensor if dense else tensor.contiguous()


def _call(name: str, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    """Fill a `_Problem` (tensors become addresses) and run one entry point; ValueError for offsets that do not fit."""
    problem = _Problem()
    for field, value in fields.items():
        setattr(problem, field, value.data_ptr() if isinstance(value, Tensor) else value)
    run = getattr(native.require(_SOURCE), name)
    run.restype = ctypes.c_int64
    status = run(ctypes.byref(problem), ctypes.c_int64(dtype == torch.float64))
    if status != 0:
        raise ValueError(f"hstu_attention: {_STATUS[status]}")


def _table_heads(table: Tensor | None) -> int:
    return table.shape[0] if table is not None and table.dim() == 2 else 1


def _fields(x: Inputs | CachedInputs, k: Tensor, v: Tensor, offsets: Tensor, s: Settings) -> dict[str, Any]:
    """What every call gives of `_Problem`; the tensors in it must outlive the call."""
    dtype = _compute_dtype(x.q.dtype)
    q, k, v = _rows(x.q, dtype), _rows(k, dtype), _rows(v, dtype)
    num_buckets = 0 if x.time_weights is None else x.time_weights.shape[-1] - 1
    return {
        "q": q,
        "k": k,
        "v": v,
        "scales": _contiguous(x.scales, dtype),
        "position_weights": _contiguous(x.position_weights, dtype),
        "time_weights": _contiguous(x.time_weights, dtype),
        "offsets": _contiguous(offsets),
        "query_times": _contiguous(x.query_times),
        "num_targets": _contiguous(x.num_targets),
        "thresholds": time_bucket_thresholds(num_buckets),
        "batch": offsets.shape[0] - 1,
        "total": k.shape[0],
        "queries": q.shape[0],
        "heads": q.shape[1],
        "key_dim": q.shape[2],
        "value_dim": v.shape[2],
        "q_stride": q.stride(0),
        "k_stride": k.stride(0),
        "v_stride": v.stride(0),
        "max_seq_len": s.max_seq_len,
        "position_heads": _table_heads(x.position_weights),
        "time_heads": _table_heads(x.time_weights),
        "num_buckets": num_buckets,
        "max_attn_len": s.max_attn_len,
        "contextual_seq_len": s.contextual_seq_len,
        "min_full_attn_seq_len": s.min_full_attn_seq_len,
        "dropout": int(s.dropout_rate > 0.0),
        "dropout_threshold": drop_threshold(s.dropout_rate),
        "dropout_seed": s.dropout_seed,
        "threads": torch.get_num_threads(),
        "alpha": s.alpha,
        "scale": s.scale,
        "dropout_factor": 1.0 / (1.0 - s.dropout_rate),
    }


def _contiguous(tensor: Tensor | None, dtype: torch.dtype = torch.int64) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _own_rows(x: Inputs, s: Settings) -> dict[str, Any]:
    own = {"key_times": _contiguous(x.key_times), "row_keys": _contiguous(x.row_keys)}
    return {**_fields(x, x.k, x.v, x.offsets, s), **own}


def forward(x: Inputs, s: Settings) -> Tensor:
    dtype = _compute_dtype(x.q.dtype)
    out = torch.empty(x.v.shape, dtype=dtype)
    _call("hstu_attention_forward", dtype, {**_own_rows(x, s), "out": out})
    return out.to(x.v.dtype)


def backward(
    grad_out: Tensor, x: Inputs, s: Settings, need_position: bool, need_time: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and both tables, empty ones for tables that are absent or not needed."""
    dtype = _compute_dtype(x.q.dtype)
    grad_rows = _rows(grad_out, dtype)
    fields = {**_own_rows(x, s), "grad_out": grad_rows, "grad_out_stride": grad_rows.stride(0)}
    grads = {f"grad_{name}": torch.empty(t.shape, dtype=dtype) for name, t in (("q", x.q), ("k", x.k), ("v", x.v))}
    if need_position and x.position_weights is not None:
        grads["grad_position"] = torch.empty(x.position_weights.shape, dtype=dtype)
    if need_time and x.time_weights is not None:
        grads["grad_time"] = torch.empty(x.time_weights.shape, dtype=dtype)
    _call("hstu_attention_backward", dtype, {**fields, **grads})

    def finished(name: str, like: Tensor | None) -> Tensor:
        return grads[name].to(like.dtype) if name in grads and like is not None else x.q.new_empty(0)

    return (
        finished("grad_q", x.q),
        finished("grad_k", x.k),
        finished("grad_v", x.v),
        finished("grad_position", x.position_weights),
        finished("grad_time", x.time_weights),
    )


def cached(x: CachedInputs, s: Settings) -> Tensor:
    """Cached keys first, then the new ones: without a softmax their parts of the output simply add."""
    dtype = _compute_dtype(x.q.dtype)
    out = torch.empty(x.q.shape[0], x.q.shape[1], x.v_cache.shape[2], dtype=dtype)
    if out.numel() == 0:
        return out.to(x.v_cache.dtype)
    q_counts = x.q_offsets.diff()
    cached_lengths = x.cache_offsets.diff() if x.cache_lengths is None else x.cache_lengths.contiguous()
    shared = {
        "q_offsets": _contiguous(x.q_offsets),
        "row_lengths": cached_lengths if x.k is None else cached_lengths + q_counts,
        "out": out,
    }
    first = {"key_times": _contiguous(x.cache_times), "key_counts": cached_lengths}
    cache = {**_fields(x, x.k_cache, x.v_cache, x.cache_offsets, s), **shared, **first}
    _call("hstu_attention_forward", dtype, cache)
    if x.k is not None and x.v is not None:
        behind = {"key_times": _contiguous(x.key_times), "key_origins": cached_lengths, "accumulate": 1}
        _call("hstu_attention_forward", dtype, {**_fields(x, x.k, x.v, x.q_offsets, s), **shared, **behind})
    return out.to(x.v_cache.dtype)
