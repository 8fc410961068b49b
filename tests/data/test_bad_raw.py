"""Bad input: one line on stderr, exit status 2, nothing written."""

import dataclasses
import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import preprocess, sources
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import prepare
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[2]
HEADER = "user_id,item_id,timestamp,rating\n"
GOOD = HEADER + "1,5,3,1\n1,6,2,2\n1,7,2,3\n"


def _zip(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _check(raw: Path, dataset: str, data_dir: Path, **options: object) -> str:
    """The error of preparing `raw`, after checking that nothing was written."""
    with pytest.raises(DataError) as caught:
        prepare(sources.get(dataset).with_options(**options), raw=raw, data_dir=data_dir)
    assert not data_dir.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "got an empty file"),
        (HEADER, "got no rows"),
        ("user_id,item_id,rating\n1,2,3\n", "column 'timestamp' is missing, got the columns user_id, item_id, rating"),
        (GOOD + "1,x,4,2\n", "row 4, column item_id: got the id 'x'"),
        (GOOD + "x,5,4,2\n1,5,5,5\n2,5,5,5\n", "row 4, column user_id: got the id 'x'"),
        (GOOD + "1,,4,2\n", "row 4, column item_id: got an empty or NaN cell"),
        (GOOD + "NaN,5,4,2\n", "row 4, column user_id: got an empty or NaN cell"),
        (GOOD + "1,5,NaN,2\n", "row 4, column timestamp: got an empty or NaN cell"),
        (GOOD + "1,5,inf,2\n", "row 4, column timestamp: got"),
        (GOOD + "1,5,99999999999999999999999,2\n", "row 4, column timestamp: got 1e+23, expected seconds"),
        (GOOD + "1,5,-1e300,2\n", "row 4, column timestamp: got -1e+300, expected seconds"),
        (GOOD + f"1,5,{2**62},2\n", f"row 4, column timestamp: got {2**62}, expected seconds"),
        ("user_id,item_id,item_id,timestamp\n1,5,6,3\n", "got 2 columns named 'item_id', expected one"),
        (GOOD.replace("1,", "u,") + 'u,5,9,2\n"",5,4,2\n', "row 5, column user_id: got an empty id"),
        (GOOD.replace("1,", "u,") + 'u," ",4,2\n', "row 4, column item_id: got an empty id"),
        (GOOD + "1,5,noon,2\n", "row 4, column timestamp: got 'noon', expected seconds or an ISO 8601 time"),
        (
            HEADER + "1,5,2014-13-01,2\n1,6,2014-12-01,2\n1,7,2014-11-01,3\n",
            "row 1, column timestamp: got '2014-13-01'",
        ),
        (GOOD + "1,5,4,good\n", "row 4, column rating: got 'good', expected a number"),
        (GOOD + "1,5,4\n", "row 4: got 3 cells ('1,5,4'), expected 4"),
        (HEADER + "1,5,3,1\n2,6,2,2\n3,7,2,3\n", "every user has one event"),
        (HEADER + "1,5,3,1\n1,6,2,2\n", "every user has at most 2 events"),
    ],
)
def test_custom_file(tmp_path: Path, text: str, expected: str) -> None:
    raw = tmp_path / "events.csv"
    raw.write_text(text)
    message = _check(raw, "custom", tmp_path / "out")
    assert expected in message
    if "every user" not in expected:
        assert str(raw) in message


def test_custom_row_far_inside_a_large_file(tmp_path: Path) -> None:
    """Past Arrow's first block, where a type has already been inferred."""
    raw = tmp_path / "events.csv"
    raw.write_text(HEADER + "1,5,3,1\n" * 1_500_000 + "1,5,later,1\n" + "1,5,3,1\n" * 10)
    assert "row 1500001, column timestamp: got 'later'" in _check(raw, "custom", tmp_path / "out")


