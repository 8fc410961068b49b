"""C++ counter-based dropout as a custom op; float32 and float64, lower precisions pass through float32."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from ops import native
from ops.random import drop_threshold

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "x is not on the CPU"
    return native.reason(_SOURCE)


@torch.library.custom_op("gr::dropout_cpu", mutates_args=())
def _apply(x_TD: torch.Tensor, rate: float, seed: int, keys_T: torch.Tensor) -> torch.Tensor:
    library = native.library(_SOURCE)
    assert library is not None
    double = x_TD.dtype == torch.float64
    values_TD = x_TD.to(torch.float64 if double else torch.float32).contiguous()
    keys_T = keys_T.contiguous()
    out_TD = torch.empty_like(values_TD)
    tokens = x_TD.shape[0]
    (library.dropout_f64 if double else library.dropout_f32)(
        native.pointer(values_TD),
        native.pointer(keys_T),
        ctypes.c_int64(tokens),
        ctypes.c_int64(x_TD.shape[1:].numel()),
        ctypes.c_uint64(seed & (2**64 - 1)),
        ctypes.c_uint32(drop_threshold(rate)),
        ctypes.c_double(1.0 / (1.0 - rate)),
        native.pointer(out_TD),
    )
    return out_TD.to(x_TD.dtype)


@_apply.register_fake
def _(x_TD: torch.Tensor, rate: float, seed: int, keys_T: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.rate, ctx.seed, keys_T = inputs
    ctx.save_for_backward(keys_T)


def _backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (keys_T,) = ctx.saved_tensors
    return _apply(grad_TD, ctx.rate, ctx.seed, keys_T), None, None, None


_apply.register_autograd(_backward, setup_context=_setup_context)


def dropout(x_TD: torch.Tensor, rate: float, seed: int, keys_T: torch.Tensor) -> torch.Tensor:
    # torch passes integers as signed 64 bits; the generator reads the same 64 bits unsigned.
    seed &= 2**64 - 1
    result: torch.Tensor = _apply(x_TD, rate, seed - 2**64 if seed >= 2**63 else seed, keys_T)
    return result
