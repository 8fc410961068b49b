"""A prepared dataset of toy size with something to learn, as `preprocess_public_data.py` would leave it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_USERS = 60
NUM_ITEMS = 40
# Ids with gaps: nothing may take an item's id for its place in the catalog.
ID_STEP = 3
FIRST_TIMESTAMP = 1_000_000_000


def raw_id(item_id: int) -> str:
    return f"sku-{item_id}"


def write_toy_dataset(
    data_dir: Path, name: str = "toy", *, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS, seed: int = 0
) -> Path:
    """Write `<data_dir>/<name>/` and return it.

    Users walk a ring of items, mostly one place a step, so the next item can be learned. User n has 4 + n % 12 events;
    item ids are 3, 6, ..., their raw ids "sku-3", ..., their titles "Item 3", ...
    """
    generator = np.random.default_rng(seed)
    sequences = []
    for user in range(num_users):
        steps = np.where(generator.random(4 + user % 12) < 0.85, 1, generator.integers(2, num_items, 4 + user % 12))
        places = (generator.integers(num_items) + steps.cumsum()) % num_items
        sequences.append(ID_STEP * (places + 1))
    stamps = [FIRST_TIMESTAMP + 86_400 * np.arange(len(s)) + generator.integers(3_600, size=len(s)) for s in sequences]
    ratings = [generator.integers(1, 6, size=len(s)).astype(np.float32) for s in sequences]
    ids = ID_STEP * np.arange(1, num_items + 1)
    folder = data_dir / name
    folder.mkdir(parents=True)
    columns = {
        "user_id": pa.array(np.arange(1, num_users + 1)),
        "item_ids": pa.array(sequences, pa.list_(pa.int64())),
        "ratings": pa.array(ratings, pa.list_(pa.float32())),
        "timestamps": pa.array(stamps, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), folder / "sequences.parquet")
    items = {"item_id": ids, "raw_id": [raw_id(i) for i in ids.tolist()], "title": [f"Item {i}" for i in ids.tolist()]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    counts = {
        "users": num_users,
        "items_listed": num_items,
        "items_rated": len(np.unique(np.concatenate(sequences))),
        "events": sum(map(len, sequences)),
    }
    facts = {"name": name, "version": 1, "source": "toy", "checksum": {}, "options": {}, "counts": counts}
    facts |= {"max_item_id": int(ids[-1]), "split": "leave_one_out", "command": "tests/toy.py"}
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder
