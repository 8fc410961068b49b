"""Events of one's own: a CSV or Parquet file with user, item and time columns, and perhaps a rating.

Raw ids may be integers or text; they become 1..n in sorted order (numerically where all are integers) and are kept as
`raw_id` and `raw_user_id`. Times are seconds, or ISO 8601 dates, which are taken as UTC where they name no zone. An
item table may add titles, texts, categories and items that nobody has rated.

A folder of sequences whose ids are numbers already keeps them (`generative_recommenders.data.sequence_folder`); lists
of items without times are read too (`generative_recommenders.data.item_lists`).
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data import item_lists, sequence_csv, sequence_folder
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source, item_text
from generative_recommenders.data.tables import (
    NUMBER,
    TIME_LIMIT,
    check_no_missing,
    column_names,
    encoded,
    read_delimited,
    to_numpy,
)

logger = logging.getLogger(__name__)

_RATING = "rating"
_CODED_TEXT = pa.dictionary(pa.int32(), pa.string())
_INTEGER_ID = r"^(0|-?[1-9][0-9]{0,17})$"
_PADDED_INTEGER = r"^0[0-9]+$"
# As seconds this is in the year 5138: nobody's clock, but somebody's milliseconds.
_MILLISECONDS_FROM = 100_000_000_000
_TICKS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True, kw_only=True)
class CustomSource(Source):
    """Reads a `.csv`, `.tsv` (either also `.gz`) or `.parquet` file of events, a `sasrec_format.csv`, or a folder of
    sequences.

    Attributes:
        rating_column: None takes the column `rating` where there is one; without ratings all are 1.
        items: optional table of `item_column` and any of `title_column`, `text`, `categories` (in CSV joined by `|`).
        string_ids: take ids as text even where nearly all are integers.
    """

    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = "timestamp"
    rating_column: str | None = None
    title_column: str = "title"
    items: Path | None = None
    string_ids: bool = False
    option_names: ClassVar[tuple[str, ...]] = (
        "user_column",
        "item_column",
        "timestamp_column",
        "rating_column",
        "title_column",
        "items",
        "string_ids",
    )

    @property
    def options(self) -> dict[str, Any]:
        if self.items is None or not self.items.is_file():
            return super().options
        return {**super().options, "items_sha256": hashlib.sha256(self.items.read_bytes()).hexdigest()}

    def chosen_files(self, raw: RawFiles) -> list[str]:
        return (
            sequence_folder.chosen_files(raw) if sequence_folder.is_sequence_folder(raw) else item_lists.names_of(raw)
        )

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        if sequence_folder.is_sequence_folder(raw):
            return self._read_folder(raw)
        if item_lists.names_of(raw):
            return self._read_lists(raw)
        file = _TableFile(raw)
        if sequence_csv.ITEMS in file.names:
            return self._read_sequences(file)
        if item_lists.SEQUENCE in file.names:
            rows = file.read({self.user_column: _CODED_TEXT, item_lists.SEQUENCE: None})
            rows = rows.rename_columns([item_lists.USER, item_lists.SEQUENCE])
            return self._listed(item_lists.events_of_rows(rows, file.where), file.where)
        rating = self.rating_column or (_RATING if _RATING in file.names else None)
        kinds: dict[str, pa.DataType | None] = {
            self.user_column: _CODED_TEXT,
            self.item_column: _CODED_TEXT,
            self.timestamp_column: None,
        }
        if rating is not None:
            kinds[rating] = pa.float32()
        return self._events(file.read(kinds), file.where, rating)

    def _read_folder(self, raw: RawFiles) -> RawEvents:
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        given = [name for name in self.option_names if getattr(self, name) != defaults[name]]
        if given:
            raise DataError(
                f"--{given[0]}: got {getattr(self, given[0])}, but a folder of sequences has fixed names; leave it out"
            )
        return sequence_folder.read_sequence_folder(raw)

    def _read_lists(self, raw: RawFiles) -> RawEvents:
        lists = item_lists.read(raw)
        events = self._listed(lists.events, lists.where)
        if not lists.items or self.items is not None:
            return events
        catalogue = events.items
        for name, column in item_lists.texts_of(lists.items, catalogue["raw_id"].combine_chunks()).items():
            catalogue = catalogue.append_column(name, column)
        return dataclasses.replace(events, items=catalogue)

    def _listed(self, events: pa.Table, where: str) -> RawEvents:
        """From events whose times are places in their lists."""
        named = events.rename_columns([self.user_column, self.item_column, self.timestamp_column])
        made = self._events(named, where, None)
        return dataclasses.replace(made, facts={**made.facts, "timestamps": item_lists.NO_TIMES})

    def _read_sequences(self, file: "_TableFile") -> RawEvents:
        """The same from lists of events, a row a user."""
        rows = file.read(dict.fromkeys(sequence_csv.COLUMNS, pa.string()))
        names = [self.user_column, self.item_column, _RATING, self.timestamp_column]
        return self._events(
            sequence_csv.events_of_sequences(rows, file.where).rename_columns(names), file.where, _RATING
        )

    def _events(self, events: pa.Table, where: str, rating: str | None) -> RawEvents:
        times, fractions = seconds(events[self.timestamp_column], where, self.timestamp_column)
        users = _Ids(events[self.user_column], where, self.user_column)
        items = _Ids(events[self.item_column], where, self.item_column)
        table = self._item_table()
        listed = encoded(table[self.item_column])[1].cast(pa.string()) if table is not None else None
        user_names = users.sorted_names(self.string_ids)
        item_names = items.sorted_names(self.string_ids, listed)
        ratings = to_numpy(events[rating]) if rating else np.ones(events.num_rows, dtype=np.float32)
        # Only whole seconds are stored; the order inside a second lives on in the order of the events.
        order = slice(None) if fractions is None else np.lexsort((fractions, times))
        return RawEvents(
            user_ids=users.ranks(user_names)[order],
            item_ids=items.ranks(item_names)[order],
            ratings=ratings[order],
            timestamps=times[order],
            items=self._catalogue(item_names, table),
            users=pa.table({"user_id": np.arange(1, len(user_names) + 1), "raw_user_id": user_names}),
        )

    def _item_table(self) -> pa.Table | None:
        if self.items is None:
            return None
        file = _TableFile(RawFiles(self.items))
        optional = [name for name in (self.title_column, "text", "categories") if name in file.names]
        table = file.read({self.item_column: pa.string(), **dict.fromkeys(optional, pa.string())}, optional)
        ids = pd.Series(to_numpy(table[self.item_column].cast(pa.string())))
        _check_no_blank_id((ids.str.strip() == "").to_numpy(), file.where, self.item_column)
        repeated = ids.duplicated().to_numpy()
        if repeated.any():
            row = int(np.argmax(repeated))
            raise DataError(
                f"{file.where}, row {row + 1}: got item {table[self.item_column][row].as_py()!r} again, "
                "expected one row an item; remove one"
            )
        return table

    def _catalogue(self, names: pa.Array, table: pa.Table | None) -> pa.Table:
        columns: dict[str, Any] = {"item_id": np.arange(1, len(names) + 1), "raw_id": names}
        if table is None:
            return pa.table(columns)
        rows = pc.index_in(names, table[self.item_column].cast(pa.string()).combine_chunks())
        if self.title_column in table.column_names:
            columns["title"] = table[self.title_column].cast(pa.string()).take(rows)
        if "categories" in table.column_names:
            columns["categories"] = _category_lists(table["categories"]).take(rows)
        if "text" in table.column_names:
            columns["text"] = table["text"].cast(pa.string()).take(rows)
        elif "title" in columns:
            titles = columns["title"].to_pylist()
            categories = columns["categories"].to_pylist() if "categories" in columns else [None] * len(titles)
            columns["text"] = [
                None if title is None else item_text(title, names_of or [])
                for title, names_of in zip(titles, categories, strict=True)
            ]
        return pa.table(columns)


class _TableFile:
    """A CSV or Parquet file, read by column."""

    def __init__(self, raw: RawFiles) -> None:
        if not raw.is_single_file:
            raise DataError(
                f"--raw: got {raw.path}, expected one .csv, .tsv, .csv.gz or .parquet file, or a folder "
                f"with {sequence_folder.SEQUENCES} or {sequence_folder.INTERACTIONS}"
            )
        self.where = str(raw.path)
        suffixes = [suffix.lower() for suffix in raw.path.suffixes]
        packed = suffixes[-1:] == [".gz"]
        kind = (suffixes[:-1] if packed else suffixes)[-1:]
        if kind not in ([".csv"], [".tsv"], [".parquet"]) or (packed and kind == [".parquet"]):
            raise DataError(f"{self.where}: got an unknown kind of file, expected .csv, .tsv, .csv.gz or .parquet")
        self._delimiter = "\t" if kind == [".tsv"] else ","
        self._parquet = kind == [".parquet"]
        content = raw.read(raw.path.name)
        try:
            self._content = _unpacked(content) if packed else content
            self.names: list[str] = (
                pq.read_schema(pa.BufferReader(self._content)).names
                if self._parquet
                else column_names(self._content, self._delimiter)
            )
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: truncated or damaged ({error}); copy or export it again") from error

    def read(self, kinds: Mapping[str, pa.DataType | None], nullable: list[str] | None = None) -> pa.Table:
        for name in kinds:
            count = self.names.count(name)
            if count > 1:
                raise DataError(f"{self.where}: got {count} columns named {name!r}, expected one; rename the others")
        if not self._parquet:
            return read_delimited(
                self._content, kinds, where=self.where, delimiter=self._delimiter, nullable=nullable or []
            )
        for name in kinds:
            if name not in self.names:
                raise DataError(
                    f"{self.where}: column {name!r} is missing, got the columns {', '.join(self.names[:20])}; "
                    "name the column by its flag"
                )
        try:
            table = pq.read_table(pa.BufferReader(self._content), columns=list(kinds))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where}: truncated or damaged ({error}); copy or export it again") from error
        if table.num_rows == 0:
            raise DataError(f"{self.where}: got no rows, expected one row an event; check that the file is complete")
        check_no_missing(table.drop_columns(nullable or []), self.where)
        for index, (name, kind) in enumerate(kinds.items()):
            if kind == pa.float32():
                got = table[name].type
                if not (pa.types.is_integer(got) or pa.types.is_floating(got)):
                    raise DataError(
                        f"{self.where}, column {name}: got type {got}, expected numbers; convert the column"
                    )
                table = table.set_column(index, name, table[name].cast(pa.float32(), safe=False))
        return table


class _Ids:
    """A column of raw ids: codes of the events, and the distinct ids as text."""

    def __init__(self, column: pa.ChunkedArray, where: str, name: str) -> None:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{where}, column {name}: got type {kind}, expected integer or text ids; convert the column"
            )
        self._codes, values = encoded(column)
        self._values = values.cast(pa.string())
        self._where, self._name = where, name
        blank = pc.equal(pc.utf8_trim_whitespace(self._values), "").to_numpy(zero_copy_only=False)
        if blank.any():
            _check_no_blank_id(blank[self._codes], where, name)

    def sorted_names(self, string_ids: bool, listed: pa.Array | None = None) -> pa.Array:
        """Distinct ids, those of an item table included, in the order of their numbers 1..n."""
        values = self._values if listed is None else pa.concat_arrays([self._values, listed]).unique()
        integers = pc.match_substring_regex(values, _INTEGER_ID).to_numpy(zero_copy_only=False)
        if integers.all() and not string_ids:
            return values.take(pc.array_sort_indices(values.cast(pa.int64())))
        # 0001712771 beside B000EXAMPLE is text; 17 beside x is most likely a damaged row.
        padded = pc.any(pc.match_substring_regex(values, _PADDED_INTEGER)).as_py()
        if integers.mean() > 0.5 and not padded and not string_ids:
            self._raise_odd(values.filter(pa.array(~integers))[0].as_py())
        return values.take(pc.array_sort_indices(values))

    def ranks(self, names: pa.Array) -> np.ndarray:
        """int64 (E,): place of every event's id in `names`, from 1."""
        rank = pc.index_in(self._values, names).to_numpy(zero_copy_only=False).astype(np.int64)
        return rank[self._codes] + 1

    def _raise_odd(self, odd: str) -> None:
        code = self._values.index(odd).as_py()
        row = f", row {int(np.argmax(self._codes == code)) + 1}" if code >= 0 else " (item table)"
        raise DataError(
            f"{self._where}{row}, column {self._name}: got the id {odd!r}, expected an integer as in most rows; "
            "fix the row, or pass --string_ids to take all ids as text"
        )


