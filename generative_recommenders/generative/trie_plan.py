"""What a trie will take, from the number of items and of codes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from generative_recommenders.data.errors import DataError

# A node's code and where its children begin; an item's row.
_NODE_BYTES, _ITEM_BYTES = 8, 4
# Factors of a long product are taken together, in at most so many groups.
_GROUPS = 4096


@dataclass(frozen=True)
class TriePlan:
    """Expected nodes a level and bytes of a trie of `items` items whose tuples are random and distinct.

    Real catalogues share more prefixes and take less. Items whose ids do not count from one to the next take 4 or 8
    bytes more.
    """

    items: int
    sizes: tuple[int, ...]
    nodes: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        return round(_NODE_BYTES * sum(self.nodes)) + _ITEM_BYTES * self.items

    def __str__(self) -> str:
        rows = [f"{'level':>5}  {'codes':>9}  {'nodes':>13}  {'MB':>8}"]
        for level, (size, nodes) in enumerate(zip(self.sizes, self.nodes, strict=True)):
            rows.append(f"{level:>5}  {size:>9,}  {nodes:>13,.0f}  {_NODE_BYTES * nodes / 1e6:>8.2f}")
        rows.append(f"items  {'':>9}  {self.items:>13,}  {_ITEM_BYTES * self.items / 1e6:>8.2f}")
        rows.append(f"total {self.nbytes / 1e6:.2f} MB, {self.nbytes / self.items:.1f} bytes an item")
        return "\n".join(rows)


def plan(items: int, sizes: Sequence[int]) -> TriePlan:
    """Raises DataError for no items or a level without codes."""
    if items < 1 or not sizes or min(sizes) < 1:
        raise DataError(f"trie plan: got {items} items of codes {tuple(sizes)}, expected at least 1 of each")
    tuples = math.prod(sizes)
    # More items than tuples share some.
    distinct = min(items, tuples)
    prefixes = [math.prod(sizes[: level + 1]) for level in range(len(sizes))]
    return TriePlan(items, tuple(sizes), tuple(q * _chance_of_use(tuples, tuples // q, distinct) for q in prefixes))


def _chance_of_use(tuples: int, below: int, drawn: int) -> float:
    """That of `below` given tuples at least one is among the `drawn`, of `tuples` in all.

    One minus the product of 1 - below / (tuples - i) over the draws i.
    """
    if drawn > tuples - below:
        return 1.0
    edges = np.linspace(0, drawn, min(drawn, _GROUPS) + 1)
    middle, widths = (edges[1:] + edges[:-1] - 1) / 2, np.diff(edges)
    return float(-np.expm1((widths * np.log1p(-below / (float(tuples) - middle))).sum()))
