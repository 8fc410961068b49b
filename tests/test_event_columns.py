"""Columns of events as model input: they help where they decide, must fit the binding, and travel to serving."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.nn.embeddings import ItemEmbedding
from generative_recommenders.nn.inputs import build_features
from generative_recommenders.retrieval.assemble import Plan
from generative_recommenders.retrieval.config import RetrievalConfig
from generative_recommenders.serving.demo import history_of
from generative_recommenders.serving.histories import Histories, read_histories
from generative_recommenders.serving.recommender import Recommender
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.retrieval import RetrievalExperiment
from generative_recommenders.training.runs import find_checkpoint
from tests.batches import batch as random_batch
from tests.toy import ID_STEP, NUM_ITEMS, raw_id, write_toy_dataset

ACTIONS = 5
INTEGERS = pa.int64()
CONFIG = "configs/ml-100k/hstu-demo.gin"
SMALL = (
    "train_fn.dataset_name = 'toy'",
    "train_fn.num_epochs = 16",
    "train_fn.loss_module = 'FullSoftmaxLoss'",
    "train_fn.temperature = 0.1",
    "train_fn.max_sequence_length = 12",
    "train_fn.item_embedding_dim = 32",
    "train_fn.local_batch_size = 32",
    "train_fn.learning_rate = 8e-3",
    "train_fn.dropout_rate = 0.0",
    "train_fn.filter_history = False",
    "hstu_encoder.dqk = 16",
    "hstu_encoder.dv = 16",
)
WITH = "train_fn.event_columns = {'action': 5}"
CPU = Runtime(0, 1, torch.device("cpu"))


def write_actions(data_dir: Path) -> Path:
    """Toy data in which an event's action is the number of steps on the ring to the next item, less one."""
    folder = write_toy_dataset(data_dir, num_users=400)
    path = folder / "sequences.parquet"
    generator = np.random.default_rng(1)
    lengths = [len(row) for row in pq.read_table(path)["item_ids"].to_pylist()]
    actions = [generator.integers(ACTIONS, size=n) for n in lengths]
    places = [(generator.integers(NUM_ITEMS) + np.cumsum([0, *(a[:-1] + 1)])) % NUM_ITEMS for a in actions]
    replace_column(folder, "item_ids", [ID_STEP * (p + 1) for p in places])
    replace_column(folder, "action", actions)
    return folder


def replace_column(folder: Path, name: str, values: Sequence[object], kind: pa.DataType = INTEGERS) -> None:
    path = folder / "sequences.parquet"
    table = pq.read_table(path)
    others = {column: table.column(column) for column in table.column_names if column != name}
    pq.write_table(pa.table(others | {name: pa.array(values, pa.list_(kind))}), path)


def actions_of(folder: Path) -> list[list[int]]:
    lists: list[list[int]] = pq.read_table(folder / "sequences.parquet")["action"].to_pylist()
    return lists


def experiment(data_dir: Path, *bindings: str) -> RetrievalExperiment:
    return RetrievalExperiment(load([CONFIG], [*SMALL, *bindings]), Places(data_dir, data_dir / "exps"), CPU)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RetrievalExperiment, float, Path]:
    """The experiment with the column, the hit rate it reached, and its run folder."""
    folder = tmp_path_factory.mktemp("actions")
    write_actions(folder)
    run = experiment(folder, WITH)
    evaluation, run_folder = run.train()
    return run, evaluation.metrics["hr@1"], run_folder


def test_a_column_that_decides_the_next_item_helps(trained: tuple[RetrievalExperiment, float, Path]) -> None:
    run, with_column, folder = trained
    without, _ = experiment(run.places.data_dir).train()
    # Without the action five items are equally likely.
    assert with_column > 2 * without.metrics["hr@1"], (with_column, without.metrics)
    assert run.evaluate_checkpoint(folder, "test").metrics["hr@1"] == pytest.approx(with_column)


def test_a_checkpoint_recommends_by_action(trained: tuple[RetrievalExperiment, float, Path], tmp_path: Path) -> None:
    run, _, folder = trained
    recommender = Recommender.from_checkpoint(find_checkpoint(folder))
    path = tmp_path / "histories.csv"
    first, second = raw_id(ID_STEP), raw_id(2 * ID_STEP)
    path.write_text(f'user_id,item_ids,action\nu,"{first},{second}","0,0"\nv,"{first},unknown,{second}","0,1,4"\n')
    histories = read_histories(path, recommender.event_columns)
    assert histories.events == {"action": [[0, 0], [0, 1, 4]]}
    best = recommender.recommend(histories, 1)["item_id"].tolist()
    assert best[0] != best[1]
    # An unknown item goes with its action.
    known = Histories(["v"], [[first, second]], [None], [None], events={"action": [[0, 4]]})
    ranked = recommender.recommend(known, 3)["item_id"].tolist()
    assert recommender.recommend(histories, 3).query("user_id == 'v'")["item_id"].tolist() == ranked
    with pytest.raises(DataError, match="histories: got no action, expected the action of every event") as error:
        recommender.recommend(read_histories(path), 1)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="histories: user 'v': got action 5, expected 0 to 4"):
        recommender.recommend(dataclasses.replace(known, events={"action": [[0, 5]]}), 1)
    assert isinstance(recommender.recommend(history_of(run.dataset, 3), 1), pd.DataFrame)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"1,2","0"', "row 1 has 2 item_ids and 1 action, expected equal"),
        ('"1","many"', "row 1, action: got 'many', expected a number"),
        ('"1","0.5"', "row 1, action: got '0.5', expected an integer"),
    ],
)
def test_a_file_of_histories_with_a_bad_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "histories.csv"
    path.write_text(f"item_ids,action\n{text}\n")
    with pytest.raises(DataError, match=message):
        read_histories(path, ("action",))
    assert read_histories(path).events == {}


