"""Triton form of the jagged ops. Values are moved as bits of their size, so that every type is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import triton_runtime
from ops.tuning import Table

_TABLE = Table("jagged")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# One program adds the lengths up.
_MAX_LENGTHS = 1 << 16

refuses = triton_runtime.refuses


def scan_refuses(*args: Any, **kwargs: Any) -> str | None:
    if args and args[0].shape[0] > _MAX_LENGTHS:
        return f"{args[0].shape[0]} lengths, expected at most {_MAX_LENGTHS}"
    return refuses(*args, **kwargs)


def lengths_to_offsets(lengths_B: Tensor) -> Tensor:
    from ops.jagged import kernels

    offsets = torch.empty(lengths_B.shape[0] + 1, dtype=torch.int64, device=lengths_B.device)
    triton_runtime.launch(
        kernels.offsets_of_lengths,
        lambda config: (1,),
        *(lengths_B.contiguous(), offsets, lengths_B.shape[0]),
        table=_TABLE,
        key={},
    )
    return offsets


def rows(offsets: Tensor, total: int) -> Tensor:
    return _rows_or_positions(offsets, total, positions=False)


def positions(offsets: Tensor, total: int) -> Tensor:
    return _rows_or_positions(offsets, total, positions=True)


def _rows_or_positions(offsets: Tensor, total: int, *, positions: bool) -> Tensor:
    from ops.jagged import kernels

    out_T = torch.empty(total, dtype=torch.int64, device=offsets.device)
    triton_runtime.launch(
        kernels.rows_or_positions,
        lambda config: (-(-total // config["BLOCK_T"]),),
        *(offsets.contiguous(), out_T, total, *search(offsets)),
        table=_TABLE,
        key={},
        POSITIONS=positions,
    )
    return out_T


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, padding_value: bool | int | float) -> Tensor:
    from ops.jagged import kernels

    padding = _bits(torch.full((1,), padding_value, dtype=values.dtype)).item()
    out = values.new_empty(offsets.shape[0] - 1, max_len, *values.shape[1:])
    source, places = _flat(values, 1), out.shape[0] * max_len
    _launch_moves(
        kernels.to_padded,
        (source, offsets.contiguous(), _bits(out), padding, places, max_len, source.stride(0)),
        places,
        source.shape[1],
    )
    return out


def padded_to_jagged(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    from ops.jagged import kernels

    out = dense.new_empty(total, *dense.shape[2:])
    source = _flat(dense, 2)
    _launch_moves(
        kernels.to_jagged,
        (source, offsets.contiguous(), _bits(out), total, *search(offsets), dense.shape[1], source.stride(0)),
        total,
        source.shape[1],
    )
    return out


def concat_jagged(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor) -> Tensor:
    out = left.new_empty(left.shape[0] + right.shape[0], *left.shape[1:])
    _move_part(left, out, left_offsets, right_offsets, left.shape[0], to_whole=True)
    _move_part(right, out, right_offsets, left_offsets[1:], right.shape[0], to_whole=True)
    return out


def split_jagged(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, left_total: int) -> tuple[Tensor, Tensor]:
    left = values.new_empty(left_total, *values.shape[1:])
    _move_part(values, left, left_offsets, right_offsets, left_total, to_whole=False)
    return left, last_part(values, left_offsets, right_offsets, values.shape[0] - left_total)


def last_part(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, total: int) -> Tensor:
    right = values.new_empty(total, *values.shape[1:])
    _move_part(values, right, right_offsets, left_offsets[1:], total, to_whole=False)
    return right


def _move_part(source: Tensor, target: Tensor, offsets: Tensor, shifts: Tensor, total: int, *, to_whole: bool) -> None:
    from ops.jagged import kernels

    whole_total = (target if to_whole else source).shape[0]
    source = _flat(source, 1)
    _launch_moves(
        kernels.move_part,
        (
            *(source, _bits(target), offsets.contiguous(), shifts.contiguous(), total, whole_total),
            *(*search(offsets), source.stride(0)),
        ),
        total,
        source.shape[1],
        TO_WHOLE=to_whole,
    )


def _launch_moves(kernel: Any, args: tuple[Any, ...], places: int, width: int, **constants: Any) -> None:
    """A program moves BLOCK_T values' elements w, BLOCK_W of them; `width`, their number, is the last argument."""
    triton_runtime.launch(
        kernel,
        lambda config: (-(-places // config["BLOCK_T"]), -(-width // config["BLOCK_W"])),
        *args,
        width,
        table=_TABLE,
        key={"width": triton_runtime.power_of_two(width)},
        **constants,
    )


def jagged_dense_bmm(values_TK: Tensor, offsets: Tensor, weight_BKN: Tensor, bias_BN: Tensor | None) -> Tensor:
    from ops.jagged import kernels

    (total, inner), batch, outer = values_TK.shape, weight_BKN.shape[0], weight_BKN.shape[2]
    out_TN = values_TK.new_empty(total, outer)
    values_TK = _unit_stride(values_TK)
    triton_runtime.launch(
        kernels.dense_bmm,
        lambda config: (total and total // config["BLOCK_T"] + batch, -(-outer // config["BLOCK_N"])),
        *(values_TK, offsets.contiguous(), weight_BKN, None if bias_BN is None else bias_BN.contiguous(), out_TN),
        *(*search(offsets), inner, outer, values_TK.stride(0), *weight_BKN.stride()),
        table=_TABLE,
        key={"inner": triton_runtime.power_of_two(inner), "outer": triton_runtime.power_of_two(outer)},
        PRECISION=triton_runtime.precision(),
    )
    return out_TN


def jagged_dense_bmm_weight_grad(
    values_TK: Tensor, grad_TN: Tensor, offsets: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, the latter (B, 0) where there is none."""
    from ops.jagged import kernels

    batch, inner, outer = offsets.shape[0] - 1, values_TK.shape[1], grad_TN.shape[1]
    values_TK, grad_TN = _unit_stride(values_TK), _unit_stride(grad_TN)
    grad_weight = values_TK.new_empty(batch, inner, outer)
    grad_bias = values_TK.new_empty(batch, outer if bias else 0)
    triton_runtime.launch(
        kernels.dense_bmm_weight_grad,
        lambda config: (batch, -(-inner // config["BLOCK_K"]), -(-outer // config["BLOCK_N"])),
        *(values_TK, grad_TN, offsets.contiguous(), grad_weight, grad_bias if bias else None),
        *(inner, outer, values_TK.stride(0), grad_TN.stride(0)),
        table=_TABLE,
        key={"inner": triton_runtime.power_of_two(inner), "outer": triton_runtime.power_of_two(outer)},
        PRECISION=triton_runtime.precision(),
    )
    return grad_weight, grad_bias


def search(offsets: Tensor) -> tuple[int, int]:
    """Rows and steps of the kernels' binary search for a value's row."""
    batch = offsets.shape[0] - 1
    return batch, max(batch - 1, 0).bit_length()


def _bits(x: Tensor) -> Tensor:
    return x.view(_BITS[x.element_size()])


def _flat(x: Tensor, dims: int) -> Tensor:
    """Bits of x as (values, elements of a value), the elements side by side; its first dimensions count the values."""
    return _unit_stride(_bits(x).reshape(x.shape[:dims].numel(), x.shape[dims:].numel()))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
