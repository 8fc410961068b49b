"""Histories of users in raw ids, as a person keeps them: parquet, csv or json, one row a user.

Columns: `item_ids`, a list or text such as "3186,1270" or "[3186, 1270]"; optionally `user_id` (else the row number),
`timestamps` (the same number of integers, seconds), `ratings` (the same number of ratings or codes of event types as
the model was trained on, for models that read them), the event columns a model reads (as many integers) and
`request_timestamp` (the time recommendations are asked for; the last event's where it is missing).
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.tables import TIME_LIMIT, column_names, read_delimited


@dataclass(frozen=True)
class Histories:
    """Parallel lists over users; raw item ids are strings, oldest first.

    `named` tells whether `user_ids` are raw ids of users, and not the numbers of the rows. `events` are further columns
    of the events by name.
    """

    user_ids: list[str]
    raw_item_ids: list[list[str]]
    timestamps: list[list[int] | None]
    request_timestamps: list[int | None]
    ratings: list[list[float]] | None = None
    named: bool = True
    events: dict[str, list[list[int]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user_ids)


def read_table(path: Path) -> pd.DataFrame:
    """Rows of a parquet, csv or json file (a json array of objects, or one object a line).

    Raises:
        DataError: missing, empty, unreadable or of another kind.
    """
    readers: dict[str, Any] = {
        ".parquet": pd.read_parquet,
        ".csv": _read_csv,
        ".json": lambda p: pd.read_json(p, dtype=False),
        ".jsonl": lambda p: pd.read_json(p, dtype=False, lines=True),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: got a {path.suffix or 'nameless'} file, expected one of {', '.join(readers)}")
    if not path.exists():
        raise DataError(f"{path}: no such file; expected histories with a column item_ids")
    try:
        table: pd.DataFrame = readers[path.suffix](path)
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from error
    if table.empty:
        raise DataError(f"{path}: got no rows, expected one row a user")
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    """Cells as text. A list without quotes has more cells than the header, which pandas alone would guess at."""
    content = pa.py_buffer(path.read_bytes())
    names = column_names(content, ",")
    read_delimited(content, dict.fromkeys(names, pa.string()), where=str(path), nullable=names)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def read_histories(path: Path, event_columns: Iterable[str] = ()) -> Histories:
    """Parse a file of histories, with those of the columns `event_columns` that it has.

    Raises:
        DataError: naming file, row and column.
    """
    table = read_table(path)
    if "item_ids" not in table.columns:
        raise DataError(f"{path}: column item_ids is missing; got {', '.join(map(str, table.columns))}")
    items = [_list(value, path, row, "item_ids") for row, value in enumerate(table["item_ids"])]
    times: list[list[int] | None] = [None] * len(items)
    if "timestamps" in table.columns:
        parsed = _parallel(table, "timestamps", items, path)
        times = [[_integer(v, path, row, "timestamps") for v in values] for row, values in enumerate(parsed)]
    ratings = None
    if "ratings" in table.columns:
        given = _parallel(table, "ratings", items, path)
        ratings = [[_number(v, path, row, "ratings") for v in values] for row, values in enumerate(given)]
    events = {}
    for name in event_columns:
        if name in table.columns:
            codes = _parallel(table, name, items, path)
            events[name] = [[_code(v, path, row, name) for v in values] for row, values in enumerate(codes)]
    requests: list[int | None] = [None] * len(items)
    if "request_timestamp" in table.columns:
        column = "request_timestamp"
        requests = [None if _absent(v) else _integer(v, path, row, column) for row, v in enumerate(table[column])]
    users = (
        table["user_id"].map(_raw_id).tolist() if "user_id" in table.columns else [str(i) for i in range(len(items))]
    )
    return Histories(users, items, times, requests, ratings, named="user_id" in table.columns, events=events)


def _parallel(table: pd.DataFrame, column: str, items: list[list[str]], path: Path) -> list[list[str]]:
    """Lists of a column that has an element for each item."""
    parsed = [_list(value, path, row, column) for row, value in enumerate(table[column])]
    for row, (ids, values) in enumerate(zip(items, parsed, strict=True)):
        if len(ids) != len(values):
            raise DataError(f"{path}: row {row + 1} has {len(ids)} item_ids and {len(values)} {column}, expected equal")
    return parsed


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _raw_id(value: Any) -> str:
    """Raw ids are compared as text; 318.0 read from a column with gaps is 318."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _list(value: Any, path: Path, row: int, column: str) -> list[str]:
    if _absent(value) if not hasattr(value, "__len__") or isinstance(value, str) else False:
        return []
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}: row {row + 1}, {column}: cannot read the list {text[:40]!r}") from error
        else:
            value = text.split(",")
    if not hasattr(value, "__iter__"):
        raise DataError(f"{path}: row {row + 1}, {column}: got {value!r}, expected a list")
    return [_raw_id(v) for v in value]


def _number(value: str, path: Path, row: int, column: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{path}: row {row + 1}, {column}: got {value[:40]!r}, expected a number")
    return number


def _code(value: str, path: Path, row: int, column: str) -> int:
    number = _number(value, path, row, column)
    if not number.is_integer():
        raise DataError(f"{path}: row {row + 1}, {column}: got {value[:40]!r}, expected an integer")
    return int(number)


def _integer(value: Any, path: Path, row: int, column: str) -> int:
    exact = isinstance(value, numbers.Integral) or (isinstance(value, str) and value.lstrip("-").isdigit())
    where = f"{path}: row {row + 1}, {column}"
    try:
        seconds = int(value) if exact else int(float(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: got {str(value)[:40]!r}, expected seconds as an integer") from error
    if not -TIME_LIMIT < seconds < TIME_LIMIT:
        raise DataError(f"{where}: got {str(value)[:40]!r}, expected seconds between -2^62 and 2^62")
    return seconds
