"""What to do about items that a tokenizer gives the same tuple of codes.

    dedup       one more level counts the items of a tuple from 0 (TIGER, GRID).
    sinkhorn    the items of a prefix spread over its free last codes by Sinkhorn's iterations (LC-Rec).
    greedy      the nearest item keeps the tuple, the next takes its nearest last code that is free (MQL4GRec).
    assignment  last codes of least total distance within a prefix (ZCR, Zhang 2026).
    first_free  the first free tuple among those with one of the nearest codes of the last level, then of the level
                before (OnePiece, without its random way out).
    product     one code of any level changed, the nearest first; for product codes (Parallel TIGER).
    none        the items of a tuple stay together.

An item whose tuple is its own never moves. After all policies but "none" no tuple is shared: an item that a policy's
own rule leaves without one (sources keep these collisions) goes on to `first_free`'s, and finally to whatever is
nearest and free. Nothing depends on chance or on the order of rows other than by precedence: rows are in the order of
item ids, and where distances tie the lower row comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.quantizer_base import Quantizer
from generative_recommenders.tokenizers.reassignment import Reassignment
from generative_recommenders.tokenizers.tuple_space import TupleSpace, rank_in_group

POLICIES = ("dedup", "sinkhorn", "greedy", "assignment", "first_free", "product", "none")


@dataclass(frozen=True)
class Resolution:
    """Codes after a policy.

    Attributes:
        codes_NL: int64, on the device of the codes given; "dedup" has one column more.
        sizes: codes a level.
        unresolved: items whose tuple a lower row has too, or an item that was there before.
        changed: items that lost a code of the tokenizer's; none by "dedup".
    """

    codes_NL: Tensor
    sizes: tuple[int, ...]
    unresolved: int
    changed: int


def resolve(
    policy: str,
    quantizer: Quantizer,
    x_ND: Tensor,
    codes_NL: Tensor,
    *,
    taken_ML: Tensor | None = None,
    width: int = 0,
    seed: int = 0,
    nearest: int = 10,
) -> Resolution:
    """Apply one of `POLICIES`.

    Args:
        x_ND: embeddings, rows by ascending item id.
        codes_NL: `quantizer.encode(x_ND)`.
        taken_ML: tuples that exist already: they are not changed, and no item gets one. Of "dedup" with its digit;
            a tuple's new items count on from its largest.
        width: least size of the level that "dedup" adds; it is larger where a tuple has more items.
        seed: of the hash that tuples of more than 63 bits are looked up by; no result depends on it.
        nearest: codes a level that "first_free", "product", and what other policies leave to them, look at.
    Raises:
        DataError: another policy, codes that are not the quantizer's, or more items than tuples.
    """
    if policy not in POLICIES:
        raise DataError(f"collision policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
    if nearest < 1 or width < 0:
        raise DataError(f"collisions: got nearest {nearest} and width {width}, expected at least 1 and 0")
    sizes = tuple(quantizer.sizes)
    codes, taken = _checked(policy, quantizer, x_ND, codes_NL, taken_ML)
    space = TupleSpace(sizes, taken[:, : len(sizes)], seed=seed)
    keys_N = space.keys(codes)
    rank_N, shared_N = _occurrences(space, keys_N)
    if policy == "dedup":
        digits_N = rank_N + _digits_before(space, keys_N, taken)
        sizes = (*sizes, max(width, int(max(digits_N.max(initial=0), taken[:, -1].max(initial=0))) + 1))
        return _resolution(codes_NL, np.column_stack([codes, digits_N]), sizes, unresolved=0, changed=0)
    if policy == "none" or not shared_N.any():
        unresolved = int(((rank_N > 0) | space.contains(keys_N)).sum())
        return _resolution(codes_NL, codes, sizes, unresolved=unresolved, changed=0)
    if len(codes) + space.used > math.prod(sizes):
        raise DataError(
            f"collisions: got {len(codes)} items beside {space.used} tuples in use, expected at most "
            f"{math.prod(sizes)} for sizes {sizes}; try larger sizes, one more level, or the policy dedup"
        )
    resolved = codes.copy()
    space.add(codes[~shared_N])
    _reassign(policy, Reassignment(quantizer, x_ND, resolved, space), np.flatnonzero(shared_N), nearest)
    changed = int((resolved != codes).any(axis=1).sum())
    return _resolution(codes_NL, resolved, sizes, unresolved=0, changed=changed)


def _reassign(policy: str, items: Reassignment, rows_n: np.ndarray, nearest: int) -> None:
    """Give each of `rows_n`, which share their tuples, a tuple of its own."""
    last = items.levels - 1
    if policy != "first_free":
        compared = list(range(items.levels)) if policy == "product" else [last]
        rows_n = rows_n[np.argsort(items.own_distances(rows_n, compared), kind="stable")]
    if policy == "sinkhorn":
        items.to_sinkhorn(rows_n, nearest)
        return
    if policy == "assignment":
        items.to_least_cost(rows_n)
        return
    keys_n = items.space.keys(items.codes_NL[rows_n])
    keeps_n = (rank_in_group(keys_n) == 0) & ~items.space.contains(keys_n)
    items.space.add(items.codes_NL[rows_n[keeps_n]])
    rows_n = rows_n[~keeps_n]
    if policy == "greedy":
        items.to_nearest(rows_n)
    elif policy == "product":
        items.to_single_substitution(rows_n, nearest)
    else:
        items.to_first_free(rows_n, nearest)


def _checked(
    policy: str, quantizer: Quantizer, x_ND: Tensor, codes_NL: Tensor, taken_ML: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both tables of codes as int64 arrays; `taken` is (0, columns) where there is none."""
    quantizer.check_codes(codes_NL)
    if len(x_ND) != len(codes_NL):
        raise DataError(f"collisions: got {len(codes_NL)} rows of codes for {len(x_ND)} embeddings, expected equal")
    levels = len(quantizer.sizes)
    columns = levels + (policy == "dedup")
    if taken_ML is None:
        taken_ML = codes_NL.new_empty(0, columns)
    if taken_ML.dim() != 2 or taken_ML.shape[1] != columns:
        raise DataError(
            f"taken codes: got shape {tuple(taken_ML.shape)}, expected (items, {columns}) of the policy {policy}; pass "
            "the codes of the table that items are added to"
        )
    quantizer.check_codes(taken_ML[:, :levels])
    codes, taken = (table.detach().cpu().to(torch.int64).numpy() for table in (codes_NL, taken_ML))
    return codes, taken


