"""Merlin session tables to prepared data: numbering, prefixes, files, and what happens when it is interrupted."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin import Sequences, prepare_merlin
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, SPLITS, TIME, USER, write_tables
from tests.merlin_tables import ROOT, ROWS, Row, run_python, sequences_of, session_table, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "merlin")


def test_small_tables_by_hand(folder: Path) -> None:
    """Items 7, 9, 30, 100 are 1 to 4, event types 3 and 4 are 0 and 1, sessions a to d are 0 to 3."""
    raw = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = prepare_merlin(folder, folder, command="the command")
    assert sequences_of(folder, "train") == [
        {"user_id": 1, "item_ids": [3, 2, 3], "ratings": [1.0, 0.0, 0.0], "timestamps": [100, 101, 102]},
        {"user_id": 0, "item_ids": [4, 2], "ratings": [0.0, 1.0], "timestamps": [60, 61]},
    ]
    assert sequences_of(folder, "valid") == [
        {
            "user_id": 2,
            "item_ids": [2, 4, 3, 2],
            "ratings": [0.0, 0.0, 1.0, 1.0],
            "timestamps": [200, 201, 202, 203],
        }
    ]
    assert sequences_of(folder, "test") == [
        {"user_id": 1, "item_ids": [4, 1], "ratings": [0.0, 0.0], "timestamps": [300, 301]},
        {"user_id": 3, "item_ids": [2, 3], "ratings": [1.0, 1.0], "timestamps": [290, 291]},
    ]
    assert pq.read_table(folder / "items.parquet").to_pydict() == {
        "item_id": [1, 2, 3, 4],
        "raw_id": ["7", "9", "30", "100"],
    }
    assert (folder / "sasrec_format_test.csv").read_text() == (
        "index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps\n"
        '0,1,"3,0","0,0","300,301"\n'
        '1,3,"1,2","1,1","290,291"\n'
    )
    assert done.written
    metadata = json.loads((folder / "dataset.json").read_text())
    assert metadata == done.metadata
    checksums = metadata.pop("checksum")
    assert sorted(checksums) == ["test.parquet", "train.parquet", "valid.parquet"]
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", checksum) for checksum in checksums.values())
    assert metadata.pop("splits")["test"] == {
        "rows": 2,
        "short_rows_dropped": 0,
        "sequences": 2,
        "users": 2,
        "events": 4,
        "items": 4,
        "items_unseen_in_train": 1,
        "sequences_ending_in_unseen_item": 1,
        "event_types_unseen_in_train": [],
    }
    assert metadata == {
        "name": "merlin",
        "version": 1,
        "source": "merlin",
        "options": {"expand_sequences_to_prefixes": False},
        "max_item_id": 4,
        "split": "explicit",
        "command": "the command",
        "counts": {
            "users": 4,
            "sequences": 5,
            "items_listed": 4,
            "items_rated": 4,
            "events": 13,
            "short_rows_dropped": 1,
            "items_unseen_in_train": 1,
        },
        "num_event_types": 2,
        "event_types": ["3", "4"],
    }
    assert {name: (folder / name).read_bytes() for name in raw} == raw
    assert {path.name for path in folder.iterdir()} - raw.keys() == {
        "dataset.json",
        "items.parquet",
        *(f"sequences_{split}.parquet" for split in SPLITS),
        *(f"sasrec_format_{split}.csv" for split in SPLITS),
    }


def test_types_on_disk(folder: Path) -> None:
    prepare_merlin(folder, folder)
    for split in SPLITS:
        schema = pq.read_schema(folder / f"sequences_{split}.parquet")
        assert [str(schema.field(name).type) for name in schema.names[:1]] == ["int64"]
        assert [str(schema.field(name).type.value_type) for name in schema.names[1:]] == ["int64", "float", "int64"]
    assert str(pq.read_schema(folder / "items.parquet").field("item_id").type) == "int64"


def test_text_is_sorted_by_code_point_and_other_arrow_types_are_read(tmp_path: Path) -> None:
    names = pa.array([["view", "Buy"], ["view", "view"]]).cast(pa.large_list(pa.dictionary(pa.int32(), pa.string())))
    table = pa.table(
        {
            ITEMS: pa.array([["9", "10"], ["é", "10"]], pa.list_(pa.string(), 2)),
            EVENT_TYPES: names,
            USER: pa.array([5, 4], pa.uint16()),
            TIME: pa.array([1, 2], pa.int32()),
            "more": [0, 0],
        }
    )
    folder = write_rows(tmp_path, train=table, valid=table, test=table)
    done = prepare_merlin(folder, folder)
    assert pq.read_table(folder / "items.parquet")["raw_id"].to_pylist() == ["10", "9", "é"]
    assert done.metadata["event_types"] == ["Buy", "view"]
    assert [(row["user_id"], row["item_ids"], row["ratings"]) for row in sequences_of(folder, "test")] == [
        (1, [2, 1], [1.0, 0.0]),
        (0, [3, 1], [1.0, 1.0]),
    ]


def _sessions(ids: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Sessions of the three splits: (item, event type) pairs, session, first time."""
    pairs = st.lists(st.tuples(ids, ids), max_size=5)
    split = st.lists(st.tuples(pairs, ids, st.integers(-(2**61), 2**61)), max_size=4)
    return st.tuples(split, split, split)


