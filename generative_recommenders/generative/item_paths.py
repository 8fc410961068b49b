"""The way from the root of a trie to each of its items, and how much of it training has seen.

Items are numbered in the trie's order, which is that of their IDs: these numbers are called places here. Items whose
IDs begin alike lie side by side, so of places in ascending order the nodes of each level ascend too.

Letters: N places (removed items keep theirs), L levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.generative.trie import ItemFilter, Trie

# Which codes of an item are scored; see `SpecGRConfig.score`.
Score = Literal["drop_last", "in_sample_prefix", "drop_last_of_all"]


@dataclass(frozen=True, eq=False)
class ItemPaths:
    """Made by `of`. nodes_LN: int32, the node of each level that an item lies below. item_ids_N: int64."""

    trie: Trie
    nodes_LN: Tensor
    item_ids_N: Tensor

    @classmethod
    def of(cls, trie: Trie) -> ItemPaths:
        found: list[Tensor] = []
        below_N = torch.arange(len(trie.rows), dtype=torch.int32, device=trie.device)
        for offset in reversed(trie.offsets[1:]):
            below_N = (torch.searchsorted(offset, below_N, right=True) - 1).to(torch.int32)
            found.append(below_N)
        rows_N = trie.rows.long()
        ids_N = rows_N + trie.first_id if trie.item_ids_N is None else trie.item_ids_N.long()[rows_N]
        return cls(trie, torch.stack(found[::-1]), ids_N)

    def __len__(self) -> int:
        return len(self.item_ids_N)

    def nodes(self, level: int, places: Tensor) -> Tensor:
        """State of the trie after the code of `level` of each item, int64 of any shape."""
        return self.nodes_LN[level][places].long()

    def codes(self, level: int, places: Tensor) -> Tensor:
        """Code of `level` of each item, int64 of any shape."""
        return self.trie.tokens[level][self.nodes_LN[level][places]].long()

    def all_codes(self, places: Tensor) -> Tensor:
        """Codes of each item, (…) to (…, L)."""
        return torch.stack([self.codes(level, places) for level in range(self.trie.levels)], -1)

    def places_of(self, item_ids: Tensor) -> Tensor:
        """Place of each item, -1 of one that is not in the trie or was removed; int64 of any shape."""
        ids_N, places_N = self._by_id
        index = torch.searchsorted(ids_N, item_ids.contiguous()).clamp_max(len(ids_N) - 1)
        places = places_N[index]
        known = ids_N[index] == item_ids
        if self.trie.base is not None:
            known = known & self.trie.base.items[places]
        return torch.where(known, places, -1)

    def allowed(self, allowed: ItemFilter | None) -> Tensor:
        """Which items may be returned, bool (N,) or (B, N), those of a filter or all that are not removed."""
        own = self.trie.base if allowed is None else self._own(allowed)
        return own.items if own is not None else torch.ones_like(self.item_ids_N, dtype=torch.bool)

    def scored_lengths(self, in_sample: ItemFilter, score: Score, min_prefix: int) -> Tensor:
        """How many codes count in each item's score, int64 (N,); see `SpecGRConfig`.

        Raises:
            DataError: a filter of another trie, or of one request each.
        """
        own, levels = self._own(in_sample), self.trie.levels
        if own.per_request:
            raise DataError("in-sample items: got a filter for each request, expected one for all")
        if score == "drop_last_of_all":
            return torch.full_like(self.item_ids_N, max(levels - 1, 1))
        if score == "drop_last":
            return torch.where(own.items, levels, max(levels - 1, 1))
        shared_LN = torch.stack([bits[nodes_N] for bits, nodes_N in zip(own.levels, self.nodes_LN, strict=True)])
        return shared_LN.sum(0).clamp(min=min(min_prefix, levels))

    def _own(self, items: ItemFilter) -> ItemFilter:
        if items.trie is not self.trie.identity:
            raise DataError("item filter: got one of another trie, expected one of this trie; make it again")
        return items

    @cached_property
    def _by_id(self) -> tuple[Tensor, Tensor]:
        ids_N, places_N = self.item_ids_N.sort()
        return ids_N, places_N
