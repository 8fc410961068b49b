"""Checks tuples of codes, sorts them and cuts them into the levels of a trie, in numpy passes over whole columns.

A pass sorts plain 64-bit integers: a tuple's codes above the row it comes from, so that no permutation has to be
carried along. Tuples that do not fit are sorted in several passes, from the last levels to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError

_INT32_MAX = 2**31 - 1


class SortedTuples(NamedTuple):
    """A trie's arrays, all int32 and all with places in sorted order.

    tokens: of each level the codes of its nodes. offsets: of each level where the children of a state begin, one more
    than there are states; the last one has where the items of a leaf begin. rows: the row of each item.
    """

    tokens: list[np.ndarray]
    offsets: list[np.ndarray]
    rows: np.ndarray


def sort_tuples(codes_NL: np.ndarray, sizes: Sequence[int]) -> SortedTuples:
    """From int32 codes within their levels, one row at least; equal tuples keep the order of their rows."""
    count = len(codes_NL)
    rows = sorted_rows(codes_NL, sizes)
    sorted_NL = codes_NL.take(rows, axis=0)
    tokens, offsets = [], []
    begins = np.zeros(count, dtype=bool)
    begins[0] = True
    before = np.zeros(1, dtype=np.int64)
    for level in range(len(sizes)):
        column_N = np.ascontiguousarray(sorted_NL[:, level])
        begins[1:] |= column_N[1:] != column_N[:-1]
        first = np.flatnonzero(begins)
        tokens.append(column_N[first])
        node_N = np.cumsum(begins, dtype=np.int32)
        offsets.append(np.append(node_N[before] - 1, np.int32(len(first))))
        before = first
    offsets.append(np.append(before, count).astype(np.int32))
    return SortedTuples(tokens, offsets, rows.astype(np.int32))


def sorted_rows(codes_NL: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Rows by ascending tuples, equal ones in order."""
    row_bits = max(len(codes_NL) - 1, 0).bit_length()
    bits = [(size - 1).bit_length() for size in sizes]
    place_N = np.arange(len(codes_NL), dtype=np.uint64)
    rows: np.ndarray | None = None
    for group in _groups(bits, 64 - row_bits):
        keys = np.zeros(len(codes_NL), dtype=np.uint64)
        for level in group:
            keys <<= np.uint64(bits[level])
            keys |= codes_NL[:, level].astype(np.uint64)
        if rows is not None:
            keys = keys[rows]
        keys <<= np.uint64(row_bits)
        keys |= place_N
        keys.sort()
        keys &= np.uint64((1 << row_bits) - 1)
        order = keys.astype(np.int64)
        rows = order if rows is None else rows[order]
    assert rows is not None
    return rows


def _groups(bits: Sequence[int], room: int) -> list[range]:
    """Consecutive levels whose codes fit together in `room` bits, the last levels first."""
    groups, last = [], len(bits)
    while last > 0:
        first, used = last - 1, bits[last - 1]
        while first > 0 and used + bits[first - 1] <= room:
            first -= 1
            used += bits[first]
        groups.append(range(first, last))
        last = first
    return groups


def checked_codes(codes_NL: Tensor, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes as int32 (N, L). Raises DataError for shapes that do not fit and codes outside their levels."""
    if codes_NL.dim() != 2 or codes_NL.shape[1] != len(sizes) or len(codes_NL) == 0 or not sizes:
        raise DataError(
            f"trie: got codes of shape {tuple(codes_NL.shape)} for {len(sizes)} levels, expected at least one row, and "
            "a column a level"
        )
    if codes_NL.is_floating_point() or codes_NL.dtype == torch.bool or not 1 <= min(sizes) <= max(sizes) <= _INT32_MAX:
        raise DataError(f"trie: got {codes_NL.dtype} codes of sizes {sizes}, expected integers and sizes from 1")
    if len(codes_NL) > _INT32_MAX:
        raise DataError(f"trie: got {len(codes_NL)} items, expected at most {_INT32_MAX}")
    codes_NL = codes_NL.detach().cpu()
    lowest, highest = (x.tolist() for x in torch.aminmax(codes_NL, dim=0))
    for level, size in enumerate(sizes):
        if lowest[level] < 0 or highest[level] >= size:
            column_N = codes_NL[:, level]
            row = int(((column_N < 0) | (column_N >= size)).nonzero()[0])
            raise DataError(
                f"trie: got code {int(column_N[row])} at level {level} of row {row}, expected 0 to {size - 1}; check "
                f"the sizes {sizes}"
            )
    return codes_NL.to(torch.int32).contiguous().numpy()


def checked_ids(item_ids_N: Tensor | None, count: int) -> tuple[int, Tensor | None, np.ndarray | None]:
    """First id, all ids unless they count up from it, and the rows by ascending id unless they ascend.

    Raises DataError for a shape or dtype that does not fit and an id given twice.
    """
    if item_ids_N is None:
        return 0, None, None
    if item_ids_N.shape != (count,) or item_ids_N.is_floating_point() or item_ids_N.dtype == torch.bool:
        got = f"{item_ids_N.dtype} {tuple(item_ids_N.shape)}"
        raise DataError(f"trie: got item ids as {got}, expected integers ({count},)")
    ids_N = item_ids_N.detach().cpu().long()
    steps_N = ids_N.diff()
    if bool((steps_N == 1).all()):
        return int(ids_N[0]), None, None
    narrow = int(ids_N.min()) >= -_INT32_MAX and int(ids_N.max()) <= _INT32_MAX
    kept_N = ids_N.to(torch.int32 if narrow else torch.int64)
    if bool((steps_N > 0).all()):
        return 0, kept_N, None
    sorted_N, order = ids_N.sort()
    same_N = sorted_N.diff() == 0
    if bool(same_N.any()):
        raise DataError(f"trie: got item {int(sorted_N[1:][same_N][0])} twice, expected one row an item")
    return 0, kept_N, order.numpy()
