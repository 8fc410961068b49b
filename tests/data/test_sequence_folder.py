"""Folders of sequences: real Beauty and Sports where they are at hand, and small folders with one thing wrong."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import sources
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import Prepared, prepare

LINES = "7 2 1 3\n3 1 2 4 2\n"
# By user as in LINES, the rows out of order.
USERS, ITEMS_OF = [7, 3, 3, 7, 3, 7, 3], [3, 1, 2, 2, 4, 1, 2]
POSITIONS, TIMES = [2, 0, 1, 0, 2, 1, 3], [90, 10, 10, 50, 20, 50, 20]
PRODUCTS = [
    {"item_id": 2, "asin": "B2", "title": None, "brand": None, "categories": [], "textual_id": "blue thing"},
    {"item_id": 1, "asin": "B1", "title": "One", "brand": "Acme", "categories": [["Top", "Low"], ["Other"]]},
    {"item_id": 3, "asin": None, "title": None},
    {"item_id": 4, "asin": "B4", "title": "Four", "categories": None, "rank": 5},
]


def write_lines(folder: Path, text: str | bytes = LINES) -> None:
    (folder / "sequential_data.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def write_table(folder: Path, **changed: object) -> None:
    columns = {"user_id": USERS, "item_id": ITEMS_OF, "position": POSITIONS, "timestamp": TIMES} | changed
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), folder / "interactions.parquet")


def write_products(folder: Path, rows: list[object] | None = None) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in (PRODUCTS if rows is None else rows))
    (folder / "items.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_lines(folder)
    write_table(folder)
    write_products(folder)
    return folder


def prepared(raw: Path, **options: object) -> Prepared:
    return prepare(sources.get("custom"), raw=raw, data_dir=raw.parent / "out", **options)


def refused(raw: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepared(raw)
    assert not (raw.parent / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sequences(done: Prepared) -> list[dict]:
    return pq.read_table(done.path / "sequences.parquet").to_pylist()


def items(done: Prepared) -> list[dict]:
    return pq.read_table(done.path / "items.parquet").to_pylist()


def test_ids_order_and_times_are_kept(raw: Path) -> None:
    done = prepared(raw)
    assert sequences(done) == [
        {"user_id": 3, "item_ids": [1, 2, 4, 2], "ratings": [1.0] * 4, "timestamps": [10, 10, 20, 20]},
        {"user_id": 7, "item_ids": [2, 1, 3], "ratings": [1.0] * 3, "timestamps": [50, 50, 90]},
    ]
    assert "timestamps" not in done.metadata
    assert done.metadata["ratings"] == "all 1: the files hold none"


def test_products(raw: Path) -> None:
    one, two, three, four = items(prepared(raw))
    assert one == {
        "item_id": 1,
        "raw_id": "B1",
        "title": "One",
        "text": "One. Brand: Acme. Categories: Top > Low",
        "categories": ["Top", "Low"],
        "brand": "Acme",
        "textual_id": None,
    }
    assert (two["raw_id"], two["title"], two["text"], two["categories"]) == ("B2", None, "blue thing", [])
    assert two["textual_id"] == "blue thing"
    assert (three["raw_id"], three["text"]) == ("3", None)
    assert (four["raw_id"], four["text"]) == ("B4", "Four")


@pytest.mark.parametrize("missing", ["sequential_data.txt", "interactions.parquet", "items.jsonl.gz"])
def test_a_file_may_be_absent(raw: Path, missing: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = prepared(raw, name="whole")
    (raw / missing).unlink()
    done = prepared(raw)
    for one, other in zip(sequences(whole), sequences(done), strict=True):
        assert one["item_ids"] == other["item_ids"]
    if missing == "interactions.parquet":
        assert [user["timestamps"] for user in sequences(done)] == [[0, 1, 2, 3], [0, 1, 2]]
        assert done.metadata["timestamps"].startswith("place in the sequence")
        assert "places in the sequence stand for times" in caplog.text
    else:
        assert sequences(done) == sequences(whole)
    if missing == "items.jsonl.gz":
        assert items(done) == [{"item_id": n, "raw_id": str(n)} for n in (1, 2, 3, 4)]
        assert "items have no titles" in caplog.text


def test_ratings_are_taken_where_there_are_some(raw: Path) -> None:
    write_table(raw, rating=pa.array([1, 2, 3, 4, 5, 1, 2], pa.int8()))
    done = prepared(raw)
    assert [user["ratings"] for user in sequences(done)] == [[2.0, 3.0, 5.0, 2.0], [4.0, 1.0, 1.0]]
    assert "ratings" not in done.metadata


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_embeddings_go_with_their_items(raw: Path, kind: type) -> None:
    assert "embedding" not in items(prepared(raw))[0]
    values = np.arange(12, dtype=kind).reshape(4, 3) / 8
    np.save(raw / "text_emb_small.npy", values)
    done = prepared(raw)
    assert done.written, "a file that has come is something else than what was prepared"
    table = pq.read_table(done.path / "items.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float16())
    assert np.array_equal(np.array(table["embedding"].to_pylist()), values)
    assert not prepared(raw).written
    (raw / "text_emb_small.npy").unlink()
    assert prepared(raw).written


def test_zip_and_folder_above_read_the_same(raw: Path) -> None:
    expected = sequences(prepared(raw, name="folder"))
    archive = raw.parent / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in raw.iterdir():
            file.write(path, f"set/{path.name}")
    assert sequences(prepared(archive, name="zip")) == expected
    top = raw.parent / "top"
    top.mkdir()
    raw.rename(top / "one")
    assert sequences(prepared(top, name="top")) == expected


def test_two_datasets_in_one_folder_are_not_mixed(raw: Path) -> None:
    for name in ("a", "b"):
        (raw / name).mkdir()
        write_lines(raw / name)
    (raw / "sequential_data.txt").unlink()
    assert "got sequential_data.txt in a, b, expected one dataset" in refused(raw)


def test_column_names_cannot_be_given(raw: Path) -> None:
    source = sources.get("custom").with_options(user_column="who")
    with pytest.raises(DataError, match="--user_column: got who, but a folder of sequences has fixed names"):
        prepare(source, raw=raw, data_dir=raw.parent / "out")


@pytest.mark.parametrize("dataset", ["custom", "amzn14-toys"])
def test_unknown_layout(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "sequences.txt").write_text(LINES)
    with pytest.raises(DataError, match=r"sequential_data\.txt (nor|or) interactions\.parquet"):
        prepare(sources.get(dataset), raw=tmp_path, data_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "7 2 1 3\n3 1 2 2 4\n",
            "user 3 has the items 1 2 2 4 in sequential_data.txt and 1 2 4 2 in interactions.parquet",
        ),
        ("7 2 1 3\n", "user 3 has the items nothing in sequential_data.txt and 1 2 4 2 in"),
        ("7 2 1\n3 1 2 4 2\n", "user 7 has the items 2 1 in sequential_data.txt and 2 1 3 in"),
        (LINES + "9 1 2 3\n", "user 9 has the items 1 2 3 in sequential_data.txt and nothing in"),
        (LINES + "5 1 2 3\n", "user 5 has the items 1 2 3 in sequential_data.txt and nothing in"),
        ("7 2 1 3\n3 1 x 4 2\n", "sequential_data.txt, line 2: got 'x', expected an integer id"),
        ("7 2 1 3\n3 1 -2 4 2\n", "line 2: got '-2', expected an integer id"),
        ("7 2 1 3\n3 1 2 4 99999999999999999999\n", "line 2: got '99999999999999999999'"),
        ("7 2 0 3\n3 1 2 4 2\n", "line 1: got item 0, expected ids from 1"),
        ("7 2 1 3\n3\n", "line 2: got no item"),
        ("7 2 1 3\n\n3 1 2 4 2\n", "line 2: got no item"),
        ("7 2 1 3\n3 1 2 4\n7 2\n", "got user 7 on lines 1 and 3, expected one line a user"),
        ("", "got an empty file"),
        ("\n \n", "line 1: got no item"),
        (b"7 2 1\xff 3\n", "byte 5: got no digit or space"),
    ],
)
def test_bad_lines(raw: Path, lines: str | bytes, expected: str) -> None:
    write_lines(raw, lines)
    assert expected in refused(raw)


def test_windows_line_ends_and_a_missing_last_one(raw: Path) -> None:
    write_lines(raw, LINES.strip().replace("\n", " \r\n"))
    assert [user["user_id"] for user in sequences(prepared(raw))] == [3, 7]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"timestamp": None}, "column 'timestamp' is missing, got user_id, item_id, position"),
        ({"item_id": list("abcdefg")}, "column item_id: got type string, expected integers"),
        ({"position": [float(p) for p in POSITIONS]}, "column position: got type double, expected integers"),
        ({"timestamp": [*TIMES[:-1], None]}, "row 7, column timestamp: got an empty or NaN cell"),
        ({"timestamp": [2**62, *TIMES[1:]]}, f"row 1, column timestamp: got {2**62}, expected seconds"),
        ({"item_id": [3, 1, 0, 2, 4, 1, 2]}, "row 3, column item_id: got 0, expected an id from 1"),
        ({"position": [2, 0, 1, 1, 2, 1, 3]}, "user 7: got position 1 in place of 0"),
        ({"position": [2, 0, 1, 0, 3, 1, 4]}, "user 3: got position 3 in place of 2"),
        ({"timestamp": [90, 10, 10, 50, 20, 40, 20]}, "user 7: the time at position 1 is earlier than the one before"),
        ({"item_id": pa.array([2**63] * 7, pa.uint64())}, "truncated or damaged"),
    ],
)
def test_bad_tables(raw: Path, changed: dict[str, object], expected: str) -> None:
    write_table(raw, **changed)
    assert expected in refused(raw)


@pytest.mark.parametrize("name", ["interactions.parquet", "items.jsonl.gz", "text_emb_x.npy"])
def test_truncated_files(raw: Path, name: str) -> None:
    np.save(raw / "text_emb_x.npy", np.zeros((4, 2), np.float16))
    content = (raw / name).read_bytes()
    (raw / name).write_bytes(content[: len(content) - 9])
    message = refused(raw)
    assert name in message and "truncated" in message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([*PRODUCTS[:2], {"asin": "B3"}], "line 3: 'item_id' is missing, got asin"),
        ([*PRODUCTS[:2], {"item_id": "3"}], 'line 3, item_id: got "3", expected an integer'),
        ([*PRODUCTS[:2], {"item_id": 3, "title": 5}], "line 3, title: got 5, expected a text"),
        ([*PRODUCTS[:2], {"item_id": 3, "categories": ["Top"]}], "line 3, categories: got"),
        ([*PRODUCTS[:2], [1]], "line 3: got [1], expected a JSON object"),
        ([*PRODUCTS, PRODUCTS[0]], "got item_id 2 twice, expected distinct ids"),
        ([*PRODUCTS, {"item_id": 0}], "got item_id 0, expected distinct ids from 1"),
        (PRODUCTS[:3], "item 4 is not in the item table"),
        ([], "got no lines"),
    ],
)
def test_bad_products(raw: Path, rows: list[object], expected: str) -> None:
    write_products(raw, rows)
    assert expected in refused(raw)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros((3, 2), np.float16), "got the shape (3, 2) for 4 items with ids up to 4"),
        (np.zeros(4, np.float16), "got the shape (4,) for 4 items"),
        (np.zeros((4, 2), np.float64), "got float64 (Fortran order: False), expected float16 or float32 by rows"),
        (np.full((4, 2), np.nan, np.float16), "row 1: got a number that float16 cannot hold"),
        (np.array([[0], [0], [1e9], [0]], np.float32), "row 3: got a number that float16 cannot hold"),
        (np.array([{}], object), "got object"),
    ],
)
def test_bad_embeddings(raw: Path, values: np.ndarray, expected: str) -> None:
    np.save(raw / "text_emb_x.npy", values)
    assert expected in refused(raw)


def test_embeddings_of_two_models_are_not_chosen_from(raw: Path) -> None:
    for name in "ab":
        np.save(raw / f"text_emb_{name}.npy", np.zeros((4, 2), np.float16))
    assert "got text_emb_a.npy, text_emb_b.npy, expected one file of embeddings" in refused(raw)


REAL = {"beauty": (22_363, 12_101, 198_502), "sports": (35_598, 18_357, 296_337)}


@pytest.fixture(scope="module", params=sorted(REAL))
def real(request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Prepared Beauty and Sports."""
    raw = shared_dir / "data" / "amazon-2014" / request.param
    data_dir = tmp_path_factory.mktemp("data")
    return prepare(sources.get(f"amzn14-{request.param}"), raw=raw, data_dir=data_dir)


