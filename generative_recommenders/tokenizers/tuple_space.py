"""Which tuples of codes are in use: asked by the million, by whole tuple or by prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_LARGEST_KEY = 2**63 - 1


class TupleSpace:
    """The tuples in use among all that `sizes` allow, all int64 numpy arrays.

    A tuple's key is sum_l weight_l * code_l modulo 2^64. Where all tuples fit 63 bits the weights make it the tuple
    read as a number. Otherwise they are random odd numbers: equal tuples have equal keys still, and two tuples that
    share a key (one pair in 2^63) make a free tuple look used, never the reverse.

    Args:
        sizes: codes a level.
        used_UL: (U, L), tuples in use; any may be there several times.
        seed: of the random weights.
    """

    def __init__(self, sizes: Sequence[int], used_UL: np.ndarray, *, seed: int = 0) -> None:
        self.sizes = tuple(sizes)
        self._weights_L = _weights(self.sizes, seed)
        keys_U = self.keys(used_UL)
        self._sorted_U = np.sort(keys_U)
        if (self._sorted_U[1:] == self._sorted_U[:-1]).any():
            self._sorted_U, first_U = np.unique(keys_U, return_index=True)
            used_UL = used_UL[first_U]
        self._used_UL = used_UL

    @property
    def used(self) -> int:
        return len(self._sorted_U)

    def below(self, level: int) -> int:
        """Tuples that share their codes up to and including those of `level`, 2^62 at most."""
        return min(math.prod(self.sizes[level + 1 :]), 2**62)

    def keys(self, codes: np.ndarray, levels: int | None = None) -> np.ndarray:
        """Keys of tuples, or of their first `levels` codes; (..., L) gives (...)."""
        levels = len(self.sizes) if levels is None else levels
        keys = np.zeros(codes.shape[:-1], dtype=np.int64)
        for level in range(levels):
            keys += codes[..., level] * self._weights_L[level]
        return keys

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Whether tuples with these keys are in use, bool in the shape of keys."""
        if not self.used:
            return np.zeros(keys.shape, dtype=bool)
        return self._sorted_U[np.searchsorted(self._sorted_U, keys).clip(max=self.used - 1)] == keys

    def add(self, codes_nL: np.ndarray) -> None:
        """Use tuples that were free, each once."""
        if len(codes_nL):
            self._used_UL = np.concatenate([self._used_UL, codes_nL])
            self._sorted_U = np.sort(np.concatenate([self._sorted_U, self.keys(codes_nL)]))

    def rooms(self, level: int, prefixes_G: np.ndarray) -> Rooms:
        """What is free below these prefixes of `level` codes, keys in ascending order, as things are now."""
        keys_U = self.keys(self._used_UL, level)
        group_U = np.searchsorted(prefixes_G, keys_U).clip(max=len(prefixes_G) - 1)
        below_U = np.flatnonzero(prefixes_G[group_U] == keys_U)
        below_U = below_U[np.argsort(group_U[below_U], kind="stable")]
        used_G = np.bincount(group_U[below_U], minlength=len(prefixes_G))
        return Rooms(self.sizes[level], self.below(level), self._used_UL[below_U, level], used_G)


class Rooms:
    """Free tuples below each code of a level, for G prefixes.

    Args:
        size: codes of the level.
        below: tuples below each code, used or free.
        used_codes_u: the level's code of each tuple in use, by prefix.
        used_G: tuples in use, a prefix.
    """

    def __init__(self, size: int, below: int, used_codes_u: np.ndarray, used_G: np.ndarray) -> None:
        self.size, self.below = size, below
        self._codes_u, self._used_G = used_codes_u, used_G
        self._starts_G = np.cumsum(used_G) - used_G
        self.free_G = min(size * below, 2**62) - used_G

    def of(self, groups_g: np.ndarray) -> np.ndarray:
        """Free tuples below each code, for some of the prefixes, int64 (g, size)."""
        counts_g = self._used_G[groups_g]
        row_u = np.repeat(np.arange(len(groups_g)), counts_g)
        place_u = np.arange(len(row_u)) + np.repeat(self._starts_G[groups_g] - np.cumsum(counts_g) + counts_g, counts_g)
        used = np.bincount(row_u * self.size + self._codes_u[place_u], minlength=len(groups_g) * self.size)
        return self.below - used.reshape(len(groups_g), self.size)


def _weights(sizes: tuple[int, ...], seed: int) -> np.ndarray:
    if math.prod(sizes) > _LARGEST_KEY:
        return np.random.default_rng(seed).integers(-(2**62), 2**62, len(sizes)) * 2 + 1
    return np.array([math.prod(sizes[level + 1 :]) for level in range(len(sizes))], dtype=np.int64)


def rank_in_run(sorted_n: np.ndarray) -> np.ndarray:
    """Place of each entry among its equals, which follow each other, int64 (n,)."""
    place_n = np.arange(len(sorted_n))
    starts_n = np.concatenate([[True], sorted_n[1:] != sorted_n[:-1]])[: len(sorted_n)]
    return place_n - np.maximum.accumulate(np.where(starts_n, place_n, 0))


def rank_in_group(groups_n: np.ndarray) -> np.ndarray:
    """Place of each entry among its equals, which lie anywhere, in their order, int64 (n,)."""
    order_n = np.argsort(groups_n, kind="stable")
    ranks_n = np.empty(len(groups_n), dtype=np.int64)
    ranks_n[order_n] = rank_in_run(groups_n[order_n])
    return ranks_n