_INTEGERS = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))
_TEXTS = st.one_of(st.sampled_from(["10", "9", "a", "B"]), st.text(min_size=1, max_size=3))


@settings(max_examples=40, deadline=None)
@given(st.one_of(_sessions(_INTEGERS), _sessions(_TEXTS)))
def test_every_session_of_two_events_comes_back(
    splits: tuple[list[tuple[list[tuple[Any, Any]], Any, int]], ...],
) -> None:
    """Each split has one session more, so that none is empty."""
    rows: dict[str, list[Row]] = {}
    for split, sessions in zip(SPLITS, splits, strict=True):
        values = [value for other in splits for events, _, _ in other for pair in events for value in pair]
        values += [session for other in splits for _, session, _ in other]
        extra = values[0] if values else 1
        rows[split] = [
            *(([i for i, _ in events], [e for _, e in events], user, time) for events, user, time in sessions),
            ([extra, extra], [extra, extra], extra, 0),
        ]
    kind = pa.string() if isinstance(rows["train"][-1][2], str) else pa.int64()
    schema = pa.schema({ITEMS: pa.list_(kind), EVENT_TYPES: pa.list_(kind), USER: kind, TIME: pa.int64()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {split: list(zip(*rows[split], strict=True)) for split in SPLITS}
        write_tables(
            folder,
            {
                split: pa.table(
                    [pa.array(column, f.type) for column, f in zip(columns[split], schema, strict=True)], schema=schema
                )
                for split in SPLITS
            },
        )
        metadata = prepare_merlin(folder, folder, csv=False).metadata
        items = pq.read_table(folder / "items.parquet")["raw_id"].to_pylist()
        users = sorted({user for split in SPLITS for _, _, user, _ in rows[split]})
        assert items == [str(item) for item in sorted({i for split in SPLITS for row in rows[split] for i in row[0]})]
        for split in SPLITS:
            got = [
                (
                    [items[item - 1] for item in row["item_ids"]],
                    [metadata["event_types"][int(code)] for code in row["ratings"]],
                    users[row["user_id"]],
                    row["timestamps"],
                )
                for row in sequences_of(folder, split)
            ]
            assert got == [
                (list(map(str, ids)), list(map(str, types)), user, list(range(time, time + len(ids))))
                for ids, types, user, time in rows[split]
                if len(ids) >= 2
            ]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.integers(1, 30))
def test_prefixes_in_blocks_equal_a_loop(lengths: list[int], block_events: int) -> None:
    total = sum(lengths)
    sequences = Sequences(
        users=np.arange(len(lengths)),
        starts=np.cumsum(lengths) - np.array(lengths),
        lengths=np.array(lengths),
        first_timestamps=np.arange(len(lengths)) * 100,
        items=np.arange(1, total + 1),
        event_types=np.arange(total) % 3,
    )
    expected: list[dict[str, Any]] = []
    item = 1
    for user, length in enumerate(lengths):
        for stop in range(2, length + 1):
            places = range(stop)
            expected.append(
                {
                    "user_id": user,
                    "item_ids": [item + place for place in places],
                    "ratings": [float((item + place - 1) % 3) for place in places],
                    "timestamps": [user * 100 + place for place in places],
                }
            )
        item += length
    kept = sequences.at_least(2)
    if not len(kept.lengths):
        assert not expected
        return
    blocks = list(kept.prefixes().blocks(block_events))
    assert [row for block in blocks for row in block.to_pylist()] == expected
    assert all(block.num_rows for block in blocks)
    assert kept.prefixes().last_items.tolist() == [row["item_ids"][-1] for row in expected]


def test_prefixes_on_disk(folder: Path) -> None:
    done = prepare_merlin(folder, folder, expand_sequences_to_prefixes=True)
    assert [row["item_ids"] for row in sequences_of(folder, "train")] == [[3, 2], [3, 2, 3], [4, 2]]
    assert [row["item_ids"] for row in sequences_of(folder, "valid")] == [[2, 4], [2, 4, 3], [2, 4, 3, 2]]
    assert done.metadata["counts"]["sequences"] == 8
    assert done.metadata["splits"]["train"]["events"] == 7
    lines = (folder / "sasrec_format_train.csv").read_text().splitlines()
    assert lines[1:] == ['0,1,"2,1","1,0","100,101"', '1,1,"2,1,2","1,0,0","100,101,102"', '2,0,"3,1","0,1","60,61"']


def test_csv_written_in_blocks_is_one_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_merlin(folder, folder)
    whole = {path.name: path.read_text() for path in folder.glob("*.csv")}
    rows = {split: sequences_of(folder, split) for split in SPLITS}
    small = Sequences.blocks
    monkeypatch.setattr(Sequences, "blocks", lambda self: small(self, 2))
    prepare_merlin(folder, folder, force=True)
    assert {path.name: path.read_text() for path in folder.glob("*.csv")} == whole
    assert {split: sequences_of(folder, split) for split in SPLITS} == rows


def test_prepared_data_is_left_alone_until_something_changes(folder: Path) -> None:
    assert prepare_merlin(folder, folder, csv=False).written
    assert not list(folder.glob("*.csv"))
    assert not prepare_merlin(folder, folder, csv=False).written
    assert prepare_merlin(folder, folder).written
    assert not prepare_merlin(folder, folder).written
    assert not prepare_merlin(folder, folder, csv=False).written
    assert prepare_merlin(folder, folder, force=True).written
    assert prepare_merlin(folder, folder, csv=False, expand_sequences_to_prefixes=True).written
    assert not list(folder.glob("*.csv")), "CSVs of other options must not stay"
    (folder / "items.parquet").unlink()
    assert prepare_merlin(folder, folder, csv=False, expand_sequences_to_prefixes=True).written
    write_rows(folder, test=session_table([*ROWS["test"], ([7, 7], [3, 3], "e", 1)]))
    assert prepare_merlin(folder, folder, csv=False, expand_sequences_to_prefixes=True).written


def test_tables_in_another_folder_or_an_archive(folder: Path, tmp_path: Path) -> None:
    expected = [prepare_merlin(folder, folder).metadata["checksum"], sequences_of(folder, "test")]
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for split in SPLITS:
            archive.write(folder / f"{split}.parquet", f"export/{split}.parquet")
    for raw in (folder, tmp_path / "export.zip"):
        out = tmp_path / f"out-{raw.stem}"
        done = prepare_merlin(raw, out)
        assert [done.metadata["checksum"], sequences_of(out, "test")] == expected
        assert done.metadata["name"] == out.name
        assert done.metadata["source"] == raw.name
        assert not (out / "train.parquet").exists()


_KILL = """
import os, signal, sys
from pathlib import Path
from generative_recommenders.data.merlin import prepare_merlin
replace, calls = os.replace, []
def stop_at(source, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = stop_at
prepare_merlin(Path(sys.argv[1]), Path(sys.argv[1]), force=True, expand_sequences_to_prefixes=True)
"""


@pytest.mark.parametrize("call", [1, 4, 8])
def test_killed_between_two_files(folder: Path, tmp_path: Path, call: int) -> None:
    """Nothing vouches for the mixture, and the next call completes it. The eighth file is dataset.json."""
    prepare_merlin(folder, folder)
    command = [sys.executable, "-c", _KILL, str(folder), str(call)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not (folder / "dataset.json").exists()
    assert prepare_merlin(folder, folder, expand_sequences_to_prefixes=True).written
    fresh = tmp_path / "fresh"
    prepare_merlin(folder, fresh, expand_sequences_to_prefixes=True)
    for path in fresh.iterdir():
        if path.name != "dataset.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(path.name for path in fresh.iterdir()), *(f"{split}.parquet" for split in SPLITS)]
    )


def test_a_failure_before_the_files_move_leaves_the_old_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_merlin(folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("generative_recommenders.data.merlin.pq.write_table", fail)
    with pytest.raises(DataError, match=r"cannot write \(No space left on device"):
        prepare_merlin(folder, folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_kind_of_dataset_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "ml-1m"
    out.mkdir()
    (out / "dataset.json").write_text('{"split": "leave_one_out"}')
    with pytest.raises(DataError, match="ml-1m: got a dataset with split 'leave_one_out' there"):
        prepare_merlin(folder, out, force=True)
    (out / "dataset.json").write_text("damaged")
    assert prepare_merlin(folder, out).written


def test_event_types_that_train_lacks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_rows(tmp_path, valid=session_table([([9, 9, 9], [3, 8, 5], "c", 1)]))
    with caplog.at_level(logging.WARNING):
        done = prepare_merlin(folder, folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/valid.parquet: event types '5', '8' occur in valid and not in train; nothing trains their embeddings"
    ]
    assert done.metadata["event_types"] == ["3", "4", "5", "8"]
    assert done.metadata["splits"]["valid"]["event_types_unseen_in_train"] == ["5", "8"]
    assert done.metadata["splits"]["test"]["event_types_unseen_in_train"] == []
    assert sequences_of(folder, "valid")[0]["ratings"] == [0.0, 3.0, 2.0]


def test_an_item_of_a_dropped_row_is_listed_and_not_rated(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, train=session_table([*ROWS["train"], ([8], [3], "z", 1)]))
    counts = prepare_merlin(folder, folder).metadata["counts"]
    assert (counts["items_listed"], counts["items_rated"], counts["short_rows_dropped"]) == (5, 4, 2)


def test_command_line(folder: Path, tmp_path: Path) -> None:
    data_dir = f"--data_dir={tmp_path}"
    done = run_python("preprocess_merlin_data.py", data_dir, "--expand_sequences_to_prefixes", "--no_csv")
    assert done.returncode == 0, done.stderr
    assert re.sub(r"[0-9.]+ s$", "", done.stdout.strip()) == (
        f"{folder}: sequences train 3, valid 3, test 2; 20 events of 2 types; 4 items, 1 of them unseen in train; "
        "1 rows of fewer than 2 events dropped; "
    )
    assert not list(folder.glob("*.csv"))
    assert "--no_csv" in json.loads((folder / "dataset.json").read_text())["command"]
    again = run_python("preprocess_merlin_data.py", data_dir, "--name=other", f"--raw={folder}")
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "other").glob("*.csv"))) == 3
    failed = run_python("preprocess_merlin_data.py", data_dir, "--name=absent")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+/absent: no such folder, .*--raw\n", failed.stderr)
    for name in ("../x", "..", ""):
        refused = run_python("preprocess_merlin_data.py", data_dir, f"--name={name}")
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: --name: got ")
