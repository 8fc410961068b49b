"""Amazon reviews of 2023, one category, with the published splits by time (Hou et al., "Bridging Language and Items for
Retrieval and Recommendation", 2024).

What Video Games, Office Products and Cell Phones share. The raw files are those of the benchmark
`5core_timestamp_w_his`, and for texts the products:

    <category>.{train,valid,test}.csv    user_id, parent_asin, rating, timestamp (milliseconds), history
    meta_<category>.jsonl                parent_asin, title, features, description, categories

each as it is or with `.gz`. A row is an event, and `history` is the user's items before it, joined by spaces. Rows
follow from the events, so that histories are only compared with them: a row without one has no row here either. Ids go
by the split that an item or event is first told in, as everywhere with explicit splits.
"""

import gzip
import html
import logging
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.json_lines import is_gzip, read_json_lines
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source
from generative_recommenders.data.sources.amzn_books import ranks
from generative_recommenders.data.tables import TIME_LIMIT, encoded, read_delimited, to_numpy
from generative_recommenders.data.temporal import SPLITS

logger = logging.getLogger(__name__)

_PLACE = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main"
_CODED_TEXT = pa.dictionary(pa.int32(), pa.string())
_TEXT = pa.string()
_EVENT_FIELDS: dict[str, pa.DataType | None] = {
    "user_id": _CODED_TEXT,
    "parent_asin": _CODED_TEXT,
    "rating": pa.float32(),
    "timestamp": pa.int64(),
    "history": _TEXT,
}
_PRODUCT_FIELDS = pa.schema(
    {
        "parent_asin": _TEXT,
        "title": _TEXT,
        "features": pa.list_(_TEXT),
        "description": pa.list_(_TEXT),
        "categories": pa.list_(_TEXT),
    }
)


@dataclass(frozen=True, kw_only=True)
class Amazon2023(Source):
    """Reads the events and products of one category.

    Attributes:
        category: as the published files spell it.
    """

    category: str

    @property
    def event_files(self) -> tuple[str, ...]:
        """Names of the files of events, by split."""
        return tuple(f"{self.category}.{split}.csv" for split in SPLITS)

    @property
    def products_file(self) -> str:
        """Name of the file of texts."""
        return f"meta_{self.category}.jsonl"

    def chosen_files(self, raw: RawFiles) -> list[str]:
        there = (_present(raw, name) for name in (*self.event_files, self.products_file))
        return [name for name in there if name is not None]

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        tables = [self._events(raw, name) for name in self.event_files]
        splits = np.repeat(np.arange(len(SPLITS), dtype=np.int8), [table.num_rows for table in tables])
        table = pa.concat_tables(tables).unify_dictionaries()
        user_codes, users = encoded(table["user_id"])
        item_codes, items = encoded(table["parent_asin"])
        user_ids, user_names = ranks(user_codes, users)
        item_ids, item_names = ranks(item_codes, items)
        milliseconds = to_numpy(table["timestamp"])
        # Seconds are what is kept; the order inside one lives on in the order of the events.
        order = np.argsort(milliseconds, kind="stable")
        _compare(table["history"].take(pa.array(order)), user_ids[order], item_ids[order], item_names, str(raw.path))
        return RawEvents(
            user_ids=user_ids[order],
            item_ids=item_ids[order],
            ratings=to_numpy(table["rating"])[order],
            timestamps=milliseconds[order] // 1000,
            items=self._catalogue(raw, item_names),
            users=pa.table({"user_id": np.arange(1, len(user_names) + 1), "raw_user_id": user_names}),
            splits=splits[order],
        )

    def _events(self, raw: RawFiles, name: str) -> pa.Table:
        found = _present(raw, name)
        if found is None:
            raise DataError(
                f"{raw.path}: got neither {name} nor {name}.gz, expected the published {', '.join(self.event_files)}; "
                "check --raw"
            )
        where = raw.where(found)
        table = read_delimited(_unpacked(raw.read(found), where), _EVENT_FIELDS, where=where, nullable=("history",))
        times = to_numpy(table["timestamp"])
        bad = (times < 0) | (times >= TIME_LIMIT)
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(f"{where}, row {row + 1}, column timestamp: got {times[row]}, expected milliseconds")
        return table

    def _catalogue(self, raw: RawFiles, asins: pa.Array) -> pa.Table:
        columns = {"item_id": pa.array(np.arange(1, len(asins) + 1)), "raw_id": asins}
        name = _present(raw, self.products_file)
        if name is None:
            logger.warning("%s: no %s, so that items have no texts", raw.path, self.products_file)
            return pa.table(columns)
        texts = [field for field in _PRODUCT_FIELDS.names if field != "parent_asin"]
        listed = read_json_lines(raw.read(name), _PRODUCT_FIELDS, where=raw.where(name), nullable=texts)
        rows = pc.index_in(asins, listed["parent_asin"].combine_chunks())
        if rows.null_count:
            logger.warning("%s: %d of %d items are not listed", raw.where(name), rows.null_count, len(asins))
        chosen = listed.select(texts).take(rows)
        columns["title"] = pa.array([_plain(title) for title in chosen["title"].to_pylist()], _TEXT)
        for field in texts[1:]:
            lists = ([text for part in parts or [] if (text := _plain(part))] for parts in chosen[field].to_pylist())
            columns[field] = pa.array(lists, pa.list_(_TEXT))
        return pa.table(columns)


