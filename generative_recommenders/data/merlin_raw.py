"""Session tables as NVIDIA Merlin exports them: `train.parquet`, `valid.parquet`, `test.parquet`, a row a session.

A table has the columns `item_id_list_seq` and `item_event_name_list_seq` (lists of equal length, integers or text),
`user_session` (integer or text) and `timestamp_first` (integer). Rows are counted from 1 in messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.staged_files import staged_files
from generative_recommenders.data.tables import TIME_LIMIT, check_no_missing, to_numpy

SPLITS = ("train", "valid", "test")
ITEMS, EVENT_TYPES, USER, TIME = "item_id_list_seq", "item_event_name_list_seq", "user_session", "timestamp_first"
COLUMNS = (ITEMS, EVENT_TYPES, USER, TIME)
_EXPECTED_LISTS = "lists of integers or of text"


@dataclass(frozen=True)
class RawSessions:
    """One table; S sessions, E events laid end to end.

    Attributes:
        where: how messages name the file.
        users: (S,), int64 or large_string.
        lengths: int64 (S,), events a session, 0 or more.
        items, event_types: (E,), int64 or large_string each.
        first_timestamps: int64 (S,).
    """

    where: str
    users: pa.ChunkedArray
    lengths: np.ndarray
    items: pa.ChunkedArray
    event_types: pa.ChunkedArray
    first_timestamps: np.ndarray


def file_name(split: str) -> str:
    """Name of the table of a split."""
    return f"{split}.parquet"


def open_raw(raw: Path) -> RawFiles:
    """The folder (or zip archive) with the three tables; those of a folder lie directly in it.

    Raises:
        DataError: the folder or one of the tables is absent.
    """
    advice = "put the three tables there or name their folder with --raw"
    if not raw.exists():
        raise DataError(f"{raw}: no such folder, expected one with {', '.join(map(file_name, SPLITS))}; {advice}")
    files = RawFiles(raw)
    # `RawFiles` also looks one folder down, where an older table would go unnoticed.
    found = (lambda name: (raw / name).is_file()) if raw.is_dir() else files.has
    absent = next((file_name(split) for split in SPLITS if not found(file_name(split))), None)
    if absent is not None:
        raise DataError(f"{raw}: got no {absent}, expected {', '.join(map(file_name, SPLITS))}; {advice}")
    return files


def read_sessions(files: RawFiles, split: str) -> RawSessions:
    """Read and check the table of a split.

    Raises:
        DataError: the file is absent or unreadable, a column is missing or of another type, a cell or a list element
            is null or empty text, or the two lists of a row differ in length.
    """
    name = file_name(split)
    where = files.where(name)
    source = pa.BufferReader(files.read(name))
    try:
        present = pq.read_schema(source).names
        source.seek(0)
        table = pq.read_table(source, columns=[column for column in COLUMNS if column in present])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{where}: not a readable Parquet file ({str(error).splitlines()[0]}); export it again"
        ) from error
    missing = next((column for column in COLUMNS if column not in present), None)
    if missing is not None:
        raise DataError(
            f"{where}: column {missing!r} is missing, got the columns {', '.join(present[:20])}; rename or add it"
        )
    if table.num_rows == 0:
        raise DataError(f"{where}: got no rows, expected one row a session; export it again")
    lengths, items = _list_column(table, ITEMS, where)
    event_lengths, event_types = _list_column(table, EVENT_TYPES, where)
    differs = lengths != event_lengths
    if differs.any():
        row = int(np.argmax(differs))
        raise DataError(
            f"{where}, row {row + 1}: got {lengths[row]} values in {ITEMS} and {event_lengths[row]} in {EVENT_TYPES}, "
            "expected as many; fix the row"
        )
    check_no_missing(table.select([USER, TIME]), where)
    users = _ids(table[USER], "integers or text", f"{where}, column {USER}")
    _check_no_empty_text(users, np.arange(table.num_rows), where, USER)
    return RawSessions(where, users, lengths, items, event_types, _timestamps(table[TIME], where))


def write_tables(folder: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write `<split>.parquet` for every split into `folder`; other files there stay.

    Raises:
        DataError: the place cannot be written.
    """
    with staged_files(folder) as stage:
        for split, table in tables.items():
            pq.write_table(table, stage / file_name(split), compression="zstd")


def _list_column(table: pa.Table, name: str, where: str) -> tuple[np.ndarray, pa.ChunkedArray]:
    """Lengths int64 (S,) and values (E,) of a list column without nulls."""
    column = table[name]
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{where}, column {name}: got type {kind}, expected {_EXPECTED_LISTS}; export it as lists")
    if column.null_count:
        row = int(np.argmax(to_numpy(pc.is_null(column)))) + 1
        raise DataError(f"{where}, row {row}, column {name}: got null, expected a list; fix the row")
    lengths = to_numpy(pc.list_value_length(column)).astype(np.int64)
    values = pc.list_flatten(column)
    if values.null_count:
        event = int(np.argmax(to_numpy(pc.is_null(values))))
        row = int(np.searchsorted(np.cumsum(lengths), event, side="right")) + 1
        raise DataError(f"{where}, row {row}, column {name}: got a null in the list, expected a value; fix the row")
    values = _ids(values, _EXPECTED_LISTS, f"{where}, column {name}")
    _check_no_empty_text(values, np.repeat(np.arange(len(lengths)), lengths), where, name)
    return lengths, values


def _ids(values: pa.ChunkedArray, expected: str, where: str) -> pa.ChunkedArray:
    """The values as int64 or large_string."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        values = values.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values.cast(pa.large_string())
    # A file of empty lists only has values of no type.
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where}: got values of type {kind}, expected {expected}; cast the column")
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: got an integer beyond 64 bits with sign, expected less; use text ids") from error


def _check_no_empty_text(values: pa.ChunkedArray, rows: np.ndarray, where: str, name: str) -> None:
    if not pa.types.is_large_string(values.type):
        return
    empty = pc.equal(values, pa.scalar("", pa.large_string()))
    if pc.any(empty).as_py():
        row = rows[int(np.argmax(to_numpy(empty)))] + 1
        raise DataError(f"{where}, row {row}, column {name}: got an empty text, expected an id; fix the row")


def _timestamps(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """int64 (S,), strictly between -TIME_LIMIT and TIME_LIMIT."""
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"{where}, column {TIME}: got type {column.type}, expected integers (such as Unix seconds); cast the column"
        )
    limit = pa.scalar(TIME_LIMIT, pa.uint64() if pa.types.is_uint64(column.type) else pa.int64())
    beyond = pc.greater_equal(column, limit)
    if pa.types.is_signed_integer(column.type):
        beyond = pc.or_(beyond, pc.less_equal(column, pa.scalar(-TIME_LIMIT, pa.int64())))
    if pc.any(beyond).as_py():
        row = int(np.argmax(to_numpy(beyond)))
        raise DataError(
            f"{where}, row {row + 1}, column {TIME}: got {column[row].as_py()}, expected an integer between -2^62 and "
            "2^62; fix the row"
        )
    return to_numpy(column.cast(pa.int64()))
