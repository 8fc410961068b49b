"""Grouping, ordering, what is written, and what happens when it is interrupted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generative_recommenders.data import sources
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder
from generative_recommenders.data.preprocess import prepare, sequences_table, user_order
from generative_recommenders.data.sources import RawEvents

ROOT = Path(__file__).resolve().parents[2]

_EVENTS = "user_id,item_id,timestamp,rating\n1,5,3,1\n1,6,2,2\n1,7,2,3\n2,7,1,5\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "events.csv"
    path.write_text(_EVENTS)
    return path


def _small_synthetic(seed: int = 0) -> sources.Source:
    return sources.get("synthetic").with_options(synthetic_users=20, synthetic_items=100, synthetic_seed=seed)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3)),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([1, 2**40]),
)
def test_sequences_equal_a_loop_over_the_rows(rows: list[tuple[int, int, int]], spread: int) -> None:
    """Small ranges give many ties in time; the large spread takes the two-key sort."""
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    expected: dict[int, list[tuple[int, int, float]]] = {}
    for place, (user, item, time) in enumerate(rows):
        expected.setdefault(user * spread, []).append((time * spread, item, float(place)))
    events = RawEvents(
        user_ids=users * spread,
        item_ids=items,
        ratings=np.arange(len(rows), dtype=np.float32),
        timestamps=times * spread,
        items=pa.table({"item_id": np.arange(1, 10)}),
    )
    table = sequences_table(events)
    assert table["user_id"].to_pylist() == sorted(expected)
    for row in table.to_pylist():
        wanted = sorted(expected[row["user_id"]], key=lambda event: event[0])
        assert list(zip(row["timestamps"], row["item_ids"], row["ratings"], strict=True)) == wanted


@given(st.lists(st.tuples(st.integers(-(2**62), 2**62), st.integers(-(2**62), 2**62)), min_size=1, max_size=20))
def test_order_of_any_int64(rows: list[tuple[int, int]]) -> None:
    users, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    assert user_order(users, times).tolist() == sorted(range(len(rows)), key=lambda i: rows[i])


def test_files_types_and_metadata(raw: Path, tmp_path: Path) -> None:
    done = prepare(sources.get("custom"), raw=raw, data_dir=tmp_path, command="the command")
    schema = pq.read_schema(done.path / "sequences.parquet")
    assert [(name, str(schema.field(name).type.value_type)) for name in ("item_ids", "ratings", "timestamps")] == [
        ("item_ids", "int64"),
        ("ratings", "float"),
        ("timestamps", "int64"),
    ]
    assert str(schema.field("user_id").type) == "int64"
    metadata = json.loads((done.path / "dataset.json").read_text())
    assert metadata == done.metadata
    assert metadata["name"] == "custom"
    assert metadata["source"] == "events.csv"
    assert metadata["checksum"].keys() == {"events.csv"}
    assert metadata["checksum"]["events.csv"].startswith("sha256:")
    assert metadata["split"] == "leave_one_out"
    assert metadata["command"] == "the command"
    assert metadata["max_item_id"] == 3
    assert metadata["counts"] == {
        "users": 2,
        "items_listed": 3,
        "items_rated": 3,
        "events": 4,
        "users_with_fewer_than_3_events": 1,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["custom", "events.csv"]


def test_prepared_data_is_left_alone_until_something_changes(raw: Path, tmp_path: Path) -> None:
    custom = sources.get("custom")
    assert prepare(custom, raw=raw, data_dir=tmp_path).written
    assert not prepare(custom, raw=raw, data_dir=tmp_path).written
    assert prepare(custom, raw=raw, data_dir=tmp_path, csv=True).written
    assert not prepare(custom, raw=raw, data_dir=tmp_path, csv=True).written
    assert prepare(custom, raw=raw, data_dir=tmp_path, force=True).written
    assert prepare(custom.with_options(string_ids=True), raw=raw, data_dir=tmp_path).written
    raw.write_text(_EVENTS + "2,5,9,1\n")
    assert prepare(custom.with_options(string_ids=True), raw=raw, data_dir=tmp_path).written
    (tmp_path / "custom" / "items.parquet").unlink()
    assert prepare(custom.with_options(string_ids=True), raw=raw, data_dir=tmp_path).written


def test_a_changed_item_table_prepares_again(raw: Path, tmp_path: Path) -> None:
    table = tmp_path / "items.csv"
    table.write_text("item_id,title\n5,Five\n")
    source = sources.get("custom").with_options(items=table)
    assert prepare(source, raw=raw, data_dir=tmp_path).written
    assert not prepare(source, raw=raw, data_dir=tmp_path).written
    table.write_text("item_id,title\n5,Fünf\n")
    assert prepare(source, raw=raw, data_dir=tmp_path).written


def test_another_name_is_another_dataset(raw: Path, tmp_path: Path) -> None:
    done = prepare(sources.get("custom"), raw=raw, data_dir=tmp_path, name="shop")
    assert done.path == tmp_path / "shop"
    assert done.metadata["name"] == "shop"
    with pytest.raises(DataError, match="plain folder name"):
        prepare(sources.get("custom"), raw=raw, data_dir=tmp_path, name="../shop")


def test_a_failing_write_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with whole_folder(folder) as partial:
        (partial / "a").write_text("old")

    def fail_half_way() -> None:
        with whole_folder(folder) as partial:
            (partial / "a").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert (folder / "a").read_text() == "old"
    with whole_folder(folder) as partial:
        (partial / "a").write_text("new")
    assert (folder / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failing_second_rename_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the two names cannot be exchanged at once."""
    monkeypatch.setattr("generative_recommenders.data.folders._exchange", lambda first, second: False)
    folder = tmp_path / "data"
    for content in ("one", "two"):
        with whole_folder(folder) as partial:
            (partial / "a").write_text(content)
        assert (folder / "a").read_text() == content
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if "partial" in self.name and not self.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DataError, match="Input/output error"), whole_folder(folder) as partial:
        (partial / "a").write_text("three")
    assert (folder / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupt_between_the_two_renames_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generative_recommenders.data.folders._exchange", lambda first, second: False)
    folder = tmp_path / "data"
    with whole_folder(folder) as partial:
        (partial / "a").write_text("one")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if target.name.endswith("-old"):
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:
        (partial / "a").write_text("two")
    assert (folder / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.fixture
def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path, dead_pid: int) -> None:
    gone = [f"data.partial-{dead_pid}", f"data.partial-{dead_pid}-old", f"data.partial-{os.getpid()}-old"]
    # Of a process that runs, of another dataset, and of nobody known.
    kept = [f"data.partial-{os.getppid()}", f"other.partial-{dead_pid}", "data.partial-x"]
    for name in [*gone, *kept, "data"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("old")
    with whole_folder(tmp_path / "data") as partial:
        (partial / "a").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "data"])
    assert (tmp_path / "data" / "a").read_text() == "new"


