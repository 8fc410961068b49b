"""From the prefixes a search ends with to its results: leaves into items, scores, and what the list proves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.beam_result import BeamResult, gap_of, slots_of
from generative_recommenders.generative.beam_steps import Beams
from generative_recommenders.generative.trie import ItemFilter, Trie


def result_of(
    beams: Beams, trie: Trie, k: int, allowed: ItemFilter | None, divisor: float = 1.0, *, searched: bool = True
) -> BeamResult:
    """The first `k` items of the leaves that `beams` ended at; scores are divided by `divisor`.

    `searched` is False where every item was scored instead. Prefixes of a search without a trie that are no item, or
    none that is allowed, are dropped here. A sample's items are chosen by their noise and then ordered by score.
    """
    choice_BM = beams.scores_BM if beams.noisy_BM is None else beams.noisy_BM
    order_BM = leaf_order(choice_BM.masked_fill(beams.states_BM < 0, -math.inf), beams.states_BM)
    states_BM = beams.states_BM.gather(1, order_BM)
    slots = slots_of(trie.item_counts(states_BM, allowed=allowed), k)
    items_BK = trie.item_at(states_BM.gather(1, slots.leaf_BK), slots.place_BK, allowed=allowed)
    source_BK = order_BM.gather(1, slots.leaf_BK)
    scores_BK = (beams.scores_BM.gather(1, source_BK) / divisor).masked_fill(~slots.valid_BK, -math.inf)
    codes_BKL = beams.codes_BML().gather(1, source_BK[..., None].expand(-1, -1, beams.level))
    gap_B = gap_of(scores_BK[:, -1], beams.pruned_B / divisor)
    if beams.noisy_BM is not None:
        gap_B = torch.full_like(gap_B, math.inf)
        order_BK = leaf_order(scores_BK, beams.states_BM.gather(1, source_BK))
        scores_BK, items_BK = scores_BK.gather(1, order_BK), items_BK.gather(1, order_BK)
        codes_BKL = codes_BKL.gather(1, order_BK[..., None].expand_as(codes_BKL))
    valid_BK = scores_BK > -math.inf
    return BeamResult(
        items_BK.masked_fill(~valid_BK, 0),
        codes_BKL.masked_fill(~valid_BK[..., None], -1),
        scores_BK,
        valid_BK.sum(1),
        gap_B < 0,
        gap_B,
        torch.full_like(gap_B, _width(beams) if searched else 0, dtype=torch.int64),
    )


def _width(beams: Beams) -> int:
    """The widest level that the model was shown, which the last one is not."""
    return max(codes_BM.shape[1] for codes_BM in beams.codes[:-1] or beams.codes)


def leaf_order(scores_BM: Tensor, states_BM: Tensor) -> Tensor:
    """Places by falling score, equal ones by leaf, which is by codes; items of one leaf stay in order."""
    order_BM = states_BM.argsort(dim=1, stable=True)
    return order_BM.gather(1, scores_BM.gather(1, order_BM).argsort(dim=1, descending=True, stable=True))


def excluded_history(trie: Trie, batch: SequenceBatch, allowed: ItemFilter | None) -> ItemFilter:
    """Per request the items that are not in its history, and that `allowed` has, where it is given."""
    return trie.exclude(batch.rows_T(), batch.item_ids_T, batch.size, allowed=allowed)