class TestRealFolders:
    def test_published_counts(self, real: Prepared) -> None:
        counts = real.metadata["counts"]
        expected = REAL[real.metadata["source"]]
        assert (counts["users"], counts["items_rated"], counts["events"]) == expected
        assert counts["items_listed"] == real.metadata["max_item_id"] == expected[1]

    def test_sequences_equal_the_published_file_line_by_line(self, real: Prepared, shared_dir: Path) -> None:
        file = shared_dir / "data" / "amazon-2014" / real.metadata["source"] / "sequential_data.txt"
        table = pq.read_table(real.path / "sequences.parquet", columns=["user_id", "item_ids"])
        users, lists = table["user_id"].to_pylist(), table["item_ids"].to_pylist()
        written = [" ".join(map(str, [user, *events])) for user, events in zip(users, lists, strict=True)]
        assert written == [line.strip() for line in file.read_text().splitlines()]

    def test_products_and_embeddings(self, real: Prepared, shared_dir: Path) -> None:
        file = shared_dir / "data" / "amazon-2014" / real.metadata["source"] / "text_emb_minilm_l6_v2.f16.npy"
        table = pq.read_table(real.path / "items.parquet")
        values = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        assert np.array_equal(values.reshape(-1, 384), np.load(file))
        beauty = real.metadata["source"] == "beauty"
        assert table.num_rows - table["title"].null_count == (12_094 if beauty else 0)
        assert table.num_rows - table["brand"].null_count == (7_455 if beauty else 11_017)
        assert len(set(table["text"].to_pylist())) == (12_082 if beauty else 18_357)

    def test_the_folder_of_another_dataset_is_refused(self, real: Prepared, shared_dir: Path, tmp_path: Path) -> None:
        other = "sports" if real.metadata["source"] == "beauty" else "beauty"
        raw = shared_dir / "data" / "amazon-2014" / real.metadata["source"]
        with pytest.raises(DataError, match=f"amzn14-{other}: got users .* instead of"):
            prepare(sources.get(f"amzn14-{other}"), raw=raw, data_dir=tmp_path / "out")


