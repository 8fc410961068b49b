"""C++ form (cpu.cpp) of `norm_mul_dropout`; float32 and float64, lower precisions pass through float32."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.norm_mul_dropout.form import ACTIVATIONS, SEGMENTS, Form
from ops.random import drop_threshold

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "y is not on the CPU"
    return native.reason(_SOURCE)


class _Problem(ctypes.Structure):
    """`Problem` of cpu.cpp. It holds addresses: the tensors must live as long as it is used."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "u", "weight", "bias", "keys")),
        *((name, ctypes.c_int64) for name in ("y_stride", "u_stride", "tokens", "groups", "group_width")),
        *((name, ctypes.c_int64) for name in ("activation", "output")),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
    )

    def __init__(
        self, y_TD: Tensor, u_TD: Tensor, weight: Tensor | None, bias: Tensor | None, keys_T: Tensor | None, form: Form
    ) -> None:
        super().__init__(
            *(None if x is None else x.data_ptr() for x in (y_TD, u_TD, weight, bias, keys_T)),
            *(y_TD.stride(0), u_TD.stride(0)),
            *(y_TD.shape[0], form.num_groups, y_TD.shape[1] // form.num_groups),
            *(ACTIVATIONS.index(form.u_activation), list(SEGMENTS).index(form.output)),
            form.dropout_seed & (2**64 - 1),
            drop_threshold(form.dropout_rate),
            1.0 / (1.0 - form.dropout_rate),
            form.eps,
        )


def rows(x_TD: Tensor) -> Tensor:
    """x in a dtype of cpu.cpp; itself where it is in one and its rows lie without gaps inside."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _affine(values_D: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values_D is None else values_D.to(dtype).contiguous()


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(native.require(_SOURCE), f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def norm_mul_dropout(
    y_TD: Tensor, u_TD: Tensor, weight: Tensor | None, bias: Tensor | None, keys_T: Tensor | None, form: Form
) -> Tensor:
    dtype = y_TD.dtype
    y_TD, u_TD = rows(y_TD), rows(u_TD)
    weight, bias = _affine(weight, y_TD.dtype), _affine(bias, y_TD.dtype)
    keys_T = None if keys_T is None else keys_T.contiguous()
    out = y_TD.new_empty(y_TD.shape[0], form.segments * y_TD.shape[1])
    problem = _Problem(y_TD, u_TD, weight, bias, keys_T, form)
    _function("forward", y_TD.dtype)(ctypes.byref(problem), native.pointer(out))
    return out.to(dtype)


def gradients(
    grad: Tensor,
    y_TD: Tensor,
    u_TD: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keys_T: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = y_TD.dtype
    grad, y_TD, u_TD = rows(grad), rows(y_TD), rows(u_TD)
    weight, bias = _affine(weight, y_TD.dtype), _affine(bias, y_TD.dtype)
    keys_T = None if keys_T is None else keys_T.contiguous()
    grad_y_TD, grad_u_TD = (torch.empty_like(y_TD, memory_format=torch.contiguous_format) for _ in range(2))
    grad_weight, grad_bias = (None if x is None else torch.empty_like(x) for x in (weight, bias))
    problem = _Problem(y_TD, u_TD, weight, bias, keys_T, form)
    _function("backward", y_TD.dtype)(
        ctypes.byref(problem),
        ctypes.c_void_p(grad.data_ptr()),
        ctypes.c_int64(grad.stride(0)),
        *map(native.pointer, (grad_y_TD, grad_u_TD, grad_weight, grad_bias)),
    )
    return grad_y_TD.to(dtype), grad_u_TD.to(dtype), grad_weight, grad_bias
