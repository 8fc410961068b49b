"""Merlin session tables to prepared data with explicit splits, for `train_fn.dataset_name = "merlin"`.

Three tables (`merlin_raw`) become `sequences_{train,valid,test}.parquet`, `items.parquet` and `dataset.json`, and on
request the published pipeline's `sasrec_format_{train,valid,test}.csv`. What the pipeline does:

- Item ids, event types and `user_session` values are numbered in sorted order over the three tables: integers by
  value, text by code point. Items count from 1 (0 is padding; the CSVs count from 0), event types and users from 0.
- `ratings` holds the codes of event types; the i-th event of a session is at `timestamp_first + i`.
- Rows keep the order of the file. A row with fewer than two events has no target and no history, and is dropped; its
  items are numbered all the same.
- `expand_sequences_to_prefixes` replaces a row by its prefixes of two events and more, shortest first.

The raw tables may lie in the folder that is written. So the folder is not replaced as one: every file is, and
`dataset.json`, without which nothing reads the folder, goes first and comes last (`staged_files`).
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, SPLITS, USER, file_name, open_raw, read_sessions
from generative_recommenders.data.preprocess import ITEMS_FILE, METADATA_FILE, SEQUENCES_SCHEMA, Prepared
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.staged_files import staged_files
from generative_recommenders.data.tables import encoded

logger = logging.getLogger(__name__)

VERSION = 1
SPLIT = "explicit"
MIN_EVENTS = 2
# Rows are gathered and written in blocks of about this many events: prefixes take far more room than their sessions.
_BLOCK_EVENTS = 4_000_000


def sequences_file(split: str) -> str:
    """Name of the prepared sequences of a split."""
    return f"sequences_{split}.parquet"


def csv_file(split: str) -> str:
    """Name of the CSV of a split."""
    return f"sasrec_format_{split}.csv"


@dataclass(frozen=True)
class Sequences:
    """S rows over E events that rows may share: row s holds events `starts[s]` up to `starts[s] + lengths[s]`.

    Attributes:
        users, starts, lengths, first_timestamps: int64 (S,).
        items: int64 (E,), from 1.
        event_types: int64 (E,), from 0.
    """

    users: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first_timestamps: np.ndarray
    items: np.ndarray
    event_types: np.ndarray

    @property
    def last_items(self) -> np.ndarray:
        """int64 (S,): the item that a row ends in, its target in an evaluation."""
        return self.items[self.starts + self.lengths - 1]

    def at_least(self, events: int) -> "Sequences":
        """The rows of at least that many events, over the events of these rows only. No two rows may share events."""
        keep = self.lengths >= events
        kept = np.repeat(keep, self.lengths)
        lengths = self.lengths[keep]
        return Sequences(
            users=self.users[keep],
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            first_timestamps=self.first_timestamps[keep],
            items=self.items[kept],
            event_types=self.event_types[kept],
        )

    def prefixes(self) -> "Sequences":
        """Every prefix of `MIN_EVENTS` events or more, row by row, shortest first."""
        copies = np.maximum(self.lengths - MIN_EVENTS + 1, 0)
        owner = np.repeat(np.arange(len(copies)), copies)
        place = np.arange(len(owner)) - (np.cumsum(copies) - copies)[owner]
        return dataclasses.replace(
            self,
            users=self.users[owner],
            starts=self.starts[owner],
            lengths=place + MIN_EVENTS,
            first_timestamps=self.first_timestamps[owner],
        )

    def blocks(self, events: int = _BLOCK_EVENTS) -> Iterator[pa.Table]:
        """The rows in order as tables of the prepared format, of about `events` events each."""
        blocks = np.cumsum(self.lengths) // events
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
        for low, high in itertools.pairwise(edges):
            lengths = self.lengths[low:high]
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
            event = np.repeat(self.starts[low:high], lengths) + place
            times = np.repeat(self.first_timestamps[low:high], lengths) + place
            columns = (self.items[event], self.event_types[event].astype(np.float32), times)
            lists = [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(column)) for column in columns]
            yield pa.table([pa.array(self.users[low:high]), *lists], schema=SEQUENCES_SCHEMA)


class MerlinParquetDataProcessor:
    """The three tables in memory, numbered, and optionally as prefixes.

    Attributes:
        item_ids: (X,), raw ids of items 1, 2, ...
        event_types: (T,), raw event types of codes 0, 1, ...
        sequences: the rows of each split as they are written.
        rows, short_rows: rows of each table as read, and those of them that were dropped.
    Raises:
        DataError: a table is absent or has a fault (`merlin_raw.read_sessions`), ids are integers in one table and
            text in another, or no row of a table has two events.
    """

    def __init__(self, files: RawFiles, *, expand_sequences_to_prefixes: bool = False) -> None:
        raw = [read_sessions(files, split) for split in SPLITS]
        for table in raw:
            if table.lengths.max() < MIN_EVENTS:
                raise DataError(
                    f"{table.where}: got no row of {MIN_EVENTS} events, expected one or more; check {ITEMS}"
                )
        where = [table.where for table in raw]
        users, _ = _coded([table.users for table in raw], where, USER)
        items, self.item_ids = _coded([table.items for table in raw], where, ITEMS)
        types, self.event_types = _coded([table.event_types for table in raw], where, EVENT_TYPES)
        self.sequences: dict[str, Sequences] = {}
        self.rows: dict[str, int] = {}
        self.short_rows: dict[str, int] = {}
        for place, (split, table) in enumerate(zip(SPLITS, raw, strict=True)):
            sequences = Sequences(
                users=users[place],
                starts=np.cumsum(table.lengths) - table.lengths,
                lengths=table.lengths,
                first_timestamps=table.first_timestamps,
                items=items[place] + 1,
                event_types=types[place],
            ).at_least(MIN_EVENTS)
            self.rows[split] = len(table.lengths)
            self.short_rows[split] = len(table.lengths) - len(sequences.lengths)
            self.sequences[split] = sequences.prefixes() if expand_sequences_to_prefixes else sequences

    def facts(self) -> dict[str, Any]:
        """What dataset.json says on the content: `counts`, `event_types`, and `splits` with the counts of each.

        "Unseen in train" are items and event types that no row written for train holds.
        """
        known = _present(self.sequences["train"].items, len(self.item_ids) + 1)
        known_types = _present(self.sequences["train"].event_types, len(self.event_types))
        rated = np.zeros_like(known)
        splits: dict[str, dict[str, Any]] = {}
        for split, rows in self.sequences.items():
            items = _present(rows.items, len(known))
            types = _present(rows.event_types, len(known_types))
            rated |= items
            splits[split] = {
                "rows": self.rows[split],
                "short_rows_dropped": self.short_rows[split],
                "sequences": len(rows.lengths),
                "users": len(np.unique(rows.users)),
                "events": int(rows.lengths.sum()),
                "items": int(items.sum()),
                "items_unseen_in_train": int((items & ~known).sum()),
                "sequences_ending_in_unseen_item": int((~known[rows.last_items]).sum()),
                "event_types_unseen_in_train": self.event_types.filter(pa.array(types & ~known_types)).to_pylist(),
            }
        counts = {
            "users": len(np.unique(np.concatenate([rows.users for rows in self.sequences.values()]))),
            "sequences": sum(split["sequences"] for split in splits.values()),
            "items_listed": len(self.item_ids),
            "items_rated": int(rated.sum()),
            "events": sum(split["events"] for split in splits.values()),
            "short_rows_dropped": sum(self.short_rows.values()),
            "items_unseen_in_train": int((rated & ~known).sum()),
        }
        return {
            "counts": counts,
            "num_event_types": len(self.event_types),
            "event_types": self.event_types.to_pylist(),
            "splits": splits,
        }


def prepare_merlin(
    raw: Path,
    folder: Path,
    *,
    expand_sequences_to_prefixes: bool = False,
    csv: bool = True,
    force: bool = False,
    command: str = "",
) -> Prepared:
    """Read the three tables in `raw` and write the prepared dataset `folder.name` into `folder`, beside what is there.

    A folder that already holds the same version, options and tables is left alone unless `force`.

    Args:
        raw: folder or zip archive of the tables; may be `folder`.
        csv: also write `sasrec_format_{train,valid,test}.csv`. Those of an earlier call are removed where it is false
            and the folder is written.
        command: recorded in dataset.json.
    Raises:
        DataError: a table cannot be used, `folder` holds a dataset without explicit splits, or it cannot be written.
    """
    folder = folder.absolute() if not folder.name else folder
    files = open_raw(raw)
    options = {"expand_sequences_to_prefixes": expand_sequences_to_prefixes}
    before = _metadata(folder)
    if before and before.get("split") != SPLIT:
        raise DataError(
            f"{folder}: got a dataset with split {before.get('split')!r} there, expected none or one with explicit "
            "splits; choose another --name"
        )
    if not force and _is_current(folder, before, options, files, csv):
        return Prepared(folder, before, written=False)
    processor = MerlinParquetDataProcessor(files, expand_sequences_to_prefixes=expand_sequences_to_prefixes)
    facts = processor.facts()
    for split in SPLITS[1:]:
        unseen = facts["splits"][split]["event_types_unseen_in_train"]
        if unseen:
            logger.warning(
                "%s: event types %s occur in %s and not in train; nothing trains their embeddings",
                files.where(file_name(split)),
                ", ".join(map(repr, unseen)),
                split,
            )
    metadata = {
        "name": folder.name,
        "version": VERSION,
        "source": files.path.resolve().name,
        "checksum": {member: f"sha256:{digest}" for member, digest in files.checksums.items()},
        "options": options,
        "max_item_id": len(processor.item_ids),
        "split": SPLIT,
        "command": command,
        **facts,
    }
    _write(folder, processor, metadata, csv)
    return Prepared(folder, metadata, written=True)


def _coded(tables: list[pa.ChunkedArray], where: list[str], name: str) -> tuple[list[np.ndarray], pa.Array]:
    """Codes int64 of every table's values, and as text the values that 0, 1, ... stand for, in sorted order."""
    kinds = ["integers" if pa.types.is_integer(values.type) else "text" for values in tables]
    for kind, file in zip(kinds, where, strict=True):
        if kind != kinds[0]:
            raise DataError(
                f"{file}, column {name}: got {kind}, expected {kinds[0]} as in {where[0]}; cast one of them"
            )
    codes, distinct = encoded(pa.chunked_array([chunk for values in tables for chunk in values.chunks]))
    order = pc.sort_indices(distinct).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    edges = np.cumsum([len(values) for values in tables])[:-1]
    return np.split(rank[codes], edges), distinct.take(pa.array(order)).cast(pa.string())


