"""Triton form of position and time embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import triton_runtime
from ops.jagged.gpu import search
from ops.position_embedding.buckets import TimeScale, bucket_offsets
from ops.tuning import Table

_TABLE = Table("position_embedding")

refuses = triton_runtime.refuses


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the position index (T,) and the time bucket, (T,) or (0,)."""
    from ops.position_embedding import kernels

    total, width = x_TD.shape
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    out_TD = torch.empty(total, width, dtype=x_TD.dtype, device=x_TD.device)
    index_T = offsets.new_empty(total)
    bucket_T = offsets.new_empty(0 if time_table is None else total)
    edges = None if time_table is None else bucket_offsets(time_table.shape[0] - 1, unit, scale, x_TD.device)
    inputs = (position_table_PD, time_table, timestamps_T, num_targets)
    triton_runtime.launch(
        kernels.position_embedding,
        lambda config: (-(-total // config["BLOCK_T"]),),
        *(x_TD, offsets.contiguous(), *(None if x is None else x.contiguous() for x in inputs), edges),
        *(out_TD, index_T, bucket_T, alpha, total, *search(offsets), position_table_PD.shape[0], context),
        *((0, 0) if edges is None else search(edges)),
        *(x_TD.stride(0), width),
        table=_TABLE,
        key={"width": triton_runtime.power_of_two(width)},
        NEWEST=newest,
        STRIDE=stride,
    )
    return out_TD, index_T, bucket_T
