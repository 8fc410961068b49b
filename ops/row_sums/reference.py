"""Sums of weighted source rows by id in plain PyTorch, through the (N, D) tensor of weighted rows."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(source_SD.dtype, torch.float32)
    kept_M = torch.nonzero((ids_N >= 0) & (ids_N < num_rows))[:, 0]
    weighted_MD = source_SD.index_select(0, kept_M if rows_N is None else rows_N[kept_M]).to(dtype)
    if weights_N is not None:
        weighted_MD = weighted_MD * weights_N[kept_M, None].to(dtype)
    return weighted_MD.new_zeros(num_rows, source_SD.shape[1]).index_add(0, ids_N[kept_M], weighted_MD)


def row_sums_sparse(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept_M = torch.nonzero((ids_N >= 0) & (ids_N < num_rows))[:, 0]
    unique_ids_U, place_M = ids_N[kept_M].unique(return_inverse=True)
    rows_M = kept_M if rows_N is None else rows_N[kept_M]
    weights_M = None if weights_N is None else weights_N[kept_M]
    return unique_ids_U, row_sums(place_M, source_SD, len(unique_ids_U), rows_M, weights_M)
