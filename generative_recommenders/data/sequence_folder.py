"""A folder of sequences with their items, in which ids are already numbers.

    sequential_data.txt     a line a user, `user item item ...`, oldest first (the file of S3-Rec, Zhou et al., CIKM
                            2020, and P5, Geng et al., RecSys 2022)
    interactions.parquet    integers `user_id`, `item_id`, `position` (from 0 within a user), `timestamp` (seconds), and
                            where known `rating`
    items.jsonl.gz          `item_id`, and where known `asin`, `title`, `brand`, `categories` (paths, root first),
                            `textual_id` (keywords that name an item without a title)
    text_emb_*.npy          one float16 or float32 row an item, row k of item k + 1

One of the first two must be there; where both are, they must agree event by event. The last two may be absent. Unlike
other sources, ids are kept as they are, so that results published for this numbering can be compared.
"""

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.json_lines import read_json_lines
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, product_text
from generative_recommenders.data.tables import TIME_LIMIT, check_no_missing, to_numpy

logger = logging.getLogger(__name__)

SEQUENCES = "sequential_data.txt"
INTERACTIONS = "interactions.parquet"
ITEMS = "items.jsonl.gz"
EMBEDDINGS = "text_emb_*.npy"
_NUMBER = r"^[0-9]{1,18}$"
_TEXT = pa.string()
_ITEM_FIELDS = pa.schema(
    {
        "item_id": pa.int64(),
        "asin": _TEXT,
        "title": _TEXT,
        "brand": _TEXT,
        "categories": pa.list_(pa.list_(_TEXT)),
        "textual_id": _TEXT,
    }
)


@dataclass(frozen=True)
class _Events:
    """E events by user, oldest first within one; `ratings` and `timestamps` are None where the file has none."""

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None = None
    ratings: np.ndarray | None = None


def is_sequence_folder(raw: RawFiles) -> bool:
    """Whether `raw` is a folder or zip that holds sequences in this layout."""
    return not raw.is_single_file and (raw.has(SEQUENCES) or raw.has(INTERACTIONS))


def chosen_files(raw: RawFiles) -> list[str]:
    """Names of the files there that are read."""
    return [name for name in (SEQUENCES, INTERACTIONS, ITEMS) if raw.has(name)] + raw.names(EMBEDDINGS)


def read_sequence_folder(raw: RawFiles) -> RawEvents:
    """All events and items.

    Raises:
        DataError: a file is damaged or lacks a column, the two files of events differ (the message names the user), a
            user's times go back, or the embeddings do not have one row an item.
    """
    for name in chosen_files(raw):
        if len(raw.folders(name)) > 1:
            found = ", ".join(raw.folders(name)[:5])
            raise DataError(f"{raw.path}: got {name} in {found}, expected one dataset; name its folder with --raw")
    lines = _read_lines(raw) if raw.has(SEQUENCES) else None
    table = _read_interactions(raw) if raw.has(INTERACTIONS) else None
    if lines is not None and table is not None:
        _check_equal(raw, lines, table)
    events = table or lines
    assert events is not None
    facts: dict[str, Any] = {}
    timestamps, ratings = events.timestamps, events.ratings
    if timestamps is None:
        logger.warning("%s: no %s, so that places in the sequence stand for times", raw.path, INTERACTIONS)
        facts["timestamps"] = "place in the sequence, from 0: the files hold no times"
        timestamps = np.arange(len(events.users)) - np.repeat(_starts(events.users), _lengths(events.users))
    if ratings is None:
        facts["ratings"] = "all 1: the files hold none"
        ratings = np.ones(len(events.users), dtype=np.float32)
    return RawEvents(
        user_ids=events.users,
        item_ids=events.items,
        ratings=ratings,
        timestamps=timestamps,
        items=_with_embeddings(raw, _catalogue(raw, events.items)),
        facts=facts,
    )


