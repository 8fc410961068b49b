"""Tuples of codes as single integers, so that they can be sorted, counted and looked up by the million."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_KEY = 2**63 - 1


class CodeKeys:
    """One int64 a tuple of codes, equal for equal tuples and in their order; -1 for what is not among those given.

    A key is the tuple read as a number, level l being a digit of base sizes[l]. Where the next digit does not fit 63
    bits, the number so far gives way to its rank among the numbers of the tuples given, which is below their count.
    Without such levels any tuple within `sizes` has a key of its own.
    """

    def __init__(self, codes_NL: Tensor, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._known: dict[int, Tensor] = {}
        if math.prod(sizes) > _LARGEST_KEY:
            self._pack(codes_NL.to(torch.int64), learn=True)

    def of(self, codes_nL: Tensor) -> Tensor:
        """Keys of tuples (n, L) of any integers, int64 (n,), on the CPU."""
        return self._pack(codes_nL.cpu().to(torch.int64), learn=False)

    def _pack(self, codes_nL: Tensor, *, learn: bool) -> Tensor:
        legal_n = ((codes_nL >= 0) & (codes_nL < torch.tensor(self.sizes))).all(dim=1)
        keys_n, span = torch.where(legal_n, codes_nL[:, 0], 0), self.sizes[0]
        for level, size in enumerate(self.sizes[1:], 1):
            if span * size > _LARGEST_KEY:
                if learn:
                    self._known[level] = torch.unique(keys_n)
                known = self._known[level]
                ranks_n = torch.searchsorted(known, keys_n).clamp_(max=len(known) - 1)
                legal_n &= known[ranks_n] == keys_n
                keys_n, span = ranks_n, len(known)
            keys_n, span = keys_n * size + torch.where(legal_n, codes_nL[:, level], 0), span * size
        return torch.where(legal_n, keys_n, -1)
