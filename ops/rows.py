"""Selecting table rows by id, and finding ids in a sorted list, shared by the ops that score a catalogue."""

from __future__ import annotations

import torch


def select_rows(table_VD: torch.Tensor, ids_X: torch.Tensor) -> torch.Tensor:
    """table[ids], (X, D): a view where the ids are one ascending range, as in most catalogues, else a copy."""
    count = ids_X.numel()
    if count and int(ids_X[-1]) - int(ids_X[0]) == count - 1 and bool((ids_X.diff() == 1).all()):
        first = int(ids_X[0])
        return table_VD[first : first + count]
    return table_VD.index_select(0, ids_X)


def find_sorted(sorted_ids_X: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of each wanted id in the ascending list of unique ids, and whether it is there; 0 for absent ones."""
    count = sorted_ids_X.numel()
    if count == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    first = int(sorted_ids_X[0])
    if int(sorted_ids_X[-1]) - first == count - 1:
        position = wanted - first
        found = (position >= 0) & (position < count)
    else:
        position = torch.searchsorted(sorted_ids_X, wanted).clamp_max(count - 1)
        found = sorted_ids_X[position] == wanted
    return torch.where(found, position, 0), found
