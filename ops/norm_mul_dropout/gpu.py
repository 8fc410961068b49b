"""Triton form of `norm_mul_dropout`: shapes, partial sums and launches of kernels.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import triton_runtime
from ops.norm_mul_dropout.form import Form
from ops.random import drop_threshold
from ops.random.reference import seed_halves
from ops.tuning import Table

_TABLE = Table("norm_mul_dropout")
# A program of backward walks a multiple of this many tokens, and of a step of any configuration ...
_MIN_SPAN = 32
# ... so large that there are at most this many rows of partial sums.
MAX_PROGRAMS = 1024
# A slice of a group is held in registers.
MAX_GROUP_WIDTH = 2048


def refuses(*args: Any, **kwargs: Any) -> str | None:
    if args and args[0].shape[1] // args[5].num_groups > MAX_GROUP_WIDTH:
        return f"groups wider than {MAX_GROUP_WIDTH}"
    return triton_runtime.refuses(*args, **kwargs)


def rows(x_TD: Tensor) -> Tensor:
    """x itself where its rows lie without gaps inside, however far apart they are."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _scalars(form: Form) -> tuple[int | float, ...]:
    threshold, scale = drop_threshold(form.dropout_rate), 1.0 / (1.0 - form.dropout_rate)
    return *seed_halves(form.dropout_seed), threshold, scale, form.eps


def _variant(group_width: int, form: Form) -> dict[str, Any]:
    block = triton_runtime.power_of_two(group_width)
    return {
        "table": _TABLE,
        "key": {"width": block},
        "ACTIVATION": form.u_activation,
        "OUTPUT": form.output,
        "BLOCK_W": block,
    }


def norm_mul_dropout(
    y_TD: Tensor, u_TD: Tensor, weight: Tensor | None, bias: Tensor | None, keys_T: Tensor | None, form: Form
) -> Tensor:
    from ops.norm_mul_dropout import kernels

    y_TD, u_TD = rows(y_TD), rows(u_TD)
    tokens, width = y_TD.shape
    group_width = width // form.num_groups
    out = y_TD.new_empty(tokens, form.segments * width)
    triton_runtime.launch(
        kernels.norm_mul_dropout,
        lambda config: (-(-tokens // config["BLOCK_T"]), form.num_groups if width else 0),
        y_TD,
        u_TD,
        *map(_dense, (weight, bias, keys_T)),
        out,
        *(y_TD.stride(0), u_TD.stride(0)),
        *_scalars(form),
        tokens,
        group_width,
        **_variant(group_width, form),
    )
    return out


def gradients(
    grad: Tensor,
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    from ops.norm_mul_dropout import kernels

    grad, y_TD, u_TD = rows(grad), rows(y_TD), rows(u_TD)
    tokens, width = y_TD.shape
    group_width = width // form.num_groups
    span = _MIN_SPAN * max(-(-tokens // (_MIN_SPAN * MAX_PROGRAMS)), 1)
    programs = -(-tokens // span)
    grad_y_TD, grad_u_TD = (torch.empty_like(y_TD, memory_format=torch.contiguous_format) for _ in range(2))
    sums: list[Tensor | None] = [
        None if values_D is None else y_TD.new_empty(programs, width, dtype=torch.float32)
        for values_D in (weight, bias)
    ]
    triton_runtime.launch(
        kernels.norm_mul_dropout_backward,
        lambda config: (programs, form.num_groups if width else 0),
        grad,
        y_TD,
        u_TD,
        *map(_dense, (weight, bias, keys_T)),
        grad_y_TD,
        grad_u_TD,
        *sums,
        *(grad.stride(0), y_TD.stride(0), u_TD.stride(0)),
        *_scalars(form),
        tokens,
        span,
        group_width,
        **_variant(group_width, form),
    )
    grad_weight, grad_bias = (None if rows_PD is None else rows_PD.sum(0) for rows_PD in sums)
    return grad_y_TD, grad_u_TD, grad_weight, grad_bias
