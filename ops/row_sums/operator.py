"""`row_sums` as one operator for both devices, with autograd; the source's gradient is the same operator transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.row_sums import cpu, gpu
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::row_sums", mutates_args=())
def _apply(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None, triton: bool
) -> Tensor:
    return (gpu if on_gpu(source_SD, triton) else cpu).row_sums(ids_N, source_SD, num_rows, rows_N, weights_N)


@_apply.register_fake
def _(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None, triton: bool
) -> Tensor:
    dtype = torch.promote_types(source_SD.dtype, torch.float32)
    return source_SD.new_empty(num_rows, source_SD.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids_N, source_SD, ctx.num_rows, rows_N, weights_N, ctx.triton = inputs
    ctx.sources, ctx.dtype = source_SD.shape[0], source_SD.dtype
    ctx.save_for_backward(ids_N, rows_N, weights_N, source_SD if ctx.needs_input_grad[4] else None)


def _backward(ctx: Any, grad_VD: Tensor) -> tuple[Tensor | None, ...]:
    ids_N, rows_N, weights_N, source_SD = ctx.saved_tensors
    if rows_N is None:
        rows_N = torch.arange(ctx.sources, device=ids_N.device)
    inside_N = (ids_N >= 0) & (ids_N < ctx.num_rows)
    grad_source_SD = grad_weights_N = None
    if ctx.needs_input_grad[1]:
        sources_N = torch.where(inside_N, rows_N, -1)
        grad_source_SD = _apply(sources_N, grad_VD, ctx.sources, ids_N, weights_N, ctx.triton).to(ctx.dtype)
    if ctx.needs_input_grad[4]:
        # An entry that was left out looks at rows that exist, and its product is dropped.
        padded_SD, padded_VD = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (source_SD, grad_VD))
        entries_ND = padded_SD.index_select(0, torch.where(inside_N, rows_N, ctx.sources)).to(grad_VD.dtype)
        grads_ND = padded_VD.index_select(0, torch.where(inside_N, ids_N, ctx.num_rows))
        grad_weights_N = torch.where(inside_N, (entries_ND * grads_ND).sum(dim=1), 0.0).to(weights_N.dtype)
    return None, grad_source_SD, None, None, grad_weights_N, None


_apply.register_autograd(_backward, setup_context=_setup_context)


def row_sums(
    ids_N: Tensor,
    source_SD: Tensor,
    num_rows: int,
    rows_N: Tensor | None,
    weights_N: Tensor | None,
    *,
    triton: bool,
) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    result: Tensor = _apply(ids_N, source_SD, num_rows, rows_N, weights_N, triton)
    return result
