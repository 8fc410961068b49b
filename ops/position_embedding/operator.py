"""Position and time embeddings as one operator for both devices, with autograd; table gradients are `row_sums`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.position_embedding import gpu, reference
from ops.position_embedding.buckets import TimeScale
from ops.row_sums.operator import row_sums
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::position_embedding", mutates_args=())
def _apply(
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
    scale: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x_TD, offsets, position_table_PD, time_table, timestamps_T, num_targets)
    known: TimeScale = "sqrt" if scale == "sqrt" else "log"
    if on_gpu(x_TD, triton):
        return gpu.position_embedding(*tensors, alpha, newest, stride, context, unit, known)
    out_TD = reference.position_embedding(*tensors, alpha, newest, stride, context, unit, known)
    total, num_positions = x_TD.shape[0], position_table_PD.shape[0]
    index_T = reference.position_index(offsets, total, num_positions, newest, num_targets, stride, context)
    if time_table is None or timestamps_T is None:
        return out_TD, index_T, index_T.new_empty(0)
    return out_TD, index_T, reference.time_index(offsets, timestamps_T, time_table.shape[0] - 1, unit, known)


@_apply.register_fake
def _(
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
    scale: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x_TD.shape[0]
    bucket_T = offsets.new_empty(0 if time_table is None else total)
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), offsets.new_empty(total), bucket_T


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, position_table_PD, time_table, *_ = inputs
    ctx.alpha, ctx.triton = inputs[6], inputs[-1]
    ctx.tables = [None if table is None else (table.shape[0], table.dtype) for table in (position_table_PD, time_table)]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad_TD: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None]
    for i, (ids_T, table) in enumerate(zip(ctx.saved_tensors, ctx.tables, strict=True)):
        if table is not None and ctx.needs_input_grad[2 + i]:
            num_rows, dtype = table
            grads[i] = row_sums(ids_T, grad_TD, num_rows, None, None, triton=ctx.triton).to(dtype)
    grad_x_TD = grad_TD * ctx.alpha if ctx.needs_input_grad[0] else None
    return grad_x_TD, None, *grads, *[None] * 9


_apply.register_autograd(_backward, setup_context=_setup_context)


def position_embedding(*tensors: Tensor | None, triton: bool, **options: Any) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    out_TD: Tensor
    out_TD, _, _ = _apply(*tensors, **options, triton=triton)
    return out_TD
