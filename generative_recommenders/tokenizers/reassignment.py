"""Giving free tuples to items that have none of their own: the policies of `collisions` that change codes.

Items that share their codes before a level compete for the codes of that level; what is compared is the quantizer's
distance from what those codes leave of the item. All sources change the last level first, where a change costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from generative_recommenders.tokenizers.matching import (
    first_choices,
    min_cost_codes,
    nearest_with_room,
    sinkhorn_codes,
)
from generative_recommenders.tokenizers.quantizer_base import Quantizer
from generative_recommenders.tokenizers.tuple_space import TupleSpace, rank_in_group

# Entries of a matrix of items by codes, or of items by codes of their candidates, that are held at a time.
BLOCK_ENTRIES = 1 << 22
# The same of Sinkhorn's kernels, which are read a hundred times: they should stay in a core's cache.
KERNEL_ENTRIES = 1 << 17
SINKHORN_ROUNDS = 20
SINKHORN_STEPS = 50
SINKHORN_EPSILON = 0.003


class Reassignment:
    """Items, their codes, and the tuples that are in use already.

    Every method takes rows in the order of precedence and gives each a tuple that was free, which is then in use.

    Args:
        codes_NL: int64; changed in place.
        space: tuples in use; the items' own are free unless they are among them.
    """

    def __init__(self, quantizer: Quantizer, x_ND: Tensor, codes_NL: np.ndarray, space: TupleSpace) -> None:
        self.quantizer, self.x_ND, self.codes_NL, self.space = quantizer, x_ND, codes_NL, space
        self.levels = len(space.sizes)

    def own_distances(self, rows_n: np.ndarray, levels: list[int]) -> np.ndarray:
        """Sum over `levels` of the distance to the item's own code, float64 (n,)."""
        sums_n = np.zeros(len(rows_n))
        for level in levels:
            for block in self._blocks(len(rows_n), self.space.sizes[level]):
                own = self.codes_NL[rows_n[block], level]
                sums_n[block] += self._distances(rows_n[block], level)[np.arange(len(own)), own]
        return sums_n

    def to_nearest(self, rows_n: np.ndarray) -> None:
        """MQL4GRec's order: the nearest code of the last level with which the tuple is free.

        Where all tuples that share the item's codes before a level are used up, the level before changes to its
        nearest code with room, and the levels after are chosen anew. This ends while there are free tuples at all.
        """
        for top in reversed(range(self.levels)):
            if not len(rows_n):
                return
            staying_n = self._fits(rows_n, top)
            staying = rows_n[staying_n]
            for level in range(top, self.levels):
                self._choose(staying, level)
            self.space.add(self.codes_NL[staying])
            rows_n = rows_n[~staying_n]

    def to_first_free(self, rows_n: np.ndarray, nearest: int) -> None:
        """The first free tuple with one of the `nearest` codes of the last level, then of the level before, and so on.

        Levels after the changed one are chosen anew. Items that find none go `to_nearest`.
        """
        for level in reversed(range(self.levels)):
            rows_n = self._to_first(rows_n, partial(self._variants, level=level, nearest=nearest))
        self.to_nearest(rows_n)

    def to_single_substitution(self, rows_n: np.ndarray, nearest: int) -> None:
        """Parallel TIGER's order: one code changed, all levels' `nearest` codes by their distance.

        Items that find none go `to_first_free`.
        """
        left_n = self._to_first(rows_n, partial(self._substitutions, nearest=nearest))
        self.to_first_free(left_n, nearest)

    def to_least_cost(self, rows_n: np.ndarray) -> None:
        """Last codes of least total distance among the items that share the codes before (ZCR, Zhang 2026).

        Items that are more than these codes allow, the last in precedence, go `to_nearest`, one level up.
        """
        staying_n = self._fits(rows_n, self.levels - 1)
        rows, prefixes_G, groups = self._grouped(rows_n[staying_n], self.levels - 1)
        rooms = self.space.rooms(self.levels - 1, prefixes_G)
        for block, first, last in _group_blocks(groups, BLOCK_ENTRIES // rooms.size):
            free_GC = rooms.of(np.arange(first, last)) > 0
            counts_G = np.bincount(groups[block] - first, minlength=last - first)
            distances = self._distances(rows[block], self.levels - 1)
            self.codes_NL[rows[block], -1] = min_cost_codes(distances, counts_G, free_GC)
        self.space.add(self.codes_NL[rows])
        self.to_nearest(rows_n[~staying_n])

    def to_sinkhorn(self, rows_n: np.ndarray, nearest: int) -> None:
        """LC-Rec's uniform mapping onto the last codes that are free, in rounds until one leaves nothing or no change.

        What is left, copies of one embedding above all, goes `to_first_free`.
        """
        open_n = np.arange(len(rows_n))
        left = []
        for _ in range(SINKHORN_ROUNDS):
            fits_n = self._fits(rows_n[open_n], self.levels - 1)
            placed_n = np.zeros(len(open_n), dtype=bool)
            placed_n[fits_n] = self._spread(rows_n[open_n[fits_n]])
            groups_n = self._grouped_keys(rows_n[open_n], self.levels - 1)[1]
            moving_G = np.bincount(groups_n, weights=placed_n) > 0
            self.space.add(self.codes_NL[rows_n[open_n[placed_n]]])
            left.append(open_n[~moving_G[groups_n]])
            open_n = open_n[moving_G[groups_n] & ~placed_n]
            if not len(open_n):
                break
        self.to_first_free(rows_n[np.sort(np.concatenate([*left, open_n]))], nearest)

    def _spread(self, rows_n: np.ndarray) -> np.ndarray:
        """Set last codes by `sinkhorn_codes`; whether an item got one, bool (n,)."""
        if not len(rows_n):
            return np.zeros(0, dtype=bool)
        level, size = self.levels - 1, self.space.sizes[-1]
        rows, prefixes_G, groups = self._grouped(rows_n, level)
        rooms = self.space.rooms(level, prefixes_G)
        counts_G = np.bincount(groups, minlength=len(prefixes_G))
        starts_G = np.cumsum(counts_G) - counts_G
        # Groups of like size share a block, padded to the next power of two.
        width_G = 1 << np.ceil(np.log2(counts_G)).astype(np.int64)
        codes = np.full(len(rows), -1)
        for width in np.unique(width_G).tolist():
            alike = np.flatnonzero(width_G == width)
            for block in self._blocks(len(alike), width * size):
                some = alike[block]
                place_GB = starts_G[some, None] + np.arange(width)
                real_GB = np.arange(width) < counts_G[some, None]
                padded = np.zeros((len(some), width, size))
                padded[real_GB] = self._distances(rows[place_GB[real_GB]], level)
                free_GC = rooms.of(some) > 0
                chosen_GB = np.empty(place_GB.shape, dtype=np.int64)
                for part in self._blocks(len(some), width * size, KERNEL_ENTRIES):
                    chosen_GB[part] = sinkhorn_codes(
                        padded[part],
                        counts_G[some[part]],
                        free_GC[part],
                        epsilon=SINKHORN_EPSILON,
                        steps=SINKHORN_STEPS,
                    )
                codes[place_GB[real_GB]] = chosen_GB[real_GB]
        placed = codes >= 0
        self.codes_NL[rows[placed], -1] = codes[placed]
        return np.isin(rows_n, rows[placed])

    def _fits(self, rows_n: np.ndarray, level: int) -> np.ndarray:
        """Whether the free tuples below an item's first `level` codes are enough for it and those before it, bool."""
        prefixes_G, groups_n = self._grouped_keys(rows_n, level)
        return rank_in_group(groups_n) < self.space.rooms(level, prefixes_G).free_G[groups_n]

    def _choose(self, rows_n: np.ndarray, level: int) -> None:
        """Set the code of `level` to the nearest with room, given the codes before; codes after count for nothing."""
        if not len(rows_n):
            return
        rows, prefixes_G, groups = self._grouped(rows_n, level)
        rooms = self.space.rooms(level, prefixes_G)
        before, rest_C = -1, np.empty(0, dtype=np.int64)
        for block in self._blocks(len(rows), rooms.size):
            first, last = groups[block][0], groups[block][-1] + 1
            room_GC = rooms.of(np.arange(first, last))
            if first == before:
                room_GC[0] = rest_C
            local = groups[block] - first
            codes = nearest_with_room(self._distances(rows[block], level), local, room_GC)
            self.codes_NL[rows[block], level] = codes
            before, rest_C = last - 1, room_GC[-1] - np.bincount(codes[local == local[-1]], minlength=rooms.size)

    def _to_first(self, rows_n: np.ndarray, variants: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Give each row the first of its variants (n, m, L) that is free; the rows that have none are returned."""
        left = [rows_n[:0]]
        for block in self._blocks(len(rows_n), max(self.space.sizes)):
            rows = rows_n[block]
            tuples_nmL = variants(rows)
            keys_nm = self.space.keys(tuples_nmL)
            choice_n = first_choices(keys_nm, self.space.contains(keys_nm))
            placed = np.flatnonzero(choice_n >= 0)
            self.codes_NL[rows[placed]] = tuples_nmL[placed, choice_n[placed]]
            self.space.add(self.codes_NL[rows[placed]])
            left.append(rows[choice_n < 0])
        return np.concatenate(left)

    def _variants(self, rows_n: np.ndarray, level: int, nearest: int) -> np.ndarray:
        """Tuples with one of the `nearest` codes of `level` and the levels after chosen anew, int64 (n, m, L)."""
        codes_nm = nearest_codes(self._distances(rows_n, level), nearest)[0]
        tuples_nmL = np.repeat(self.codes_NL[rows_n, None], codes_nm.shape[1], axis=1)
        tuples_nmL[:, :, level] = codes_nm
        flat_rows, flat = np.repeat(rows_n, codes_nm.shape[1]), tuples_nmL.reshape(-1, self.levels)
        for after in range(level + 1, self.levels):
            for block in self._blocks(len(flat), self.space.sizes[after]):
                flat[block, after] = self._distances(flat_rows[block], after, flat[block]).argmin(axis=1)
        return tuples_nmL

    def _substitutions(self, rows_n: np.ndarray, nearest: int) -> np.ndarray:
        """Tuples with one code changed, by the distance of the new code, int64 (n, m, L)."""
        places, codes, distances = [], [], []
        for level in range(self.levels):
            codes_nm, distances_nm = nearest_codes(self._distances(rows_n, level), nearest)
            # The item's own tuple is no substitution.
            distances_nm[codes_nm == self.codes_NL[rows_n, level, None]] = np.inf
            places.append(np.full(codes_nm.shape, level))
            codes.append(codes_nm)
            distances.append(distances_nm)
        order_nm = np.argsort(np.concatenate(distances, axis=1), axis=1, kind="stable")
        place_nm, code_nm = (np.take_along_axis(np.concatenate(part, axis=1), order_nm, 1) for part in (places, codes))
        tuples_nmL = np.repeat(self.codes_NL[rows_n, None], order_nm.shape[1], axis=1)
        np.put_along_axis(tuples_nmL, place_nm[:, :, None], code_nm[:, :, None], axis=2)
        return tuples_nmL

    def _distances(self, rows_n: np.ndarray, level: int, codes_nL: np.ndarray | None = None) -> np.ndarray:
        """Distances of items to the codes of `level`, float32 (n, C); `codes_nL` stand for the items' own."""
        codes_nL = self.codes_NL[rows_n] if codes_nL is None else codes_nL
        x_nD = self.x_ND[torch.from_numpy(rows_n).to(self.x_ND.device)]
        return self.quantizer.distances(x_nD, torch.from_numpy(codes_nL), level).cpu().numpy()

    def _grouped_keys(self, rows_n: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Prefixes of `level` codes that the items have, ascending keys (G,), and which is whose, (n,)."""
        return np.unique(self.space.keys(self.codes_NL[rows_n], level), return_inverse=True)

    def _grouped(self, rows_n: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows by prefix, in their order within it; the prefixes (G,); which is whose, ascending (n,)."""
        prefixes_G, groups_n = self._grouped_keys(rows_n, level)
        order_n = np.argsort(groups_n, kind="stable")
        return rows_n[order_n], prefixes_G, groups_n[order_n]

    def _blocks(self, rows: int, width: int, entries: int = BLOCK_ENTRIES) -> Iterator[slice]:
        step = max(entries // width, 1)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def nearest_codes(distances_nC: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest codes by ascending distance, lower codes first among equals, and their distances, (n, m)."""
    count = min(count, distances_nC.shape[1])
    # The bits of floats, signed ones mirrored, sort as the floats do; the code below them makes every entry differ.
    bits_nC = np.ascontiguousarray(distances_nC + np.float32(0.0)).view(np.int32).astype(np.int64)
    keys_nC = ((bits_nC ^ ((bits_nC >> 31) & 0x7FFFFFFF)) << 32) | np.arange(distances_nC.shape[1])
    codes_nm = np.sort(np.partition(keys_nC, count - 1, axis=1)[:, :count], axis=1) & 0xFFFFFFFF
    return codes_nm, np.take_along_axis(distances_nC, codes_nm, axis=1)


def _group_blocks(groups: np.ndarray, step: int) -> Iterator[tuple[slice, int, int]]:
    """Slices of some `step` rows that end where a group does, with the first group and the one after the last."""
    start = 0
    while start < len(groups):
        # At least one whole group, or as many as end within the step.
        end = int(np.searchsorted(groups, groups[min(start + step, len(groups) - 1)], side="left"))
        if end <= start or start + step >= len(groups):
            end = int(np.searchsorted(groups, groups[min(start + step, len(groups) - 1)], side="right"))
        yield slice(start, end), int(groups[start]), int(groups[end - 1]) + 1
        start = end
