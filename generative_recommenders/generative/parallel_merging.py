"""The best leaves of a catalogue from the log-probabilities of independent positions, of one ID an item or several.

An item with IDs of several modalities m has one score, by one of three rules:

    joint:      sum over all positions of all IDs of log p(code): the log-likelihood the model is trained on
    mixture:    log mean_m p_m(item), p_m(item) = exp(s_m(item)) / sum over the catalogue's items of exp(s_m)
    published:  the K best items of each modality by s_m / n_m, the mean log-probability of a code; an item in several
                lists has the mean of its scores there plus 1, another its only score (MQL4GRec, Parallel TIGER)

s_m is the sum of log p over the n_m positions of ID m. In a mixture both lists are probabilities over the same items,
so that scores of IDs of different lengths and vocabularies compare and an item that one modality is sure of is not
vetoed by the other. A published list is no top-K of a distribution: it is never called exact.

Letters: N leaves, B requests, K results, X leaves of a request's lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from generative_recommenders.generative.parallel_config import ModalityMerge
from generative_recommenders.generative.parallel_exact import Catalogue, CodeSums, LeafScores, MixedScores, NoisyScores
from generative_recommenders.generative.trie import ItemFilter, Trie

# Requests at a time on a CPU: a gather then reads whole cache lines and the numbers it reads stay in the cache.
_REQUESTS_AT_A_TIME = 64


@dataclass(frozen=True)
class RankedLeaves:
    """K leaves of each request and their scores, -inf where there is no such leaf; nothing follows from their order.

    exact: they are the best of all. noisy_BK: of a sample, the scores with the noise that chose it.
    """

    leaves_BK: Tensor
    scores_BK: Tensor
    exact: bool
    noisy_BK: Tensor | None = None


class LeafRanking:
    """Ranks the leaves of a trie; which rows make up a leaf's score is worked out once.

    Args:
        modalities: positions of each ID of an item, side by side in the trie's codes.
    """

    def __init__(self, trie: Trie, modalities: Sequence[int], merge: ModalityMerge) -> None:
        self.trie = trie
        self.merge = merge
        counts = (len(trie.sizes),) if merge == "joint" else modalities
        bounds = [sum(counts[:number]) for number in range(len(counts) + 1)]
        # The positions that are added up: all of them, or those of each ID.
        self.spans = [slice(first, last) for first, last in pairwise(bounds)]
        self.sums = [CodeSums(trie.leaf_codes()[:, span], trie.sizes[span]) for span in self.spans]

    def __call__(
        self, log_probs: Sequence[Tensor], k: int, allowed: ItemFilter | None = None, keys_B1: Tensor | None = None
    ) -> RankedLeaves:
        """The k best leaves, or with keys a sample of k without replacement; of "published" the lists of all IDs.

        Args:
            log_probs: (B, C_l) float32 of each position.
        """
        requests = len(log_probs[0])
        size = _REQUESTS_AT_A_TIME if self.trie.device.type == "cpu" else max(1, requests)
        parts = []
        for first in range(0, max(1, requests), size):
            rows = torch.arange(first, min(first + size, requests), device=self.trie.device)
            parts.append(
                self._some(
                    [log_probs_BC[rows] for log_probs_BC in log_probs],
                    k,
                    None if allowed is None else allowed.select(rows),
                    None if keys_B1 is None else keys_B1[rows],
                )
            )
        leaves_BK = torch.cat([part.leaves_BK for part in parts])
        scores_BK = torch.cat([part.scores_BK for part in parts])
        noisy = [part.noisy_BK for part in parts if part.noisy_BK is not None]
        return RankedLeaves(leaves_BK, scores_BK, parts[0].exact, torch.cat(noisy) if noisy else None)

    def _some(
        self, log_probs: Sequence[Tensor], k: int, allowed: ItemFilter | None, keys_B1: Tensor | None
    ) -> RankedLeaves:
        catalogue = Catalogue(self.trie, len(log_probs[0]), allowed)
        parts = [sums.under(log_probs[span]) for sums, span in zip(self.sums, self.spans, strict=True)]
        if self.merge == "published":
            leaves_BX, scores_BX = _published(catalogue, parts, k, [span.stop - span.start for span in self.spans])
            return RankedLeaves(leaves_BX, scores_BX, exact=False)
        scores: LeafScores = parts[0] if len(parts) == 1 else _mixture(catalogue, parts)
        if keys_B1 is None:
            return RankedLeaves(*catalogue.best(scores, k), exact=True)
        leaves_BK, noisy_BK = catalogue.best(NoisyScores(scores, keys_B1), k)
        return RankedLeaves(leaves_BK, catalogue.at(scores, leaves_BK), exact=False, noisy_BK=noisy_BK)


def _mixture(catalogue: Catalogue, parts: Sequence[LeafScores]) -> MixedScores:
    """Each modality's scores as probabilities over the items of the catalogue, and their mean."""
    return MixedScores(parts, [-catalogue.log_mass(part) - math.log(len(parts)) for part in parts])


def _published(
    catalogue: Catalogue, parts: Sequence[LeafScores], k: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Leaves of all modalities' lists and their merged scores, (B, modalities * k), -inf where one is repeated."""
    best = [catalogue.best(part, k) for part in parts]
    leaves_BX, scores_BX = (torch.cat(column, 1) for column in zip(*best, strict=True))
    total_BX, lists_BX = torch.zeros_like(scores_BX), torch.zeros_like(leaves_BX)
    dropped_BX = scores_BX.isneginf()
    for number, ((leaves_BK, scores_BK), length) in enumerate(zip(best, lengths, strict=True)):
        found_BXK = (leaves_BX[..., None] == leaves_BK[:, None]) & (scores_BK > -math.inf)[:, None]
        total_BX = total_BX + torch.where(found_BXK, (scores_BK / length)[:, None], 0.0).sum(-1)
        lists_BX = lists_BX + found_BXK.any(-1)
        later = torch.arange(leaves_BX.shape[1], device=leaves_BX.device) >= (number + 1) * leaves_BK.shape[1]
        dropped_BX = dropped_BX | (found_BXK.any(-1) & later)
    merged_BX = total_BX / lists_BX.clamp(min=1) + (lists_BX > 1).float()
    return leaves_BX, merged_BX.masked_fill(dropped_BX, -math.inf)
