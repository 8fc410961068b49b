"""Histories in raw ids: what a cell may hold, and the row named where it may not."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from generative_recommenders.data.errors import DataError
from generative_recommenders.serving.histories import read_histories


@pytest.mark.parametrize(
    "stamp", ["1e30", "-1e30", "9" * 26, str(2**62), str(-(2**62)), "inf", "nan", "noon", "9" * 5000]
)
@pytest.mark.parametrize("column", ["timestamps", "request_timestamp"])
def test_a_time_out_of_range_names_the_row(tmp_path: Path, column: str, stamp: str) -> None:
    path = tmp_path / "histories.csv"
    path.write_text(f"item_ids,{column}\na,5\nb,{stamp}\n")
    with pytest.raises(DataError, match=rf"histories\.csv: row 2, {column}: got .*, expected seconds") as error:
        read_histories(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_times_in_range_are_exact(tmp_path: Path) -> None:
    path, largest = tmp_path / "histories.parquet", 2**62 - 1
    lists = {"item_ids": [["a", "b"]], "timestamps": [[-largest, largest]], "request_timestamp": [largest]}
    pd.DataFrame(lists).to_parquet(path)
    histories = read_histories(path)
    assert histories.timestamps == [[-largest, largest]]
    assert histories.request_timestamps == [largest]


def test_a_list_without_quotes_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "histories.csv"
    path.write_text("item_ids\n1,2,3\n4,5,6\n")
    with pytest.raises(DataError, match=r"histories\.csv, (row 1|line 2): got 3 .*expected 1"):
        read_histories(path)
    path.write_text('item_ids\n"1,2,3"\n\n4\n')
    assert read_histories(path).raw_item_ids == [["1", "2", "3"], ["4"]]
