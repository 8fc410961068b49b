"""Sampled softmax as two operators for both devices, with autograd: the losses, and the table's dense gradient.

What forward keeps for backward is the queries' gradient per unit of loss (T, D) and (T, R) numbers, on a CPU the
negatives' probabilities, on a GPU their logits: each device's own backward knows which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.rows import compute_dtype
from ops.sampled_softmax import cpu, gpu
from ops.sampled_softmax.pairs import pairs
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::sampled_softmax", mutates_args=())
def _forward(
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    item_log_q: Tensor | None,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
    sparse_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (gpu if on_gpu(queries_TD, triton) else cpu).forward(
        queries_TD, table_VD, positive_ids_T, negative_ids_TR, item_log_q, temperature, l2_norm, eps, needs_grad
    )


@_forward.register_fake
def _(
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    item_log_q: Tensor | None,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
    sparse_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(queries_TD, table_VD)
    tokens, width = queries_TD.shape
    kept = tokens if needs_grad else 0
    shapes = (tokens,), (kept, width), (kept, negative_ids_TR.shape[1])
    losses_T, slopes_TD, kept_TR = (queries_TD.new_empty(shape, dtype=dtype) for shape in shapes)
    return losses_T, slopes_TD, kept_TR


@torch.library.custom_op("gr::sampled_softmax_table_grad", mutates_args=())
def _table_grad(
    grad_T: Tensor,
    losses_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    kept_TR: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    triton: bool,
) -> Tensor:
    inputs = (grad_T, losses_T, queries_TD, table_VD, positive_ids_T, negative_ids_TR, kept_TR)
    return (gpu if on_gpu(queries_TD, triton) else cpu).table_grad(*inputs, temperature, l2_norm, eps)


@_table_grad.register_fake
def _(grad_T: Tensor, losses_T: Tensor, queries_TD: Tensor, table_VD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(table_VD, memory_format=torch.contiguous_format)


def _sparse_table_grad(
    grad_T: Tensor,
    losses_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    kept_TR: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    triton: bool,
) -> Tensor:
    """The rows that the batch names; how many is known only on the device, so a GPU is waited for."""
    device = gpu if on_gpu(queries_TD, triton) else cpu
    probabilities_TR = device.probabilities(losses_T, kept_TR)
    ids_N, tokens_N, weights_N = pairs(
        grad_T / temperature, losses_T, positive_ids_T, negative_ids_TR, probabilities_TR
    )
    ids_U, grad_UD = device.row_sums_sparse(ids_N, queries_TD, table_VD.shape[0], tokens_N, weights_N)
    grad_UD = device.finish_rows(grad_UD, table_VD.index_select(0, ids_U), l2_norm, eps)
    return torch.sparse_coo_tensor(ids_U[None], grad_UD, table_VD.shape, is_coalesced=True, check_invariants=False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries_TD, table_VD, positive_ids_T, negative_ids_TR, _, *scalars, _, ctx.sparse_grad, triton = inputs
    losses_T, slopes_TD, kept_TR = output
    ctx.constants = (*scalars, triton)
    ctx.save_for_backward(losses_T, queries_TD, table_VD, positive_ids_T, negative_ids_TR, kept_TR, slopes_TD)
    ctx.set_materialize_grads(False)


# An operator without a gradient: a second derivative is refused, where that of a plain product would lack a part.
@torch.library.custom_op("gr::sampled_softmax_query_grad", mutates_args=())
def _query_grad(grad_T: Tensor, slopes_TD: Tensor, like_TD: Tensor) -> Tensor:
    return (grad_T[:, None] * slopes_TD).to(like_TD.dtype, memory_format=torch.contiguous_format)


@_query_grad.register_fake
def _(grad_T: Tensor, slopes_TD: Tensor, like_TD: Tensor) -> Tensor:
    return slopes_TD.new_empty(slopes_TD.shape, dtype=like_TD.dtype)


def _backward(ctx: Any, grad_T: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_T is None:
        return (None,) * 11
    *saved, slopes_TD = ctx.saved_tensors
    grad_queries_TD = grad_table_VD = None
    if ctx.needs_input_grad[0]:
        grad_queries_TD = _query_grad(grad_T, slopes_TD, saved[1])
    if ctx.needs_input_grad[1]:
        grad_table_VD = (_sparse_table_grad if ctx.sparse_grad else _table_grad)(grad_T, *saved, *ctx.constants)
    return grad_queries_TD, grad_table_VD, *(None,) * 9


_forward.register_autograd(_backward, setup_context=_setup_context)


def sampled_softmax_loss(
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    item_log_q: Tensor | None,
    sparse_grad: bool,
    *,
    triton: bool,
) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    needs_grad = torch.is_grad_enabled() and (queries_TD.requires_grad or table_VD.requires_grad)
    inputs = (queries_TD, table_VD, positive_ids_T, negative_ids_TR, item_log_q)
    losses_T: Tensor = _forward(*inputs, temperature, l2_norm, eps, needs_grad, sparse_grad, triton)[0]
    return losses_T
