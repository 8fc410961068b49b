"""Rows of a table by lists of ids, shared by the ops that score a catalogue: selecting, finding, normalizing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Extent(NamedTuple):
    """The smallest and largest id of a list, and whether the list counts from the one to the other."""

    smallest: int
    largest: int
    is_range: bool


# Of the lists seen lately, each under the version of its tensor.
_extents: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def extent(ids_X: Tensor) -> Extent:
    """Of one id or more. A GPU is waited for, once: there a tensor is read again only after PyTorch wrote to it."""
    if ids_X.device.type == "cpu" or ids_X.is_inference():
        return _read_extent(ids_X)
    version, found = _extents.get(ids_X, (None, None))
    if version != ids_X._version:
        version, found = _extents[ids_X] = ids_X._version, _read_extent(ids_X)
    assert found is not None
    return found


def _read_extent(ids_X: Tensor) -> Extent:
    smallest, largest, steps = torch.stack([ids_X.min(), ids_X.max(), (ids_X.diff() == 1).sum()]).tolist()
    return Extent(smallest, largest, steps == ids_X.numel() - 1)


def select_rows(table_VD: Tensor, ids_X: Tensor) -> Tensor:
    """table[ids], (X, D): a view where the ids are one ascending range, as in most catalogues, else a copy."""
    if ids_X.numel() and extent(ids_X).is_range:
        first = extent(ids_X).smallest
        return table_VD[first : first + ids_X.numel()]
    return table_VD.index_select(0, ids_X)


def find_sorted(sorted_ids_X: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Position of each wanted id in the ascending list of unique ids, and whether it is there; 0 for absent ones."""
    count = sorted_ids_X.numel()
    if count == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    if extent(sorted_ids_X).is_range:
        position = wanted - extent(sorted_ids_X).smallest
        found = (position >= 0) & (position < count)
    else:
        position = torch.searchsorted(sorted_ids_X, wanted).clamp_max(count - 1)
        found = sorted_ids_X[position] == wanted
    return torch.where(found, position, 0), found


def l2_normalize(rows: Tensor, eps: float) -> Tensor:
    """rows / max(|rows|, eps)."""
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(eps)


def l2_normalize_backward(grad: Tensor, rows: Tensor, eps: float) -> Tensor:
    """The gradient of rows from that of `l2_normalize(rows, eps)`, in the gradient's dtype."""
    rows = rows.to(grad.dtype)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    bounded = norm.clamp_min(eps)
    unit = rows / bounded
    along = torch.where(norm >= eps, (grad * unit).sum(dim=-1, keepdim=True), 0)
    return (grad - along * unit) / bounded
