"""What a search over semantic IDs returns, and how the leaves it ends at become items.

A leaf may hold several items (IDs that collide). They share the leaf's score: all of them are returned, by ascending
item id, and K counts items. Leaves of equal score are ordered by their codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BeamResult:
    """The K results of B requests, best first; row b holds `valid_count_B[b]` of them, the rest is padding.

    items_BK: int64 item ids, padded with 0.
    codes_BKL: int64 semantic ID of each item, padded with -1.
    scores_BK: float32 sums of log-probabilities, padded with -inf; no returned item has -inf.
    valid_count_B: int64.
    exact_B: bool; the list is proven to be the exact top-K of the allowed catalogue under the model.
    gap_B: float32; the best score of a prefix that was given up minus the K-th score. The list is exact where it is
        below 0; else no missed item is better than the K-th by more than this. -inf: nothing was given up. inf: fewer
        than K were found though something was given up, or the list is a sample.
    width_B: int64; prefixes that were kept at the widest level of the search that made the list. 0: it was no search.
    """

    items_BK: Tensor
    codes_BKL: Tensor
    scores_BK: Tensor
    valid_count_B: Tensor
    exact_B: Tensor
    gap_B: Tensor
    width_B: Tensor

    @property
    def valid_BK(self) -> Tensor:
        """Which places hold a result."""
        return torch.arange(self.items_BK.shape[1], device=self.items_BK.device) < self.valid_count_B[:, None]

    def replaced(self, rows: Tensor, other: BeamResult) -> BeamResult:
        """This result with the given rows, int64 (b,), taken from `other`, a result of those requests alone."""
        return BeamResult(
            *(
                getattr(self, name).index_copy(0, rows, getattr(other, name))
                for name in ("items_BK", "codes_BKL", "scores_BK", "valid_count_B", "exact_B", "gap_B", "width_B")
            )
        )


def gap_of(kth_score_B: Tensor, pruned_B: Tensor) -> Tensor:
    """`BeamResult.gap_B` from the K-th score, -inf where there is none, and the best score given up."""
    gap_B = pruned_B - kth_score_B
    return torch.where(pruned_B.isneginf(), torch.full_like(gap_B, -math.inf), gap_B)


@dataclass(frozen=True)
class Slots:
    """Which leaf, (B, K) of M, and which of its items, counted from 0, each result is; `valid_BK` says if it is."""

    leaf_BK: Tensor
    place_BK: Tensor
    valid_BK: Tensor


def slots_of(counts_BM: Tensor, k: int) -> Slots:
    """Spread the first `k` items over leaves in order, leaf m holding `counts_BM[b, m]` of them."""
    ends_BM = counts_BM.cumsum(1)
    wanted_BK = torch.arange(k, device=counts_BM.device).expand(counts_BM.shape[0], k).contiguous()
    leaf_BK = torch.searchsorted(ends_BM, wanted_BK, right=True)
    valid_BK = leaf_BK < counts_BM.shape[1]
    leaf_BK = leaf_BK.clamp(max=counts_BM.shape[1] - 1)
    place_BK = wanted_BK - (ends_BM - counts_BM).gather(1, leaf_BK)
    return Slots(leaf_BK, torch.where(valid_BK, place_BK, 0), valid_BK)
