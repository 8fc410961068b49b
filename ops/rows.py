"""Rows of a table by lists of ids, shared by the ops that score a catalogue: selecting, finding, normalizing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Extent(NamedTuple):
    """The smallest and largest id of a list, whether it ascends, and whether it counts from the one to the other."""

    smallest: int
    largest: int
    ascends: bool
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
    step_X = ids_X.diff()
    facts = torch.stack([ids_X.min(), ids_X.max(), (step_X > 0).sum(), (step_X == 1).sum()])
    smallest, largest, upward, single = facts.tolist()
    return Extent(smallest, largest, upward == step_X.numel(), single == step_X.numel())


def select_rows(table_VD: Tensor, ids_X: Tensor) -> Tensor:
    """table[ids], (X, D): a view where the ids are one ascending range, as in most catalogues, else a copy."""
    if ids_X.numel() and (ids := extent(ids_X)).is_range:
        return table_VD[ids.smallest : ids.largest + 1]
    return table_VD.index_select(0, ids_X)


def find_sorted(sorted_ids_X: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Position of each wanted id in the ascending list of unique ids, and whether it is there; 0 for absent ones."""
    count = sorted_ids_X.numel()
    if count == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    ids = extent(sorted_ids_X)
    if ids.is_range:
        position = wanted - ids.smallest
        found = (position >= 0) & (position < count)
    else:
        position = torch.searchsorted(sorted_ids_X, wanted).clamp_max(count - 1)
        found = sorted_ids_X[position] == wanted
    return torch.where(found, position, 0), found


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What these are computed in together: float32, or float64 where one is."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None), torch.float32)


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