def test_batches_carry_the_column_of_their_events(trained: tuple[RetrievalExperiment, float, Path]) -> None:
    run, _, _ = trained
    data = run.dataset
    batch = run.splits.test.batch(torch.tensor([2, 7]), torch.arange(2)).to("cpu")
    rows = [actions_of(data.folder)[int(row)][:-1][-12:] for row in run.splits.test.rows[torch.tensor([2, 7])]]
    assert batch.events["action"].tolist() == [code for row in rows for code in row]
    plain = PreparedDataset.load(data.folder.parent, "toy")
    assert plain.events == {} and plain.fingerprint != data.fingerprint
    assert batch.to("meta").events["action"].is_meta


def test_a_missing_column_is_named_with_those_there(tmp_path: Path) -> None:
    write_actions(tmp_path)
    message = r"event column acton is missing, got user_id, ratings, timestamps, item_ids, action"
    with pytest.raises(DataError, match=message) as error:
        experiment(tmp_path, "train_fn.event_columns = {'acton': 5}")
    assert "\n" not in str(error.value)


def test_values_out_of_range_are_counted_before_training(tmp_path: Path) -> None:
    folder = write_actions(tmp_path)
    actions = actions_of(folder)
    fours = sum(row.count(4) for row in actions)
    message = rf"event_columns: got 4 values of 'action', expected at least 5 .*: {fours:,} of [\d,]+ events of 'toy'"
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, "train_fn.event_columns = {'action': 4}")
    actions[0][1] = -2
    replace_column(folder, "action", actions)
    with pytest.raises(ConfigError, match=r"without negative values: 1 of [\d,]+ events .* such as -2"):
        experiment(tmp_path, WITH)


def test_a_column_that_does_not_fit_its_events_is_refused(tmp_path: Path) -> None:
    folder = write_actions(tmp_path)
    whole = actions_of(folder)
    # The total is right; two rows are not.
    moved = [whole[0][:-1], [*whole[1], 0], *whole[2:]]
    cases = [
        (moved, pa.int64(), r"row 0: got 4 values in item_ids and 3 in action, expected equal; 2 of 400 rows differ"),
        ([None, *whole[1:]], pa.int64(), r"row 0: got 4 values in item_ids and 0 in action"),
        ([[None] * 4, *whole[1:]], pa.int64(), r"column action: got 4 empty values"),
        (whole, pa.float64(), r"column action: got type list<element: double>, expected lists of integers"),
    ]
    for values, kind, message in cases:
        replace_column(folder, "action", values, kind)
        with pytest.raises(DataError, match=message):
            PreparedDataset.load(tmp_path, "toy", ["action"])
        assert PreparedDataset.load(tmp_path, "toy").num_users == 400
    replace_column(folder, "action", whole, pa.int8())
    assert PreparedDataset.load(tmp_path, "toy", ["action"]).events["action"].dtype == torch.int64


def test_ratings_and_columns_are_mixed_alike() -> None:
    torch.manual_seed(0)
    items = ItemEmbedding(9, 8)
    features = build_features("rated", 6, 3, 8, {"b": 4, "a": 2})
    batch = random_batch([3, 1, 4], 9)
    a, b = torch.arange(8) % 2, torch.arange(8) % 4
    tables = [features.rating_embedding.weight, *(e.weight for e in features.event_embeddings)]
    columns = [items.table[batch.item_ids_T], tables[0][batch.ratings_T.long()], tables[1][a], tables[2][b]]
    expected = torch.cat(columns, 1) @ features.mix.weight.T + features.mix.bias
    torch.testing.assert_close(features(dataclasses.replace(batch, events={"b": b, "a": a}), items), expected)
    assert features.mix.in_features == 8 + 3 * 3
    assert build_features("item", 6, 3, 8, {"a": 2}).rating_embedding is None
    assert not list(build_features("item", 6, 3, 8).parameters())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"action": 0}, "expected at least 1 value"),
        ({"a/b": 2}, "expected names of letters"),
        ({"ratings": 6}, "for ratings try train_fn.use_rated_input_preproc"),
    ],
)
def test_bindings_that_cannot_be(columns: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"train_fn\.event_columns: got .*{message}"):
        RetrievalConfig(event_columns=columns)


def test_the_run_is_named_after_its_columns() -> None:
    plan = Plan.of(load([CONFIG], [WITH]))
    assert "-evaction5" in plan.describe()
    assert plan.model_bindings()["train_fn.event_columns"] == {"action": 5}
    with pytest.raises(ConfigError, match=r"event_columns: got .*, expected {} with train_fn.input_features_preproc"):
        Plan.of(load([CONFIG], [WITH, "train_fn.input_features_preproc = 'interleaved'"]))
