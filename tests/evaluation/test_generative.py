"""Metrics of generated lists against counting by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.evaluation.generative import Catalogue, evaluate_lists, list_ranks, repeated
from generative_recommenders.evaluation.metrics import MAX_RANK
from generative_recommenders.generative.beam_result import BeamResult
from tests.batches import batch

CPU = Runtime(0, 1, torch.device("cpu"))
MISS = MAX_RANK + 1
# Items 1 and 2 share an ID, as do 4 and 5.
CODES = torch.tensor([[0, 0], [3, 1], [3, 1], [3, 2], [5, 0], [5, 0], [6, 6]])


def batch_of(targets: list[int]) -> SequenceBatch:
    """Any histories, with these targets."""
    return replace(batch([2] * len(targets)), target_ids_B=torch.tensor(targets))


def listed(rows: list[list[int]], k: int, exact: list[bool] | None = None) -> BeamResult:
    items = torch.tensor([row + [0] * (k - len(row)) for row in rows])
    counts = torch.tensor([len(row) for row in rows])
    valid = torch.arange(k) < counts[:, None]
    codes = torch.where(valid[..., None], CODES[items], -1)
    scores = torch.where(valid, -torch.arange(k).float(), -math.inf)
    proven = torch.tensor(exact or [True] * len(rows))
    return BeamResult(items, codes, scores, counts, proven, torch.zeros(len(rows)), torch.zeros_like(counts))


def test_an_id_counts_once_and_an_item_takes_a_place_of_its_own() -> None:
    result = listed([[1, 2, 3, 4, 5], [1, 2, 3], [6], []], 5)
    targets = torch.tensor([5, 2, 1, 6])
    items, ids = list_ranks(result, targets, CODES[targets])
    assert items.tolist() == [5, 2, MISS, MISS]
    assert ids.tolist() == [3, 1, MISS, MISS]


def test_items_of_one_id_need_not_stand_together() -> None:
    result = listed([[1, 3, 2, 4, 6], [4, 1, 5, 2, 3]], 5)
    targets = torch.tensor([6, 3])
    items, ids = list_ranks(result, targets, CODES[targets])
    assert items.tolist() == [5, 5] and ids.tolist() == [4, 3]


def test_a_target_with_the_id_of_a_listed_item_hits_at_the_level_of_ids_alone() -> None:
    items, ids = list_ranks(listed([[3, 4]], 2), torch.tensor([5]), CODES[torch.tensor([5])])
    assert (items.tolist(), ids.tolist()) == ([MISS], [2])


def test_padding_is_neither_an_item_nor_a_repetition() -> None:
    result = listed([[1, 2, 1, 1], [3]], 4)
    assert repeated(result).tolist() == [2, 0]


def test_metrics_are_means_over_users() -> None:
    targets = [5, 2, 1, 6]
    lists = [[1, 2, 3, 4, 5], [1, 2, 3], [6], []]
    catalogue = Catalogue(CODES, torch.tensor([False, True, True, True, True, True, False]), 6)
    model = torch.nn.Linear(1, 1)
    parts = iter([listed(lists[:2], 5, [True, False]), listed(lists[2:], 5, [True, True])])
    halves = [batch_of(targets[:2]), batch_of(targets[2:])]
    evaluation = evaluate_lists(model, lambda _: next(parts), halves, CPU, catalogue, 5)
    m = evaluation.metrics
    assert evaluation.num_users == 4
    assert m["hr@5"] == 0.5 and m["hr@1"] == 0 and m["sid_hr@1"] == 0.25 and m["sid_hr@5"] == 0.5
    assert m["ndcg@5"] == pytest.approx((1 / math.log2(6) + 1 / math.log2(3)) / 4)
    assert m["sid_ndcg@5"] == pytest.approx((1 / math.log2(4) + 1) / 4)
    assert m["mrr"] == pytest.approx((1 / 5 + 1 / 2) / 4) and m["sid_mrr"] == pytest.approx((1 / 3 + 1) / 4)
    assert m["valid"] == pytest.approx(9 / 20) and m["duplicates"] == 0 and m["certified"] == 0.75
    assert m["coverage@5"] == 1.0
    assert "hr@10" not in m and model.training


def test_slices_are_of_targets_seen_in_training_and_not() -> None:
    catalogue = Catalogue(CODES, torch.tensor([False, True, False, False, False, False, False]), 6)
    result = listed([[1], [1]], 10)
    m = evaluate_lists(torch.nn.Linear(1, 1), lambda _: result, [batch_of([1, 2])], CPU, catalogue, 10).metrics
    assert (m["hr@10"], m["hr@10_warm"], m["hr@10_cold"], m["sid_hr@10"]) == (0.5, 1.0, 0.0, 1.0)


def test_certified_shares_are_cumulative_over_widths() -> None:
    catalogue = Catalogue(CODES, torch.ones(7, dtype=torch.bool), 6)
    widths = torch.tensor([2, 8, 32, 32])
    result = replace(listed([[1]] * 4, 5, [True, True, True, False]), width_B=widths)
    m = evaluate_lists(torch.nn.Linear(1, 1), lambda _: result, [batch_of([1] * 4)], CPU, catalogue, 5).metrics
    assert (m["certified@2"], m["certified@8"], m["certified@32"]) == (0.25, 0.5, 0.75) == (0.25, 0.5, m["certified"])
    unsearched = replace(result, width_B=torch.zeros(4, dtype=torch.int64))
    m = evaluate_lists(torch.nn.Linear(1, 1), lambda _: unsearched, [batch_of([1] * 4)], CPU, catalogue, 5).metrics
    assert not [name for name in m if name.startswith("certified@")]