def _read_lines(raw: RawFiles) -> _Events:
    where = raw.where(SEQUENCES)
    try:
        text = raw.read(SEQUENCES).to_pybytes().decode("ascii").rstrip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}, byte {error.start}: got no digit or space; get the file again") from error
    words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(pa.array(text.split("\n"))))
    counts = pc.list_value_length(words).to_numpy()
    if counts.min() < 2:
        line = int(np.argmax(counts < 2)) + 1
        raise DataError(f"{where}, line {line}: got no item, expected `user item item ...`; fix the line")
    flat = words.flatten()
    good = pc.match_substring_regex(flat, _NUMBER).to_numpy(zero_copy_only=False)
    if not good.all():
        place = int(np.argmin(good))
        line = int(np.searchsorted(counts.cumsum(), place, side="right")) + 1
        raise DataError(f"{where}, line {line}: got {flat[place].as_py()!r}, expected an integer id; fix the line")
    numbers = flat.cast(pa.int64()).to_numpy()
    starts = np.cumsum(counts) - counts
    line_users = numbers[starts]
    order = np.argsort(line_users, kind="stable")
    again = np.flatnonzero(np.diff(line_users[order]) == 0)
    if len(again):
        raise DataError(
            f"{where}: got user {line_users[order][again[0]]} on lines {order[again[0]] + 1} and "
            f"{order[again[0] + 1] + 1}, expected one line a user; join them"
        )
    is_item = np.ones(len(numbers), dtype=bool)
    is_item[starts] = False
    users, items = np.repeat(line_users, counts - 1), numbers[is_item]
    if items.min() < 1:
        line = int(np.repeat(np.arange(len(counts)), counts - 1)[np.argmin(items)]) + 1
        raise DataError(f"{where}, line {line}: got item 0, expected ids from 1, 0 is padding; add 1 to the ids")
    by_user = np.argsort(users, kind="stable")
    return _Events(users[by_user], items[by_user])


