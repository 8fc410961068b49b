"""Files that belong to items stay theirs when splits number the items anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import sources
from generative_recommenders.data.preprocess import Prepared, prepare
from generative_recommenders.data.temporal import TimeSplit
from generative_recommenders.data.text_embeddings import embed_items
from generative_recommenders.tokenizers.catalogue import load_current
from preprocess_public_data import import_for


@pytest.fixture(scope="module")
def folders(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Raw Beauty, prepared without and with splits."""
    raw, data_dir = shared_dir / "data" / "amazon-2014" / "beauty", tmp_path_factory.mktemp("data")
    source = sources.get("amzn14-beauty")
    plain, split = (prepare(source, raw=raw, data_dir=data_dir, split=rule).path for rule in (None, TimeSplit()))
    return raw, plain, split


def test_items_keep_all_that_is_told_of_them(folders: tuple[Path, Path, Path]) -> None:
    _, plain, split = folders
    old, new = (pq.read_table(folder / "items.parquet") for folder in (plain, split))
    places = new["source_item_id"].to_numpy() - 1
    assert (places != np.arange(len(places))).sum() > 1000
    assert new.select(old.column_names[1:]).equals(old.select(old.column_names[1:]).take(pa.array(places)))


@pytest.mark.parametrize("kind", ["npy", "parquet", "raw_ids", "prepared"])
def test_each_item_has_its_own_embedding(folders: tuple[Path, Path, Path], kind: str, tmp_path: Path) -> None:
    raw, plain, split = folders
    (path,) = raw.glob("text_emb_*.npy")
    values = np.load(path)
    if kind == "parquet":
        rows = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"item_id": np.arange(1, len(values) + 1), "embedding": rows}), path)
    elif kind == "raw_ids":
        asins = pq.read_table(split / "items.parquet")["raw_id"].to_pylist()
        path = tmp_path / "x.npy"
        np.save(path, values[pq.read_table(split / "items.parquet")["source_item_id"].to_numpy() - 1])
        (tmp_path / "x.raw_ids.txt").write_text("\n".join(asins) + "\n")
    options = {"encoder": "prepared"} if kind == "prepared" else {"encoder": "file", "path": path}
    old, new = (embed_items(folder, **options) for folder in (plain, split))  # type: ignore[arg-type]
    titles = [
        pq.read_table(folder / "items.parquet", columns=["raw_id", "title"]).to_pydict() for folder in folders[1:]
    ]
    row = {asin: place for place, asin in enumerate(titles[0]["raw_id"])}
    places = np.array([row[asin] for asin in titles[1]["raw_id"]])
    assert [titles[0]["title"][place] for place in places] == titles[1]["title"]
    assert new.item_ids_N.tolist() == list(range(1, len(places) + 1))
    assert np.array_equal(new.values_ND.numpy(), old.values_ND.numpy()[places])
    assert np.array_equal(new.values_ND.numpy()[:50], values[places[:50]].astype(np.float32))


def test_imported_semantic_ids_are_those_of_the_item(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    raw, _, split = folders
    codes = np.load(raw / "semantic_ids_letter.u8.npy")
    file = tmp_path / "semantic_ids.json"
    words = [[f"<{letter}_{code}>" for letter, code in zip("abcd", row, strict=True)] for row in codes.tolist()]
    file.write_text(json.dumps({str(number): row for number, row in enumerate(words, start=1)}))
    import_for(Prepared(split, {}, written=True), file)
    table = load_current(split / "semantic_ids" / "imported")
    items = pq.read_table(split / "items.parquet")
    assert table.raw_ids is not None and table.raw_ids.tolist() == items["raw_id"].to_pylist()
    assert np.array_equal(table.codes_NL.numpy(), codes[items["source_item_id"].to_numpy() - 1])
