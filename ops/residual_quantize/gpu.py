"""Triton form of residual quantization; codebooks in float32, x in any dtype with kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import triton_runtime
from ops.tuning import Table

_TABLE = Table("residual_quantize")

refuses = triton_runtime.refuses


def residual_quantize(x_TD: Tensor, codebooks_LCD: Tensor, half_norms_LC: Tensor) -> tuple[Tensor, Tensor]:
    from ops.residual_quantize import kernels

    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    tokens, (levels, size, width) = x_TD.shape[0], codebooks_LCD.shape
    codes_TL = torch.empty(tokens, levels, dtype=torch.int64, device=x_TD.device)
    residual_TD = torch.empty(tokens, width, dtype=torch.float32, device=x_TD.device)
    tensor_cores = torch.backends.cuda.matmul.allow_tf32
    # Powers of two, so that catalogues of about one size share a choice.
    bucket = triton_runtime.power_of_two(tokens)
    triton_runtime.launch(
        kernels.residual_quantize,
        lambda config: (-(-tokens // config["BLOCK_T"]),),
        x_TD,
        codebooks_LCD.contiguous(),
        half_norms_LC.contiguous(),
        codes_TL,
        residual_TD,
        x_TD.stride(0),
        tokens,
        levels,
        size,
        width,
        table=_TABLE,
        key={"tokens": bucket, "size": size, "width": width, "tf32": int(tensor_cores)},
        PRECISION="tf32" if tensor_cores else "ieee",
    )
    return codes_TL, residual_TD.to(x_TD.dtype)
