"""The public code's CSV is written by `--csv` and read back by the custom source."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import sources
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import prepare

HEADER = "index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps\n"


def test_written_and_read_back(tmp_path: Path) -> None:
    source = sources.get("synthetic").with_options(synthetic_users=50, synthetic_items=120)
    first = prepare(source, data_dir=tmp_path, csv=True).path
    again = prepare(sources.get("custom"), raw=first / "sasrec_format.csv", data_dir=tmp_path, name="again").path
    one, other = (pq.read_table(folder / "sequences.parquet").to_pydict() for folder in (first, again))
    raw_id = dict(
        zip(*(pq.read_table(again / "items.parquet")[c].to_pylist() for c in ("item_id", "raw_id")), strict=True)
    )
    assert [[int(raw_id[i]) for i in items] for items in other["item_ids"]] == one["item_ids"]
    assert other["timestamps"] == one["timestamps"]
    assert other["ratings"] == one["ratings"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('1,7,"3,4,5","5,4","10,20,30"', r"row 2: got 3 values in sequence_item_ids and 2 in sequence_ratings"),
        ('1,7,"3,,5","5,4,1","10,20,30"', r"row 2, column sequence_item_ids: got an empty id"),
        ('1,7,"3,4,5","5,x,1","10,20,30"', r"row 2, column sequence_ratings: got 'x'"),
        ('1,7,"3,4,5","5,4,1","10,20,later"', r"row 2, column sequence_timestamps: got 'later'"),
        ('1,7,"3,4,5","5,4,1",', r"row 2, column sequence_timestamps: got an empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "sasrec_format.csv"
    path.write_text(HEADER + '0,6,"3,4,5","5,4,1","10,20,30"\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        prepare(sources.get("custom"), raw=path, data_dir=tmp_path)
    assert not (tmp_path / "custom").exists()
