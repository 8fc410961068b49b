"""Which items a search may return, pushed up a trie: at each level the nodes that lead to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """Made by `Trie.allow` and `Trie.exclude`, for that trie alone.

    levels: of each level the nodes that lead to an allowed item, bool (E_l,) for all requests or (B, E_l) for each.
    items: the allowed items in the trie's order, bool (N,) or (B, N). trie: identifies the trie.
    """

    levels: tuple[Tensor, ...]
    items: Tensor
    trie: object

    @property
    def per_request(self) -> bool:
        return self.items.dim() == 2

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.levels, self.items))

    def to(self, device: torch.device | str) -> ItemFilter:
        return ItemFilter(tuple(x.to(device) for x in self.levels), self.items.to(device), self.trie)

    def select(self, rows: Tensor) -> ItemFilter:
        """The filter of the requests `rows`, in that order; one for all requests stays as it is."""
        if not self.per_request:
            return self
        return ItemFilter(tuple(x[rows] for x in self.levels), self.items[rows], self.trie)

    def copied(self, batch: int) -> ItemFilter:
        """A filter of its own for each of B requests."""
        bits = [x.expand(batch, -1).clone() for x in (*self.levels, self.items)]
        return ItemFilter(tuple(bits[:-1]), bits[-1], self.trie)


class Ranges(NamedTuple):
    """Places first[n] to last[n] - 1 of all ranges, one after the other; whose they are; where each range begins."""

    places: Tensor
    owners: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, first_n: Tensor, last_n: Tensor) -> Ranges:
        """From int64 (n,). A GPU is waited for: it knows how many there are."""
        counts_n = (last_n - first_n).clamp_min(0)
        offsets = F.pad(counts_n.cumsum(0), (1, 0))
        owners = torch.repeat_interleave(torch.arange(len(counts_n), device=counts_n.device), counts_n)
        places = torch.arange(len(owners), device=counts_n.device) + (first_n - offsets[:-1])[owners]
        return cls(places, owners, offsets)

    def kept(self, keep: Tensor) -> Ranges:
        """Without the places where `keep` is off."""
        return Ranges(self.places[keep], self.owners[keep], self._upto(keep))

    def counts(self, marked: Tensor) -> Tensor:
        """How many places of each range are marked, int64 (n,)."""
        return self._upto(marked).diff()

    def _upto(self, marked: Tensor) -> Tensor:
        return F.pad(marked.cumsum(0), (1, 0))[self.offsets]


def push_up(items: Tensor, offsets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """From items, bool (…, N) in a trie's order, the nodes of each level that lead to one, bool (…, E_l).

    offsets: those of the trie, from the root's to the leaves'.
    """
    levels: list[Tensor] = []
    below = items
    for offset in reversed(offsets[1:]):
        upto = F.pad(below.cumsum(-1, dtype=torch.int32), (1, 0)).index_select(-1, offset)
        below = upto[..., 1:] > upto[..., :-1]
        levels.append(below)
    return tuple(reversed(levels))


def take_away(allowed: ItemFilter, rows_P: Tensor, places_P: Tensor, offsets: Sequence[Tensor]) -> None:
    """Switch items off, in place, and every node that is left without one.

    Item `places_P[p]` of request `rows_P[p]` goes; only nodes above such items are looked at. `allowed` is per request.
    """
    below = allowed.items
    for offset, level in zip(reversed(offsets[1:]), reversed(allowed.levels), strict=True):
        below[rows_P, places_P] = False
        parents_P = torch.searchsorted(offset, places_P.to(offset.dtype), right=True) - 1
        key_P = torch.unique(rows_P * level.shape[1] + parents_P)
        rows_P, parents_P = key_P // level.shape[1], key_P % level.shape[1]
        ranges = Ranges.of(offset[parents_P].long(), offset[parents_P + 1].long())
        empty_P = ranges.counts(allowed_at(below, ranges.places, rows_P[ranges.owners])) == 0
        rows_P, places_P = rows_P[empty_P], parents_P[empty_P]
        below = level
    below[rows_P, places_P] = False


def allowed_at(bits: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """bits[places], or bits[rows, places] where there is a row a request."""
    return bits[places] if bits.dim() == 1 else bits[rows, places]