def _read_interactions(raw: RawFiles) -> _Events:
    where = raw.where(INTERACTIONS)
    content = pa.BufferReader(raw.read(INTERACTIONS))
    names = ["user_id", "item_id", "position", "timestamp"]
    try:
        schema = pq.read_schema(content)
        for name in names:
            if name not in schema.names:
                raise DataError(f"{where}: column {name!r} is missing, got {', '.join(schema.names[:20])}; add it")
            if not pa.types.is_integer(schema.field(name).type):
                kind = schema.field(name).type
                raise DataError(f"{where}, column {name}: got type {kind}, expected integers; convert the column")
        if "rating" in schema.names:
            names.append("rating")
        table = pq.read_table(content, columns=names)
        if "rating" in names:
            table = table.set_column(4, "rating", table["rating"].cast(pa.float32(), safe=False))
        table = pa.table([column.cast(pa.int64()) for column in table.columns[:4]] + table.columns[4:], names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: truncated or damaged ({str(error).splitlines()[0]}); get it again") from error
    if table.num_rows == 0:
        raise DataError(f"{where}: got no rows, expected one row an event; check that the file is complete")
    check_no_missing(table, where)
    users, items, positions, timestamps, *ratings = (to_numpy(column) for column in table.columns)
    _check_rows(where, "item_id", items, items >= 1, "an id from 1, 0 is padding")
    _check_rows(where, "timestamp", timestamps, (timestamps > -TIME_LIMIT) & (timestamps < TIME_LIMIT), "seconds")
    order = np.lexsort((positions, users))
    users, items, positions, timestamps = (column[order] for column in (users, items, positions, timestamps))
    expected = np.arange(len(users)) - np.repeat(_starts(users), _lengths(users))
    if (positions != expected).any():
        row = int(np.argmax(positions != expected))
        raise DataError(
            f"{where}, user {users[row]}: got position {positions[row]} in place of {expected[row]}, "
            "expected 0, 1, ... within a user; number the events again"
        )
    back = (np.diff(timestamps) < 0) & (np.diff(users) == 0)
    if back.any():
        row = int(np.argmax(back)) + 1
        raise DataError(
            f"{where}, user {users[row]}: the time at position {positions[row]} is earlier than the one before, "
            "expected positions in the order of time; number the events again"
        )
    return _Events(users, items, timestamps, ratings[0][order] if ratings else None)


def _check_rows(where: str, name: str, values: np.ndarray, good: np.ndarray, expected: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(f"{where}, row {row + 1}, column {name}: got {values[row]}, expected {expected}; fix the row")


def _starts(users: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))


def _lengths(users: np.ndarray) -> np.ndarray:
    return np.diff(np.append(_starts(users), len(users)))


def _check_equal(raw: RawFiles, lines: _Events, table: _Events) -> None:
    """Raise `DataError` for the first user of whom the two files tell different things."""
    shared = min(len(lines.users), len(table.users))
    same = (lines.users[:shared] == table.users[:shared]) & (lines.items[:shared] == table.items[:shared])
    if same.all() and len(lines.users) == len(table.users):
        return
    place = shared if same.all() else int(np.argmin(same))
    user = min(int(events.users[place]) for events in (lines, table) if place < len(events.users))

    def told(events: _Events) -> str:
        items = events.items[events.users == user]
        text = " ".join(map(str, items[:20])) + (" ..." if len(items) > 20 else "")
        return text if len(items) else "nothing"

    raise DataError(
        f"{raw.path}: user {user} has the items {told(lines)} in {SEQUENCES} and {told(table)} in {INTERACTIONS}, "
        "expected the same; take both files from one place, or remove one"
    )


def _catalogue(raw: RawFiles, event_items: np.ndarray) -> pa.Table:
    if not raw.has(ITEMS):
        logger.warning("%s: no %s, so that items have no titles", raw.path, ITEMS)
        ids = np.unique(event_items)
        return pa.table({"item_id": ids, "raw_id": [str(item) for item in ids.tolist()]})
    where = raw.where(ITEMS)
    optional = [name for name in _ITEM_FIELDS.names if name != "item_id"]
    rows = read_json_lines(raw.read(ITEMS), _ITEM_FIELDS, where=where, nullable=optional).sort_by("item_id")
    ids = to_numpy(rows["item_id"])
    if ids[0] < 1 or (np.diff(ids) == 0).any():
        got = ids[0] if ids[0] < 1 else f"{ids[int(np.argmax(np.diff(ids) == 0))]} twice"
        raise DataError(f"{where}: got item_id {got}, expected distinct ids from 1, 0 is padding; fix the ids")
    first_paths = (next(iter(paths or []), None) for paths in rows["categories"].to_pylist())
    categories = [[name for name in path or [] if name] for path in first_paths]
    names = pc.coalesce(rows["title"], rows["textual_id"]).to_pylist()
    return pa.table(
        {
            "item_id": ids,
            "raw_id": pc.coalesce(rows["asin"], rows["item_id"].cast(_TEXT)),
            "title": rows["title"],
            "text": pa.array(map(product_text, names, rows["brand"].to_pylist(), categories), _TEXT),
            "categories": pa.array(categories, pa.list_(_TEXT)),
            "brand": rows["brand"],
            "textual_id": rows["textual_id"],
        }
    )


def _with_embeddings(raw: RawFiles, items: pa.Table) -> pa.Table:
    names = raw.names(EMBEDDINGS)
    if not names:
        return items
    if len(names) > 1:
        raise DataError(f"{raw.path}: got {', '.join(names)}, expected one file of embeddings; remove the others")
    where, ids = raw.where(names[0]), items["item_id"].to_numpy()
    values = _array(raw.read(names[0]), where)
    if values.ndim != 2 or len(values) != len(ids) or ids[-1] != len(ids) or not values.shape[1]:
        raise DataError(
            f"{where}: got the shape {values.shape} for {len(ids):,} items with ids up to {ids[-1]:,}, "
            "expected one row an item and ids without gaps; remove the file or compute it again"
        )
    with np.errstate(over="ignore"):
        values = values.astype(np.float16)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(f"{where}, row {int(np.argmax(bad)) + 1}: got a number that float16 cannot hold; compute again")
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * values.shape[1])
    return items.append_column("embedding", pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1))))


def _array(content: pa.Buffer, where: str) -> np.ndarray:
    """The array of an `.npy` file, a view of its bytes: nothing of the size its header states is allocated."""
    stream = io.BytesIO(content.slice(0, min(content.size, 1 << 16)).to_pybytes())
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if fortran or dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
            raise DataError(f"{where}: got {dtype} (Fortran order: {fortran}), expected float16 or float32 by rows")
        return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)
    except ValueError as error:
        raise DataError(f"{where}: truncated or no .npy file ({error}); compute it again") from error
