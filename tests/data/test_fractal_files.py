"""The command: its files, what survives a kill, and what a bad flag says."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch

import run_fractal_expansion as command
from generative_recommenders.data import fractal_output, fractal_plan, sources
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.fractal import (
    Expansion,
    Settings,
    index_ratings,
)
from generative_recommenders.data.fractal_input import read_events
from generative_recommenders.data.fractal_output import Output
from generative_recommenders.data.fractal_report import (
    can_plot,
    sampled_activity,
    source_activity,
)
from generative_recommenders.data.preprocess import prepare
from generative_recommenders.errors import exit_on_user_error
from tests.fractal_ratings import HEADER, file_bytes, rating_lines, small_ratings, small_settings, write_csv

ROOT = Path(__file__).resolve().parents[2]
ML_1M = ROOT.parent / "shared" / "data" / "ml-1m" / "ml-1m.zip"
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command in this process; 2 x 3 blocks of `ratings.csv` to the folder `out` unless told otherwise."""
    monkeypatch.setattr(command, "stop_on_sigterm", lambda: None)
    write_csv(tmp_path / "ratings.csv", rating_lines())

    def call(*flags: str) -> int:
        defaults = [f"--input-csv-file={tmp_path}/ratings.csv", f"--output-prefix={tmp_path}/out/"]
        defaults += ["--num-row-multiplier=2", "--num-col-multiplier=3"]
        monkeypatch.setattr(sys, "argv", ["run_fractal_expansion.py", *defaults, *flags])
        return exit_on_user_error(command.main)()

    return call


def _columns(row: dict[str, list[float]]) -> list[list[float]]:
    return [row["item_ids"], row["ratings"], row["timestamps"]]


def test_files_hold_the_blocks(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--write-dataset", "True") == 0
    out = tmp_path / "out"
    names = [f"2x3_{i}.{kind}" for i in range(2) for kind in ("csv", "parquet")]
    names += ["2x3_statistics.csv", "2x3_users.csv", "dataset.json", "items.parquet", "sequences.parquet"]
    assert sorted(file_bytes(out)) == sorted(names)
    ratings = small_ratings()
    expansion = Expansion(ratings, small_settings())
    U, X = ratings.num_users, ratings.num_items
    total, users = 0, []
    for i in range(2):
        table = pq.read_table(out / f"2x3_{i}.parquet")
        types = [str(field.type) for field in table.schema]
        assert types == ["int64", "list<element: int64>", "list<element: float>", "list<element: int64>"]
        events = []
        for row in table.to_pylist():
            assert row["timestamps"] == list(range(len(row["item_ids"]))) and len(row["ratings"]) == len(
                row["item_ids"]
            )
            events += [(row["user_id"], item, rating) for item, rating in zip(*_columns(row)[:2], strict=True)]
        wanted = []
        for j in range(3):
            rows = expansion.block(i, j).rows(0, U)
            owners = np.repeat(np.arange(U), rows["counts"]) + i * U
            values = ratings.values_V[rows["codes"]].tolist()
            wanted += list(
                zip(owners.tolist(), (rows["columns"].astype(int) + j * X + 1).tolist(), values, strict=True)
            )
            in_block = [item for _, item, _ in events if (item - 1) // X == j]
            assert len(in_block) == expansion.block_events[i, j]
        assert sorted(events) == sorted(wanted)
        # The CSV says the same: user_id,"ids","ratings".
        names_of = ["user_id", "items", "ratings"]
        text = pacsv.read_csv(out / f"2x3_{i}.csv", pacsv.ReadOptions(column_names=names_of)).to_pylist()
        assert [[int(item) for item in row["items"].split(",")] for row in text] == table["item_ids"].to_pylist()
        assert [[float(x) for x in row["ratings"].split(",")] for row in text] == table["ratings"].to_pylist()
        assert [row["user_id"] for row in text] == table["user_id"].to_pylist()
        first = (out / f"2x3_{i}.csv").read_text().splitlines()[0]
        assert first.count('"') == 4 and first.split(",", 1)[1][0] == '"'
        users.append(f"{i},{table.num_rows}\n")
        total += len(events)
    assert (out / "2x3_users.csv").read_text() == "".join(users)
    assert total == expansion.block_events.sum()
    assert f"{total:,} ratings" in capsys.readouterr().out


def test_the_folder_is_a_prepared_dataset(run: Run, tmp_path: Path) -> None:
    assert run("--write_dataset", "--visualize_num_samples", "0") == 0
    data = PreparedDataset.load(tmp_path, "out")
    ratings = small_ratings()
    assert len(data.catalog) == data.catalog.max_item_id == 3 * ratings.num_items
    assert data.item_ids_E.min() >= 1
    shards = pa.concat_tables(pq.read_table(tmp_path / "out" / f"2x3_{i}.parquet") for i in range(2))
    assert data.user_ids_U.tolist() == shards["user_id"].to_pylist()
    assert data.item_ids_E.tolist() == [item for row in shards["item_ids"].to_pylist() for item in row]
    counts = data.metadata["counts"]
    lengths = data.lengths_U
    assert counts == {
        "users": data.num_users,
        "items_listed": 3 * ratings.num_items,
        "items_rated": len(data.item_ids_E.unique()),
        "events": len(data.item_ids_E),
        "users_with_fewer_than_3_events": int((lengths < 3).sum()),
    }
    assert data.metadata["name"] == "out"
    assert data.metadata["checksum"].keys() == {"ratings.csv"}  # type: ignore[attr-defined]


def test_pieces_of_a_user_are_merged_by_place(tmp_path: Path) -> None:
    """All blocks keep everything: the merged places of a user ascend, ties by block, and every block is spread."""
    ratings = small_ratings(users=30, items=8)
    expansion = Expansion(ratings, small_settings(), np.ones((2, 3)))
    Output(expansion, f"{tmp_path}/").write(0)
    U, X = ratings.num_users, ratings.num_items
    pieces = [expansion.block(0, j).rows(0, U) for j in range(3)]
    for row in pq.read_table(tmp_path / "2x3_0.parquet").to_pylist():
        wanted = []
        for j, piece in enumerate(pieces):
            end = int(piece["counts"][: row["user_id"] + 1].sum())
            of_user = slice(end - int(piece["counts"][row["user_id"]]), end)
            for position, (place, column) in enumerate(
                zip(piece["places"][of_user], piece["columns"][of_user], strict=True)
            ):
                wanted.append((int(place), j, position, int(column) + j * X + 1))
        assert row["item_ids"] == [item for *_, item in sorted(wanted)]


def test_text_does_not_depend_on_the_size_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expansion = Expansion(small_ratings(), small_settings())
    texts = []
    for chunk in (1, 40, 10**6):
        monkeypatch.setattr(fractal_output, "CHUNK_EVENTS", chunk)
        Output(expansion, f"{tmp_path}/{chunk}/").write(1)
        texts.append((tmp_path / str(chunk) / "2x3_1.csv").read_bytes())
        rows = pq.ParquetFile(tmp_path / str(chunk) / "2x3_1.parquet")
        assert (rows.num_row_groups > 1) == (chunk < 10**6)
    assert texts[0] == texts[1] == texts[2]


def test_more_events_than_32_bit_offsets_hold(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fractal_output, "_MOST_NARROW", 10)
    assert run("--write-dataset", "True") == 0
    assert pa.types.is_large_list(pq.read_schema(tmp_path / "out" / "sequences.parquet").field("item_ids").type)
    shards = [pq.read_table(tmp_path / "out" / f"2x3_{i}.parquet")["item_ids"].to_pylist() for i in range(2)]
    loaded = PreparedDataset.load(tmp_path, "out")
    assert loaded.item_ids_E.tolist() == [item for shard in shards for row in shard for item in row]


def test_a_killed_run_goes_on_to_the_same_bytes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--write-dataset", "True") == 0
    out = tmp_path / "out"
    whole = file_bytes(out)
    kept = (out / "2x3_0.parquet").stat().st_mtime_ns
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    for name in ("2x3_1.parquet", "dataset.json", "sequences.parquet"):
        (out / name).unlink()
    for name in ("2x3_1.csv", "sequences.parquet"):
        (out / f"{name}.partial-{gone.pid}").write_text("half")
    (out / "2x3_1.csv").write_text("half")
    assert run("--write-dataset", "True") == 0
    assert file_bytes(out) == whole
    assert (out / "2x3_0.parquet").stat().st_mtime_ns == kept
    # A shard whose CSV was lost or cut short is made again, and a complete folder is left alone.
    (out / "2x3_0.csv").unlink()
    (out / "2x3_1.csv").write_text("half")
    assert run("--write-dataset", "True") == 0
    assert file_bytes(out) == whole
    monkeypatch.setattr(Output, "write", None)
    monkeypatch.setattr(Output, "finish", None)
    assert run("--write-dataset", "True") == 0


def test_a_stop_in_a_shard_leaves_no_part_of_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = Output._merged

    def stopping(self: Output, i: int, *rest: object) -> object:
        if i == 1:
            raise KeyboardInterrupt
        return merged(self, i, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Output, "_merged", stopping)
        assert run("--write-dataset", "True") == 130
    assert sorted(file_bytes(tmp_path / "out")) == ["2x3_0.csv", "2x3_0.parquet"]
    assert run("--write-dataset", "True") == 0
    stopped = file_bytes(tmp_path / "out")
    assert run("--write-dataset", "True", f"--output-prefix={tmp_path}/again/") == 0
    again = file_bytes(tmp_path / "again")
    assert {name for name in again if again[name] != stopped[name]} == {"dataset.json"}


def test_seeds(run: Run, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert run("--write-dataset", "True", f"--random-seed={seed}", f"--output-prefix={tmp_path}/{seed}_") == 0
    files = file_bytes(tmp_path)
    assert "0_2x3_statistics.csv" in files and "dataset.json" not in files
    assert all(files[f"0_2x3_{i}.csv"] != files[f"1_2x3_{i}.csv"] for i in range(2))


def test_other_flags_or_other_data_in_the_same_place(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--write-dataset", "True") == 0
    before = file_bytes(tmp_path / "out")
    capsys.readouterr()
    write_csv(tmp_path / "other.csv", rating_lines(seed=5))
    for flags, expected in (
        (["--random-seed=3"], "2x3_0.parquet: was made with --random-seed 0, not 3; choose another"),
        (["--element-sample-rate=0.5"], "was made with --element-sample-rate 1.0, not 0.5"),
        ([f"--input-csv-file={tmp_path}/other.csv"], "was made with other ratings or settings"),
        (["--num-col-multiplier=4"], "dataset.json: was made with other ratings or settings"),
    ):
        for write in ("True", "False"):
            assert run(*flags, "--write-dataset", write) == 2
            error = capsys.readouterr().err
            assert expected in error and error.count("\n") == 1
    assert file_bytes(tmp_path / "out") == before
    (tmp_path / "out" / "2x3_0.parquet").write_text("something else")
    assert run("--write-dataset", "True") == 2
    assert "is no shard of an expansion" in capsys.readouterr().err


def test_a_dataset_is_never_overwritten(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.get("synthetic").with_options(synthetic_users=20, synthetic_items=100)
    folder = prepare(source, data_dir=tmp_path).path
    before = file_bytes(folder)
    assert run(f"--input-csv-file={folder}", f"--output-prefix={folder}/", "--write-dataset", "True") == 2
    assert "dataset.json: was made with other" in capsys.readouterr().err
    assert file_bytes(folder) == before


def test_full_disk(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fractal_output.os, "fsync", full)
    assert run("--write-dataset", "True") == 2
    assert "2x3_0.csv: cannot write (No space left on device)" in capsys.readouterr().err
    assert file_bytes(tmp_path / "out") == {}


def test_dry_run_prints_the_plan_and_writes_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Expansion, "block", None)
        assert run("--dry_run", "--write-dataset", "True") == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    expansion = Expansion(small_ratings(), small_settings())
    assert f"12 users, 9 items, {expansion.ratings.num_events} ratings" in text
    assert f"2 x 3: 24 users, items 1..27, {expansion.block_events.sum()} ratings" in text
    shards = [line.split() for line in text.splitlines() if line.split()[0] in ("0", "1", "total")]
    assert [int(line[2]) for line in shards] == [*expansion.shard_events, expansion.block_events.sum()]
    assert "memory" in text and "0 of 2 shards are there" in text


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 100th user of MovieLens 1M, as a ratings.dat."""
    if not ML_1M.exists():
        pytest.skip("ml-1m.zip is not there")
    with zipfile.ZipFile(ML_1M) as archive:
        name = next(name for name in archive.namelist() if name.endswith("ratings.dat"))
        lines = archive.read(name).decode().splitlines()
    path = tmp_path_factory.mktemp("ml-1m") / "ratings.dat"
    path.write_text("".join(line + "\n" for line in lines if int(line.split("::")[0]) % 100 == 1))
    return path


def test_a_sample_of_movielens(run: Run, tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--num-row-multiplier=4", "--num_col_multiplier=8", f"--input_csv_file={sample}"]
    assert run(*size, "--write-dataset", "True", f"--output-prefix={tmp_path}/ml/") == 0
    ratings = index_ratings(read_events(sample)[0], "sample")
    expansion = Expansion(ratings, Settings(num_row_multiplier=4, num_col_multiplier=8))
    expected = fractal_plan.plan(expansion)
    data = PreparedDataset.load(tmp_path, "ml")
    # Only the clip to 0.001..0.995 and rounding separate the two.
    assert len(data.item_ids_E) == pytest.approx(expansion.pattern.sum() * ratings.num_events, rel=0.005)
    assert len(data.item_ids_E) == expected.events_R.sum()
    assert data.item_ids_E.min() >= 1 and data.item_ids_E.max() <= 8 * ratings.num_items
    assert data.num_users == pytest.approx(expected.rows_R.sum(), rel=0.01)
    for i in range(4):
        written = (tmp_path / "ml" / f"4x8_{i}.csv").stat().st_size
        assert written == pytest.approx(expected.csv_bytes_R[i], rel=0.02)
    # A rare item of the source is rare in the expansion: both have the long tail.
    counts = np.sort(torch.bincount(data.item_ids_E).numpy())[::-1]
    source = np.sort(np.bincount(ratings.items_E))[::-1]
    for share in (0.1, 0.5):
        of_expansion = counts[: int(share * len(counts))].sum() / counts.sum()
        assert of_expansion == pytest.approx(source[: int(share * len(source))].sum() / source.sum(), abs=0.15)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--input-csv-file=none.csv"], "--input-csv-file none.csv: no such file or folder; name a ratings.csv"),
        (["--input-csv-file={tmp}/short.csv"], "short.csv: column 'rating' is missing"),
        (["--input-csv-file={tmp}/broken.csv"], "broken.csv, row 2, column movieId: got 'x', expected an integer"),
        (["--input-csv-file={tmp}/broken"], "broken/sequences.parquet: cannot be read"),
        (["--input-csv-file={tmp}/empty"], "got a folder without sequences.parquet"),
        (["--num-row-multiplier=0"], "--num-row-multiplier: got 0, expected 1 or more"),
        (["--num_col_multiplier=-3"], "--num-col-multiplier: got -3, expected 1 or more"),
        (["--num-row-multiplier=10", "--num-col-multiplier=11"], "got 10 x 11, expected the smaller at most 9"),
        (["--element-sample-rate=1.5"], "--element-sample-rate: got 1.5, expected more than 0 and at most 1"),
        (["--block_sample_rate", "0"], "--block-sample-rate: got 0.0, expected more than 0"),
        (["--block_sample_rate", "nan"], "--block-sample-rate: got nan, expected more than 0"),
        (["--random-seed=-1"], "--random-seed: got -1, expected 0 or more"),
        (["--visualize-num-samples=-1"], "--visualize-num-samples: got -1, expected 0 or more"),
        (["--write-dataset", "maybe"], "got 'maybe', expected True or False"),
        (["--rows", "3"], "unrecognized arguments: --rows 3"),
        (["--output-prefix={tmp}/empty"], "expected a slash at its end; try "),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], expected: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.csv").write_text("userId,movieId,timestamp\n1,2,3\n")
    (tmp_path / "broken.csv").write_text(HEADER + "1,2,3,4\n1,x,3,4\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sequences.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    assert run(*(flag.format(tmp=tmp_path) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error
    assert not (tmp_path / "out").exists()


def test_counts_without_writing_equal_those_of_the_files(run: Run, tmp_path: Path) -> None:
    assert run() == 0
    assert sorted(file_bytes(tmp_path / "out")) == ["2x3_statistics.csv"]
    counted = file_bytes(tmp_path / "out")["2x3_statistics.csv"]
    assert counted.startswith(b"curve,data,rank,rank_fraction,count,relative_count\n")
    assert run("--write-dataset", "True") == 0
    assert file_bytes(tmp_path / "out")["2x3_statistics.csv"] == counted
    expansion = Expansion(small_ratings(), small_settings())
    one = sampled_activity(expansion, 1)
    assert one.events in expansion.shard_events.tolist() and one.users <= expansion.ratings.num_users
    assert sampled_activity(expansion, 9).events == expansion.block_events.sum()
    assert source_activity(expansion.ratings).events == expansion.ratings.num_events


def test_a_plot_needs_matplotlib(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "can_plot", lambda: False)
        assert run("--visualize", "True") == 0
    error = capsys.readouterr().err
    assert error == "warning: --visualize: no plot, matplotlib is not installed; try pip install matplotlib\n"
    assert (tmp_path / "out" / "2x3_statistics.csv").is_file()
    if can_plot():
        assert run("--visualize", "True") == 0
        assert (tmp_path / "out" / "2x3_statistics.png").read_bytes()[:4] == b"\x89PNG"


def test_flags_and_defaults_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(json.dumps(vars(command.parser().parse_args([])), default=str)) == {
        "random_seed": 0,
        "input_csv_file": "ratings.csv",
        "output_prefix": "",
        "num_row_multiplier": 16,
        "num_col_multiplier": 32,
        "element_sample_rate": 1.0,
        "block_sample_rate": 1.0,
        "visualize": False,
        "write_dataset": False,
        "visualize_num_samples": 0,
        "dry_run": False,
    }
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--help"])
    assert "--num-row-multiplier" in capsys.readouterr().out