def _occurrences(space: TupleSpace, keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many lower rows have the row's tuple, int64 (N,), and whether any other item has it, bool (N,)."""
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    starts = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]])[: len(keys_N)])
    counts = np.diff(np.append(starts, len(keys_N)))
    rank_N, shared_N = np.empty_like(order_N), np.empty(len(keys_N), dtype=bool)
    rank_N[order_N] = np.arange(len(keys_N)) - np.repeat(starts, counts)
    shared_N[order_N] = np.repeat(counts > 1, counts)
    return rank_N, shared_N | space.contains(keys_N)


def _digits_before(space: TupleSpace, keys_N: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The first digit that no taken item of the row's tuple has nor one above it, int64 (N,)."""
    if not len(taken):
        return np.zeros(len(keys_N), dtype=np.int64)
    keys_M, digits_M = space.keys(taken), taken[:, -1]
    order_M = np.lexsort((digits_M, keys_M))
    keys_M, digits_M = keys_M[order_M], digits_M[order_M]
    last_N = np.searchsorted(keys_M, keys_N, side="right") - 1
    return np.where((last_N >= 0) & (keys_M[last_N] == keys_N), digits_M[last_N] + 1, 0)


def _resolution(
    codes_NL: Tensor, resolved: np.ndarray, sizes: tuple[int, ...], *, unresolved: int, changed: int
) -> Resolution:
    return Resolution(torch.from_numpy(resolved).to(codes_NL.device), sizes, unresolved, changed)
