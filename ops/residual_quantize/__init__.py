"""Residual quantization: level by level the nearest code of what the levels before left over.

    r_0 = x        c_l = argmin_c |r_l - e_{l,c}|^2        r_{l+1} = r_l - e_{l,c_l}        l = 0 .. L-1

The nearest code is found as argmax_c <r, e_c> - |e_c|^2 / 2, equal distances going to the lowest index. Sources:
SoundStream (Zeghidour et al. 2021, section III.C), TIGER (Rajput et al. 2023, section 3.1). The fast forms hold no
(T, C) matrix of distances, so a whole catalogue is one call.

Codes are discrete and nothing here has a gradient. A tokenizer's losses are rebuilt from the codes, L gathers that send
gradients where it wants them; in TIGER's form, with one straight-through step for the sum of the codes,

    codes_TL, _ = residual_quantize(z_TD, codebooks)
    residual_TD, loss = z_TD, 0.0
    for codebook_CD, code_T in zip(codebooks, codes_TL.T):
        chosen_TD = codebook_CD[code_T]
        loss = loss + (residual_TD.detach() - chosen_TD).square().sum()
        loss = loss + beta * (residual_TD - chosen_TD.detach()).square().sum()
        residual_TD = residual_TD - chosen_TD.detach()
    quantized_TD = z_TD - residual_TD.detach()

Therefore the residuals between levels, L times the size of the result, are not returned: a loss has them as above, and
the one before level l, which k-means initialization, dead-code revival and reassignment of collisions start from, is
the residual of a call with `codebooks[:l]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ops.dispatch import Implementation, Op
from ops.residual_quantize import cpu, gpu, operator, reference
from ops.rows import compute_dtype

__all__ = ["residual_quantize"]

_residual_quantize = Op(
    "residual_quantize",
    reference.residual_quantize,
    {
        "triton": Implementation(partial(operator.residual_quantize, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.residual_quantize, triton=False), cpu.refuses),
    },
)


def residual_quantize(
    x_TD: Tensor, codebooks: Tensor | Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes, int64 (T, L), and what the last level leaves over, (T, D) in the dtype of x. No gradients.

    x_TD: floats. codebooks: (L, C, D), or one (C_l, D) a level with any numbers of codes, of any float dtypes.
    Computed in float32, float64 where an input is; the residual is rounded to the dtype of x once, at the end. Two
    codes whose distances differ by less than the rounding of <r, e> may be taken for one another: on a GPU that of TF32
    where `torch.backends.cuda.matmul.allow_tf32` is on.
    A distance that is NaN is the largest: a row with NaN gets code 0 and a residual with NaN, and a code with NaN is
    chosen by no row that has a finite distance to another.
    Raises ValueError for shapes or dtypes that do not fit and a level without codes.
    """
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"residual_quantize x: got {x_TD.dtype} {tuple(x_TD.shape)}, expected floats (T, D)")
    levels = list(codebooks)
    for level, codebook_CD in enumerate(levels):
        fits = codebook_CD.dim() == 2 and codebook_CD.shape[1] == x_TD.shape[1] and codebook_CD.shape[0] > 0
        if not fits or not codebook_CD.is_floating_point():
            got = f"{codebook_CD.dtype} {tuple(codebook_CD.shape)}"
            expected = f"at least one code of {x_TD.shape[1]} floats"
            raise ValueError(f"residual_quantize codebook of level {level}: got {got}, expected {expected}")
    with torch.no_grad():
        if not levels:
            return x_TD.new_empty(x_TD.shape[0], 0, dtype=torch.int64), x_TD.clone()
        codebooks_LCD, half_norms_LC = _uniform(levels, compute_dtype(x_TD, *levels))
        codes_TL, residual_TD = _residual_quantize(x_TD.detach(), codebooks_LCD, half_norms_LC, backend=backend)
    return codes_TL, residual_TD


def _uniform(levels: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codebooks as (L, C, D), and |e|^2 / 2 as (L, C), infinite for what fills up short levels: it is never nearest."""
    codebooks_LCD = pad_sequence([codebook_CD.detach().to(dtype) for codebook_CD in levels], batch_first=True)
    half_norms = [codebook_CD.detach().to(dtype).square().sum(dim=1) / 2 for codebook_CD in levels]
    return codebooks_LCD, pad_sequence(half_norms, batch_first=True, padding_value=float("inf"))
