"""C++ form (cpu.cpp) of `row_sums`; float32 and float64, lower precisions pass through float32."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "ids are not on the CPU"
    return native.reason(_SOURCE)


def row_sums(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None
) -> Tensor:
    library = native.require(_SOURCE)
    dtype = torch.promote_types(source_SD.dtype, torch.float32)
    ids_N, source_SD = ids_N.contiguous(), source_SD.to(dtype).contiguous()
    weights_N = None if weights_N is None else weights_N.to(dtype).contiguous()
    if rows_N is not None:
        rows_N = rows_N.contiguous()
        _check_rows(library, ids_N, rows_N, num_rows, source_SD.shape[0])
    sums_VD = source_SD.new_empty(num_rows, source_SD.shape[1])
    (library.row_sums_f64 if dtype == torch.float64 else library.row_sums_f32)(
        *map(native.pointer, (ids_N, rows_N, weights_N, source_SD)),
        *map(ctypes.c_int64, (ids_N.shape[0], *sums_VD.shape)),
        native.pointer(sums_VD),
    )
    return sums_VD


def row_sums_sparse(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    inside_N = (ids_N >= 0) & (ids_N < num_rows)
    unique_ids_U, found_M = ids_N[inside_N].unique(return_inverse=True)
    place_N = torch.full_like(ids_N, -1)
    place_N[inside_N] = found_M
    return unique_ids_U, row_sums(place_N, source_SD, len(unique_ids_U), rows_N, weights_N)


def _check_rows(library: ctypes.CDLL, ids_N: Tensor, rows_N: Tensor, num_rows: int, sources: int) -> None:
    library.row_outside.restype = ctypes.c_int64
    sizes = map(ctypes.c_int64, (ids_N.shape[0], num_rows, sources))
    bad = library.row_outside(*map(native.pointer, (ids_N, rows_N)), *sizes)
    if bad >= 0:
        raise IndexError(f"row_sums rows: got {int(rows_N[bad])}, expected 0 to {sources - 1}")
