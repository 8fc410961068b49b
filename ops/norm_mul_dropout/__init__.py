"""Normalize, gate and drop: what HSTU does between attention and its output projection, in one pass over memory.

    normed  = (y - mean) * rsqrt(var + eps) * weight + bias        mean and var over each of `num_groups` slices of D
    product = act(u) * normed
    out     = dropout(product) | dropout([u, normed, product]) | dropout([u, y, product])

One group is layer normalization, one a head the group normalization of DLRM-v3. As separate PyTorch calls each step is
a round trip to memory and its result is kept for backward; here nothing is kept but y and u, from which backward
recomputes statistics and mask. The mask is that of `ops.dropout` for rows of the result's width, so the result is that
of the separate steps up to rounding. Statistics are two-pass, in float32, or in float64 for float64 inputs.

Sources: Actions Speak Louder than Words (arXiv 2402.17152), equation 3; the concatenations are `concat_ua` of the
public experiments and `hstu_compute_output` of DLRM-v3. In every form u is concatenated as it is given: the activation
belongs to the product alone. (HSTU's projection has activated u already and leaves `u_activation` at "none".)
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.norm_mul_dropout import cpu, gpu, operator, reference
from ops.norm_mul_dropout.form import ACTIVATIONS, SEGMENTS, Form

__all__ = ["norm_mul_dropout"]

_norm_mul_dropout = Op(
    "norm_mul_dropout",
    reference.norm_mul_dropout,
    {
        "triton": Implementation(partial(operator.norm_mul_dropout, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.norm_mul_dropout, triton=False), cpu.refuses),
    },
)


def norm_mul_dropout(
    y_TD: Tensor,
    u_TD: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    num_groups: int = 1,
    u_activation: Literal["none", "silu", "sigmoid"] = "none",
    output: Literal["product", "concat_normed", "concat_raw"] = "product",
    dropout_rate: float = 0.0,
    dropout_seed: int = 0,
    keys_T: Tensor | None = None,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """dropout(act(u) * norm(y)), (T, D), or dropout of [u, norm(y) or y, act(u) * norm(y)], (T, 3D); formula above.

    y_TD, u_TD: floats of one dtype, in which the result is; slices of a wider tensor are read where they lie. weight,
    bias: (D,), any floating dtype. num_groups: equal slices of D, normalized each on its own.
    output: "product", "concat_normed" or "concat_raw". keys_T: int64 (T,), what names a row to dropout, by default
    its index; dropout is off when not training. The column of the result is the lane of dropout.
    Gradients: y, u, weight, bias; the last two are summed in an order that depends on T alone.
    Raises ValueError for shapes, dtypes or names that do not fit and a rate outside [0, 1).
    """
    _check(y_TD, u_TD, weight, bias, num_groups)
    if u_activation not in ACTIVATIONS:
        raise ValueError(f"norm_mul_dropout u_activation: got {u_activation!r}, expected one of {ACTIVATIONS}")
    if output not in SEGMENTS:
        raise ValueError(f"norm_mul_dropout output: got {output!r}, expected one of {tuple(SEGMENTS)}")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"norm_mul_dropout dropout_rate: got {dropout_rate}, expected 0 <= rate < 1")
    if keys_T is not None and (keys_T.dtype != torch.int64 or keys_T.shape != y_TD.shape[:1]):
        got = f"{keys_T.dtype} {tuple(keys_T.shape)}"
        raise ValueError(f"norm_mul_dropout keys_T: got {got}, expected int64 ({y_TD.shape[0]},)")
    if not training or dropout_rate == 0.0:
        dropout_rate, dropout_seed, keys_T = 0.0, 0, None
    elif keys_T is None:
        keys_T = torch.arange(y_TD.shape[0], device=y_TD.device)
    form = Form(eps, num_groups, u_activation, output, dropout_rate, dropout_seed)
    result: Tensor = _norm_mul_dropout(y_TD, u_TD, weight, bias, keys_T, form, backend=backend)
    return result


def _check(y_TD: Tensor, u_TD: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int) -> None:
    if y_TD.dim() != 2 or u_TD.shape != y_TD.shape or u_TD.dtype != y_TD.dtype or not y_TD.is_floating_point():
        got = f"{y_TD.dtype} {tuple(y_TD.shape)} and {u_TD.dtype} {tuple(u_TD.shape)}"
        raise ValueError(f"norm_mul_dropout y and u: got {got}, expected floats of one dtype and shape (T, D)")
    for name, values_D in (("weight", weight), ("bias", bias)):
        if values_D is not None and (values_D.shape != y_TD.shape[1:] or not values_D.is_floating_point()):
            got = f"{values_D.dtype} {tuple(values_D.shape)}"
            raise ValueError(f"norm_mul_dropout {name}: got {got}, expected floats ({y_TD.shape[1]},)")
    if num_groups < 1 or y_TD.shape[1] % num_groups:
        raise ValueError(f"norm_mul_dropout num_groups: got {num_groups}, expected a divisor of {y_TD.shape[1]}")
