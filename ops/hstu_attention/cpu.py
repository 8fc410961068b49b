"""The C++ form of HSTU attention (`cpu.cpp`), as custom operators that autograd and `torch.compile` see through.

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
from ops.hstu_attention.buckets import time_bucket_thresholds
from ops.random import drop_threshold

_SOURCE = Path(__file__).with_name("cpu.cpp")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATUS = {
    1: "offsets: got values that decrease, or do not go from 0 to the rows of k, expected a cumulative sum of lengths",
    2: "offsets: got a row longer than max_seq_len, expected at most max_seq_len; try a larger one",
    3: "query_rows: got a value outside the rows of k, expected 0 <= row < T",
}

_POINTERS_IN = (
    *("q", "k", "v", "scales", "position_weights", "time_weights"),
    *("offsets", "query_times", "key_times", "num_targets", "row_keys", "query_rows", "thresholds"),
)
_POINTERS_OUT = ("out", "grad_out", "grad_q", "grad_k", "grad_v", "grad_position", "grad_time")
_INTEGERS = (
    *("batch", "total", "queries", "heads", "key_dim", "value_dim"),
    *("q_stride", "k_stride", "v_stride", "grad_out_stride"),
    *("max_seq_len", "position_heads", "time_heads", "num_buckets"),
    *("max_attn_len", "contextual_seq_len", "min_full_attn_seq_len"),
    *("dropout", "dropout_threshold", "dropout_seed", "threads"),
)


class _Problem(ctypes.Structure):
    """`Problem` of cpu.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS_IN, *_POINTERS_OUT)),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("alpha", "scale", "dropout_factor")),
    ]


def refuses(*args: Any, **kwargs: Any) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None; without arguments, about this machine."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return f"a tensor is on {value.device.type}"
    if args and args[0].dtype not in _DTYPES:
        return f"no kernel for {args[0].dtype}"
    return _machine_refuses()


@torch.compiler.assume_constant_result
def _machine_refuses() -> str | None:
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
    library = native.library(_SOURCE)
    assert library is not None
    problem = _Problem()
    for field, value in fields.items():
        setattr(problem, field, value.data_ptr() if isinstance(value, Tensor) else value)
    run = getattr(library, name)
    run.restype = ctypes.c_int64
    status = run(ctypes.byref(problem), ctypes.c_int64(dtype == torch.float64))
    if status != 0:
        raise ValueError(f"hstu_attention: {_STATUS[status]}")


def _table_heads(table: Tensor | None) -> int:
    return table.shape[0] if table is not None and table.dim() == 2 else 1


def _fields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seq_len: int,
    alpha: float,
    scale: float,
    scales: Tensor | None,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    min_full_attn_seq_len: int,
    dropout_rate: float,
    dropout_seed: int,
    row_keys: Tensor | None,
    query_rows: Tensor | None,
) -> dict[str, Any]:
    """What forward and backward share of `_Problem`; the tensors in it must outlive the call."""
    dtype = _compute_dtype(q.dtype)

    def contiguous(tensor: Tensor | None, wanted: torch.dtype = torch.int64) -> Tensor | None:
        return None if tensor is None else tensor.to(wanted).contiguous()

    q, k, v = _rows(q, dtype), _rows(k, dtype), _rows(v, dtype)
    num_buckets = 0 if time_weights is None else time_weights.shape[-1] - 1
    return {
        "q": q,
        "k": k,
        "v": v,
        "scales": contiguous(scales, dtype),
        "position_weights": contiguous(position_weights, dtype),
        "time_weights": contiguous(time_weights, dtype),
        "offsets": contiguous(offsets),
        "query_times": contiguous(query_times),
        "key_times": contiguous(key_times),
        "num_targets": contiguous(num_targets),
        "row_keys": contiguous(row_keys),
        "query_rows": contiguous(query_rows),
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
        "max_seq_len": max_seq_len,
        "position_heads": _table_heads(position_weights),
        "time_heads": _table_heads(time_weights),
        "num_buckets": num_buckets,
        "max_attn_len": max_attn_len,
        "contextual_seq_len": contextual_seq_len,
        "min_full_attn_seq_len": min_full_attn_seq_len,
        "dropout": int(dropout_rate > 0.0),
        "dropout_threshold": drop_threshold(dropout_rate),
        "dropout_seed": dropout_seed,
        "threads": torch.get_num_threads(),
        "alpha": alpha,
        "scale": scale,
        "dropout_factor": 1.0 / (1.0 - dropout_rate),
    }


@torch.library.custom_op("gr::hstu_attention_cpu", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seq_len: int,
    alpha: float,
    scale: float,
    scales: Tensor | None,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    min_full_attn_seq_len: int,
    dropout_rate: float,
    dropout_seed: int,
    row_keys: Tensor | None,
    query_rows: Tensor | None,
) -> Tensor:
    if query_rows is not None and query_rows.numel() == 0:
        # An empty tensor has a null address, which the kernel reads as "all rows".
        return v.new_empty(0, q.shape[1], v.shape[2])
    dtype = _compute_dtype(q.dtype)
    fields = _fields(
        q,
        k,
        v,
        offsets,
        max_seq_len,
        alpha,
        scale,
        scales,
        position_weights,
        time_weights,
        query_times,
        key_times,
        num_targets,
        max_attn_len,
        contextual_seq_len,
        min_full_attn_seq_len,
        dropout_rate,
        dropout_seed,
        row_keys,
        query_rows,
    )
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=dtype)
    _call("hstu_attention_forward", dtype, {**fields, "out": out})
    return out.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("gr::hstu_attention_cpu_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seq_len: int,
    alpha: float,
    scale: float,
    scales: Tensor | None,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    min_full_attn_seq_len: int,
    dropout_rate: float,
    dropout_seed: int,
    row_keys: Tensor | None,
    need_position: bool,
    need_time: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(q.dtype)
    fields = _fields(
        q,
        k,
        v,
        offsets,
        max_seq_len,
        alpha,
        scale,
        scales,
        position_weights,
        time_weights,
        query_times,
        key_times,
        num_targets,
        max_attn_len,
        contextual_seq_len,
        min_full_attn_seq_len,
        dropout_rate,
        dropout_seed,
        row_keys,
        None,
    )
    grad_rows = _rows(grad_out, dtype)
    grads = {f"grad_{name}": torch.empty(x.shape, dtype=dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    tables = {}
    if need_position and position_weights is not None:
        tables["grad_position"] = torch.empty(position_weights.shape, dtype=dtype)
    if need_time and time_weights is not None:
        tables["grad_time"] = torch.empty(time_weights.shape, dtype=dtype)
    gradient = {"grad_out": grad_rows, "grad_out_stride": grad_rows.stride(0)}
    _call("hstu_attention_backward", dtype, {**fields, **gradient, **grads, **tables})

    def table_grad(name: str, table: Tensor | None) -> Tensor:
        return tables[name].to(table.dtype) if name in tables and table is not None else q.new_empty(0)

    return (
        grads["grad_q"].to(q.dtype),
        grads["grad_k"].to(q.dtype),
        grads["grad_v"].to(q.dtype),
        table_grad("grad_position", position_weights),
        table_grad("grad_time", time_weights),
    )


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    position_weights, time_weights, need_position, need_time = rest[5], rest[6], rest[-2], rest[-1]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        position_weights.new_empty(position_weights.shape) if need_position else q.new_empty(0),
        time_weights.new_empty(time_weights.shape) if need_time else q.new_empty(0),
    )


# Places in the argument list of `_forward` that hold tensors; backward is handed all of them but query_rows.
_TENSOR_PLACES = (0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 18)
_POSITION_PLACE, _TIME_PLACE, _ARGUMENTS = 8, 9, 20


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    assert len(inputs) == _ARGUMENTS
    ctx.save_for_backward(*(inputs[i] for i in _TENSOR_PLACES))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs[:-1]]


def _autograd_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    arguments = list(ctx.others)
    for place, tensor in zip(_TENSOR_PLACES, ctx.saved_tensors, strict=True):
        arguments[place] = tensor
    need_position, need_time = ctx.needs_input_grad[_POSITION_PLACE], ctx.needs_input_grad[_TIME_PLACE]
    grad_q, grad_k, grad_v, grad_position, grad_time = _backward(grad_out, *arguments, need_position, need_time)
    grads: list[Tensor | None] = [None] * _ARGUMENTS
    grads[:3] = grad_q, grad_k, grad_v
    if need_position:
        grads[_POSITION_PLACE] = grad_position
    if need_time:
        grads[_TIME_PLACE] = grad_time
    return tuple(grads)


torch.library.register_autograd("gr::hstu_attention_cpu", _autograd_backward, setup_context=_setup_context)


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
    """`ops.hstu_attention.hstu_attention` by the C++ kernel."""
    scales = scale if isinstance(scale, Tensor) else None
    constant = 1.0 / max_seq_len if scale is None or isinstance(scale, Tensor) else float(scale)
    # torch passes integers as signed 64 bits; the generator reads the same 64 bits unsigned.
    seed = dropout_seed & (2**64 - 1)
    result: Tensor = _forward(
        q_THK,
        k_THK,
        v_THV,
        offsets,
        max_seq_len,
        alpha,
        constant,
        scales,
        position_weights,
        time_weights,
        query_times if time_weights is not None else None,
        key_times if time_weights is not None else None,
        num_targets,
        max_attn_len,
        contextual_seq_len,
        min_full_attn_seq_len,
        dropout_rate,
        seed - 2**64 if seed >= 2**63 else seed,
        row_keys,
        query_rows,
    )
    return result
