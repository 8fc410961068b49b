"""The operators of fbgemm_gpu that are equal to the reference, and where they are not.

Left out because it differs: `jagged_dense_bmm`, which wants the longest row on the host and adds no bias. Gradients are
this package's own, which are these operators again. On a CPU they run once something has imported fbgemm_gpu: torchrec,
say, or `ops.explain()`, which has to try.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
_OPERATORS = (
    "asynchronous_complete_cumsum",
    "offsets_range",
    "jagged_to_padded_dense_forward",
    "dense_to_jagged_forward",
)
# fbgemm counts elements in 32 bits, and takes the padding as a double.
_MAX_ELEMENTS = 2**31 - 1
_MAX_EXACT = 2**53


@functools.cache
def import_refuses() -> str | None:
    """Imports fbgemm_gpu, which takes most of a second: not before an op that could use it is called."""
    try:
        importlib.import_module("fbgemm_gpu")
        for name in _OPERATORS:
            getattr(torch.ops.fbgemm, name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"fbgemm_gpu cannot be imported ({lines[0]})"
    return None


# `torch.compile` keeps the answer it had while compiling; it looks through a cache, hence a function of its own.
@torch.compiler.assume_constant_result
def _device_refuses(device: str | None) -> str | None:
    """Why fbgemm does not run on a device; without one, on this machine."""
    if device == "cpu" and "fbgemm_gpu" not in sys.modules:
        return "fbgemm_gpu is not imported yet, which takes longer than it saves on a CPU"
    reason = import_refuses()
    if reason is not None or device is None:
        return reason
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if all(has_kernel(f"fbgemm::{name}", device.upper()) for name in _OPERATORS):
        return None
    return f"this build of fbgemm_gpu has no kernels for {device}"


def refuses(*args: Any, **_: Any) -> str | None:
    """Why fbgemm does not run on the first argument's device; without arguments, on this machine."""
    return _device_refuses(args[0].device.type if args else None)


def lengths_refuses(*args: Any, **kwargs: Any) -> str | None:
    return refuses(*args, **kwargs) or ("no lengths" if args and args[0].numel() == 0 else None)


def positions_refuses(*args: Any, **kwargs: Any) -> str | None:
    return refuses(*args, **kwargs) or ("no rows" if args and args[0].shape[0] < 2 else None)


def padded_refuses(*args: Any, **kwargs: Any) -> str | None:
    """For both directions: arguments are (values, offsets, max_len, padding_value) or (dense, offsets, total)."""
    if not args:
        return refuses()
    x, offsets, length, *padding = args
    places = (offsets.shape[0] - 1) * length if padding else length
    width = x.shape[1 if padding else 2 :].numel()
    if x.dtype not in _DTYPES:
        return f"no fbgemm kernel for {x.dtype}"
    if x.numel() == 0 or places * width == 0:
        return "no values"
    if max(x.numel(), places * width) > _MAX_ELEMENTS:
        return f"more than {_MAX_ELEMENTS} elements"
    if padding and not x.is_floating_point() and abs(padding[0]) > _MAX_EXACT:
        return f"the padding {padding[0]} is not exact as a double"
    return refuses(*args, **kwargs)


def lengths_to_offsets(lengths_B: Tensor) -> Tensor:
    offsets: Tensor = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths_B.to(torch.int64))
    return offsets


def positions(offsets: Tensor, total: int) -> Tensor:
    positions_T: Tensor = torch.ops.fbgemm.offsets_range(offsets[:-1].contiguous(), total)
    return positions_T


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, padding_value: bool | int | float) -> Tensor:
    flat = values.reshape(values.shape[0], values.shape[1:].numel())
    padded: Tensor = torch.ops.fbgemm.jagged_to_padded_dense_forward(flat, [offsets], [max_len], float(padding_value))
    return padded.view(offsets.shape[0] - 1, max_len, *values.shape[1:])


def padded_to_jagged(dense: Tensor, offsets: Tensor, total: int) -> Tensor:
    flat = dense.reshape(*dense.shape[:2], dense.shape[2:].numel())
    values: Tensor = torch.ops.fbgemm.dense_to_jagged_forward(flat, [offsets], total)
    return values.view(total, *dense.shape[2:])
