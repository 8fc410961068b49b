"""Recommendations from a trained checkpoint: what is left out, and where they may be written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from generative_recommenders.config import load
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import runtime
from generative_recommenders.serving.histories import Histories
from generative_recommenders.serving.recommender import Recommender, check_output, write_recommendations
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.retrieval import RetrievalExperiment
from generative_recommenders.training.runs import find_checkpoint
from tests.toy import NUM_ITEMS, raw_id, write_toy_dataset

WINDOW = 4
BINDINGS = (
    "train_fn.dataset_name = 'toy'",
    "train_fn.num_epochs = 1",
    f"train_fn.max_sequence_length = {WINDOW}",
    "train_fn.item_embedding_dim = 16",
    "train_fn.filter_history = False",
    "hstu_encoder.dqk = 8",
    "hstu_encoder.dv = 8",
)
# Of the first user, twelve events; the model sees the last four. The second has seen one item twice.
LONG = [raw_id(3 * n) for n in range(1, 13)]
SHORT = [raw_id(60), raw_id(63), raw_id(60)]
HISTORIES = Histories(["long", "short"], [LONG, SHORT], [None, None], [None, None])


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """Trained with `filter_history = False`."""
    folder = tmp_path_factory.mktemp("recommender")
    write_toy_dataset(folder)
    with runtime("cpu") as here:
        config = load(["configs/ml-100k/hstu-demo.gin"], BINDINGS)
        _, run = RetrievalExperiment(config, Places(folder, folder / "exps"), here).train()
    return Recommender.from_checkpoint(find_checkpoint(run))


def items_of(table: pd.DataFrame, user: str) -> set[str]:
    return set(table.loc[table["user_id"] == user, "item_id"])


def test_the_whole_history_is_left_out(recommender: Recommender) -> None:
    table = recommender.recommend(HISTORIES, NUM_ITEMS, filter_history=True)
    catalog = set(recommender.catalog.raw_ids)
    assert items_of(table, "long") == catalog - set(LONG)
    assert items_of(table, "short") == catalog - set(SHORT)


def test_the_model_sees_the_window_only(recommender: Recommender) -> None:
    window = dataclasses.replace(HISTORIES, raw_item_ids=[LONG[-WINDOW:], SHORT])
    whole, short = (recommender.recommend(h, NUM_ITEMS, filter_history=False) for h in (HISTORIES, window))
    pd.testing.assert_frame_equal(whole, short)


def test_filters_as_trained_unless_told_otherwise(recommender: Recommender) -> None:
    assert not recommender.filter_history
    assert set(LONG) < items_of(recommender.recommend(HISTORIES, NUM_ITEMS), "long")
    filtering = dataclasses.replace(recommender, filter_history=True)
    assert not set(LONG) & items_of(filtering.recommend(HISTORIES, NUM_ITEMS), "long")
    assert set(LONG) < items_of(filtering.recommend(HISTORIES, NUM_ITEMS, filter_history=False), "long")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file.csv/top.csv", r"cannot write .*file\.csv/top\.csv: .*file\.csv is no folder"),
        ("nowhere/top.csv", "nowhere is no folder"),
        ("folder.csv", "it is a folder"),
        ("top.xlsx", "expected a name that ends in"),
        ("top", "expected a name that ends in"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=f"--output: .*{message}"):
        check_output(tmp_path / name)
    with pytest.raises(DataError, match=f"--output: .*{message}"):
        write_recommendations(pd.DataFrame({"item_id": ["a"]}), tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_lost_while_writing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent was a folder when it was checked and is a file when it is written to."""
    monkeypatch.setattr("generative_recommenders.serving.recommender.check_output", lambda path: None)
    (tmp_path / "file.csv").write_text("mine")
    with pytest.raises(DataError, match="--output: cannot write"):
        write_recommendations(pd.DataFrame({"item_id": ["a"]}), tmp_path / "file.csv" / "top.csv")


@pytest.mark.parametrize("name", ["top.csv", "top.parquet", "top.json", "top.jsonl"])
def test_a_good_output_passes(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name)
    write_recommendations(pd.DataFrame({"item_id": ["a"]}), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
