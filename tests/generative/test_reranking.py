"""Reranked lists against sums and sorting in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.draft_head import EncoderDrafter
from generative_recommenders.generative.reranking import Reranker
from tests.generative.test_draft_head import batch, model_of
from tests.generative.test_tiger import ITEMS

# Places without an item at the end of the second and of all of the third.
FOUND = [[5, 2, 9, 14], [7, 1, 0, 0], [0, 0, 0, 0], [3, 8, 4, 0]]
SCORES = [[-1.0, -1.5, -4.0, -4.0], [-2.0, -2.5], [], [-0.5, -0.75, -6.0]]


def found() -> BeamResult:
    rows = [[*own, *[-math.inf] * (4 - len(own))] for own in SCORES]
    items_BK = torch.tensor(FOUND)
    codes_BKL = torch.where(items_BK > 0, items_BK, -1)[..., None].repeat(1, 1, 2)
    counts_B = torch.tensor([len(own) for own in SCORES])
    exact_B, gap_B = torch.ones(4, dtype=torch.bool), torch.full((4,), -1.0)
    return BeamResult(items_BK, codes_BKL, torch.tensor(rows), counts_B, exact_B, gap_B, torch.full((4,), 20))


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("k", [2, 4])
def test_reranked_lists(weight: float, k: int) -> None:
    drafter = EncoderDrafter(model_of("tiger").eval())
    asked = batch([11, 12, 13, 14])
    temperature = drafter.head.config.temperature
    result = Reranker(drafter, weight, 4)(asked, found(), k)
    drafts = drafter.scores(asked)[:, 1 : ITEMS + 1].double() / temperature
    for row, (items, scores) in enumerate(zip(FOUND, SCORES, strict=True)):
        total = math.log(sum(math.exp(x) for x in drafts[row].tolist()))
        log_p = {i: float(drafts[row, i - 1]) - total for i in items if i}
        new = {i: (1 - weight) * s + weight * log_p[i] for i, s in zip(items, scores, strict=False)}
        order = sorted(new, key=lambda i: -new[i])[:k]
        count = int(result.valid_count_B[row])
        assert result.items_BK[row].tolist() == order + [0] * (k - len(order)) and count == len(order)
        assert result.codes_BKL[row, :, 0].tolist() == order + [-1] * (k - len(order))
        assert result.scores_BK[row, :count].tolist() == pytest.approx([new[i] for i in order], abs=1e-4)
        assert bool(result.scores_BK[row, count:].isneginf().all())
    # What the search proved was of its own order.
    assert not bool(result.exact_B.any()) and bool(result.gap_B.isposinf().all())
    assert result.width_B.tolist() == [20] * 4


def test_the_order_changes_with_the_weight() -> None:
    drafter, asked = EncoderDrafter(model_of("tiger").eval()), batch([11, 12, 13, 14])
    kept = Reranker(drafter, 0.0, 4)(asked, found(), 4)
    assert kept.items_BK.tolist() == FOUND
    assert Reranker(drafter, 1.0, 4)(asked, found(), 4).items_BK.tolist() != FOUND
