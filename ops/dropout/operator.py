"""`dropout` as one operator for both devices, with autograd; backward is the same operator on the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.dropout import cpu, gpu
from ops.random.reference import signed_seed
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::dropout", mutates_args=())
def _apply(x_TD: Tensor, rate: float, seed: int, keys_T: Tensor, triton: bool) -> Tensor:
    return (gpu if on_gpu(x_TD, triton) else cpu).dropout(x_TD, rate, seed, keys_T)


@_apply.register_fake
def _(x_TD: Tensor, rate: float, seed: int, keys_T: Tensor, triton: bool) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.rate, ctx.seed, keys_T, ctx.triton = inputs
    ctx.save_for_backward(keys_T)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    (keys_T,) = ctx.saved_tensors
    return _apply(grad_TD, ctx.rate, ctx.seed, keys_T, ctx.triton), None, None, None, None


_apply.register_autograd(_backward, setup_context=_setup_context)


def dropout(x_TD: Tensor, rate: float, seed: int, keys_T: Tensor, *, triton: bool) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    result: Tensor = _apply(x_TD, rate, signed_seed(seed), keys_T, triton)
    return result
