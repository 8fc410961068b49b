"""One level of the search: from M prefixes and the logits of what may follow to the best M' longer prefixes.

Prefixes are kept in order, best first. A place without a prefix has score -inf; it still holds a legal code and
ancestor, so that shapes depend on the widths alone and a model needs no mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from generative_recommenders.generative.beam_sampling import children_keys, perturbed
from generative_recommenders.generative.trie import ItemFilter, Trie
from ops.random import token_hash


@dataclass(frozen=True)
class Beams:
    """M prefixes of B requests after `level` codes.

    states_BM: where in the trie each prefix ends, -1 for none. scores_BM: float32. codes: of each level those chosen,
    (B, M_l), in the places they were chosen at. ancestors: for each of these the place every present prefix comes from,
    (B, M). pruned_B: best score of a prefix that was given up so far.

    Of a sample only: chance_BM, log-probability of the prefix among the legal ones; noisy_BM, the same with noise, by
    which prefixes are kept; keys_BM, what their further noise comes from.
    """

    states_BM: Tensor
    scores_BM: Tensor
    pruned_B: Tensor
    codes: tuple[Tensor, ...] = ()
    ancestors: tuple[Tensor, ...] = ()
    chance_BM: Tensor | None = None
    noisy_BM: Tensor | None = None
    keys_BM: Tensor | None = None

    @classmethod
    def start(cls, trie: Trie, rows: Tensor, keys_B1: Tensor | None = None) -> Beams:
        """The empty prefix of each of the requests `rows`; with keys, for a sample."""
        states_B1 = trie.root(rows.numel())
        scores_B1 = torch.zeros(states_B1.shape, device=rows.device)
        pruned_B = torch.full(rows.shape, -math.inf, device=rows.device)
        noise = None if keys_B1 is None else scores_B1
        return cls(states_B1, scores_B1, pruned_B, chance_BM=noise, noisy_BM=noise, keys_BM=keys_B1)

    @property
    def level(self) -> int:
        return len(self.codes)

    @property
    def tokens_BM(self) -> Tensor | None:
        """Codes chosen last."""
        return self.codes[-1] if self.codes else None

    def codes_BML(self) -> Tensor:
        """The prefixes themselves."""
        chosen = [codes.gather(1, index) for codes, index in zip(self.codes, self.ancestors, strict=True)]
        return torch.stack(chosen, dim=-1)


@dataclass(frozen=True)
class Step:
    """How one search steps: among what, by which probabilities, and whether it samples."""

    trie: Trie
    allowed: ItemFilter | None
    constrained: bool
    normalization: Literal["vocabulary", "legal"]
    sampling: bool = False

    def __call__(self, beams: Beams, logits_BMC: Tensor, width: int) -> Beams:
        """The best `width` continuations of all prefixes, or a sample of them."""
        if self.constrained and not self.sampling:
            return self._legal(beams, logits_BMC, width)
        return self._dense(beams, logits_BMC, width)

    def _legal(self, beams: Beams, logits_BMC: Tensor, width: int) -> Beams:
        step = self.trie.step(
            logits_BMC,
            beams.states_BM,
            beams.scores_BM,
            beams.level,
            width,
            normalization=self.normalization,
            allowed=self.allowed,
        )
        pruned_B = torch.maximum(beams.pruned_B, step.pruned_B)
        return _grown(beams, step.parents_BK, step.tokens_BK, step.states_BK, step.scores_BK, pruned_B)

    def _dense(self, beams: Beams, logits_BMC: Tensor, width: int) -> Beams:
        """Over the whole (B, M, C) rectangle: what a search without a trie, or a sample, chooses from."""
        size = logits_BMC.shape[-1]
        log_probs_BMC = logits_BMC.log_softmax(-1)
        chances_BMC = log_probs_BMC
        if self.constrained:
            legal_BMC = self.trie.mask(beams.states_BM, beams.level, allowed=self.allowed)
            chances_BMC = legal_log_softmax(logits_BMC, legal_BMC)
            log_probs_BMC = log_probs_BMC.masked_fill(~legal_BMC, -math.inf)
            log_probs_BMC = chances_BMC if self.normalization == "legal" else log_probs_BMC
        totals_BX = (beams.scores_BM[..., None] + log_probs_BMC).flatten(1)
        if not self.sampling:
            place_BK, pruned_B = _best(totals_BX, width)
            return self._chosen(beams, totals_BX, place_BK, size, torch.maximum(beams.pruned_B, pruned_B))
        assert beams.chance_BM is not None and beams.noisy_BM is not None and beams.keys_BM is not None
        chances_BMC = beams.chance_BM[..., None] + chances_BMC
        keys_BMC = children_keys(beams.keys_BM, size)
        noisy_BX = perturbed(chances_BMC, beams.noisy_BM, keys_BMC).flatten(1)
        place_BK, _ = _best(noisy_BX, width)
        grown = self._chosen(beams, totals_BX, place_BK, size, beams.pruned_B)
        return Beams(
            grown.states_BM,
            grown.scores_BM,
            grown.pruned_B,
            grown.codes,
            grown.ancestors,
            chances_BMC.flatten(1).gather(1, place_BK),
            noisy_BX.gather(1, place_BK),
            token_hash(beams.level, keys_BMC.flatten(1).gather(1, place_BK)),
        )

    def _chosen(self, beams: Beams, totals_BX: Tensor, place_BK: Tensor, size: int, pruned_B: Tensor) -> Beams:
        parents_BK, tokens_BK = place_BK // size, place_BK % size
        states_BK = self.trie.advance(beams.states_BM.gather(1, parents_BK), tokens_BK, beams.level)
        return _grown(beams, parents_BK, tokens_BK, states_BK, totals_BX.gather(1, place_BK), pruned_B)


def _best(values_BX: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Places of the `width` largest values, best first, and the largest one left out. Equal values: any of them."""
    best_BX, place_BX = values_BX.topk(min(width + 1, values_BX.shape[1]), dim=1)
    left_out = best_BX.shape[1] > width
    return place_BX[:, :width], best_BX[:, width] if left_out else torch.full_like(best_BX[:, 0], -math.inf)


def _grown(
    beams: Beams, parents_BK: Tensor, tokens_BK: Tensor, states_BK: Tensor, scores_BK: Tensor, pruned_B: Tensor
) -> Beams:
    parents_BK, tokens_BK = parents_BK.clamp(min=0), tokens_BK.clamp(min=0)
    own_BK = torch.arange(parents_BK.shape[1], device=parents_BK.device).expand_as(parents_BK)
    ancestors = (*(index.gather(1, parents_BK) for index in beams.ancestors), own_BK)
    return Beams(states_BK, scores_BK, pruned_B, (*beams.codes, tokens_BK), ancestors)


def legal_log_softmax(logits_BMC: Tensor, legal_BMC: Tensor) -> Tensor:
    """Log-probabilities over the legal codes alone; -inf elsewhere, also where none is legal."""
    masked = logits_BMC.masked_fill(~legal_BMC, -math.inf)
    return masked.log_softmax(-1).masked_fill(~legal_BMC, -math.inf)