def test_text_ids_are_taken_when_asked_for(tmp_path: Path) -> None:
    raw = tmp_path / "events.csv"
    raw.write_text(GOOD + "1,x,4,2\n")
    done = prepare(sources.get("custom").with_options(string_ids=True), raw=raw, data_dir=tmp_path)
    assert pq.read_table(done.path / "items.parquet")["raw_id"].to_pylist() == ["5", "6", "7", "x"]


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("user_id", pa.array([1.0, 1.0, 2.0]), "column user_id: got type double, expected integer or text ids"),
        ("timestamp", pa.array([1.0, float("nan"), 2.0]), "row 2, column timestamp: got an empty or NaN cell"),
        ("timestamp", pa.array([1, 2, None]), "row 3, column timestamp: got an empty or NaN cell"),
        ("timestamp", pa.array([1, 2, 2**64 - 5], pa.uint64()), f"row 3, column timestamp: got {2**64 - 5}, expected"),
        ("timestamp", pa.array([1, -(2**63), 2]), f"row 2, column timestamp: got {-(2**63)}, expected seconds"),
        ("user_id", pa.array(["a", "a", ""]), "row 3, column user_id: got an empty id"),
        ("timestamp", pa.array([True, True, False]), "column timestamp: got type bool"),
        ("rating", pa.array(["a", "b", "c"]), "column rating: got type string, expected numbers"),
        ("item", pa.array([1, 2, 3]), "column 'item_id' is missing"),
    ],
)
def test_custom_parquet(tmp_path: Path, column: str, values: pa.Array, expected: str) -> None:
    columns = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": [1, 2, 3], "rating": [1, 2, 3]}
    if column == "item":
        del columns["item_id"]
    raw = tmp_path / "events.parquet"
    pq.write_table(pa.table({**columns, column: values}), raw)
    assert expected in _check(raw, "custom", tmp_path / "out")


