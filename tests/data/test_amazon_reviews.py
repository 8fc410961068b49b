"""Amazon reviews of 2014 from the published files: a filter, titles, bad lines; and Beauty rewritten in that format."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
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
from generative_recommenders.data.preprocess import Prepared, prepare
from generative_recommenders.data.sources.amazon_reviews import MIN_COUNT, five_core

ROOT = Path(__file__).resolve().parents[2]
SMALL = dataclasses.replace(sources.get("amzn14-beauty"), expected_counts={})
REVIEWS, PRODUCTS = "reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"
DAY = 86_400


def review(user: str, item: str, day: int, stars: float = 5.0, **more: object) -> dict:
    text = {"reviewerName": 'A "B"', "helpful": [0, 1], "reviewText": "x", "reviewTime": "01 1, 2014"}
    return {"reviewerID": user, "asin": item, "overall": stars, "unixReviewTime": day * DAY, **text, **more}


# Users C, A, B, .. with items I5, I3, ..: every pair once, so that all have 5 or more.
GRID = [review(user, f"I{item}", day) for user in "CABED" for day, item in enumerate((5, 3, 1, 4, 2, 6))]


def write_reviews(folder: Path, rows: list[object], name: str = REVIEWS) -> None:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_bytes(gzip.compress(lines.encode(), 1))


def write_products(folder: Path, rows: list[object]) -> None:
    """As published: Python's own notation of a dict a line."""
    lines = "".join((row if isinstance(row, str) else repr(row)) + "\n" for row in rows)
    (folder / PRODUCTS).write_bytes(gzip.compress(lines.encode(), 1))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_reviews(folder, GRID)
    return folder


def prepared(raw: Path, **options: object) -> Prepared:
    return prepare(SMALL, raw=raw, data_dir=raw.parent / "out", **options)


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


def test_registry_passes_over_a_module_without_a_source() -> None:
    module = importlib.import_module("generative_recommenders.data.sources.amazon_reviews")
    assert not hasattr(module, "SOURCE")
    assert {name for name in sources.names() if name.startswith("amzn14")} == {
        "amzn14-beauty",
        "amzn14-sports",
        "amzn14-toys",
    }


@pytest.mark.parametrize(
    ("name", "category", "counts"),
    [
        ("amzn14-beauty", "Beauty", (22_363, 12_101, 198_502)),
        ("amzn14-sports", "Sports_and_Outdoors", (35_598, 18_357, 296_337)),
        ("amzn14-toys", "Toys_and_Games", (19_412, 11_924, 167_597)),
    ],
)
def test_files_places_and_published_counts(
    name: str, category: str, counts: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.get(name)
    assert dict(source.expected_counts) == dict(zip(("users", "items_rated", "events"), counts, strict=True))
    asked: list[tuple[str, ...]] = []

    def fake(urls: tuple[str, ...], target: Path, *, remedy: str) -> None:
        asked.append(urls)
        assert remedy == f"put it at {target}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()

    monkeypatch.setattr(sources, "download", fake)
    place = "snap.stanford.edu/data/amazon/productGraph/categoryFiles"
    files = [f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz"]
    assert source.fetch(tmp_path) == tmp_path / "raw" / name
    assert asked == [(f"https://{place}/{file}", f"http://{place}/{file}") for file in files]
    assert sorted(path.name for path in (tmp_path / "raw" / name).iterdir()) == sorted(files)
    (tmp_path / "raw" / name / files[0]).unlink()
    source.fetch(tmp_path)
    assert len(asked) == 3, "what is there is not fetched again"


def test_a_failed_download_says_where_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {REVIEWS: ("http://127.0.0.1:9/x",)}
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=rf"fetch the file by other means and put it at .*amzn14-beauty/{REVIEWS}"):
        dataclasses.replace(SMALL, downloads=places).fetch(tmp_path)


def test_ids_are_ranks_and_ties_keep_the_order_of_the_file(raw: Path) -> None:
    rows = [dict(row, unixReviewTime=DAY) if row["asin"] in ("I3", "I1") else row for row in GRID]
    write_reviews(raw, [dict(row, overall=2.0) if row["asin"] == "I6" else row for row in rows])
    done = prepared(raw)
    first = sequences(done)[0]
    assert [(user["user_id"], user["raw_user_id"]) for user in sequences(done)] == list(enumerate("ABCDE", start=1))
    assert first["item_ids"] == [5, 3, 1, 4, 2, 6]
    assert first["ratings"] == [5.0, 5.0, 5.0, 5.0, 5.0, 2.0]
    assert first["timestamps"] == [0, DAY, DAY, 3 * DAY, 4 * DAY, 5 * DAY]
    assert items(done) == [{"item_id": n, "raw_id": f"I{n}"} for n in range(1, 7)]


def test_core_is_iterated_and_repeats_go(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Z has five items, of which Q leaves for want of users, and then Z itself.
    short = [review("Z", item, 1) for item in ("I1", "I2", "I3", "I4", "Q")]
    again = [review("A", "I1", 0, stars=1.0)]
    plain = prepared(raw, name="plain")
    assert plain.metadata["repeated_reviews_dropped"] == plain.metadata["reviews_outside_core_dropped"] == 0
    write_reviews(raw, [*GRID, *short, *again])
    with caplog.at_level("INFO"):
        done = prepared(raw)
    assert (done.metadata["repeated_reviews_dropped"], done.metadata["reviews_outside_core_dropped"]) == (1, 5)
    assert sequences(done) == sequences(plain)
    assert "1 reviews repeat a user and an item" in caplog.text
    assert "30 of 36 reviews in the 5-core, after 2 rounds" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=160, unique=True))
