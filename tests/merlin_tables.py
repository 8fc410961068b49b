"""Small Merlin session tables, and reading back what is made of them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, TIME, USER, write_tables

ROOT = Path(__file__).resolve().parent.parent

Row = tuple[list[Any], list[Any], Any, Any]
# items, event types, session, first time
ROWS: dict[str, list[Row]] = {
    "train": [
        ([30, 9, 30], [4, 3, 3], "b", 100),
        ([9], [3], "a", 50),
        ([100, 9], [3, 4], "a", 60),
    ],
    "valid": [([9, 100, 30, 9], [3, 3, 4, 4], "c", 200)],
    "test": [([100, 7], [3, 3], "b", 300), ([9, 30], [4, 4], "d", 290)],
}


def session_table(rows: Sequence[Row]) -> pa.Table:
    return pa.table(dict(zip((ITEMS, EVENT_TYPES, USER, TIME), zip(*rows, strict=True), strict=True)))


def write_rows(folder: Path, **changed: pa.Table) -> Path:
    """The tables of `ROWS`, with some splits replaced."""
    write_tables(folder, {split: changed.get(split, session_table(rows)) for split, rows in ROWS.items()})
    return folder


def sequences_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"sequences_{split}.parquet").to_pylist()


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
