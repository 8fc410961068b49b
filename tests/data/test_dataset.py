"""Prepared data that is not as it should be: one line that names file and column."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from tests.toy import write_toy_dataset


@pytest.mark.parametrize(
    ("file", "column"),
    [
        ("items.parquet", "item_id"),
        ("items.parquet", "raw_id"),
        ("sequences.parquet", "user_id"),
        ("sequences.parquet", "item_ids"),
        ("sequences.parquet", "ratings"),
        ("sequences.parquet", "timestamps"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, file: str, column: str) -> None:
    path = write_toy_dataset(tmp_path) / file
    pq.write_table(pq.read_table(path).drop_columns(column), path)
    with pytest.raises(DataError, match=rf"{file}: column {column} is missing, got"):
        PreparedDataset.load(tmp_path, "toy")


@pytest.mark.parametrize("file", ["items.parquet", "sequences.parquet", "dataset.json"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    path = write_toy_dataset(tmp_path) / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{file}: cannot be read: .*; try preparing the dataset again") as error:
        PreparedDataset.load(tmp_path, "toy")
    assert "\n" not in str(error.value)


def test_numbers_in_place_of_lists_are_refused(tmp_path: Path) -> None:
    path = write_toy_dataset(tmp_path) / "sequences.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("ratings")
    pq.write_table(table.set_column(place, "ratings", pa.array([1.0] * table.num_rows)), path)
    with pytest.raises(DataError, match=r"sequences\.parquet, column ratings: got type double, expected lists"):
        PreparedDataset.load(tmp_path, "toy")


def test_titles_may_be_missing(tmp_path: Path) -> None:
    path = write_toy_dataset(tmp_path) / "items.parquet"
    pq.write_table(pq.read_table(path).drop_columns("title"), path)
    catalog = PreparedDataset.load(tmp_path, "toy").catalog
    assert catalog.titles == [None] * len(catalog)
