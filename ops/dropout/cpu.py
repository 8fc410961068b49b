"""C++ counter-based dropout; float32 and float64, lower precisions pass through float32."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.random import drop_threshold

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "x is not on the CPU"
    return native.reason(_SOURCE)


def dropout(x_TD: Tensor, rate: float, seed: int, keys_T: Tensor) -> Tensor:
    library = native.require(_SOURCE)
    double = x_TD.dtype == torch.float64
    values_TD = x_TD.to(torch.float64 if double else torch.float32).contiguous()
    keys_T = keys_T.contiguous()
    out_TD = torch.empty_like(values_TD)
    (library.dropout_f64 if double else library.dropout_f32)(
        native.pointer(values_TD),
        native.pointer(keys_T),
        ctypes.c_int64(x_TD.shape[0]),
        ctypes.c_int64(x_TD.shape[1:].numel()),
        ctypes.c_uint64(seed & (2**64 - 1)),
        ctypes.c_uint32(drop_threshold(rate)),
        ctypes.c_double(1.0 / (1.0 - rate)),
        native.pointer(out_TD),
    )
    return out_TD.to(x_TD.dtype)
