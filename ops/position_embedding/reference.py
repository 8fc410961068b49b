"""Position and time embeddings in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.jagged.reference import positions, rows
from ops.position_embedding.buckets import TimeScale, time_bucket


def position_index(
    offsets: Tensor, total: int, num_positions: int, newest: bool, num_targets: Tensor | None, stride: int, context: int
) -> Tensor:
    """Row of the position table for each token, int64 (T,)."""
    positions_T = positions(offsets, total)
    index_T = positions_T
    if newest:
        highest_B = offsets.diff() if num_targets is None else offsets.diff() - stride * num_targets
        highest_T = highest_B[rows(offsets, total)]
        index_T = highest_T - torch.minimum(positions_T, highest_T) + context
        index_T = torch.where(positions_T < context, positions_T, index_T)
    return index_T.clamp(max=num_positions - 1)


def time_index(offsets: Tensor, timestamps_T: Tensor, num_buckets: int, unit: float, scale: TimeScale) -> Tensor:
    """Row of the time table for each token, int64 (T,)."""
    last_T = offsets[1:][rows(offsets, timestamps_T.shape[0])] - 1
    return time_bucket(timestamps_T[last_T] - timestamps_T, num_buckets, unit, scale)


def position_embedding(
    x_TD: Tensor,
    offsets: Tensor,
    position_table_PD: Tensor,
    time_table: Tensor | None,
    timestamps_T: Tensor | None,
    num_targets: Tensor | None,
    alpha: float,
    newest: bool,
    stride: int,
    context: int,
    unit: float,
    scale: TimeScale,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """stride: tokens a target takes. compute_dtype is by default float32 for bfloat16 and float16."""
    dtype = compute_dtype or torch.promote_types(x_TD.dtype, torch.float32)
    index_T = position_index(offsets, x_TD.shape[0], position_table_PD.shape[0], newest, num_targets, stride, context)
    # Embedding lookups, not indexing: their backward adds in a fixed order on the CPU.
    y_TD = torch.add(F.embedding(index_T, position_table_PD.to(dtype)), x_TD.to(dtype), alpha=alpha)
    if time_table is not None:
        assert timestamps_T is not None
        bucket_T = time_index(offsets, timestamps_T, time_table.shape[0] - 1, unit, scale)
        y_TD = y_TD + F.embedding(bucket_T, time_table.to(dtype))
    return y_TD.to(x_TD.dtype)
