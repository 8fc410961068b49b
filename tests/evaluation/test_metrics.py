"""Ranking metrics against their definitions, and evaluation against sorting every score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.collate import Split
from generative_recommenders.data.loader import Loader
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.encoders.hstu import HSTUConfig
from generative_recommenders.evaluation.metrics import (
    MAX_RANK,
    METRIC_NAMES,
    mean_metrics,
    per_user_metrics,
    published_ranks,
)
from generative_recommenders.evaluation.retrieval import evaluate
from generative_recommenders.losses.objective import Objective
from generative_recommenders.nn.embeddings import ItemEmbedding
from generative_recommenders.nn.outputs import L2NormOutput
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.similarity.dot import DotProduct
from tests.batches import dataset


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_metrics_follow_their_definitions(ranks: list[int]) -> None:
    values = per_user_metrics(torch.tensor(ranks))
    for u, r in enumerate(ranks):
        assert values["mrr"][u].item() == pytest.approx(1 / r)
        for k in (1, 5, 10, 50, 100, 200):
            assert values[f"ndcg@{k}"][u].item() == pytest.approx(1 / math.log2(r + 1) if r <= k else 0.0)
        for k in (1, 5, 10, 50, 100, 200, 500, 1000):
            assert values[f"hr@{k}"][u].item() == float(r <= k)


def test_misses_count_as_published() -> None:
    ranks = torch.tensor([0, 1, MAX_RANK, MAX_RANK + 1, 30_000])
    assert published_ranks(ranks, 50_000).tolist() == [2501, 1, 2500, 2501, 2501]
    assert published_ranks(torch.tensor([0, 40, 41]), 40).tolist() == [2501, 40, 2501]


def test_liked_variants_average_over_ratings_of_four_and_more() -> None:
    means = mean_metrics(torch.tensor([1, 3, 60]), torch.tensor([4.0, 3.5, 5.0]))
    assert tuple(means) == METRIC_NAMES
    assert means["hr@10_>=4"] == 0.5 and means["hr@10"] == pytest.approx(2 / 3)
    assert math.isnan(mean_metrics(torch.tensor([1]), torch.tensor([1.0]))["mrr_>=4"])


def model(num_items: int) -> RetrievalModel:
    torch.manual_seed(0)
    catalog = torch.arange(num_items) * 2 + 1
    config = HSTUConfig(num_blocks=1, num_heads=2, dqk=4, dv=4)
    encoder = config.build(8, 31, 0.5, False)
    return RetrievalModel(
        ItemEmbedding(int(catalog[-1]), 8),
        encoder,
        L2NormOutput(1e-6),
        DotProduct(),
        Objective(),
        catalog,
        item_l2_norm=True,
        l2_norm_eps=1e-6,
        top_k_method="MIPSBruteForceTopK",
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60), st.booleans(), st.integers(1, 7), st.integers(0, 100), st.none() | st.integers(1, 5))
def test_evaluation_equals_sorting_all_scores(
    num_items: int, filter_history: bool, batch_size: int, seed: int, max_rows: int | None
) -> None:
    data = dataset([3, 9, 2, 14, 30, 5, 4], num_items, seed)
    network = model(num_items)
    split = Split(data, 20, 0)
    result = evaluate(
        network,
        Loader(split, batch_size, shuffle=False).epoch(0),
        Runtime(0, 1, torch.device("cpu")),
        filter_history=filter_history,
        max_rows=max_rows,
    )
    ranks, ratings = [], []
    for user in range(len(split)):
        batch = split.batch(torch.tensor([user]), torch.tensor([0]))
        network.eval()
        query = network.last_queries(batch)[0]
        table = torch.nn.functional.normalize(network.items.table.detach(), dim=-1, eps=1e-6)
        scored = [(float(query @ table[i]), i) for i in data.catalog.item_ids.tolist()]
        seen = set(batch.item_ids_T.tolist()) if filter_history else set()
        target = int(batch.target_ids_B[0])
        ordered = [i for _, i in sorted(scored, key=lambda s: -s[0]) if i not in seen]
        ranks.append(ordered.index(target) + 1 if target in ordered else 0)
        ratings.append(float(batch.target_ratings_B[0]))
    expected = mean_metrics(published_ranks(torch.tensor(ranks), num_items), torch.tensor(ratings))
    assert result.num_users == len(split)
    # A near tie may fall either way in another order of summation; with these few users that would move a mean visibly.
    assert result.metrics == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_evaluation_leaves_the_training_mode_alone() -> None:
    network = model(30)
    network.train()
    split = Split(dataset([5, 6]), 20, 0)
    first = evaluate(network, Loader(split, 2).epoch(0), Runtime(0, 1, torch.device("cpu")))
    assert network.training
    network.eval()
    second = evaluate(network, Loader(split, 2).epoch(0), Runtime(0, 1, torch.device("cpu")))
    assert first.metrics == second.metrics
