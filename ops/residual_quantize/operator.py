"""Residual quantization as one operator for both devices, which `torch.compile` and `torch.export` see through."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.residual_quantize import cpu, gpu
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::residual_quantize", mutates_args=())
def _apply(x_TD: Tensor, codebooks_LCD: Tensor, half_norms_LC: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    return (gpu if on_gpu(x_TD, triton) else cpu).residual_quantize(x_TD, codebooks_LCD, half_norms_LC)


@_apply.register_fake
def _(x_TD: Tensor, codebooks_LCD: Tensor, half_norms_LC: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    codes_TL = x_TD.new_empty(x_TD.shape[0], codebooks_LCD.shape[0], dtype=torch.int64)
    return codes_TL, x_TD.new_empty(x_TD.shape)


def residual_quantize(
    x_TD: Tensor, codebooks_LCD: Tensor, half_norms_LC: Tensor, *, triton: bool
) -> tuple[Tensor, Tensor]:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    codes_TL, residual_TD = _apply(x_TD, codebooks_LCD, half_norms_LC, triton)
    return codes_TL, residual_TD