def test_days_of_beauty_tie_and_only_ties_are_shuffled(shared_dir: Path, tmp_path: Path) -> None:
    raw, source = shared_dir / "data" / "amazon-2014" / "beauty", sources.get("amzn14-beauty")
    plain = pq.read_table(prepare(source, raw=raw, data_dir=tmp_path, name="plain").path / "sequences.parquet")
    done = prepare(source, raw=raw, data_dir=tmp_path, name="shuffled", shuffle_ties=5)
    shuffled = pq.read_table(done.path / "sequences.parquet")
    times = plain["timestamps"].combine_chunks()
    lasts = times.offsets.to_numpy()[1:] - 1
    users = np.repeat(plain["user_id"].to_numpy(), np.diff(times.offsets.to_numpy()))
    days = times.values.to_numpy()
    ties = (np.diff(days) == 0) & (np.diff(users) == 0)
    assert ties.sum() / (np.diff(users) == 0).sum() == pytest.approx(0.44, abs=0.01)
    # The last event of a user is the target of the test.
    assert ties[lasts - 1].mean() == pytest.approx(0.43, abs=0.01)

    assert shuffled["user_id"].equals(plain["user_id"])
    assert shuffled["timestamps"].combine_chunks().equals(times)
    before, after = (table["item_ids"].combine_chunks().values.to_numpy() for table in (plain, shuffled))
    moved = before != after
    in_tie = np.concatenate(([False], ties)) | np.concatenate((ties, [False]))
    assert not moved[~in_tie].any()
    # A pair keeps its order half the time, longer runs mostly do not.
    assert 0.5 < moved[in_tie].mean() < 1
    for items_of in (before, after):
        order = np.lexsort((items_of, days, users))
        assert np.array_equal(items_of[order], before[np.lexsort((before, days, users))])


def test_without_times_there_are_no_ties_to_shuffle(raw: Path) -> None:
    (raw / "interactions.parquet").unlink()
    with pytest.raises(DataError, match="--shuffle_ties: custom has no times"):
        prepared(raw, shuffle_ties=3)
    assert not (raw.parent / "out").exists()