def _present(raw: RawFiles, name: str) -> str | None:
    """The name under which a file is there, as it is or packed."""
    return next((found for found in (name, f"{name}.gz") if raw.has(found)), None)


def _unpacked(content: pa.Buffer, where: str) -> pa.Buffer:
    if not is_gzip(content):
        return content
    try:
        return pa.py_buffer(gzip.decompress(content))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: truncated or damaged ({error}); get the file again") from error


def _plain(text: str | None) -> str | None:
    return html.unescape(text).strip() or None if text else None


def _compare(histories: pa.ChunkedArray, users: np.ndarray, items: np.ndarray, names: pa.Array, where: str) -> None:
    """Warn of histories that are not the user's events before. All arrays are of E events in the order of time."""
    order = np.argsort(users, kind="stable")
    firsts = np.flatnonzero(np.concatenate(([True], np.diff(users[order]) != 0)))
    start_E = np.repeat(firsts, np.diff(np.append(firsts, len(users))))
    before_E = np.arange(len(users)) - start_E
    offsets = np.concatenate(([0], np.cumsum(before_E)))
    places = np.arange(offsets[-1]) + np.repeat(start_E - offsets[:-1], before_E)
    words = names.cast(pa.large_string()).take(pa.array(items[order][places] - 1))
    # Lists count by 32 bits, the joined letters by 64.
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), words)
    expected = pc.binary_join(lists, pa.scalar(" ", pa.large_string()))
    told = pc.fill_null(histories.take(pa.array(order)), "").cast(pa.large_string())
    wrong = pc.sum(pc.not_equal(pc.utf8_trim_whitespace(told), expected)).as_py()
    if wrong:
        logger.warning(
            "%s: %d of %d rows have another history than the events before them; the events are used",
            where,
            wrong,
            len(users),
        )


def source(name: str, category: str, *, in_train: int, through_valid: int) -> Amazon2023:
    """The dataset of one category; `in_train` and `through_valid` are how many items its first splits are known by."""
    benchmark, products = f"{_PLACE}/benchmark/5core/timestamp_w_his", f"{_PLACE}/raw/meta_categories"
    downloads = {f"{category}.{split}.csv": (f"{benchmark}/{category}.{split}.csv",) for split in SPLITS}
    downloads[f"meta_{category}.jsonl"] = (f"{products}/meta_{category}.jsonl",)
    return Amazon2023(
        name=name,
        category=category,
        downloads=downloads,
        expected_counts={"items_in_train": in_train, "items_through_valid": through_valid},
    )
