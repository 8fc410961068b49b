"""Lists of items a user and semantic IDs of other projects as data, down to a model that trains on both."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import prepare
from generative_recommenders.data.sources import get
from generative_recommenders.tokenizers.catalogue import load_current

ROOT = Path(__file__).resolve().parents[2]
LISTS = {"u1": [3, 1, 2, 4], "u2": [2, 10, 1], "u3": [1, 2, 3, 10, 4]}
CODES = {"1": [0, 0], "2": [0, 1], "3": [1, 0], "4": [1, 1], "10": [2, 1]}


def prepared(raw: Path, data_dir: Path, **options: object) -> PreparedDataset:
    prepare(get("custom").with_options(**options), raw=raw, data_dir=data_dir, name="own")
    return PreparedDataset.load(data_dir, "own")


def lists_of(dataset: PreparedDataset) -> list[list[str]]:
    """Raw ids of each user's events."""
    names = dict(zip(dataset.catalog.item_ids.tolist(), dataset.catalog.raw_ids, strict=True))
    bounds = dataset.offsets.tolist()
    return [[names[i] for i in dataset.item_ids_E[a:b].tolist()] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("name", ["inter.json", "Games.inter.json"])
def test_lists_keep_their_order_and_ids_are_numbered_by_value(tmp_path: Path, name: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / name).write_text(json.dumps(LISTS))
    dataset = prepared(raw, tmp_path)
    assert dataset.catalog.raw_ids == ["1", "2", "3", "4", "10"]
    assert lists_of(dataset) == [[str(i) for i in items] for items in LISTS.values()]
    assert dataset.timestamps_E[:4].tolist() == [0, 1, 2, 3]
    assert "place in the sequence" in str(dataset.metadata["timestamps"])
    assert lists_of(prepared(raw / name, tmp_path / "file")) == lists_of(dataset)


def test_an_item_file_gives_titles_and_texts(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.inter.json").write_text(json.dumps({"0": [0, 1, 2], "1": [2, 1, 0]}))
    items = {"0": {"title": "Red  hat", "brand": "Acme", "categories": ["Hats", "Red"]}, "2": {"title": ""}}
    (raw / "a.item.json").write_text(json.dumps(items))
    dataset = prepared(raw, tmp_path)
    assert dataset.catalog.titles == ["Red  hat".replace("  ", " "), None, None]
    table = pq.read_table(dataset.folder / "items.parquet")
    assert table["text"].to_pylist() == ["Red hat. Acme. Hats, Red", None, None]


def test_sequences_of_a_parquet_file_keep_the_newest_items(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"user_id": [7, 9], "sequence_data": [[5, 6, 7, 8], [8, 5, 6]]}), file)
    dataset = prepared(file, tmp_path)
    assert lists_of(dataset) == [["5", "6", "7", "8"], ["8", "5", "6"]]
    batch = Split(dataset, 2, 0).batch(torch.tensor([0]), torch.tensor([0]))
    # NVIDIA's reader keeps the oldest instead.
    assert [dataset.catalog.raw_ids[i - 1] for i in batch.item_ids_T.tolist()] == ["6", "7"]


def test_a_user_has_one_row_of_a_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    texts = pa.array([["b"], ["a", "b", "c"], ["c"]], pa.list_(pa.large_string()))
    pq.write_table(pa.table({"user_id": [7, 9, 9], "sequence_data": texts}), file)
    with pytest.raises(DataError, match=r"got 2 rows of user .*9.*, expected one row a user"):
        prepared(file, tmp_path)
    pq.write_table(pa.table({"user_id": [7, 9, 8], "sequence_data": texts}), file)
    assert lists_of(prepared(file, tmp_path)) == [["b"], ["c"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 2]", "inter.json: got list, expected an object, a list of items a user"),
        ("{", "inter.json: not JSON"),
        ('{"a": 3}', "user 'a': got int, expected a list of items"),
        ('{"a": [1, 2], "b": [1, 1.5]}', "user 'b': got the item 1.5, expected an integer or text"),
        ('{"a": [1, true]}', "user 'a': got the item True"),
        ('{"a": [1], "a": [2]}', "got 'a' twice, expected every key once"),
        ('{"a": ["\\ud800"]}', "got an id that is no Unicode text"),
        ('{"a": []}', "got no events, expected lists of items"),
    ],
)
def test_what_is_no_list_of_items_is_told_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "inter.json").write_text(content)
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "inter.json", tmp_path)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "own").exists()


def test_two_files_of_events_are_one_too_many(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("a.inter.json", "b.inter.json"):
        (raw / name).write_text(json.dumps(LISTS))
    with pytest.raises(DataError, match=r"got events in a.inter.json, b.inter.json, expected one file"):
        prepared(raw, tmp_path)


@pytest.mark.parametrize("kind", ["json", "pt"])
def test_imported_ids_train_a_model(tmp_path: Path, kind: str) -> None:
    (tmp_path / "inter.json").write_text(json.dumps({f"u{n}": items for n in range(8) for items in LISTS.values()}))
    if kind == "json":
        ids = tmp_path / "semantic_ids.json"
        ids.write_text(json.dumps({item: [f"<a_{a}>", f"<b_{b}>"] for item, (a, b) in CODES.items()}))
    else:
        ids = tmp_path / "item-sid-mapping.pt"
        torch.save(torch.tensor(list(CODES.values())).T.contiguous(), ids)
    arguments = ["--dataset=custom", f"--raw={tmp_path / 'inter.json'}", f"--semantic_ids={ids}", "--name=own"]
    command = [sys.executable, "preprocess_public_data.py", *arguments, f"--data_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "imported: 5 distinct of 5 items" in done.stdout
    table = load_current(tmp_path / "own" / "semantic_ids" / "imported")
    assert table.codes_NL.tolist() == list(CODES.values())
    bindings = [
        "main.experiment = @train_generative",
        "train_generative.dataset_name = 'own'",
        "train_generative.semantic_ids = ('imported',)",
        "train_generative.model = 'SIDGR'",
        "train_generative.samples = 'last'",
        "train_generative.num_epochs = 1",
        "train_generative.top_k = 10",
        *(f"sid_gr.{n}" for n in ("num_blocks = 1", "dim = 8", "num_heads = 2")),
    ]
    places = [f"--data_dir={tmp_path}", f"--exps_dir={tmp_path / 'exps'}", "--device=cpu"]
    command = [sys.executable, "main.py", *places, *(f"--gin_bindings={b}" for b in bindings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("TEST eval:")


def test_ids_that_lack_an_item_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inter.json").write_text(json.dumps(LISTS))
    ids = tmp_path / "semantic_ids.json"
    ids.write_text(json.dumps({"1": ["<a_0>", "<b_0>"]}))
    arguments = ["--dataset=custom", f"--raw={tmp_path / 'inter.json'}", f"--semantic_ids={ids}", "--name=own"]
    command = [sys.executable, "preprocess_public_data.py", *arguments, f"--data_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "own" / "semantic_ids" / "imported").exists()
