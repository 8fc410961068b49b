"""Amazon reviews of 2023 in the published layout: a small sample of the same shape, its splits, texts and faults."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import sources
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import Prepared, prepare
from generative_recommenders.data.temporal import TimeSplit
from generative_recommenders.data.text_templates import item_texts, template_of, text_columns
from tests.merlin_tables import sequences_of

PUBLISHED = sources.get("amazon23-video-games")
SMALL = dataclasses.replace(PUBLISHED, expected_counts={})
START = 1_600_000_000_000
VALID_FROM, TEST_FROM = 60, 80
# User, item, time in ms after START (all within a second), rating. Of train, uD has one event; uE has none before test.
EVENTS = [
    ("uB", "B05", 1, 5.0),
    ("uB", "B01", 7, 4.0),
    ("uB", "B04", 3, 3.0),
    ("uA", "B02", 10, 5.0),
    ("uA", "B01", 20, 1.0),
    ("uA", "B09", 65, 2.0),
    ("uA", "B03", 66, 2.0),
    ("uA", "B08", 90, 5.0),
    ("uD", "B06", 30, 5.0),
    ("uD", "B01", 85, 5.0),
    ("uE", "B07", 86, 5.0),
    ("uE", "B09", 95, 5.0),
    ("uF", "B00", 40, 5.0),
]
PRODUCTS = [
    {"parent_asin": "B09", "title": "Pad &amp; Cable", "features": ["Fast", "Blue"], "price": 12.5},
    {"parent_asin": "B01", "title": "Chair", "description": ["Wide seat.", ""], "price": "from 9.99"},
    {"parent_asin": "B99", "title": "Unrelated", "categories": None, "price": None, "details": {"Brand": "x"}},
    {"parent_asin": "B02", "title": "", "categories": ["Video Games", "PC"], "images": [{"large": "u"}]},
]


def write(folder: Path, *, packed: bool = False, history: dict[tuple[str, str], str] | None = None) -> Path:
    """The files as published: rows in any order, `history` the user's items before, oldest first."""
    folder.mkdir(exist_ok=True)
    texts = {split: io.StringIO() for split in ("train", "valid", "test")}
    writers = {split: csv.writer(text) for split, text in texts.items()}
    for writer in writers.values():
        writer.writerow(["user_id", "parent_asin", "rating", "timestamp", "history"])
    for user, item, time, rating in EVENTS:
        before = sorted((t, i) for u, i, t, _ in EVENTS if u == user and t < time)
        told = (history or {}).get((user, item), " ".join(i for _, i in before))
        split = "test" if time >= TEST_FROM else "valid" if time >= VALID_FROM else "train"
        writers[split].writerow([user, item, rating, START + time, told])
    contents = {f"Video_Games.{split}.csv": text.getvalue() for split, text in texts.items()}
    contents["meta_Video_Games.jsonl"] = "".join(json.dumps(product) + "\n" for product in PRODUCTS)
    for name, content in contents.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (folder / name).write_text(content)
    return folder


def prepared(raw: Path, to: Path, **options: object) -> Prepared:
    return prepare(SMALL, raw=raw, data_dir=to, **options)  # type: ignore[arg-type]


def test_published_counts_and_places() -> None:
    published = {
        "amazon23-video-games": ("Video_Games", 22_976, 24_070),
        "amazon23-office-products": ("Office_Products", 65_873, 70_173),
        "amazon23-cell-phones": ("Cell_Phones_and_Accessories", 94_609, 103_084),
    }
    for name, (category, in_train, through_valid) in published.items():
        source = sources.get(name)
        assert source.expected_counts == {"items_in_train": in_train, "items_through_valid": through_valid}
        assert list(source.downloads) == [
            *(f"{category}.{split}.csv" for split in ("train", "valid", "test")),
            f"meta_{category}.jsonl",
        ]


