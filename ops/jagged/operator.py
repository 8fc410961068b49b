"""The jagged ops as operators for every device, with autograd, which `torch.compile` and `torch.export` see through.

`backend` is "cpu", "triton" or "fbgemm"; what was traced for a CPU runs Triton on GPU tensors, and the reverse.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from ops.jagged import cpu, fbgemm, gpu, reference
from ops.triton_runtime import on_gpu


def _form(x: Tensor, backend: str, on_cpu: ModuleType = cpu) -> Any:
    if backend == "fbgemm":
        return fbgemm
    return gpu if on_gpu(x, backend == "triton") else on_cpu


@torch.library.custom_op("gr::lengths_to_offsets", mutates_args=())
def lengths_to_offsets(lengths_B: Tensor, backend: str) -> Tensor:
    return _form(lengths_B, backend, reference).lengths_to_offsets(lengths_B)


@lengths_to_offsets.register_fake
def _(lengths_B: Tensor, backend: str) -> Tensor:
    return lengths_B.new_empty(lengths_B.shape[0] + 1, dtype=torch.int64)


@torch.library.custom_op("gr::jagged_rows", mutates_args=())
def rows(offsets: Tensor, total: int, backend: str) -> Tensor:
    return _form(offsets, backend, reference).rows(offsets, total)


@torch.library.custom_op("gr::jagged_positions", mutates_args=())
def positions(offsets: Tensor, total: int, backend: str) -> Tensor:
    return _form(offsets, backend, reference).positions(offsets, total)


@rows.register_fake
@positions.register_fake
def _(offsets: Tensor, total: int, backend: str) -> Tensor:
    return offsets.new_empty(total)


@torch.library.custom_op("gr::jagged_to_padded", mutates_args=())
def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, padding_value: Number, backend: str) -> Tensor:
    return _form(values, backend).jagged_to_padded(values, offsets, max_len, padding_value)


@jagged_to_padded.register_fake
def _(values: Tensor, offsets: Tensor, max_len: int, padding_value: Number, backend: str) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, max_len, *values.shape[1:])


@torch.library.custom_op("gr::padded_to_jagged", mutates_args=())
def padded_to_jagged(dense: Tensor, offsets: Tensor, total: int, backend: str) -> Tensor:
    return _form(dense, backend).padded_to_jagged(dense, offsets, total)


@padded_to_jagged.register_fake
def _(dense: Tensor, offsets: Tensor, total: int, backend: str) -> Tensor:
    return dense.new_empty(total, *dense.shape[2:])


def _keep_padded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, _, *_, ctx.backend = inputs
    ctx.total, ctx.max_len = x.shape[0], x.shape[1] if x.dim() > 1 else 0
    ctx.save_for_backward(offsets)


def _padded_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return padded_to_jagged(grad, offsets, ctx.total, ctx.backend), None, None, None, None


def _jagged_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return jagged_to_padded(grad, offsets, ctx.max_len, 0, ctx.backend), None, None, None


jagged_to_padded.register_autograd(_padded_backward, setup_context=_keep_padded)
padded_to_jagged.register_autograd(_jagged_backward, setup_context=_keep_padded)


@torch.library.custom_op("gr::concat_jagged", mutates_args=())
def concat_jagged(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, backend: str) -> Tensor:
    return _form(left, backend).concat_jagged(left, right, left_offsets, right_offsets)


@concat_jagged.register_fake
def _(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, backend: str) -> Tensor:
    return left.new_empty(left.shape[0] + right.shape[0], *left.shape[1:])


@torch.library.custom_op("gr::split_jagged", mutates_args=())
def split_jagged(
    values: Tensor, left_offsets: Tensor, right_offsets: Tensor, left_total: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _form(values, backend).split_jagged(values, left_offsets, right_offsets, left_total)


@split_jagged.register_fake
def _(
    values: Tensor, left_offsets: Tensor, right_offsets: Tensor, left_total: int, backend: str
) -> tuple[Tensor, Tensor]:
    right_total = values.shape[0] - left_total
    return values.new_empty(left_total, *values.shape[1:]), values.new_empty(right_total, *values.shape[1:])


def _keep_concat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, _, left_offsets, right_offsets, ctx.backend = inputs
    ctx.left_total = left.shape[0]
    ctx.save_for_backward(left_offsets, right_offsets)


def _concat_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right = split_jagged(grad, *ctx.saved_tensors, ctx.left_total, ctx.backend)
    return left, right, None, None, None


def _keep_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, left_offsets, right_offsets, _, ctx.backend = inputs
    ctx.save_for_backward(left_offsets, right_offsets)


def _split_backward(ctx: Any, grad_left: Tensor, grad_right: Tensor) -> tuple[Tensor | None, ...]:
    return concat_jagged(grad_left, grad_right, *ctx.saved_tensors, ctx.backend), None, None, None, None


concat_jagged.register_autograd(_concat_backward, setup_context=_keep_concat)
split_jagged.register_autograd(_split_backward, setup_context=_keep_split)


@torch.library.custom_op("gr::jagged_last_part", mutates_args=())
def last_part(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, total: int, backend: str) -> Tensor:
    return _form(values, backend).last_part(values, left_offsets, right_offsets, total)


@last_part.register_fake
def _(values: Tensor, left_offsets: Tensor, right_offsets: Tensor, total: int, backend: str) -> Tensor:
    return values.new_empty(total, *values.shape[1:])


def _keep_last_part(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, left_offsets, right_offsets, ctx.total, ctx.backend = inputs
    ctx.values_total = values.shape[0]
    ctx.save_for_backward(left_offsets, right_offsets)


def _last_part_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left_offsets, right_offsets = ctx.saved_tensors
    kept_T = torch.arange(ctx.total, device=grad.device)
    places_T = kept_T + left_offsets[1:][rows(right_offsets, ctx.total, ctx.backend)]
    grad_values = grad.new_zeros(ctx.values_total, *grad.shape[1:]).index_copy_(0, places_T, grad)
    return grad_values, None, None, None, None


last_part.register_autograd(_last_part_backward, setup_context=_keep_last_part)


@torch.library.custom_op("gr::jagged_dense_bmm", mutates_args=())
def jagged_dense_bmm(
    values_TK: Tensor, offsets: Tensor, weight_BKN: Tensor, bias_BN: Tensor | None, backend: str
) -> Tensor:
    return _form(values_TK, backend).jagged_dense_bmm(values_TK, offsets, weight_BKN, bias_BN)


@jagged_dense_bmm.register_fake
def _(values_TK: Tensor, offsets: Tensor, weight_BKN: Tensor, bias_BN: Tensor | None, backend: str) -> Tensor:
    return values_TK.new_empty(values_TK.shape[0], weight_BKN.shape[2])


@torch.library.custom_op("gr::jagged_dense_bmm_weight_grad", mutates_args=())
def jagged_dense_bmm_weight_grad(
    values_TK: Tensor, grad_TN: Tensor, offsets: Tensor, bias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _form(values_TK, backend).jagged_dense_bmm_weight_grad(values_TK, grad_TN, offsets, bias)


@jagged_dense_bmm_weight_grad.register_fake
def _(values_TK: Tensor, grad_TN: Tensor, offsets: Tensor, bias: bool, backend: str) -> tuple[Tensor, Tensor]:
    batch, outer = offsets.shape[0] - 1, grad_TN.shape[1]
    return values_TK.new_empty(batch, values_TK.shape[1], outer), values_TK.new_empty(batch, outer if bias else 0)


def _keep_bmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values_TK, offsets, weight_BKN, bias_BN, ctx.backend = inputs
    ctx.bias = bias_BN is not None
    ctx.save_for_backward(values_TK, offsets, weight_BKN)


def _bmm_backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
    values_TK, offsets, weight_BKN = ctx.saved_tensors
    grad_values = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_values = jagged_dense_bmm(grad_TN, offsets, weight_BKN.transpose(1, 2), None, ctx.backend)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        grad_weight, grad_bias = jagged_dense_bmm_weight_grad(values_TK, grad_TN, offsets, ctx.bias, ctx.backend)
    return grad_values, None, grad_weight, grad_bias if ctx.bias else None, None


jagged_dense_bmm.register_autograd(_bmm_backward, setup_context=_keep_bmm)
