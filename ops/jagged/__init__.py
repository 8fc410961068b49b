"""Jagged rows: B rows of values laid end to end, (T, ...), with int64 offsets (B + 1,) from 0 to T.

Row b is values[offsets[b]:offsets[b + 1]]. These ops make and read offsets, pad and unpad rows, join and cut them, and
multiply each row by a matrix of its own. Values are moved, not computed with: bool, integer and float types keep every
bit, and gradients are the opposite move. No op loops over rows in Python, and none waits for a GPU, which is why sizes
that only the offsets know are arguments; the one exception says so. Offsets are trusted on a GPU and checked on a CPU.

Sources: the jagged operators of FBGEMM, and `concat_2D_jagged`, `split_2D_jagged` and `jagged_dense_bmm_broadcast_add`
of the published HSTU code, here for any trailing dimensions and without the longest length on the host.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.jagged import cpu, fbgemm, gpu, operator, reference
from ops.tracing import check_offsets

__all__ = [
    "concat_jagged",
    "jagged_dense_bmm",
    "jagged_to_padded",
    "last_n",
    "lengths_to_offsets",
    "offsets_to_lengths",
    "padded_to_jagged",
    "positions",
    "rows",
    "split_jagged",
]

_lengths_to_offsets = Op(
    "lengths_to_offsets",
    reference.lengths_to_offsets,
    {
        "fbgemm": Implementation(partial(operator.lengths_to_offsets, backend="fbgemm"), fbgemm.lengths_refuses),
        "triton": Implementation(partial(operator.lengths_to_offsets, backend="triton"), gpu.scan_refuses),
    },
)
_offsets_to_lengths = Op("offsets_to_lengths", reference.offsets_to_lengths)
_rows = Op(
    "jagged_rows",
    reference.rows,
    {"triton": Implementation(partial(operator.rows, backend="triton"), gpu.refuses)},
)
_positions = Op(
    "jagged_positions",
    reference.positions,
    {
        "fbgemm": Implementation(partial(operator.positions, backend="fbgemm"), fbgemm.positions_refuses),
        "triton": Implementation(partial(operator.positions, backend="triton"), gpu.refuses),
    },
)
_jagged_to_padded = Op(
    "jagged_to_padded",
    reference.jagged_to_padded,
    {
        "fbgemm": Implementation(partial(operator.jagged_to_padded, backend="fbgemm"), fbgemm.padded_refuses),
        "triton": Implementation(partial(operator.jagged_to_padded, backend="triton"), gpu.refuses),
        "cpu": Implementation(partial(operator.jagged_to_padded, backend="cpu"), cpu.refuses),
    },
)
_padded_to_jagged = Op(
    "padded_to_jagged",
    reference.padded_to_jagged,
    {
        "fbgemm": Implementation(partial(operator.padded_to_jagged, backend="fbgemm"), fbgemm.padded_refuses),
        "triton": Implementation(partial(operator.padded_to_jagged, backend="triton"), gpu.refuses),
        "cpu": Implementation(partial(operator.padded_to_jagged, backend="cpu"), cpu.refuses),
    },
)
_concat_jagged = Op(
    "concat_jagged",
    reference.concat_jagged,
    {
        "triton": Implementation(partial(operator.concat_jagged, backend="triton"), gpu.refuses),
        "cpu": Implementation(partial(operator.concat_jagged, backend="cpu"), cpu.refuses),
    },
)
_split_jagged = Op(
    "split_jagged",
    reference.split_jagged,
    {
        "triton": Implementation(partial(operator.split_jagged, backend="triton"), gpu.refuses),
        "cpu": Implementation(partial(operator.split_jagged, backend="cpu"), cpu.refuses),
    },
)
_last_part = Op(
    "last_n",
    reference.last_part,
    {
        "triton": Implementation(partial(operator.last_part, backend="triton"), gpu.refuses),
        "cpu": Implementation(partial(operator.last_part, backend="cpu"), cpu.refuses),
    },
)
_jagged_dense_bmm = Op(
    "jagged_dense_bmm",
    reference.jagged_dense_bmm,
    {
        "triton": Implementation(partial(operator.jagged_dense_bmm, backend="triton"), gpu.refuses),
        "cpu": Implementation(partial(operator.jagged_dense_bmm, backend="cpu"), cpu.refuses),
    },
)


def lengths_to_offsets(lengths_B: Tensor, *, backend: str | None = None) -> Tensor:
    """Offsets int64 (B + 1,) of rows of these lengths: 0 and the running sums of lengths_B, int64 or int32 (B,)."""
    if lengths_B.dtype not in (torch.int64, torch.int32) or lengths_B.dim() != 1:
        _fail("lengths_to_offsets lengths", _shown(lengths_B), "int64 or int32 (B,)")
    offsets: Tensor = _lengths_to_offsets(lengths_B, backend=backend)
    return offsets


def offsets_to_lengths(offsets: Tensor, *, backend: str | None = None) -> Tensor:
    """Lengths int64 (B,) of the rows."""
    _check_offsets("offsets_to_lengths", offsets)
    lengths_B: Tensor = _offsets_to_lengths(offsets, backend=backend)
    return lengths_B


def rows(offsets: Tensor, total: int, *, backend: str | None = None) -> Tensor:
    """Row of each value, int64 (T,); total: the number of values, T, which is offsets[-1]."""
    _check_offsets("rows", offsets, total)
    rows_T: Tensor = _rows(offsets, total, backend=backend)
    return rows_T


def positions(offsets: Tensor, total: int, *, backend: str | None = None) -> Tensor:
    """Place of each value in its row, the first 0, int64 (T,); total: the number of values, T, which is offsets[-1]."""
    _check_offsets("positions", offsets, total)
    positions_T: Tensor = _positions(offsets, total, backend=backend)
    return positions_T


def jagged_to_padded(
    values: Tensor,
    offsets: Tensor,
    max_len: int,
    padding_value: bool | int | float = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Rows as a rectangle: values (T, ...) to (B, max_len, ...), rows cut at max_len or filled with padding_value.

    padding_value: any number the values' type holds, rounded to it; infinities and NaN for floats. Gradient: values,
    where nothing flows to what was cut. Raises ValueError for a padding that the type does not hold.
    """
    _check_values("jagged_to_padded values", values, 1)
    _check_offsets("jagged_to_padded", offsets, values.shape[0])
    _check_size("jagged_to_padded max_len", max_len)
    _check_padding(values.dtype, padding_value)
    padded: Tensor = _jagged_to_padded(values, offsets, max_len, padding_value, backend=backend)
    return padded