def seconds(column: pa.ChunkedArray, where: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Times of a column of numbers, times, dates or ISO 8601 texts.

    Returns:
        int64 (E,), whole seconds rounded down, and (E,) what was rounded away, or None where that is nothing.
    Raises:
        DataError: a cell is none of these, or 2^62 seconds or more from 1970, with its row.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = _parsed_times(column, where, name)
        kind = column.type
    if pa.types.is_integer(kind):
        values, fractions = _checked_times(to_numpy(column), where, name).astype(np.int64), None
    elif pa.types.is_floating(kind):
        floats = _checked_times(to_numpy(column).astype(np.float64), where, name)
        values = np.floor(floats).astype(np.int64)
        fractions = floats - values
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        # Whole days; a finer unit of the same type could overflow.
        exact = column.cast(pa.timestamp("s"), safe=False) if pa.types.is_date(kind) else column
        values, fractions = np.divmod(to_numpy(exact.cast(pa.int64())), _TICKS_PER_SECOND[exact.type.unit])
    else:
        raise DataError(f"{where}, column {name}: got type {kind}, expected seconds or ISO 8601 times; convert it")
    if values.min() >= _MILLISECONDS_FROM:
        logger.warning("%s, column %s: %d looks like milliseconds, expected seconds", where, name, values[0])
    return values, fractions if fractions is not None and fractions.any() else None


def _checked_times(times: np.ndarray, where: str, name: str) -> np.ndarray:
    # Before they become int64, where a time out of range would turn into another one. NaN compares false as well.
    good = (times > -TIME_LIMIT) & (times < TIME_LIMIT)
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(f"{where}, row {row + 1}, column {name}: got {times[row]}, expected seconds; fix the row")
    return times


def _check_no_blank_id(blank: np.ndarray, where: str, name: str) -> None:
    if blank.any():
        row = int(np.argmax(blank)) + 1
        raise DataError(f"{where}, row {row}, column {name}: got an empty id, expected an integer or text; fix the row")


def _parsed_times(column: pa.ChunkedArray, where: str, name: str) -> pa.ChunkedArray:
    numeric = to_numpy(pc.match_substring_regex(column, NUMBER))
    if numeric.mean() > 0.5:
        good, parsed = numeric, lambda: column.cast(pa.float64())
    else:
        texts = pd.Series(column.to_pandas())
        times = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
        good, parsed = times.notna().to_numpy(), lambda: pa.chunked_array([pa.array(times)])
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(
            f"{where}, row {row + 1}, column {name}: got {column[row].as_py()!r}, "
            "expected seconds or an ISO 8601 time as in the other rows; fix the row"
        )
    return parsed()


def _category_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.list_(pa.string()))
    return pc.split_pattern(column.cast(pa.string()), "|")


def _unpacked(content: pa.Buffer) -> pa.Buffer:
    with pa.CompressedInputStream(pa.BufferReader(content), "gzip") as stream:
        return stream.read_buffer()


SOURCE = CustomSource(name="custom")
