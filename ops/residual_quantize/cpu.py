"""Residual quantization of a block of tokens at a time: PyTorch's matrix product, the rest in C++ (cpu.cpp).

PyTorch's argmax alone takes longer than the product of a narrow codebook. float32 and float64; lower precisions run in
float32.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native

_SOURCE = Path(__file__).with_name("cpu.cpp")
# 2 MB of float32 scores stay in a cache, but a product of few rows runs at memory speed.
BLOCK_SCORES = 1 << 19
_MIN_ROWS = 64


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "x is not on the CPU"
    return native.reason(_SOURCE)


def residual_quantize(x_TD: Tensor, codebooks_LCD: Tensor, half_norms_LC: Tensor) -> tuple[Tensor, Tensor]:
    library = native.require(_SOURCE)
    dtype = codebooks_LCD.dtype
    take_nearest = library.take_nearest_f64 if dtype == torch.float64 else library.take_nearest_f32
    codebooks_LCD, offsets_LC = codebooks_LCD.contiguous(), -half_norms_LC
    tokens, (levels, size, width) = x_TD.shape[0], codebooks_LCD.shape
    codes_LT = torch.empty(levels, tokens, dtype=torch.int64)
    residual_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    step = max(BLOCK_SCORES // size, _MIN_ROWS)
    buffer = torch.empty(min(step, tokens), size, dtype=dtype)
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        residual_bD = x_TD[rows].to(dtype, memory_format=torch.contiguous_format, copy=True)
        scores_bC = buffer[: len(residual_bD)]
        for codebook_CD, offsets_C, codes_T in zip(codebooks_LCD, offsets_LC, codes_LT, strict=True):
            torch.addmm(offsets_C, residual_bD, codebook_CD.T, out=scores_bC)
            take_nearest(
                *map(native.pointer, (scores_bC, codebook_CD)),
                *map(ctypes.c_int64, (len(residual_bD), size, width)),
                *map(native.pointer, (residual_bD, codes_T[rows])),
            )
        residual_TD[rows] = residual_bD
    return codes_LT.T.contiguous(), residual_TD