def padded_to_jagged(dense: Tensor, offsets: Tensor, total: int, *, backend: str | None = None) -> Tensor:
    """The filled part of a rectangle: dense (B, N, ...) to (T, ...), 0 at positions from N on of longer rows.

    total: the number of values, T, which is offsets[-1]. Gradient: dense, 0 outside the rows.
    """
    _check_offsets("padded_to_jagged", offsets, total)
    _check_values("padded_to_jagged dense", dense, 2, offsets.shape[0] - 1)
    values: Tensor = _padded_to_jagged(dense, offsets, total, backend=backend)
    return values


def concat_jagged(
    left: Tensor,
    right: Tensor,
    *,
    left_offsets: Tensor | None = None,
    right_offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row of `left` followed by the same row of `right`: values (T, ...) and their offsets.

    A side with offsets is jagged, (T_side, ...); one without is dense, (B, n, ...): n values a row. Both have one
    dtype and the same trailing dimensions. Gradients: left and right.
    """
    left, left_offsets = _jagged_side("left", left, left_offsets)
    right, right_offsets = _jagged_side("right", right, right_offsets)
    if left.dtype != right.dtype or left.shape[1:] != right.shape[1:]:
        _fail("concat_jagged right", _shown(right), f"dtype and trailing dimensions of left, {_shown(left)}")
    if left_offsets.shape != right_offsets.shape:
        _fail("concat_jagged right", f"{right_offsets.shape[0] - 1} rows", f"the {left_offsets.shape[0] - 1} of left")
    values: Tensor = _concat_jagged(left, right, left_offsets, right_offsets, backend=backend)
    return values, left_offsets + right_offsets


def split_jagged(
    values: Tensor,
    offsets: Tensor,
    *,
    left_offsets: Tensor | None = None,
    right_offsets: Tensor | None = None,
    left_len: int | None = None,
    right_len: int | None = None,
    total: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each row in two, the inverse of `concat_jagged`: (left, right, offsets of the side that was not given).

    Exactly one of the four names one side's share of each row: left_offsets or right_offsets, that side's offsets, or
    left_len or right_len, the same length in every row. The other side gets the rest. A side given by a length comes
    back dense, (B, n, ...); all else is jagged. Every row must be at least as long as the share. Gradient: values.

    total: the number of values of the side given by offsets; None reads it from the offsets, which waits for a GPU.
    """
    _check_values("split_jagged values", values, 1)
    _check_offsets("split_jagged", offsets, values.shape[0])
    given = [x for x in (left_offsets, right_offsets, left_len, right_len) if x is not None]
    if len(given) != 1:
        _fail("split_jagged", f"{len(given)} shares", "one of left_offsets, right_offsets, left_len and right_len")
    (share,) = given
    batch = offsets.shape[0] - 1
    if isinstance(share, Tensor):
        _check_offsets("split_jagged", share, batch=batch)
        share_offsets, share_total = share, int(share[-1]) if total is None else total
    else:
        _check_size("split_jagged length", share)
        share_offsets, share_total = _even_offsets(batch, share, offsets.device), batch * share
    if not 0 <= share_total <= values.shape[0]:
        _fail("split_jagged total", share_total, f"at most the {values.shape[0]} values")
    rest_offsets = offsets - share_offsets
    if left_offsets is not None or left_len is not None:
        left, right = _split_jagged(values, share_offsets, rest_offsets, share_total, backend=backend)
    else:
        left_total = values.shape[0] - share_total
        left, right = _split_jagged(values, rest_offsets, share_offsets, left_total, backend=backend)
    if left_len is not None:
        left = left.view(batch, left_len, *values.shape[1:])
    if right_len is not None:
        right = right.view(batch, right_len, *values.shape[1:])
    return left, right, rest_offsets


def last_n(
    values: Tensor, offsets: Tensor, n: int | Tensor, *, total: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The last n values of each row, all of a shorter one: values (T', ...) and their offsets.

    n: a number, or one for each row, int64 (B,), where a negative one counts as 0. total: T', the number of values that
    are left, where the caller knows it; None reads it from the offsets, which waits for a GPU. Gradient: values.
    """
    _check_values("last_n values", values, 1)
    _check_offsets("last_n", offsets, values.shape[0])
    if isinstance(n, Tensor):
        if n.dtype != torch.int64 or n.shape != (offsets.shape[0] - 1,):
            _fail("last_n n", _shown(n), f"a number or int64 ({offsets.shape[0] - 1},)")
    else:
        _check_size("last_n n", n)
    kept_offsets = lengths_to_offsets(offsets.diff().clamp(max=n).clamp(min=0))
    kept_total = int(kept_offsets[-1]) if total is None else total
    if not 0 <= kept_total <= values.shape[0]:
        _fail("last_n total", kept_total, f"at most the {values.shape[0]} values")
    kept: Tensor = _last_part(values, offsets - kept_offsets, kept_offsets, kept_total, backend=backend)
    return kept, kept_offsets


def jagged_dense_bmm(
    values_TK: Tensor,
    offsets: Tensor,
    weight_BKN: Tensor,
    bias_BN: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Each row's values times a matrix of that row: out[t] = values[t] @ weight[b] + bias[b], (T, N).

    All of one float dtype; products of bfloat16 and float16 are summed in float32 and rounded once. Gradients: values,
    weight and bias, each summed in a fixed order.
    """
    if values_TK.dim() != 2 or not values_TK.is_floating_point():
        _fail("jagged_dense_bmm values", _shown(values_TK), "floats (T, K)")
    _check_offsets("jagged_dense_bmm", offsets, values_TK.shape[0])
    batch = offsets.shape[0] - 1
    dtype, inner = values_TK.dtype, values_TK.shape[1]
    if weight_BKN.dtype != dtype or weight_BKN.dim() != 3 or weight_BKN.shape[:2] != (batch, inner):
        _fail("jagged_dense_bmm weight", _shown(weight_BKN), f"{dtype} ({batch}, {inner}, N)")
    if bias_BN is not None and (bias_BN.dtype != dtype or bias_BN.shape != (batch, weight_BKN.shape[2])):
        _fail("jagged_dense_bmm bias", _shown(bias_BN), f"{dtype} ({batch}, {weight_BKN.shape[2]})")
    out_TN: Tensor = _jagged_dense_bmm(values_TK, offsets, weight_BKN, bias_BN, backend=backend)
    return out_TN


def _fail(what: str, got: object, expected: str) -> None:
    raise ValueError(f"{what}: got {got}, expected {expected}")


def _shown(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def _check_offsets(name: str, offsets: Tensor, total: int | None = None, batch: int | None = None) -> None:
    wrong = offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1
    if wrong or (batch is not None and offsets.shape[0] != batch + 1):
        _fail(f"{name} offsets", _shown(offsets), f"int64 ({'B' if batch is None else batch} + 1,)")
    if total is not None:
        _check_size(f"{name} total", total)
    check_offsets(f"{name} offsets", offsets, total)


def _check_values(what: str, x: Tensor, dims: int, batch: int | None = None) -> None:
    if x.dim() < dims or x.is_complex() or (batch is not None and x.shape[0] != batch):
        shape = "(T, ...)" if dims == 1 else f"({'B' if batch is None else batch}, N, ...)"
        _fail(what, _shown(x), f"bool, integers or floats {shape}")


def _check_size(what: str, size: int) -> None:
    if size < 0:
        _fail(what, size, "0 or more")


def _check_padding(dtype: torch.dtype, value: bool | int | float) -> None:
    if dtype.is_floating_point:
        if math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
            _fail("jagged_to_padded padding_value", value, f"what {dtype} holds, or an infinity")
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not isinstance(value, int) or not low <= value <= high:
        _fail("jagged_to_padded padding_value", repr(value), f"an integer from {low} to {high}, as {dtype} holds")


def _jagged_side(name: str, x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """A side of `concat_jagged` as jagged values and offsets."""
    _check_values(f"concat_jagged {name}", x, 2 if offsets is None else 1)
    if offsets is not None:
        _check_offsets(f"concat_jagged {name}", offsets, x.shape[0])
        return x, offsets
    return x.flatten(0, 1), _even_offsets(x.shape[0], x.shape[1], x.device)


def _even_offsets(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, device=device) * length