@pytest.mark.parametrize("name", ["events.parquet", "events.csv.gz"])
def test_custom_truncated_file(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    if name.endswith("parquet"):
        pq.write_table(pa.table({"user_id": list(range(1000))}), buffer)
    else:
        with pa.CompressedOutputStream(buffer, "gzip") as stream:
            stream.write(GOOD.encode() * 1000)
            stream.flush()
            content = buffer.getvalue()
        buffer = io.BytesIO(content)
    raw = tmp_path / name
    raw.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert "truncated or damaged" in _check(raw, "custom", tmp_path / "out")


def test_missing_file_and_unknown_kind(tmp_path: Path) -> None:
    assert "no such file or folder" in _check(tmp_path / "nothing.csv", "custom", tmp_path / "out")
    raw = tmp_path / "events.xlsx"
    raw.write_text(GOOD)
    assert "expected .csv, .tsv, .csv.gz or .parquet" in _check(raw, "custom", tmp_path / "out")


def test_repeated_column_of_a_parquet_file(tmp_path: Path) -> None:
    raw = tmp_path / "events.parquet"
    names = ["user_id", "item_id", "timestamp", "user_id"]
    pq.write_table(pa.Table.from_arrays([pa.array([1, 1, 1])] * 4, names=names), raw)
    assert "got 2 columns named 'user_id', expected one" in _check(raw, "custom", tmp_path / "out")


def test_repeated_columns_that_nobody_reads_are_harmless(tmp_path: Path) -> None:
    raw = tmp_path / "events.csv"
    raw.write_text("user_id,item_id,timestamp,note,note\n1,5,1,a,b\n1,6,2,a,b\n1,7,3,a,b\n")
    assert prepare(sources.get("custom"), raw=raw, data_dir=tmp_path).metadata["counts"]["events"] == 3


def test_empty_id_of_an_item_table(tmp_path: Path) -> None:
    raw, items = tmp_path / "events.csv", tmp_path / "items.csv"
    raw.write_text(GOOD)
    items.write_text('item_id,title\n5,A\n"",B\n')
    message = _check(raw, "custom", tmp_path / "out", items=items, string_ids=True)
    assert "items.csv, row 2, column item_id: got an empty id" in message


def test_repeated_row_of_an_item_table(tmp_path: Path) -> None:
    raw, items = tmp_path / "events.csv", tmp_path / "items.csv"
    raw.write_text(GOOD)
    items.write_text("item_id,title\n5,A\n6,B\n5,C\n")
    assert "items.csv, row 3: got item '5' again" in _check(raw, "custom", tmp_path / "out", items=items)


class TestArchives:
    def test_truncated(self, tmp_path: Path) -> None:
        raw = _zip(tmp_path / "ml-1m.zip", {"ml-1m/ratings.dat": "1::1::5::1\n" * 1000})
        raw.write_bytes(raw.read_bytes()[:-30])
        assert "truncated or not a zip archive" in _check(raw, "ml-1m", tmp_path / "out")

    def test_damaged_member(self, tmp_path: Path) -> None:
        raw = _zip(tmp_path / "ml-20m.zip", {"ml-20m/ratings.csv": "userId,movieId\n" * 1000})
        content = bytearray(raw.read_bytes())
        content[60] ^= 0xFF
        raw.write_bytes(content)
        message = _check(raw, "ml-20m", tmp_path / "out")
        assert "ml-20m.zip/ratings.csv: truncated or damaged" in message

    def test_checksum_mismatch_names_both(self, tmp_path: Path) -> None:
        raw = _zip(tmp_path / "ml-1m.zip", {"ml-1m/ratings.dat": "1::1::5::1\n"})
        message = _check(raw, "ml-1m", tmp_path / "out")
        assert "ml-1m.zip/ratings.dat: got SHA-256" in message
        assert "expected 506d64ca44484487c11dc2d9a28de5c54948213e6b96285e298afe28d6ea4e0f" in message

    def test_missing_member(self, tmp_path: Path) -> None:
        raw = _zip(tmp_path / "ml-1m.zip", {"ml-1m/movies.dat": "1::A::B\n"})
        assert "ratings.dat is missing" in _check(raw, "ml-1m", tmp_path / "out")

    def test_one_file_in_place_of_several(self, tmp_path: Path) -> None:
        raw = tmp_path / "ratings.csv"
        raw.write_text("userId,movieId,rating,timestamp\n1,7,3,1\n")
        assert "movies.csv is missing" in _check(raw, "ml-20m", tmp_path / "out")

    @pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "ml-1m/../../evil", "C:\\evil.txt", "..\\evil"])
    def test_entry_that_escapes(self, tmp_path: Path, name: str) -> None:
        raw = _zip(tmp_path / "ml-1m.zip", {"ml-1m/ratings.dat": "1::1::5::1\n", name: "x"})
        assert "points outside of its folder" in _check(raw, "ml-1m", tmp_path / "out")

    def test_symbolic_link(self, tmp_path: Path) -> None:
        link = zipfile.ZipInfo("ml-1m/ratings.dat")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
            archive.writestr(link, "/etc/hostname")
        with pytest.raises(DataError, match=r"'ml-1m/ratings\.dat' points outside"):
            RawFiles(tmp_path / "ml-1m.zip")

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ("1,abc,3,4", "ratings.csv, row 3, column movieId: got 'abc', expected an integer"),
            ("1,7,3,", "ratings.csv, row 3, column timestamp: got an empty or NaN cell"),
            ("1,7,3,NaN", "ratings.csv, row 3, column timestamp: got an empty or NaN cell"),
            ("1,7,3", "ratings.csv, row 3: got 3 cells"),
            ("1,7.5,3,4", "ratings.csv, row 3, column movieId: got '7.5'"),
        ],
    )
    def test_row_of_a_public_file(self, tmp_path: Path, row: str, expected: str) -> None:
        ratings = "userId,movieId,rating,timestamp\n1,7,3,1\n1,7,3,2\n" + row + "\n1,7,3,4\n"
        raw = _zip(tmp_path / "x.zip", {"ratings.csv": ratings, "movies.csv": "movieId,title,genres\n7,T,Drama\n"})
        assert expected in _check(raw, "ml-20m", tmp_path / "out")

    def test_row_of_a_movie_table(self, tmp_path: Path) -> None:
        raw = tmp_path / "raw"
        raw.mkdir()
        (raw / "ratings.dat").write_text("1::7::3::1\n1::7::3::2\n1::7::3::3\n")
        (raw / "users.dat").write_text("1::F::1::10::48067\n")
        source = dataclasses.replace(sources.get("ml-1m"), sha256={}, expected_counts={})
        for table, expected in [
            ("7::T::Drama\nx::U::War\n", "row 2: got the id 'x', expected an integer"),
            ("7::T\n", "row 1: got 2 cells, expected 3"),
            ("7::T::Drama\n7::U::War\n", "got an item id twice"),
            ("0::T::Drama\n7::U::War\n", "must be >= 1"),
        ]:
            (raw / "movies.dat").write_text(table)
            with pytest.raises(DataError, match=expected):
                prepare(source, raw=raw, data_dir=tmp_path / "out")


