"""Orders the items a search found anew, by what the model says of them as items beside what it says of their IDs.

    score = (1 - w) log p(ID | history) + w log p(item | history),    p(item | history) = softmax over items of s / t

s are the scores of the model's own draft head (`draft_head`), inner products of the vectors of history and item, for
all items that have an ID. The beam chooses, so what it did not reach is not listed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.draft_head import EncoderDrafter


class Reranker:
    """`reranker(batch, result, k)` is the list of the k best of the items of `result`.

    Args:
        drafter: of the model that made the result.
        weight: w, from 0 to 1.
        candidates: places that a search should have for lists to be made of.
    """

    def __init__(self, drafter: EncoderDrafter, weight: float, candidates: int) -> None:
        assert 0 <= weight <= 1 and candidates >= 1, (weight, candidates)
        self.drafter, self.weight, self.candidates = drafter, weight, candidates

    @torch.no_grad()
    def __call__(self, batch: SequenceBatch, result: BeamResult, k: int) -> BeamResult:
        """Lists of k places, or of fewer where the result has no more. Nothing is proven of them."""
        items_BV = self.item_log_probs(batch)
        own_BK = items_BV.gather(1, result.items_BK)
        scores_BK = (1 - self.weight) * result.scores_BK + self.weight * own_BK
        scores_BK = scores_BK.masked_fill(~result.valid_BK, -math.inf)
        scores_BK, order_BK = scores_BK.sort(dim=1, descending=True, stable=True)
        order_BK = order_BK[:, :k]
        codes_BKL = result.codes_BKL.gather(1, order_BK[..., None].expand(-1, -1, result.codes_BKL.shape[-1]))
        return replace(
            result,
            items_BK=result.items_BK.gather(1, order_BK),
            codes_BKL=codes_BKL,
            scores_BK=scores_BK[:, :k],
            valid_count_B=result.valid_count_B.clamp(max=k),
            exact_B=torch.zeros_like(result.exact_B),
            gap_B=torch.full_like(result.gap_B, math.inf),
        )

    def item_log_probs(self, batch: SequenceBatch) -> Tensor:
        """log p(item | history), (B, V) float32, column = item id."""
        return (self.drafter.scores(batch) / self.drafter.head.config.temperature).log_softmax(-1)
