"""Metrics of users whose target occurs in training and of the others, and which items those are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.merlin import prepare_merlin
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.evaluation import retrieval
from generative_recommenders.evaluation.metrics import METRIC_NAMES, per_user_metrics
from generative_recommenders.evaluation.slices import SLICED, sliced_means
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.retrieval import RetrievalExperiment
from tests.merlin_tables import ROWS, write_rows
from tests.toy import write_toy_dataset

CPU = Runtime(0, 1, torch.device("cpu"))


def test_means_are_over_either_group() -> None:
    ranks = torch.tensor([1, 3, 60, 12, 2501])
    trained = torch.tensor([True, False, True, False, False])
    found = sliced_means(per_user_metrics(ranks), trained)
    assert found["hr@10_warm"] == 0.5 and found["hr@50_warm"] == 0.5
    assert found["hr@10_cold"] == pytest.approx(1 / 3) and found["hr@50_cold"] == pytest.approx(2 / 3)
    assert found["ndcg@10_cold"] == pytest.approx(0.5 / 3)
    assert found["ndcg@50_cold"] == pytest.approx((0.5 + 1 / math.log2(13)) / 3)
    assert (found["users_warm"], found["users_cold"]) == (2, 3)
    assert set(found) == {f"{name}_{group}" for name in (*SLICED, "users") for group in ("warm", "cold")}


def test_a_group_of_nobody_has_no_mean_and_short_lists_no_metric_beyond_them() -> None:
    found = sliced_means({"hr@10": torch.ones(2, dtype=torch.float64)}, torch.tensor([True, True]))
    assert set(found) == {"hr@10_warm", "hr@10_cold", "users_warm", "users_cold"}
    assert math.isnan(found["hr@10_cold"]) and found["users_cold"] == 0


def test_trained_items_of_explicit_splits_are_in_train_rows(tmp_path: Path) -> None:
    folder = prepare_merlin(write_rows(tmp_path / "raw"), tmp_path / "merlin").path
    data = PreparedDataset.load(folder.parent, "merlin")
    kept = {str(item) for items, *_ in ROWS["train"] if len(items) >= 2 for item in items}
    number = dict(zip(data.catalog.raw_ids, data.catalog.item_ids.tolist(), strict=True))
    trained = sorted(number[raw] for raw in kept)
    assert data.trained_items().nonzero().flatten().tolist() == trained
    assert data.unseen_items().tolist() == [i for i in data.catalog.item_ids.tolist() if i not in trained]


@pytest.mark.parametrize("held_out", [1, 2])
def test_trained_items_of_leave_one_out_are_those_before_the_held_out(tmp_path: Path, held_out: int) -> None:
    data = PreparedDataset.load(write_toy_dataset(tmp_path).parent, "toy")
    expected = set()
    for user in range(data.num_users):
        expected |= set(data.item_ids_E[data.offsets[user] : data.offsets[user + 1]].tolist()[:-held_out])
    assert set(data.trained_items(held_out).nonzero().flatten().tolist()) == expected
    assert set(data.unseen_items(held_out).tolist()) == set(data.catalog.item_ids.tolist()) - expected


def experiment(tmp_path: Path, *bindings: str) -> RetrievalExperiment:
    shared = ("train_fn.dataset_name = 'toy'", "train_fn.max_sequence_length = 8", "main.experiment = @train_fn")
    small = ("train_fn.item_embedding_dim = 8", "sasrec_encoder.num_heads = 1", "train_fn.main_module = 'SASRec'")
    config = load([], [*shared, *small, *bindings])
    return RetrievalExperiment(config, Places(tmp_path, tmp_path / "exps"), CPU)


def test_retrieval_tells_both_where_a_target_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_toy_dataset(tmp_path)
    plain = experiment(tmp_path)
    assert not plain.dataset.unseen_items(1).numel()
    assert set(plain.evaluate(plain.model(), "test").metrics) == set(METRIC_NAMES)
    # Two users end in an item that nobody else has.
    table = pq.read_table(folder / "sequences.parquet")
    lists = [[*row[:-1], 123] if user in (3, 9) else row for user, row in enumerate(table["item_ids"].to_pylist())]
    table = table.set_column(1, "item_ids", pa.array(lists, pa.list_(pa.int64())))
    pq.write_table(table, folder / "sequences.parquet")
    items = pq.read_table(folder / "items.parquet").to_pydict()
    items = {
        "item_id": [*items["item_id"], 123],
        "raw_id": [*items["raw_id"], "new"],
        "title": [*items["title"], "New"],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    changed = experiment(tmp_path)
    ranks = torch.arange(1, changed.dataset.num_users + 1) % 7 + 1

    def fixed(model: object, top_k: object, batch: SequenceBatch, filter_history: bool) -> torch.Tensor:
        return ranks[batch.user_ids_B - 1]

    monkeypatch.setattr(retrieval, "rank_targets", fixed)
    metrics = changed.evaluate(changed.model(), "test").metrics
    assert (metrics["users_warm"], metrics["users_cold"]) == (changed.dataset.num_users - 2, 2)
    own = per_user_metrics(ranks)["ndcg@10"]
    cold = np.isin(np.arange(changed.dataset.num_users), [3, 9])
    assert metrics["ndcg@10_cold"] == pytest.approx(float(own[torch.from_numpy(cold)].mean()))
    assert metrics["ndcg@10_warm"] == pytest.approx(float(own[torch.from_numpy(~cold)].mean()))
    assert metrics["ndcg@10"] == pytest.approx(float(own.mean()))
