"""Session tables that cannot be used are refused with the file, the row and the column."""

from pathlib import Path

import pyarrow as pa
import pytest

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin import prepare_merlin
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, TIME, USER
from tests.merlin_tables import ROWS, session_table, write_rows


def _lists(items: pa.Array, events: pa.Array | None = None) -> pa.Table:
    count = len(items)
    events = items if events is None else events
    return pa.table({ITEMS: items, EVENT_TYPES: events, USER: ["u"] * count, TIME: [1] * count})


_GOOD = session_table(ROWS["test"])
_INT_LISTS = pa.list_(pa.int64())
_FAULTS = {
    "column": (_GOOD.drop_columns([TIME]), "column 'timestamp_first' is missing, got the columns item_id_list_seq, "),
    "no rows": (_GOOD.slice(0, 0), "got no rows, expected one row a session"),
    "all short": (session_table([([9], [3], "a", 1), ([], [], "a", 1)]), "got no row of 2 events"),
    "empty lists": (_lists(pa.array([[], []], pa.list_(pa.null()))), "got no row of 2 events"),
    "lengths": (
        session_table([([9, 9], [3, 3], "a", 1), ([9], [3, 3], "a", 1)]),
        "row 2: got 1 values in item_id_list_seq and 2 in item_event_name_list_seq",
    ),
    "null list": (
        _lists(pa.array([[1, 2], None], _INT_LISTS)),
        "row 2, column item_id_list_seq: got null, expected a list",
    ),
    "null item": (
        _lists(pa.array([[1, 2], [], [1, None, 2]], _INT_LISTS)),
        "row 3, column item_id_list_seq: got a null in the list",
    ),
    "null event type": (
        _lists(pa.array([[1, 2]]), pa.array([[1, None]], _INT_LISTS)),
        "row 1, column item_event_name_list_seq: got a null in the list",
    ),
    "null session": (
        session_table([([9, 9], [3, 3], "a", 1), ([9, 9], [3, 3], None, 1)]),
        "row 2, column user_session: got an empty",
    ),
    "empty session": (
        session_table([([9, 9], [3, 3], "a", 1), ([9, 9], [3, 3], "", 1)]),
        "row 2, column user_session: got an empty text",
    ),
    "empty item": (_lists(pa.array([[], ["a"], ["a", ""]])), "row 3, column item_id_list_seq: got an empty text"),
    "float items": (
        _lists(pa.array([[1.0, 2.0]])),
        "column item_id_list_seq: got values of type double, expected lists of integers or of text",
    ),
    "no lists": (_lists(pa.array(["1,2"])), "column item_id_list_seq: got type string, expected lists"),
    "float session": (session_table([([9, 9], [3, 3], 0.5, 1)]), "column user_session: got values of type double"),
    "large item": (_lists(pa.array([[2**63, 1]], pa.list_(pa.uint64()))), "got an integer beyond 64 bits"),
    "text items": (
        _lists(pa.array([["9", "30"]]), pa.array([[3, 3]])),
        "column item_id_list_seq: got text, expected integers as in ",
    ),
    "null time": (
        session_table([([9, 9], [3, 3], "a", None), ([9, 9], [3, 3], "a", 1)]),
        "row 1, column timestamp_first: got an empty",
    ),
    "float time": (_GOOD.set_column(3, TIME, [[0.5, 1.0]]), "column timestamp_first: got type double, expected int"),
    "large time": (
        session_table([([9, 9], [3, 3], "a", 1), ([9, 9], [3, 3], "a", 2**62)]),
        "row 2, column timestamp_first: got 4611686018427387904",
    ),
    "large negative time": (
        session_table([([9, 9], [3, 3], "a", -(2**63))]),
        "row 1, column timestamp_first: got -9223372036854775808",
    ),
    "large unsigned time": (
        _GOOD.set_column(3, TIME, pa.array([1, 2**64 - 1], pa.uint64())),
        "row 2, column timestamp_first: got 18446744073709551615",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_faults_are_named_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    table, message = _FAULTS[fault]
    raw = write_rows(tmp_path / "raw", test=table)
    with pytest.raises(DataError) as caught:
        prepare_merlin(raw, tmp_path / "out")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{raw}/test.parquet")
    assert not (tmp_path / "out").exists()


def test_files_that_are_absent_or_damaged(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "merlin")
    with pytest.raises(DataError, match=r"no-such: no such folder, expected one with train\.parquet, valid"):
        prepare_merlin(tmp_path / "no-such", tmp_path / "out")
    (folder / "old").mkdir()
    (folder / "test.parquet").rename(folder / "old" / "test.parquet")
    with pytest.raises(DataError, match=r"merlin: got no test\.parquet, expected train.parquet, valid"):
        prepare_merlin(folder, tmp_path / "out")
    (folder / "test.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(DataError, match=r"test\.parquet: not a readable Parquet file"):
        prepare_merlin(folder, tmp_path / "out")
    (folder / "test.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"test\.parquet: got an empty file"):
        prepare_merlin(folder, tmp_path / "out")
