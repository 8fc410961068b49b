"""The trie of a catalogue's semantic IDs: what may follow a prefix, and which items a tuple stands for.

A level is two int32 tensors. `tokens[l]` are the codes of the level's nodes, in sorted order, so the children of a
state are neighbors: nodes `offsets[l][s]` to `offsets[l][s + 1]`. The number of a node is the state after it; a leaf's
items are found alike, at `offsets[L]`. That is 8 bytes a node and 4 an item. It differs from STATIC's matrix (arXiv
2602.22647, section 4) in that levels have sizes of their own, there are no dense levels and no padding, input may be
unsorted, and a tuple may stand for several items.

Letters: N rows of items at building, B requests, M beams, K results, L levels, C_l codes and E_l nodes of level l.
States, tokens and item ids are int64; state -1 is none. At level l states are those before its code is chosen: the root
is state 0 of level 0, and what level L - 1 leads to are leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.generative import trie_plan
from generative_recommenders.generative.item_filter import (
    ItemFilter,
    Ranges,
    allowed_at,
    push_up,
    take_away,
)
from generative_recommenders.generative.trie_build import checked_codes, checked_ids, sort_tuples
from generative_recommenders.generative.trie_plan import TriePlan
from ops.trie_step import TrieStep, trie_step

__all__ = ["ItemFilter", "Trie", "TriePlan"]


@dataclass(frozen=True, eq=False)
class Trie:
    """Made by `Trie.build`. Every method keeps to items that are not removed, and to those `allowed` where it is given.

    sizes: codes a level. tokens, offsets: see the module. rows: the row of each item, in the order of leaves, within a
    leaf by ascending id. num_rows: N. first_id, item_ids_N: a row's item id is `item_ids_N[row]`, or first_id + row.
    widest: most children of a state, a level. base: which items are left after `remove`.
    """

    sizes: tuple[int, ...]
    tokens: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    rows: Tensor
    num_rows: int
    first_id: int
    item_ids_N: Tensor | None
    widest: tuple[int, ...]
    base: ItemFilter | None = None
    identity: object = field(default_factory=object, repr=False)

    @classmethod
    def build(
        cls,
        codes_NL: Tensor,
        sizes: Sequence[int],
        item_ids_N: Tensor | None = None,
        active_N: Tensor | None = None,
    ) -> Trie:
        """A trie on the CPU, from rows in any order; several rows may have the same tuple.

        Args:
            codes_NL: integers, level l from 0 to sizes[l] - 1.
            item_ids_N: the rows' item ids, each once; by default row numbers.
            active_N: bool; rows that are off are left out, and keep their place in masks of `allow`.
        Raises:
            DataError: shapes that do not fit, a code outside its level, an id given twice, or no active row.
        """
        sizes = tuple(int(size) for size in sizes)
        codes = checked_codes(codes_NL, sizes)
        count = len(codes)
        first_id, ids_N, rows = checked_ids(item_ids_N, count)
        if active_N is not None:
            if active_N.shape != (count,) or active_N.dtype != torch.bool:
                got = f"{active_N.dtype} {tuple(active_N.shape)}"
                raise DataError(f"trie: got active rows as {got}, expected bool ({count},)")
            active = active_N.cpu().numpy()
            rows = np.flatnonzero(active) if rows is None else rows[active[rows]]
            if len(rows) == 0:
                raise DataError(f"trie: got {count} items of which none is active, expected at least 1")
        found = sort_tuples(codes if rows is None else codes[rows], sizes)
        sorted_rows = found.rows if rows is None else rows[found.rows].astype(np.int32)
        return cls(
            sizes,
            tuple(map(torch.from_numpy, found.tokens)),
            tuple(map(torch.from_numpy, found.offsets)),
            torch.from_numpy(sorted_rows),
            count,
            first_id,
            ids_N,
            tuple(int(np.diff(offset).max()) for offset in found.offsets[:-1]),
        )

    plan = staticmethod(trie_plan.plan)

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, the filter of removed items included."""
        ids = () if self.item_ids_N is None else (self.item_ids_N,)
        base = 0 if self.base is None else self.base.nbytes
        return base + sum(x.nbytes for x in (*self.tokens, *self.offsets, self.rows, *ids))

    def to(self, device: torch.device | str) -> Trie:
        """The same trie elsewhere; filters made for one fit the other."""
        return replace(
            self,
            tokens=tuple(x.to(device) for x in self.tokens),
            offsets=tuple(x.to(device) for x in self.offsets),
            rows=self.rows.to(device),
            item_ids_N=None if self.item_ids_N is None else self.item_ids_N.to(device),
            base=None if self.base is None else self.base.to(device),
        )

    def root(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The empty prefix of each request, (B, 1); on the trie's device by default."""
        return torch.zeros(batch, 1, dtype=torch.int64, device=self.device if device is None else device)

    def children(
        self, states: Tensor, level: int, *, allowed: ItemFilter | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Children of states of any shape, flattened: offsets (states + 1,), tokens and states after them.

        Tokens ascend within a state. A per-request filter needs states (B, …). A GPU is waited for.
        """
        ranges = self._kept(states, level, allowed)
        return ranges.offsets, self.tokens[level][ranges.places].long(), ranges.places

    def mask(self, states: Tensor, level: int, *, allowed: ItemFilter | None = None) -> Tensor:
        """Codes that may follow states of any shape: bool (…, C_l)."""
        first, last = self._range(level, states)
        nodes = first[..., None] + torch.arange(self.widest[level], device=states.device)
        legal = nodes < last[..., None]
        nodes = torch.where(legal, nodes, 0)
        legal = self._keep_allowed(legal, nodes, allowed, level)
        # Codes behind the last one take what is not there.
        size = self.sizes[level]
        found = torch.zeros(*states.shape, size + 1, dtype=torch.bool, device=states.device)
        tokens = torch.where(legal, self.tokens[level][nodes].long(), size)
        return found.scatter_(-1, tokens, True)[..., :size]

    def advance(self, states: Tensor, tokens: Tensor, level: int, *, allowed: ItemFilter | None = None) -> Tensor:
        """State after each token, -1 where it may not follow; shapes are broadcast, any integer is a token."""
        states, tokens = torch.broadcast_tensors(states, tokens)
        low, last = self._range(level, states)
        high, found = last, self.tokens[level]
        for _ in range(self.widest[level].bit_length()):
            middle = (low + high) // 2
            below = (middle < high) & (found[middle.clamp_max(len(found) - 1)] < tokens)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        nodes = low.clamp_max(len(found) - 1)
        legal = (low < last) & (found[nodes] == tokens)
        return torch.where(self._keep_allowed(legal, nodes, allowed, level), nodes, -1)

    def find(self, codes: Tensor, *, allowed: ItemFilter | None = None) -> Tensor:
        """Leaf of each tuple of codes (…, L), -1 for one that no item has; any integers are codes."""
        if codes.shape[-1] != self.levels:
            raise DataError(f"codes: got shape {tuple(codes.shape)}, expected (…, {self.levels})")
        states = codes.new_zeros(codes.shape[:-1], dtype=torch.int64)
        for level in range(self.levels):
            states = self.advance(states, codes[..., level], level, allowed=allowed)
        return states

    def step(
        self,
        logits_BMC: Tensor,
        states_BM: Tensor,
        scores_BM: Tensor,
        level: int,
        k: int,
        *,
        normalization: str = "vocabulary",
        allowed: ItemFilter | None = None,
        backend: str | None = None,
    ) -> TrieStep:
        """The k best among all legal children of each request's beams: see `ops.trie_step`."""
        if logits_BMC.shape[-1] != self.sizes[level]:
            raise DataError(f"logits: got shape {tuple(logits_BMC.shape)}, expected (B, M, {self.sizes[level]})")
        return trie_step(
            *(logits_BMC, states_BM, scores_BM, self.offsets[level], self.tokens[level], k),
            normalization=normalization,
            allowed=self._bits(allowed, level),
            most_children=self.widest[level],
            backend=backend,
        )

    def items(self, leaves: Tensor, *, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """Items of leaves of any shape, flattened: offsets (leaves + 1,) and item ids, ascending within a leaf.

        As `children` for filters and GPUs, and so are `item_counts` and `item_at` where there is a filter.
        """
        ranges = self._kept(leaves, self.levels, allowed)
        return ranges.offsets, self._ids_at(ranges.places)

    def item_counts(self, leaves: Tensor, *, allowed: ItemFilter | None = None) -> Tensor:
        """How many items each leaf has, in the shape of `leaves`."""
        if self._own(allowed) is not None:
            return self._kept(leaves, self.levels, allowed).offsets.diff().view(leaves.shape)
        first, last = self._range(self.levels, leaves)
        return last - first

    def item_at(self, leaves: Tensor, places: Tensor, *, allowed: ItemFilter | None = None) -> Tensor:
        """Id of the item at a place, from 0, among those of a leaf; 0 where the leaf has no such place."""
        if self._own(allowed) is not None:
            ranges = self._kept(leaves, self.levels, allowed)
            first, last = (x.view(leaves.shape) for x in (ranges.offsets[:-1], ranges.offsets[1:]))
        else:
            first, last = self._range(self.levels, leaves)
        slots = first + places
        inside = (places >= 0) & (slots < last)
        slots = torch.where(inside, slots, 0)
        if self._own(allowed) is not None:
            # One more, to be taken where there is none.
            slots = F.pad(ranges.places, (0, 1))[slots]
        return torch.where(inside, self._ids_at(slots), 0)

    def holds(self, codes: Tensor, item_ids: Tensor, *, allowed: ItemFilter | None = None) -> Tensor:
        """Whether each tuple (…, L) is that of the item (…)."""
        first, last = self._range(self.levels, self.find(codes, allowed=allowed))
        slots = self._slots_of(item_ids)
        inside = (slots >= first) & (slots < last)
        return self._keep_allowed(inside, torch.where(inside, slots, 0), allowed, self.levels)

    def leaf_codes(self) -> Tensor:
        """The tuple of every leaf, (leaves, L), ascending; kept once made. Leaves of removed items are there too."""
        return self._leaf_codes

    def allow(self, mask: Tensor) -> ItemFilter:
        """Only the items of these rows: bool (N,) for all requests or (B, N) for each, rows as at building."""
        if mask.dtype != torch.bool or mask.dim() not in (1, 2) or mask.shape[-1] != self.num_rows:
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise DataError(f"item filter: got {got}, expected bool ({self.num_rows},) or (B, {self.num_rows})")
        items = mask.to(self.device).index_select(-1, self.rows)
        if self.base is not None:
            items = items & self.base.items
        return ItemFilter(push_up(items, self.offsets), items, self.identity)

    def exclude(
        self, rows_T: Tensor, item_ids_T: Tensor, batch: int, *, allowed: ItemFilter | None = None
    ) -> ItemFilter:
        """Without item `item_ids_T[t]` for request `rows_T[t]`; ids that are not in the trie are ignored.

        Costs a copy of B rows of bits and work for the excluded items alone. A GPU is waited for.
        """
        found = (self._own(allowed) or self._everything).copied(batch)
        slots_T = self._slots_of(item_ids_T)
        known_T = slots_T >= 0
        take_away(found, rows_T[known_T], slots_T[known_T], self.offsets)
        return found

    def remove(self, item_ids: Tensor | Sequence[int]) -> Trie:
        """A trie without these items that shares all tensors: they are masked, and go with the next `build`.

        Filters made before do not fit it. Raises DataError for an item that is not in the trie.
        """
        ids_n = torch.as_tensor(item_ids, dtype=torch.int64, device=self.device)
        slots_n = self._slots_of(ids_n)
        if bool((slots_n < 0).any()):
            raise DataError(f"remove: got item {int(ids_n[slots_n < 0][0])}, expected items of the trie")
        items = torch.ones(len(self.rows), dtype=torch.bool, device=self.device)
        items[slots_n] = False
        if self.base is not None:
            items &= self.base.items
        identity = object()
        return replace(self, base=ItemFilter(push_up(items, self.offsets), items, identity), identity=identity)

    @property
    def _everything(self) -> ItemFilter:
        bits = [torch.ones(len(x), dtype=torch.bool, device=self.device) for x in (*self.tokens, self.rows)]
        return ItemFilter(tuple(bits[:-1]), bits[-1], self.identity)

    @cached_property
    def _leaf_codes(self) -> Tensor:
        nodes = torch.arange(len(self.tokens[-1]), device=self.device)
        codes = torch.empty(len(nodes), self.levels, dtype=torch.int64, device=self.device)
        for level in reversed(range(self.levels)):
            codes[:, level] = self.tokens[level][nodes]
            nodes = torch.searchsorted(self.offsets[level], nodes.to(torch.int32), right=True) - 1
        return codes

    @cached_property
    def _slot_of_row(self) -> Tensor:
        """Place of each row in the order of leaves, -1 for one that was not active; one more for an unknown row."""
        slots = torch.full((self.num_rows + 1,), -1, dtype=torch.int64, device=self.device)
        slots[self.rows.long()] = torch.arange(len(self.rows), device=self.device)
        return slots

    @cached_property
    def _rows_by_id(self) -> tuple[Tensor, Tensor]:
        assert self.item_ids_N is not None
        ids, rows = self.item_ids_N.long().sort()
        return ids, rows

    def _slots_of(self, item_ids: Tensor) -> Tensor:
        """Place of each item in the order of leaves, or -1."""
        if self.item_ids_N is None:
            rows = item_ids - self.first_id
            known = (rows >= 0) & (rows < self.num_rows)
        else:
            ids, by_id = self._rows_by_id
            place = torch.searchsorted(ids, item_ids.contiguous()).clamp_max(len(ids) - 1)
            rows, known = by_id[place], ids[place] == item_ids
        return self._slot_of_row[torch.where(known, rows, self.num_rows)]

    def _ids_at(self, slots: Tensor) -> Tensor:
        rows = self.rows[slots].long()
        return rows + self.first_id if self.item_ids_N is None else self.item_ids_N[rows].long()

    def _range(self, level: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """First child of each state and the one after its last, none for state -1; level L is that of items."""
        offset = self.offsets[level]
        known = states.clamp_min(0)
        first = offset[known].long()
        return first, torch.where(states < 0, first, offset[known + 1].long())

    def _kept(self, states: Tensor, level: int, allowed: ItemFilter | None) -> Ranges:
        """Children, or items of leaves, that are allowed."""
        first, last = self._range(level, states)
        ranges = Ranges.of(first.flatten(), last.flatten())
        bits = self._bits(allowed, level)
        if bits is None:
            return ranges
        return ranges.kept(allowed_at(bits, ranges.places, _requests_of(states)[ranges.owners]))

    def _own(self, allowed: ItemFilter | None) -> ItemFilter | None:
        """The filter that holds, which a filter made here includes the removed items of."""
        if allowed is not None and allowed.trie is not self.identity:
            raise DataError(
                "item filter: got one of another trie, or from before items were removed, expected one of this trie; "
                "make it again"
            )
        return self.base if allowed is None else allowed

    def _bits(self, allowed: ItemFilter | None, level: int) -> Tensor | None:
        own = self._own(allowed)
        return None if own is None else (*own.levels, own.items)[level]

    def _keep_allowed(self, legal: Tensor, places: Tensor, allowed: ItemFilter | None, level: int) -> Tensor:
        """`legal` where what it says of, (B, …), is allowed too."""
        bits = self._bits(allowed, level)
        if bits is None:
            return legal
        rows = torch.arange(len(places), device=places.device).view(-1, *(1,) * (places.dim() - 1))
        return legal & allowed_at(bits, places, rows.expand_as(places))


def _requests_of(states: Tensor) -> Tensor:
    """Row of the first dimension of each state, flattened."""
    rows = torch.arange(len(states), device=states.device)
    return rows.view(-1, *(1,) * (states.dim() - 1)).expand_as(states).flatten()
