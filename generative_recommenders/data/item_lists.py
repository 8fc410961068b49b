"""Events as lists of items a user, oldest first and without times: the files of semantic-ID projects.

    inter.json, *.inter.json   {"user": [item, item, ...]} of torch-rechub, LC-Rec and MiniOneRec
    *.item.json                {"item": {"title": ..., "brand": ..., "categories": ..., "description": ...}}, optional
    *.parquet                  columns `user_id` and `sequence_data`, a list of integers (NVIDIA's SID-GR)

Places in the list stand for times. Lists are kept whole: histories are cut when they are read, to their newest items.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.raw_files import RawFiles

USER, ITEM, TIMESTAMP = "user_id", "item_id", "timestamp"
SEQUENCE = "sequence_data"
EVENTS = ("inter.json", "*.inter.json")
ITEMS = "*.item.json"
NO_TIMES = "place in the sequence, from 0: the files hold no times"


@dataclass(frozen=True)
class ItemLists:
    """A row an event: columns `user_id`, `item_id` (text) and `timestamp` (place); titles and texts by raw item id."""

    events: pa.Table
    items: dict[str, dict[str, Any]]
    where: str


def names_of(raw: RawFiles) -> list[str]:
    """The files of this layout that are there: the events first."""
    events = sorted({name for pattern in EVENTS for name in raw.names(pattern)})
    return events + raw.names(ITEMS) if events else []


def read(raw: RawFiles) -> ItemLists:
    """Raises DataError where a file is no such JSON, there are several, or a list holds something else than ids."""
    names = names_of(raw)
    events = [name for name in names if not name.endswith(".item.json")]
    if len(events) > 1 or len(raw.folders(events[0])) > 1:
        found = ", ".join(events) if len(events) > 1 else ", ".join(raw.folders(events[0]))
        raise DataError(f"{raw.path}: got events in {found}, expected one file; name its folder with --raw")
    where = raw.where(events[0])
    lists = _object(raw, events[0], "a list of items a user")
    bad = next((user for user, items in lists.items() if not isinstance(items, list)), None)
    if bad is not None:
        raise DataError(f"{where}, user {bad!r}: got {type(lists[bad]).__name__}, expected a list of items")
    counts = np.fromiter((len(items) for items in lists.values()), np.int64, len(lists))
    flat = [item for items in lists.values() for item in items]
    odd = next((place for place, item in enumerate(flat) if type(item) not in (int, str)), None)
    if odd is not None:
        user = list(lists)[int(np.searchsorted(counts.cumsum(), odd, side="right"))]
        raise DataError(f"{where}, user {user!r}: got the item {flat[odd]!r}, expected an integer or text")
    try:
        names_U, names_E = pa.array(list(lists), pa.string()), pa.array([str(item) for item in flat], pa.string())
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: got an id that is no Unicode text ({error.reason}); fix the file") from error
    users = names_U.take(pa.array(np.repeat(np.arange(len(lists)), counts)))
    items: dict[str, dict[str, Any]] = {}
    for name in names[len(events) :]:
        items |= {key: value for key, value in _object(raw, name, "an object an item").items() if _is_object(value)}
    return ItemLists(_events(users, names_E, counts, where), items, where)


def events_of_rows(rows: pa.Table, where: str) -> pa.Table:
    """The events of a table with `user_id` and lists in `sequence_data`.

    Raises:
        DataError: `sequence_data` holds no lists of integers or text, or a user has several rows.
    """
    column = rows[SEQUENCE].combine_chunks()
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise DataError(f"{where}, column {SEQUENCE}: got type {kind}, expected lists of item ids; convert the column")
    value = kind.value_type
    if not (pa.types.is_integer(value) or pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise DataError(f"{where}, column {SEQUENCE}: got {kind}, expected lists of integers or text")
    per_user = pc.value_counts(rows[USER].combine_chunks())
    most = int(pc.index(per_user.field("counts"), pc.max(per_user.field("counts"))).as_py()) if len(per_user) else 0
    if len(per_user) < rows.num_rows:
        user, times = (per_user[most][name].as_py() for name in ("values", "counts"))
        raise DataError(f"{where}: got {times} rows of user {user!r}, expected one row a user; join them in order")
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    owners = pa.array(np.repeat(np.arange(rows.num_rows), counts))
    flat = pc.list_flatten(column)
    if flat.null_count:
        raise DataError(f"{where}, column {SEQUENCE}: got {flat.null_count} empty items, expected an id in every place")
    return _events(rows[USER].combine_chunks().take(owners), flat, counts, where)


def texts_of(items: dict[str, dict[str, Any]], raw_ids: pa.Array) -> dict[str, pa.Array]:
    """Columns `title` and `text` for the raw ids, null where nothing is known."""
    found = [items.get(raw_id, {}) for raw_id in raw_ids.to_pylist()]
    titles = [_words(item.get("title")) for item in found]
    fields = ("title", "brand", "categories", "description")
    texts = [". ".join(word for field in fields if (word := _words(item.get(field)))) or None for item in found]
    return {"title": pa.array(titles, pa.string()), "text": pa.array(texts, pa.string())}


def _events(users: pa.Array, items: pa.Array, counts: np.ndarray, where: str) -> pa.Table:
    if not len(items):
        raise DataError(f"{where}: got no events, expected lists of items; check that the file is complete")
    places = np.arange(len(items)) - np.repeat(counts.cumsum() - counts, counts)
    return pa.table({USER: users, ITEM: items, TIMESTAMP: places})


def _words(value: object) -> str | None:
    if isinstance(value, list):
        value = ", ".join(str(part) for part in value)
    text = " ".join(str(value).split()) if value is not None else ""
    return text or None


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _object(raw: RawFiles, name: str, expected: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{raw.where(name)}: got {twice!r} twice, expected every key once; join the entries")
        return found

    try:
        content = json.loads(raw.read(name).to_pybytes(), object_pairs_hook=unique)
    except ValueError as error:
        raise DataError(f"{raw.where(name)}: not JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise DataError(f"{raw.where(name)}: got {type(content).__name__}, expected an object, {expected}")
    return content
