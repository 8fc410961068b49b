"""Embeddings of a token's position and of the time since it, added to the scaled token embeddings in one pass.

    out[t] = alpha * x[t] + position_table[index[t]] + time_table[bucket[t]]

For the token at position p of a row of length L, with c = contextual_seq_len, num_targets n of the row, each taking one
token, or two where targets and their actions are interleaved:

    index = p                                       count_from = "oldest"
    index = p where p < c, else h - min(p, h) + c   count_from = "newest", h = L - n (or L - 2n)
    bucket = trunc(f(max(query time - time, 0) / time_unit)),   f the square root or the natural logarithm

Counted from the newest event, what just happened has one index in rows of every length, and all targets share that of
distance 0. An index past the table is its last row, and a bucket past the time table its last. The query time is the
time of the row's last token. Buckets are integer arithmetic, equal on every device (`ops.position_embedding.buckets`).

Source: `add_timestamp_positional_embeddings` of the published HSTU code; counting from the oldest, without times, is
the input of "Actions Speak Louder than Words" (arXiv 2402.17152), public experiments. Difference: the number of buckets
follows from the rows of the time table in every form; the published PyTorch form took it from the embedding's width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.position_embedding import gpu, operator, reference
from ops.position_embedding.buckets import TimeScale, time_bucket
from ops.tracing import check_offsets

__all__ = ["position_embedding", "time_bucket"]

CountFrom = Literal["newest", "oldest"]

_position_embedding = Op(
    "position_embedding",
    reference.position_embedding,
    {"triton": Implementation(partial(operator.position_embedding, triton=True), gpu.refuses)},
)


def _fail(what: str, got: object, expected: str) -> None:
    raise ValueError(f"position_embedding {what}: got {got}, expected {expected}")


def _check_tensor(name: str, x: Tensor | None, dtype: torch.dtype | None, *shape: int | str) -> None:
    """dtype None: any floats. A size given by its name may be any but 0."""
    if x is None:
        return
    fits = x.is_floating_point() if dtype is None else x.dtype == dtype
    wanted = [got if isinstance(size, str) and got else size for size, got in zip(shape, x.shape, strict=False)]
    if not fits or x.dim() != len(shape) or list(x.shape) != wanted:
        kind, sizes = "floats" if dtype is None else str(dtype), ", ".join(map(str, shape))
        _fail(name, f"{x.dtype} {tuple(x.shape)}", f"{kind} of ({sizes})")


def position_embedding(
    x_TD: Tensor,
    offsets: Tensor,
    position_table_PD: Tensor,
    *,
    alpha: float = 1.0,
    count_from: CountFrom = "newest",
    num_targets: Tensor | None = None,
    interleaved_targets: bool = False,
    contextual_seq_len: int = 0,
    time_table: Tensor | None = None,
    timestamps: Tensor | None = None,
    time_unit: float = 60.0,
    time_scale: TimeScale = "sqrt",
    backend: str | None = None,
) -> Tensor:
    """alpha * x + the position's embedding + that of the elapsed time: (T, D) of x's dtype, formula above.

    x_TD floats (T, D); offsets int64 (B + 1,), from 0 to T. position_table floats (P, D); time_table floats
    (buckets + 1, D) with timestamps int64 (T,), in the seconds of which time_unit is a number: 60.0 counts minutes.
    num_targets int64 (B,): trailing targets of each row. num_targets, interleaved_targets and contextual_seq_len need
    count_from = "newest".

    Gradients: x, position_table and time_table; on a GPU those of the tables are sums in a fixed order, without
    atomics. bfloat16 and float16 are added in float32 and rounded once. Nothing waits for the GPU.
    Raises ValueError for shapes, types and options that do not fit.
    """
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        _fail("x", f"{x_TD.dtype} {tuple(x_TD.shape)}", "floats of (T, D)")
    total, width = x_TD.shape
    _check_tensor("offsets", offsets, torch.int64, "B + 1")
    check_offsets("position_embedding offsets", offsets, total)
    _check_tensor("position_table", position_table_PD, None, "P", width)
    _check_tensor("time_table", time_table, None, "buckets + 1", width)
    _check_tensor("timestamps", timestamps, torch.int64, total)
    _check_tensor("num_targets", num_targets, torch.int64, offsets.shape[0] - 1)
    if (time_table is None) != (timestamps is None):
        missing = "timestamps" if timestamps is None else "time_table"
        _fail(missing, None, "time_table and timestamps together")
    if count_from not in get_args(CountFrom):
        _fail("count_from", repr(count_from), "'newest' or 'oldest'")
    if count_from == "oldest" and (num_targets is not None or interleaved_targets or contextual_seq_len):
        _fail("count_from", "'oldest' with targets or a context", "'newest'")
    if contextual_seq_len < 0:
        _fail("contextual_seq_len", contextual_seq_len, "0 or more")
    if time_scale not in get_args(TimeScale):
        _fail("time_scale", repr(time_scale), "'sqrt' or 'log'")
    if not (time_unit > 0 and math.isfinite(time_unit)):
        _fail("time_unit", time_unit, "seconds, more than 0")
    out_TD: Tensor = _position_embedding(
        x_TD,
        offsets,
        position_table_PD,
        time_table,
        timestamps,
        num_targets,
        alpha=float(alpha),
        newest=count_from == "newest",
        stride=2 if interleaved_targets else 1,
        context=contextual_seq_len,
        unit=float(time_unit),
        scale=time_scale,
        backend=backend,
    )
    return out_TD
