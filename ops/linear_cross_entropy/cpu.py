"""C++ form (cpu.cpp) of the forward pass over whole rows of logits; float32 and float64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ops import native

_SOURCE = Path(__file__).with_name("cpu.cpp")


def usable(queries_TD: torch.Tensor) -> bool:
    return queries_TD.device.type == "cpu" and native.reason(_SOURCE) is None


def forward_whole_rows(
    queries_TD: torch.Tensor, items_XD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log-sum-exp (T,), the mean item under each token's softmax (T, D), and sum_t p[t, x] queries[t] (X, D)."""
    library = native.library(_SOURCE)
    assert library is not None
    queries_TD, items_XD = queries_TD.contiguous(), items_XD.contiguous()
    lse_T = queries_TD.new_empty(len(queries_TD))
    means_TD, mass_XD = torch.empty_like(queries_TD), torch.empty_like(items_XD)
    (library.forward_f64 if queries_TD.dtype == torch.float64 else library.forward_f32)(
        native.pointer(queries_TD),
        native.pointer(items_XD),
        *map(ctypes.c_int64, (len(queries_TD), *items_XD.shape)),
        *map(native.pointer, (lse_T, means_TD, mass_XD)),
    )
    return lse_T, means_TD, mass_XD
