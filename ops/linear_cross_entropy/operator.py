"""Full softmax as one operator for both devices, with autograd; backward is an operator of its own.

What forward keeps for backward is the log-sum-exp (T,) or what the Triton form needs beside it (3, T), the queries'
gradient at weight one (T, D) and, from the blocked form at small catalogues, the items' (X, D): each form's own
backward knows which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.linear_cross_entropy import blocked, gpu
from ops.rows import compute_dtype


@torch.library.custom_op("gr::linear_cross_entropy", mutates_args=())
def _forward(
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (queries_TD, table_VD, catalogue_ids_X, target_ids_T)
    return (gpu if triton else blocked).forward(*inputs, temperature, l2_norm, eps, needs_grad)


@_forward.register_fake
def _(
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(queries_TD, table_VD)
    (tokens, width), items = queries_TD.shape, catalogue_ids_X.shape[0]
    by_blocks = not triton and blocked.keeps_gradients(items, needs_grad, queries_TD.device)
    kept = tokens if by_blocks or (triton and needs_grad) else 0
    shapes = (tokens,), (3, tokens) if triton else (tokens,), (kept, width), (items if by_blocks else 0, width)
    losses_T, stats, slopes_TD, mass_XD = (queries_TD.new_empty(shape, dtype=dtype) for shape in shapes)
    return losses_T, stats, slopes_TD, mass_XD


@torch.library.custom_op("gr::linear_cross_entropy_backward", mutates_args=())
def _gradients(
    grad_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    stats: Tensor,
    slopes_TD: Tensor,
    mass_XD: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_table_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (grad_T, queries_TD, table_VD, catalogue_ids_X, target_ids_T, stats, slopes_TD, mass_XD)
    return (gpu if triton else blocked).backward(*inputs, temperature, l2_norm, eps, needs_table_grad)


@_gradients.register_fake
def _(grad_T: Tensor, queries_TD: Tensor, table_VD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(queries_TD, memory_format=contiguous),
        torch.empty_like(table_VD, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.l2_norm, ctx.eps, _, ctx.triton = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_T: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_T is None:
        return (None,) * 9
    needs_queries, needs_table = ctx.needs_input_grad[:2]
    constants = (ctx.temperature, ctx.l2_norm, ctx.eps, needs_table, ctx.triton)
    grad_queries_TD, grad_table_VD = _gradients(grad_T, *ctx.saved_tensors, *constants)
    return grad_queries_TD if needs_queries else None, grad_table_VD if needs_table else None, *(None,) * 7


_forward.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    *,
    triton: bool,
) -> Tensor:
    """`triton`: the Triton form, of CPU tensors under the interpreter; otherwise the blocked one, on any device."""
    needs_grad = torch.is_grad_enabled() and (queries_TD.requires_grad or table_VD.requires_grad)
    inputs = (queries_TD, table_VD, catalogue_ids_X, target_ids_T)
    losses_T: Tensor = _forward(*inputs, temperature, l2_norm, eps, needs_grad, triton)[0]
    return losses_T
