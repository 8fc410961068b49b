"""Full softmax through the whole (T, X) matrix of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.rows import compute_dtype, extent, l2_normalize


def linear_cross_entropy(
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
) -> Tensor:
    positions_T = checked_positions(catalogue_ids_X, target_ids_T, table_VD.shape[0])
    dtype = compute_dtype(queries_TD, table_VD)
    items_XD = table_VD.to(dtype).index_select(0, catalogue_ids_X)
    if l2_norm:
        items_XD = l2_normalize(items_XD, eps)
    return F.cross_entropy(queries_TD.to(dtype) / temperature @ items_XD.T, positions_T, reduction="none")


def checked_positions(catalogue_ids_X: Tensor, target_ids_T: Tensor, rows: int) -> Tensor:
    """`target_positions`, or ValueError for a target that has none; waits for a GPU."""
    positions_T = target_positions(catalogue_ids_X, target_ids_T, rows)
    missing = torch.nonzero(positions_T < 0)
    if len(missing):
        target = int(target_ids_T[missing[0, 0]])
        raise ValueError(f"linear_cross_entropy target: got id {target}, expected one of the catalogue")
    return positions_T


def target_positions(catalogue_ids_X: Tensor, target_ids_T: Tensor, rows: int) -> Tensor:
    """Index of each target in the catalogue, -1 where it is not there; ValueError for a catalogue outside the table."""
    count = catalogue_ids_X.numel()
    ids = extent(catalogue_ids_X)
    if ids.smallest < 0 or ids.largest >= rows:
        raise ValueError(f"linear_cross_entropy catalogue: got ids outside the table, expected 0 to {rows - 1}")
    if ids.is_range:
        positions_T = target_ids_T - ids.smallest
        return torch.where((positions_T >= 0) & (positions_T < count), positions_T, -1)
    position_of_V = torch.full((rows,), -1, device=catalogue_ids_X.device)
    position_of_V[catalogue_ids_X] = torch.arange(count, device=catalogue_ids_X.device)
    inside_T = (target_ids_T >= 0) & (target_ids_T < rows)
    return torch.where(inside_T, position_of_V[target_ids_T.clamp(0, rows - 1)], -1)
