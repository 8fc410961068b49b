"""`norm_mul_dropout` in plain PyTorch, one call a step; half precisions are computed in float32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.dropout.reference import dropout
from ops.norm_mul_dropout.form import Form

_ACTIVATIONS = {"none": lambda u: u, "silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}


def norm_mul_dropout(
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    form: Form,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """compute_dtype: of every step, by default float32 for half precisions and the inputs' own otherwise."""
    dtype = compute_dtype or torch.promote_types(y_TD.dtype, torch.float32)
    y, u = y_TD.to(dtype), u_TD.to(dtype)
    grouped_TGW = y.view(y.shape[0], form.num_groups, y.shape[1] // form.num_groups)
    centered_TGW = grouped_TGW - grouped_TGW.mean(dim=2, keepdim=True)
    variance_TG1 = centered_TGW.square().mean(dim=2, keepdim=True)
    normed = (centered_TGW * torch.rsqrt(variance_TG1 + form.eps)).view(y.shape)
    if weight is not None:
        normed = normed * weight.to(dtype)
    if bias is not None:
        normed = normed + bias.to(dtype)
    out = _ACTIVATIONS[form.u_activation](u) * normed
    if form.output != "product":
        out = torch.cat([u, normed if form.output == "concat_normed" else y, out], dim=1)
    if keys_T is not None:
        out = dropout(out, form.dropout_rate, form.dropout_seed, keys_T)
    return out.to(y_TD.dtype)