def test_killed_between_two_renames_the_old_folder_comes_back(tmp_path: Path, dead_pid: int) -> None:
    old = tmp_path / f"data.partial-{dead_pid}-old"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), whole_folder(tmp_path / "data"):
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "a").read_text() == "old"


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    program = (
        "import sys, time; import preprocess_public_data as command\n"
        "from generative_recommenders.data import preprocess\n"
        "def slow(*_, **__): print('writing', flush=True); time.sleep(60)\n"
        "preprocess.pq.write_table = slow\n"
        "command.run_cli(command.main)\n"
    )
    flags = ["--dataset=synthetic", "--synthetic_users=20", "--synthetic_items=100", f"--data_dir={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert [path.name for path in tmp_path.iterdir()] == [f"synthetic.partial-{process.pid}"]
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges names in one step on Linux only")
def test_killed_at_any_moment_one_complete_folder_remains(tmp_path: Path) -> None:
    prepare(_small_synthetic(), data_dir=tmp_path)
    program = (
        "import sys; from pathlib import Path; from generative_recommenders.data import sources\n"
        "from generative_recommenders.data.preprocess import prepare\n"
        "for seed in range(1, 1000):\n"
        "    source = sources.get('synthetic')\n"
        "    source = source.with_options(synthetic_users=20, synthetic_items=100, synthetic_seed=seed)\n"
        "    prepare(source, data_dir=Path(sys.argv[1])); print(seed, flush=True)\n"
    )
    rng = np.random.default_rng(0)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(timeout=float(rng.uniform(0, 0.3)))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
        folder = tmp_path / "synthetic"
        metadata = json.loads((folder / "dataset.json").read_text())
        lengths = [len(row) for row in pq.read_table(folder / "sequences.parquet")["item_ids"].to_pylist()]
        assert sum(lengths) == metadata["counts"]["events"]
        assert pq.read_table(folder / "items.parquet").num_rows == 100


def test_bytes_do_not_depend_on_the_run(tmp_path: Path) -> None:
    first = prepare(_small_synthetic(), data_dir=tmp_path / "one").path
    second = prepare(_small_synthetic(), data_dir=tmp_path / "two").path
    for file in ("sequences.parquet", "items.parquet", "dataset.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_events_of_an_unlisted_item_or_user_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,7,3,1\n1,8,3,2\n1,7,3,3\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n7,T,Drama\n")
    source = dataclasses.replace(sources.get("ml-20m"), expected_counts={})
    with pytest.raises(DataError, match="event 2: item 8 is not in the item table"):
        prepare(source, raw=tmp_path, data_dir=tmp_path)
    events = RawEvents(
        user_ids=np.array([1, 2]),
        item_ids=np.array([1, 1]),
        ratings=np.ones(2, dtype=np.float32),
        timestamps=np.array([1, 1]),
        items=pa.table({"item_id": [1]}),
        users=pa.table({"user_id": [1], "age": [30]}),
    )
    with pytest.raises(DataError, match="user 2 has events but is not listed"):
        sequences_table(events)


def test_semantic_ids_are_not_lost_to_other_options(raw: Path, tmp_path: Path) -> None:
    source = sources.get("custom")
    prepare(source, raw=raw, data_dir=tmp_path, name="own")
    ids = tmp_path / "own" / "semantic_ids" / "kept.txt"
    ids.parent.mkdir()
    ids.touch()
    # The same again is nothing to do.
    assert not prepare(source, raw=raw, data_dir=tmp_path, name="own").written
    with pytest.raises(DataError, match="holds semantic IDs, which would be lost; try another --name, or --force"):
        prepare(source, raw=raw, data_dir=tmp_path, name="own", shuffle_ties=1)
    assert ids.exists()
    assert prepare(source, raw=raw, data_dir=tmp_path, name="own", shuffle_ties=1, force=True).written
    assert not ids.exists()
