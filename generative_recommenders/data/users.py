"""Who was trained on: raw user ids and the numbers that a model with user features knows them by."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.dataset import PreparedDataset

USERS_FILE = "users.parquet"
_RAW = "raw_user_id"


def write_users(dataset: PreparedDataset, path: Path) -> None:
    """`user_id` and `raw_user_id` of the dataset's users; where the data keeps no raw ids the numbers are the ids."""
    numbers = pa.array(dataset.user_ids_U.numpy())
    raw = numbers.cast(pa.string())
    for source in sorted(dataset.folder.glob("sequences*.parquet")):
        if _RAW in pq.read_schema(source).names:
            table = pq.read_table(source, columns=["user_id", _RAW])
            names = table[_RAW].combine_chunks().take(pc.index_in(numbers, table["user_id"].combine_chunks()))
            raw = pc.coalesce(names.cast(pa.string()), raw)
    aside = path.with_name(f".{path.name}")
    pq.write_table(pa.table({"user_id": numbers, _RAW: raw}), aside)
    aside.replace(path)


def read_users(path: Path) -> dict[str, int]:
    """Numbers by raw id; empty where there is no such file."""
    if not path.is_file():
        return {}
    table = pq.read_table(path)
    return dict(zip(table[_RAW].to_pylist(), table["user_id"].to_pylist(), strict=True))