class TestFullDisk:
    @pytest.fixture
    def raw(self, tmp_path: Path) -> Path:
        path = tmp_path / "events.csv"
        path.write_text(GOOD)
        return path

    @pytest.mark.parametrize("failing_call", [1, 2])
    def test_message_and_nothing_left(
        self, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
    ) -> None:
        write, calls = pq.write_table, []

        def write_table(table: pa.Table, where: Path, **options: object) -> None:
            calls.append(where)
            write(table.slice(0, 1), where, **options)
            if len(calls) == failing_call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(preprocess.pq, "write_table", write_table)
        with pytest.raises(
            DataError, match=r"out/custom\.partial-\d+: cannot write \(No space left on device\)"
        ) as error:
            prepare(sources.get("custom"), raw=raw, data_dir=tmp_path / "out")
        assert "MB free; free some space or choose another --data_dir" in str(error.value)
        assert list((tmp_path / "out").iterdir()) == []

    def test_older_folder_stays(self, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = prepare(sources.get("custom"), raw=raw, data_dir=tmp_path).path
        before = (folder / "sequences.parquet").read_bytes()

        def write_table(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(preprocess.pq, "write_table", write_table)
        with pytest.raises(DataError):
            prepare(sources.get("custom"), raw=raw, data_dir=tmp_path, force=True)
        assert (folder / "sequences.parquet").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["custom", "events.csv"]

    @pytest.mark.skipif(sys.platform != "linux" or not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_arrow_reports_a_full_device_as_an_os_error(self) -> None:
        """What the simulated error above stands for.

        A sink, not a path: on failure `write_table` unlinks the path it was given, here a device node.
        """
        table = pa.table({"a": list(range(1_000_000))})
        with pytest.raises(OSError, match="No space left") as error, pa.OSFile("/dev/full", "wb") as sink:
            pq.write_table(table, sink)
        assert error.value.errno == errno.ENOSPC
        assert Path("/dev/full").exists()


class TestCommandLine:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "preprocess_public_data.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    def test_prepares_then_has_nothing_to_do(self, tmp_path: Path) -> None:
        raw = tmp_path / "events.csv"
        raw.write_text("who,item_id,timestamp\n1,5,3\n1,6,2\n1,7,2\n")
        arguments = ["--dataset=custom", f"--raw={raw}", f"--data_dir={tmp_path}", "--user_column=who", "--csv"]
        first, second = self.run(*arguments), self.run(*arguments)
        assert (first.returncode, second.returncode) == (0, 0)
        assert "1 users, 3 rated of 3 items, 3 events" in first.stdout
        assert "already prepared" in second.stdout
        assert (tmp_path / "custom" / "sasrec_format.csv").exists()

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--dataset=ml1m"], "error: dataset: got 'ml1m', expected one of amazon23-cell-phones,"),
            (["--dataset=ml-1m", "--raw=nothing.zip"], "error: raw file nothing.zip: no such file or folder"),
            (["--dataset=ml-1m", "--title_column=t"], "error: --title_column: dataset 'ml-1m' does not use it"),
            (
                ["--dataset=synthetic", "--synthetic_items=10"],
                "error: synthetic num_items: got 10, expected at least 100",
            ),
            (["--dataset=synthetic", "--synthetic_seed=-1"], "error: synthetic seed: got -1, expected 0 or more"),
            (["--raw=x"], "error: --dataset: got none"),
        ],
    )
    def test_one_line_and_status_2(self, tmp_path: Path, arguments: list[str], expected: str) -> None:
        result = self.run(*arguments, f"--data_dir={tmp_path / 'out'}")
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith(expected)
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_unknown_dataset_names_the_nearest(self, tmp_path: Path) -> None:
        assert "did you mean 'ml-1m'?" in self.run("--dataset=ml_1m", f"--data_dir={tmp_path}").stderr

    def test_without_a_dataset_one_failure_does_not_stop_the_others(self, tmp_path: Path) -> None:
        # Files in the places of the downloads: no network is asked.
        for name in ("movielens1m.zip", "movielens20m.zip", "ratings_Books.csv"):
            (tmp_path / name).write_bytes(b"")
        result = self.run(f"--data_dir={tmp_path}")
        assert result.returncode == 2
        assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error"] * 3
        for name in ("movielens1m.zip", "movielens20m.zip", "ratings_Books.csv"):
            assert name in result.stderr


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        raise RuntimeError("a defect")

    def mistaken() -> int:
        raise DataError("first\n  second")

    with pytest.raises(RuntimeError, match="a defect"):
        exit_on_user_error(broken)()
    assert exit_on_user_error(mistaken)() == 2
    assert capsys.readouterr().err == "error: first second\n"
