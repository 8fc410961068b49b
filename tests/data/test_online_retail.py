"""Invoices to session tables: the split by time, and the counts of the real table."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import online_retail
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin import prepare_merlin
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, SPLITS, TIME, USER
from tests.merlin_tables import run_python


def _invoices(path: Path, rows: Sequence[tuple[str, int, int]]) -> Path:
    """Invoices of (number, time, lines); line i of an invoice is item i."""
    numbers, times, lines = zip(*rows, strict=True)
    pq.write_table(
        pa.table(
            {
                "session_id": pa.array(numbers, pa.large_string()),
                "timestamp": times,
                "item_id_list": [list(range(1, count + 1)) for count in lines],
                "event_type_list": [[1] * count for count in lines],
            }
        ),
        path,
    )
    return path


def test_invoices_go_by_time_and_equal_times_stay_together(tmp_path: Path) -> None:
    rows = [("late", 90, 4), ("lone", 5, 1), *((f"s{i}", min(i, 7), 2) for i in range(8)), ("x", 7, 3), ("y", 80, 2)]
    tables = online_retail.convert(_invoices(tmp_path / "sessions.parquet", rows))
    # Of 11 sessions the 9th and the 10th begin valid and test; the 9th shares its time with the 8th.
    assert [tables[split][USER].to_pylist() for split in SPLITS] == [
        [f"s{i}" for i in range(7)],
        ["s7", "x"],
        ["y", "late"],
    ]
    assert tables["train"].column_names == [ITEMS, EVENT_TYPES, USER, TIME]
    assert online_retail.with_unseen_items(tables) == {"valid": 1, "test": 1}


def test_invoices_that_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "sessions.parquet"
    for rows in ([("a", 1, 1)], [(str(i), 3, 2) for i in range(20)], [("a", 1, 2), ("b", 2, 2)]):
        with pytest.raises(DataError, match="distinct times, expected enough for train, valid, test"):
            online_retail.convert(_invoices(path, rows))
    pq.write_table(pq.read_table(path).drop_columns(["timestamp"]), path)
    with pytest.raises(DataError, match="column 'timestamp' is missing, got the columns session_id, "):
        online_retail.convert(path)
    with pytest.raises(DataError, match="no-such: cannot be read"):
        online_retail.convert(tmp_path / "no-such")


def test_online_retail(shared_dir: Path, tmp_path: Path) -> None:
    raw = shared_dir / "data" / "online-retail" / "sessions.parquet"
    if not raw.is_file():
        pytest.skip(f"{raw} is absent")
    out = tmp_path / "merlin"
    done = run_python("-m", "generative_recommenders.data.online_retail", f"--raw={raw}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{out}: sessions train 29,820, valid 3,728, test 3,728; "
        "sessions with an item that train lacks: valid 1,691, test 2,380\n"
    )
    metadata = prepare_merlin(out, out, csv=False).metadata
    assert metadata["counts"] == {
        "users": 37_276,
        "sequences": 37_276,
        "items_listed": 4_625,
        "items_rated": 4_625,
        "events": 799_285,
        "short_rows_dropped": 0,
        "items_unseen_in_train": 220,
    }
    assert metadata["event_types"] == ["1", "2"]
    assert [metadata["splits"][split]["events"] for split in SPLITS] == [620_416, 88_986, 89_883]
    assert [metadata["splits"][split]["sequences_ending_in_unseen_item"] for split in SPLITS] == [0, 240, 384]
    times = [pq.read_table(out / f"{split}.parquet")[TIME].to_numpy() for split in SPLITS]
    assert times[0].max() < times[1].min() and times[1].max() < times[2].min()
