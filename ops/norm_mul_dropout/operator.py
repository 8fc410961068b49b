"""`norm_mul_dropout` as one operator for both devices, with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.norm_mul_dropout import cpu, gpu
from ops.norm_mul_dropout.form import Form
from ops.random.reference import signed_seed
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::norm_mul_dropout", mutates_args=())
def _apply(
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    eps: float,
    num_groups: int,
    u_activation: str,
    output: str,
    rate: float,
    seed: int,
    triton: bool,
) -> Tensor:
    form = Form(eps, num_groups, u_activation, output, rate, seed)
    return (gpu if on_gpu(y_TD, triton) else cpu).norm_mul_dropout(y_TD, u_TD, weight, bias, keys_T, form)


@_apply.register_fake
def _(
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    eps: float,
    num_groups: int,
    u_activation: str,
    output: str,
    rate: float,
    seed: int,
    triton: bool,
) -> Tensor:
    form = Form(eps, num_groups, u_activation, output, rate, seed)
    return y_TD.new_empty(y_TD.shape[0], form.segments * y_TD.shape[1])


@torch.library.custom_op("gr::norm_mul_dropout_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    eps: float,
    num_groups: int,
    u_activation: str,
    output: str,
    rate: float,
    seed: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of y, u, weight and bias; an operator returns tensors alone, so that of an absent weight or bias is empty."""
    form = Form(eps, num_groups, u_activation, output, rate, seed)
    place = gpu if on_gpu(y_TD, triton) else cpu
    grad_y_TD, grad_u_TD, *sums = place.gradients(grad, y_TD, u_TD, weight, bias, keys_T, form)
    grad_weight, grad_bias = (
        y_TD.new_empty(0) if values_D is None else total.to(values_D.dtype)
        for values_D, total in zip((weight, bias), sums, strict=True)
    )
    return grad_y_TD, grad_u_TD, grad_weight, grad_bias


@_gradients.register_fake
def _(
    grad: Tensor, y_TD: Tensor, u_TD: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        y_TD.new_empty(y_TD.shape),
        y_TD.new_empty(y_TD.shape),
        y_TD.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        y_TD.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps, num_groups, u_activation, name, rate, seed, triton = inputs
    ctx.scalars = (eps, num_groups, u_activation, name, rate, seed, triton)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y_TD, u_TD, weight, bias, keys_T = ctx.saved_tensors
    grad_y_TD, grad_u_TD, grad_weight, grad_bias = _gradients(grad, y_TD, u_TD, weight, bias, keys_T, *ctx.scalars)
    affine = (None if weight is None else grad_weight, None if bias is None else grad_bias)
    return grad_y_TD, grad_u_TD, *affine, None, *(None for _ in ctx.scalars)


_apply.register_autograd(_backward, setup_context=_setup_context)


def norm_mul_dropout(
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    form: Form,
    *,
    triton: bool,
) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    *options, seed = form
    result: Tensor = _apply(y_TD, u_TD, weight, bias, keys_T, *options, signed_seed(seed), triton)
    return result