def _present(codes: np.ndarray, size: int) -> np.ndarray:
    """bool (size,): which codes occur."""
    return np.bincount(codes, minlength=size) > 0


def _metadata(folder: Path) -> dict[str, Any]:
    """Content of dataset.json, empty if there is none that can be read."""
    try:
        content = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_current(
    folder: Path, metadata: Mapping[str, Any], options: Mapping[str, Any], files: RawFiles, csv: bool
) -> bool:
    """Whether the folder holds what the call would write."""
    if metadata.get("version") != VERSION or metadata.get("options") != options:
        return False
    wanted = [ITEMS_FILE, *map(sequences_file, SPLITS), *(map(csv_file, SPLITS) if csv else ())]
    if not all((folder / name).is_file() for name in wanted):
        return False
    for split in SPLITS:
        files.read(file_name(split))
    return metadata.get("checksum") == {member: f"sha256:{digest}" for member, digest in files.checksums.items()}


def _write(folder: Path, processor: MerlinParquetDataProcessor, metadata: Mapping[str, Any], csv: bool) -> None:
    items = pa.table(
        {"item_id": np.arange(1, len(processor.item_ids) + 1, dtype=np.int64), "raw_id": processor.item_ids}
    )
    with staged_files(folder, last=METADATA_FILE, obsolete=tuple(map(csv_file, SPLITS))) as stage:
        for split, sequences in processor.sequences.items():
            rows = 0
            with pq.ParquetWriter(stage / sequences_file(split), SEQUENCES_SCHEMA, compression="zstd") as writer:
                for block in sequences.blocks():
                    writer.write_table(block)
                    if csv:
                        _append_csv(stage / csv_file(split), block, rows)
                    rows += block.num_rows
        pq.write_table(items, stage / ITEMS_FILE, compression="zstd")
        text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
        (stage / METADATA_FILE).write_text(text, encoding="utf-8")


def _append_csv(path: Path, block: pa.Table, first_row: int) -> None:
    """Rows as the published CSV has them: items from 0, list cells as comma-separated text."""

    def joined(name: str, shift: int = 0) -> pa.Array:
        lists = block[name].combine_chunks()
        values = pc.add(lists.values.cast(pa.int64()), shift).cast(pa.string())
        return pc.binary_join(pa.ListArray.from_arrays(lists.offsets, values), ",")

    frame = pa.table(
        {
            "user_id": block["user_id"],
            "sequence_item_ids": joined("item_ids", -1),
            "sequence_ratings": joined("ratings"),
            "sequence_timestamps": joined("timestamps"),
        }
    ).to_pandas()
    frame.index += first_row
    frame.to_csv(path, mode="a", header=first_row == 0, index_label="index")
