"""C++ form (cpu.cpp) of the moves of jagged rows, any type of values; products of rows are padded and multiplied.

The offsets are checked: a ValueError instead of memory that is not theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "values are not on the CPU"
    return native.reason(_SOURCE)


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, padding_value: bool | int | float) -> Tensor:
    values, offsets = values.contiguous(), offsets.contiguous()
    padding = torch.full((1,), padding_value, dtype=values.dtype)
    batch, total = offsets.shape[0] - 1, values.shape[0]
    out = values.new_empty(batch, max_len, *values.shape[1:])
    sizes = map(ctypes.c_int64, (batch, total, max_len, _width(values, 1)))
    item = ctypes.c_int64(values.element_size())
    _run("to_padded", [(offsets, total)], *_at(values, offsets), *sizes, *_at(padding), item, *_at(out))
    return out


def padded_to_jagged(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    dense, offsets = dense.contiguous(), offsets.contiguous()
    out = dense.new_empty(total, *dense.shape[2:])
    sizes = map(ctypes.c_int64, (offsets.shape[0] - 1, total, dense.shape[1], _width(dense, 2)))
    _run("to_jagged", [(offsets, total)], *_at(dense, offsets), *sizes, *_at(out))
    return out


def concat_jagged(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor) -> Tensor:
    out = left.new_empty(left.shape[0] + right.shape[0], *left.shape[1:])
    _move_parts(out, left.contiguous(), right.contiguous(), left_offsets, right_offsets, to_whole=True)
    return out


def split_jagged(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, left_total: int) -> tuple[Tensor, Tensor]:
    left = values.new_empty(left_total, *values.shape[1:])
    right = values.new_empty(values.shape[0] - left_total, *values.shape[1:])
    _move_parts(values.contiguous(), left, right, left_offsets, right_offsets, to_whole=False)
    return left, right


def last_part(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, total: int) -> Tensor:
    right = values.new_empty(total, *values.shape[1:])
    _move_parts(values.contiguous(), None, right, left_offsets, right_offsets, to_whole=False)
    return right


def _move_parts(
    whole: Tensor, left: Tensor | None, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, *, to_whole: bool
) -> None:
    left_offsets, right_offsets = left_offsets.contiguous(), right_offsets.contiguous()
    left_total, right_total = whole.shape[0] - right.shape[0], right.shape[0]
    sizes = map(ctypes.c_int64, (left_offsets.shape[0] - 1, left_total, right_total, _width(whole, 1)))
    checked = [(left_offsets, left_total), (right_offsets, right_total)]
    _run("move_parts", checked, *_at(whole, left, right, left_offsets, right_offsets), *sizes, ctypes.c_bool(to_whole))


def _at(*tensors: Tensor | None) -> Iterator[ctypes.c_void_p]:
    return map(native.pointer, tensors)


def _run(name: str, checked: list[tuple[Tensor, int]], *arguments: Any) -> None:
    function = getattr(native.require(_SOURCE), name)
    function.restype = ctypes.c_bool
    if not function(*arguments):
        got = " and ".join(f"{int(offsets[0])} to {int(offsets[-1])}" for offsets, _ in checked)
        expected = " and ".join(f"0 to {total}" for _, total in checked)
        raise ValueError(f"jagged offsets: got {got}, expected never descending from {expected}")


def jagged_dense_bmm(values_TK: Tensor, offsets: Tensor, weight_BKN: Tensor, bias_BN: Tensor | None) -> Tensor:
    """Pads the rows to the longest, so that one batched product does them all."""
    dtype = torch.promote_types(values_TK.dtype, torch.float32)
    padded_BMK = jagged_to_padded(values_TK.to(dtype), offsets, _longest(offsets), 0)
    out_BMN = padded_BMK @ weight_BKN.to(dtype)
    if bias_BN is not None:
        out_BMN += bias_BN.to(dtype)[:, None]
    return padded_to_jagged(out_BMN, offsets, values_TK.shape[0]).to(values_TK.dtype)


def jagged_dense_bmm_weight_grad(
    values_TK: Tensor, grad_TN: Tensor, offsets: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, the latter (B, 0) where there is none."""
    dtype = torch.promote_types(values_TK.dtype, torch.float32)
    longest = _longest(offsets)
    values_BMK = jagged_to_padded(values_TK.to(dtype), offsets, longest, 0)
    grad_BMN = jagged_to_padded(grad_TN.to(dtype), offsets, longest, 0)
    grad_weight = values_BMK.transpose(1, 2) @ grad_BMN
    grad_bias = grad_BMN.sum(1) if bias else grad_BMN.new_empty(len(grad_BMN), 0)
    return grad_weight.to(values_TK.dtype), grad_bias.to(values_TK.dtype)


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if offsets.shape[0] > 1 else 0


def _width(x: Tensor, dims: int) -> int:
    """Bytes of one value, whose shape follows the first dimensions."""
    return x.shape[dims:].numel() * x.element_size()
