"""Residual quantization in plain PyTorch, a (T, C) matrix of scores at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def residual_quantize(x_TD: Tensor, codebooks_LCD: Tensor, half_norms_LC: Tensor) -> tuple[Tensor, Tensor]:
    residual_TD = x_TD.to(codebooks_LCD.dtype)
    codes_TL = x_TD.new_empty(x_TD.shape[0], codebooks_LCD.shape[0], dtype=torch.int64)
    for level, codebook_CD in enumerate(codebooks_LCD):
        scores_TC = residual_TD @ codebook_CD.T - half_norms_LC[level]
        code_T = torch.where(scores_TC.isnan(), float("-inf"), scores_TC).argmax(dim=1)
        codes_TL[:, level] = code_T
        residual_TD = residual_TD - codebook_CD[code_T]
    return codes_TL, residual_TD.to(x_TD.dtype)
