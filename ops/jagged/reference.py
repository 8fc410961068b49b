"""Jagged rows in plain PyTorch: index arithmetic and gathers, no loop over rows, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def lengths_to_offsets(lengths_B: Tensor) -> Tensor:
    return F.pad(lengths_B.to(torch.int64).cumsum(0), (1, 0))


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    return offsets.diff()


def rows(offsets: Tensor, total: int) -> Tensor:
    rows_B = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return rows_B.repeat_interleave(offsets.diff(), output_size=total)


def positions(offsets: Tensor, total: int) -> Tensor:
    starts_T = offsets[:-1].repeat_interleave(offsets.diff(), output_size=total)
    return torch.arange(total, device=offsets.device) - starts_T


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, padding_value: bool | int | float) -> Tensor:
    positions_N = torch.arange(max_len, device=values.device)
    inside_BN = positions_N < offsets.diff()[:, None]
    # One more value at the end stands for everything outside the rows.
    extended = torch.cat([values, values.new_full((1, *values.shape[1:]), padding_value)])
    return extended[torch.where(inside_BN, offsets[:-1, None] + positions_N, values.shape[0])]


def padded_to_jagged(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    batch, n = dense.shape[:2]
    positions_T = positions(offsets, total)
    extended = torch.cat([dense.flatten(0, 1), dense.new_zeros(1, *dense.shape[2:])])
    return extended[torch.where(positions_T < n, rows(offsets, total) * n + positions_T, batch * n)]


def left_places(left_offsets: Tensor, right_offsets: Tensor, total: int) -> Tensor:
    """Where each of the left parts' values is in the concatenated rows, (total,)."""
    rows_T = rows(left_offsets, total)
    return torch.arange(total, device=left_offsets.device) + right_offsets[rows_T]


def right_places(left_offsets: Tensor, right_offsets: Tensor, total: int) -> Tensor:
    """Where each of the right parts' values is in the concatenated rows, (total,)."""
    rows_T = rows(right_offsets, total)
    return torch.arange(total, device=left_offsets.device) + left_offsets[rows_T + 1]


def concat_jagged(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor) -> Tensor:
    places = torch.cat(
        [
            left_places(left_offsets, right_offsets, left.shape[0]),
            right_places(left_offsets, right_offsets, right.shape[0]),
        ]
    )
    both = torch.cat([left, right])
    return torch.empty_like(both).index_copy(0, places, both)


def split_jagged(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, left_total: int) -> tuple[Tensor, Tensor]:
    left = values[left_places(left_offsets, right_offsets, left_total)]
    return left, last_part(values, left_offsets, right_offsets, values.shape[0] - left_total)


def last_part(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, total: int) -> Tensor:
    """The right side of `split_jagged` alone."""
    return values[right_places(left_offsets, right_offsets, total)]


def jagged_dense_bmm(
    values_TK: Tensor,
    offsets: Tensor,
    weight_BKN: Tensor,
    bias_BN: Tensor | None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Pads the rows to the longest; compute_dtype is by default float32 for bfloat16 and float16."""
    dtype = compute_dtype or torch.promote_types(values_TK.dtype, torch.float32)
    longest = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    out_BMN = jagged_to_padded(values_TK.to(dtype), offsets, longest, 0) @ weight_BKN.to(dtype)
    if bias_BN is not None:
        out_BMN = out_BMN + bias_BN.to(dtype)[:, None]
    return padded_to_jagged(out_BMN, offsets, values_TK.shape[0]).to(values_TK.dtype)