def test_core_equals_removing_one_by_one(pairs: list[tuple[int, int]]) -> None:
    left = list(pairs)

    def lonely() -> tuple[int, int] | None:
        for pair in left:
            if any([other[side] for other in left].count(pair[side]) < MIN_COUNT for side in (0, 1)):
                return pair
        return None

    while (pair := lonely()) is not None:
        left.remove(pair)
    users, found = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    kept, rounds = five_core(users, found)
    assert [pair for pair, keep in zip(pairs, kept, strict=True) if keep] == left
    assert (rounds == 0) == (len(left) == len(pairs))
    assert five_core(users[kept], found[kept])[1] == 0


def test_products(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_products(
        raw,
        [
            {"asin": "I9", "title": 5},
            {
                "asin": "I1",
                "title": "O&#39;Neil &amp; \"Co\" 'x'",
                "brand": "B&amp;B",
                "price": 1.5,
                "related": {"a": []},
            },
            {
                "asin": "I2",
                "categories": [["Beauty", "Nails &amp; Co"], ["Other"]],
                "title": " ",
                "salesRank": {"B": 3},
            },
            {"asin": "I3", "title": "Crème \\d", "brand": "", "categories": []},
            "{'asin': 'I4', 'title': 'a \\d b', 'brand': 'Acme', 'categories': [['Beauty']]}",
            {"asin": "I4", "title": "again"},
            {"asin": "I5", "description": "no 'asin': 'I9'"},
            {"asin": "I1", "title": "again", "description": "see 'asin': 'I6'"},
        ],
    )
    done = prepared(raw)
    rows = [tuple(row[k] for k in ("raw_id", "title", "brand", "categories", "text")) for row in items(done)]
    assert rows == [
        ("I1", "O'Neil & \"Co\" 'x'", "B&B", [], "O'Neil & \"Co\" 'x'. Brand: B&B"),
        ("I2", None, None, ["Beauty", "Nails & Co"], "Categories: Beauty > Nails & Co"),
        ("I3", "Crème \\d", None, [], "Crème \\d"),
        ("I4", "a \\d b", "Acme", ["Beauty"], "a \\d b. Brand: Acme. Categories: Beauty"),
        ("I5", None, None, [], None),
        ("I6", None, None, [], None),
    ]
    assert "1 of 6 items are not listed" in caplog.text


def test_products_may_be_absent_and_come_later(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "title" not in items(prepared(raw))[0]
    assert f"no {PRODUCTS}, so that items have no titles" in caplog.text
    write_products(raw, [{"asin": "I1", "title": "One"}])
    assert items(prepared(raw))[0]["title"] == "One"
    assert not prepared(raw).written
    (raw / PRODUCTS).unlink()
    assert prepared(raw).written


def test_reviews_alone_are_a_raw_file(raw: Path) -> None:
    assert sequences(prepared(raw / REVIEWS)) == sequences(prepared(raw, name="folder"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{'asin': 'I1', 'title': __import__('pathlib').Path('MARK').touch()}", "not the literal of a dict (malformed"),
        ("{'asin': 'I1', 'title': open('MARK', 'w')}", "not the literal of a dict (malformed node"),
        ("{'asin': 'I1', 'title': [t for t in 'ab']}", "not the literal of a dict (malformed node"),
        ("{'asin': 'I1', 'title': f'{1}'}", "not the literal of a dict (malformed node"),
        ("{'asin': 'I1', 'title': 'a', 'price': " + "[" * 5_000 + "}", "not the literal of a dict"),
        ("{'asin': 'I1', 'price': " + "-" * 90_000 + "1}", "not the literal of a dict"),
        ("{'asin': 'I1', 'price': " + "1+" * 50_000 + "1}", "not the literal of a dict"),
        ("{'asin': 'I1', 'title': '" + "x" * (1 << 20) + "'}", "bytes, expected one product"),
        ("{'asin': 'I1', {}: 1}", "not the literal of a dict"),
        ("{'asin': 'I1', 'title': 'a\0'}", "not the literal of a dict"),
        ("{'asin': 'I1', 'title': 'a'", "not the literal of a dict"),
        ("import os", "not the literal of a dict"),
        ("['asin']", "got list, expected the literal of a dict"),
        ("{'title': 'a'}", "got asin None, expected a text"),
        ("{'asin': 'I1', 'title': 5}", "title: got 5, expected a text"),
        ("{'asin': 'I1', 'brand': ['a']}", "brand: got ['a'], expected a text"),
        ("{'asin': 'I1', 'categories': ['Beauty']}", "categories: got ['Beauty'], expected a list of lists of texts"),
        ("{'asin': 'I1', 'categories': 'Beauty'}", "categories: got 'Beauty', expected a list of lists of texts"),
    ],
    ids=range(18),
)
def test_bad_products_are_named_and_never_executed(
    raw: Path, line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(raw)
    write_products(raw, [{"asin": "I2", "title": "Two"}, line])
    message = refused(raw)
    assert f"{PRODUCTS}, line 2" in message and expected in message
    assert len(message) < 400
    assert not (raw / "MARK").exists()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({k: v for k, v in GRID[0].items() if k != "asin"}, "line 31: 'asin' is missing, got reviewerID, overall"),
        (dict(GRID[0], unixReviewTime=None), "line 31, unixReviewTime: got null, expected an integer"),
        (dict(GRID[0], unixReviewTime="5"), 'line 31, unixReviewTime: got "5", expected an integer'),
        (dict(GRID[0], unixReviewTime=1.5), "line 31, unixReviewTime: got 1.5, expected an integer"),
        (dict(GRID[0], unixReviewTime=2**63), "line 31, unixReviewTime: got 9223372036854775808, expected an integer"),
        (dict(GRID[0], unixReviewTime=2**62), "object 31, unixReviewTime: got 4611686018427387904, expected seconds"),
        (dict(GRID[0], overall=True), "line 31, overall: got true, expected a number"),
        (dict(GRID[0], overall=float("nan")), "line 31: not a JSON object (NaN is no JSON number)"),
        (dict(GRID[0], overall=1e300), "line 31, overall: got 1e+300, expected a number"),
        (dict(GRID[0], reviewerID=5), "line 31, reviewerID: got 5, expected a text"),
        ("{'asin': 'I1'}", "line 31: not a JSON object"),
        ("[1]", "line 31: got [1], expected a JSON object"),
        ('{"asin": ', "line 31: not a JSON object"),
    ],
    ids=range(13),
)
def test_bad_reviews(raw: Path, row: object, expected: str) -> None:
    write_reviews(raw, [*GRID, row])
    assert f"{REVIEWS}, {expected}" in refused(raw)


def test_bytes_that_are_no_text(raw: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in GRID).encode().replace(b"I4", b"I\xff", 1)
    (raw / REVIEWS).write_bytes(gzip.compress(lines))
    assert f"{REVIEWS}, line 4: not a JSON object ('utf-8' codec can't decode" in refused(raw)


@pytest.mark.parametrize("name", [REVIEWS, PRODUCTS])
def test_truncated_gzip(raw: Path, name: str) -> None:
    write_products(raw, [{"asin": f"I{n}", "title": os.urandom(200).hex()} for n in range(1, 7)])
    content = (raw / name).read_bytes()
    for size in (len(content) - 1, len(content) // 2, 12):
        (raw / name).write_bytes(content[:size])
        message = refused(raw)
        assert f"{name}: truncated or damaged" in message


def test_files_without_reviews(raw: Path) -> None:
    write_reviews(raw, [])
    assert "got no lines" in refused(raw)
    (raw / REVIEWS).write_bytes(b"")
    assert "got an empty file" in refused(raw)
    write_reviews(raw, GRID[:20])
    assert "got no users and items with 5 reviews each" in refused(raw)


def test_reviews_of_another_category_are_not_taken(raw: Path) -> None:
    (raw / REVIEWS).rename(raw / "reviews_Books_5.json.gz")
    assert f"got neither {REVIEWS} nor sequential_data.txt nor interactions.parquet" in refused(raw)


def test_wrong_counts_are_named(raw: Path) -> None:
    with pytest.raises(
        DataError, match="users 5 instead of 22,363, items_rated 6 instead of 12,101, events 30 instead"
    ):
        prepare(sources.get("amzn14-beauty"), raw=raw, data_dir=raw.parent / "out")


def test_command_line(raw: Path) -> None:
    write_products(raw, ["{'asin': 'I1', 'title': exit(0)}"])
    command = [sys.executable, "preprocess_public_data.py", "--dataset=amzn14-beauty", f"--raw={raw}"]
    done = subprocess.run(
        [*command, f"--data_dir={raw.parent / 'out'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "line 1: not the literal of a dict" in done.stderr
    assert "Traceback" not in done.stderr


def test_beauty_in_the_published_format_gives_the_published_sequences(shared_dir: Path, tmp_path: Path) -> None:
    """The real events and products, written as reviews and literals, come back equal item by item."""
    folder = shared_dir / "data" / "amazon-2014" / "beauty"
    events = pq.read_table(folder / "interactions.parquet").to_pydict()
    products = [json.loads(line) for line in gzip.decompress((folder / "items.jsonl.gz").read_bytes()).splitlines()]
    asins = {product["item_id"]: product["asin"] for product in products}
    write_reviews(
        tmp_path,
        [
            {"reviewerID": f"A{user:05d}", "asin": asins[item], "overall": 5.0, "unixReviewTime": time}
            for user, item, time in zip(events["user_id"], events["item_id"], events["timestamp"], strict=True)
        ],
    )
    write_products(tmp_path, products)
    done = prepare(sources.get("amzn14-beauty"), raw=tmp_path, data_dir=tmp_path / "out")
    assert done.metadata["repeated_reviews_dropped"] == done.metadata["reviews_outside_core_dropped"] == 0
    table, catalogue = (pq.read_table(done.path / f"{name}.parquet") for name in ("sequences", "items"))
    assert catalogue["raw_id"].to_pylist() == sorted(asins.values())
    got = catalogue["raw_id"].take(pa.array(table["item_ids"].combine_chunks().values.to_numpy() - 1)).to_pylist()
    assert got == [asins[item] for item in events["item_id"]]
    titles = dict(zip(catalogue["raw_id"].to_pylist(), catalogue["title"].to_pylist(), strict=True))
    assert sum(titles[product["asin"]] == product["title"] for product in products) > 12_090