def test_part_of_the_files_is_not_the_published_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got items_in_train 4 instead of 22,976, items_through_valid 6 instead of"):
        prepare(PUBLISHED, raw=write(tmp_path / "raw"), data_dir=tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_splits_are_those_of_the_files(tmp_path: Path, packed: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = prepared(write(tmp_path / "raw", packed=packed), tmp_path)
    assert not [record for record in caplog.records if "history" in record.message]
    items = pq.read_table(done.path / "items.parquet").to_pydict()
    asin = dict(zip(items["item_id"], items["raw_id"], strict=True))
    rows = {
        split: [(row["raw_user_id"], [asin[i] for i in row["item_ids"]]) for row in sequences_of(done.path, split)]
        for split in ("train", "valid", "test")
    }
    assert rows == {
        "train": [("uA", ["B02", "B01"]), ("uB", ["B05", "B04", "B01"])],
        "valid": [("uA", ["B02", "B01", "B09"]), ("uA", ["B02", "B01", "B09", "B03"])],
        "test": [
            ("uA", ["B02", "B01", "B09", "B03", "B08"]),
            ("uD", ["B06", "B01"]),
            ("uE", ["B07", "B09"]),
        ],
    }
    # B06 is in train, in no row of train; uF has no row at all, nor its B00.
    assert list(asin.values()) == ["B01", "B02", "B04", "B05", "B03", "B09", "B06", "B07", "B08", "B00"]
    assert done.metadata["counts"]["items_in_train"] == 4 and done.metadata["counts"]["items_through_valid"] == 6
    data = PreparedDataset.load(tmp_path, "amazon23-video-games")
    assert [asin[i] for i in data.unseen_items().tolist()] == list(asin.values())[4:]
    assert data.timestamps_E.max() == (START + 95) // 1000
    assert not prepared(tmp_path / "raw", tmp_path).written


def test_texts_are_the_published_fields(tmp_path: Path) -> None:
    done = prepared(write(tmp_path / "raw"), tmp_path)
    items = pq.read_table(done.path / "items.parquet")
    texts = item_texts(items, template_of("amazon23-video-games", text_columns(items)))
    told = dict(zip(items["raw_id"].to_pylist(), texts, strict=True))
    assert told["B09"] == "Pad & Cable. Fast Blue"
    assert told["B01"] == "Chair. Wide seat."
    assert told["B02"] == "Video Games, PC"
    assert told["B07"] == ""


def test_histories_that_are_not_the_events_before_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {("uA", "B01"): "B05", ("uA", "B03"): "B09 B01 B02", ("uD", "B01"): "", ("uE", "B07"): "B77"}
    with caplog.at_level(logging.WARNING):
        prepared(write(tmp_path / "raw", history=other), tmp_path)
    assert f"4 of {len(EVENTS)} rows have another history" in caplog.text


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw")
    with pytest.raises(DataError, match="--split: amazon23-video-games-temporal has splits of its own"):
        prepared(raw, tmp_path, split=TimeSplit())
    with pytest.raises(DataError, match="--csv: amazon23-video-games has splits of its own"):
        prepared(raw, tmp_path, csv=True)
    test = raw / "Video_Games.test.csv"
    content = test.read_text()
    test.write_text(content.replace(str(START + 95), "soon"))
    with pytest.raises(DataError, match=r"Video_Games.test.csv, row 4, column timestamp: got 'soon'"):
        prepared(raw, tmp_path)
    test.write_text(content.replace(str(START + 90), str(START)))
    with pytest.raises(DataError, match="splits: got an event of"):
        prepared(raw, tmp_path)
    test.unlink()
    with pytest.raises(DataError, match=r"got neither Video_Games\.test\.csv nor Video_Games\.test\.csv\.gz"):
        prepared(raw, tmp_path)
    (raw / "Video_Games.test.csv.gz").write_bytes(gzip.compress(content.encode())[:-9])
    with pytest.raises(DataError, match="truncated or damaged"):
        prepared(raw, tmp_path)
    assert not (tmp_path / "amazon23-video-games").exists()


def test_without_products_items_have_no_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = write(tmp_path / "raw")
    (raw / "meta_Video_Games.jsonl").unlink()
    done = prepared(raw, tmp_path)
    assert "title" not in pq.read_schema(done.path / "items.parquet").names
