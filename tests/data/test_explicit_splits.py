"""Prepared data whose splits are files: which rows are whose, what trains, and what is said of a faulty file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin import prepare_merlin
from generative_recommenders.retrieval.assemble import Splits, training_counts
from generative_recommenders.retrieval.config import RetrievalConfig
from tests.merlin_tables import sequences_of, write_rows
from tests.toy import write_toy_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`merlin_tables.ROWS` prepared: two train rows (one is too short), one of valid and two of test."""
    return prepare_merlin(write_rows(tmp_path / "raw"), tmp_path / "merlin").path


def splits_of(dataset: PreparedDataset, eval_split: str = "test") -> Splits:
    return Splits.of(RetrievalConfig(max_sequence_length=3, eval_split=eval_split), dataset)  # type: ignore[arg-type]


def test_rows_lie_end_to_end_and_each_split_has_its_own(folder: Path) -> None:
    dataset = PreparedDataset.load(folder.parent, "merlin")
    rows = {split: sequences_of(folder, split) for split in ("train", "valid", "test")}
    assert dataset.explicit
    assert dataset.split_rows == {"train": (0, 2), "valid": (2, 3), "test": (3, 5)}
    assert dataset.item_ids_E.tolist() == [i for split in rows.values() for row in split for i in row["item_ids"]]
    assert dataset.user_ids_U.tolist() == [row["user_id"] for split in rows.values() for row in split]


@pytest.mark.parametrize("eval_split", ["test", "valid"])
def test_every_split_predicts_the_last_event_of_its_own_rows(folder: Path, eval_split: str) -> None:
    splits = splits_of(PreparedDataset.load(folder.parent, "merlin"), eval_split)
    for name in ("train", "valid", "test"):
        rows, split = sequences_of(folder, name), splits.named(name)
        assert (len(split), split.num_skipped, split.num_rows) == (len(rows), 0, len(rows))
        members = torch.arange(len(split))
        batch = split.batch(members, members)
        assert batch.target_ids_B.tolist() == [row["item_ids"][-1] for row in rows]
        assert batch.target_ratings_B.tolist() == [row["ratings"][-1] for row in rows]
        assert batch.item_ids_T.tolist() == [i for row in rows for i in row["item_ids"][-4:-1]]
        assert batch.user_ids_B.tolist() == [row["user_id"] for row in rows]


def test_only_train_rows_are_counted(folder: Path) -> None:
    dataset = PreparedDataset.load(folder.parent, "merlin")
    counts = training_counts(dataset, splits_of(dataset).train.ignore_last_n)
    expected = torch.zeros(len(dataset.catalog), dtype=torch.int64)
    for row in sequences_of(folder, "train"):
        for item in row["item_ids"]:
            expected[item - 1] += 1
    assert counts.tolist() == expected.tolist()
    assert 0 in counts.tolist()


def test_leave_one_out_data_has_no_split_rows(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path)
    dataset = PreparedDataset.load(tmp_path, "toy")
    assert not dataset.explicit
    splits = splits_of(dataset, "valid")
    assert [splits.named(name).ignore_last_n for name in ("train", "valid", "test")] == [2, 1, 0]
    assert splits.test.num_rows == dataset.num_users


def test_an_unknown_item_is_placed_in_its_file(folder: Path) -> None:
    path = folder / "sequences_test.parquet"
    table = pq.read_table(path)
    rows = table.column("item_ids").to_pylist()
    rows[1][0] = 99
    place = table.column_names.index("item_ids")
    pq.write_table(table.set_column(place, "item_ids", pa.array(rows, pa.list_(pa.int64()))), path)
    with pytest.raises(DataError, match=r"sequences_test\.parquet row 1 holds item 99"):
        PreparedDataset.load(folder.parent, "merlin")


def test_a_missing_split_is_named_with_the_command_that_makes_it(folder: Path) -> None:
    (folder / "sequences_valid.parquet").unlink()
    with pytest.raises(DataError, match=r"sequences_valid\.parquet not found, .*preprocess_merlin_data\.py"):
        PreparedDataset.load(folder.parent, "merlin")


def test_unprepared_sessions_name_the_script_for_sessions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset 'merlin': .* not found, .*preprocess_merlin_data\.py --name=merlin"):
        PreparedDataset.load(tmp_path, "merlin")


def test_the_fingerprint_covers_every_split(folder: Path) -> None:
    before = PreparedDataset.load(folder.parent, "merlin").fingerprint
    path = folder / "sequences_test.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 1), path)
    assert PreparedDataset.load(folder.parent, "merlin").fingerprint != before


def test_the_fingerprint_is_of_events_users_and_splits(folder: Path) -> None:
    dataset = PreparedDataset.load(folder.parent, "merlin")
    others = [
        replace(dataset, split_rows={"train": (0, 1), "valid": (1, 3), "test": (3, 5)}),
        replace(dataset, user_ids_U=dataset.user_ids_U.flip(0)),
        replace(dataset, ratings_E=dataset.ratings_E + 0.5),
        replace(dataset, timestamps_E=dataset.timestamps_E + 1),
        replace(dataset, item_ids_E=dataset.item_ids_E.flip(0)),
    ]
    assert len({d.fingerprint for d in (dataset, *others)}) == 6
