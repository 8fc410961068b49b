"""Events of a source to prepared data: `sequences.parquet`, `items.parquet`, `dataset.json`, one folder a dataset.

Events are grouped by user and ordered by time; equal times keep the order of the source file. (The published
preprocessing orders them with an unstable sort, which leaves the order of ties to the NumPy version.) Grouping is one
stable sort of a combined key, and the list columns are built from offsets and values: no loop over users.

With a rule of `temporal`, or where the source's files hold splits, `sequences_{train,valid,test}.parquet` come in the
place of `sequences.parquet`, and items are numbered anew (`split_files`).

The folder appears whole or not at all (`folders.whole_folder`).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source
from generative_recommenders.data.split_files import DividedData, ordered_events
from generative_recommenders.data.temporal import SPLITS, PublishedSplit, SplitRule

logger = logging.getLogger(__name__)

VERSION = 1
SEQUENCES_FILE = "sequences.parquet"
ITEMS_FILE = "items.parquet"
METADATA_FILE = "dataset.json"
CSV_FILE = "sasrec_format.csv"
IDS_FOLDER = "semantic_ids"
SEQUENCES_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "item_ids": pa.list_(pa.int64()),
        "ratings": pa.list_(pa.float32()),
        "timestamps": pa.list_(pa.int64()),
    }
)
"""Columns that every sequences file has; users and further columns of events come after them."""
SPLIT = "leave_one_out"
EXPLICIT_SPLIT = "explicit"
# Leave-one-out takes an event for test and one for valid; training needs at least one more.
MIN_EVENTS = 3


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset: its folder, the content of dataset.json, and whether this call wrote it."""

    path: Path
    metadata: Mapping[str, Any]
    written: bool


def prepare(
    source: Source,
    *,
    raw: Path | None = None,
    data_dir: Path = Path("tmp"),
    name: str | None = None,
    csv: bool = False,
    force: bool = False,
    shuffle_ties: int | None = None,
    split: SplitRule | None = None,
    command: str = "",
) -> Prepared:
    """Read `source`, check it, and write `<data_dir>/<name>`.

    A folder that already holds the same version, options and source files is left alone unless `force`.

    Args:
        raw: raw file or folder; None downloads into `data_dir`.
        name: folder and dataset name; by default the source's, with the suffix of `split`.
        csv: also write `sasrec_format.csv`.
        shuffle_ties: seed of a random order among a user's events of equal time, instead of the order of the source.
            That order can carry information: what a site lists together is rated together.
        split: divides the events into rows of train, valid and test; None leaves one out, or takes the splits of the
            files where they hold some.
        command: recorded in dataset.json.
    Raises:
        DataError: raw files are missing, damaged or not as expected, or the result cannot be written. The folder is
            then as it was before the call.
    """
    name = name or source.name + (split.suffix if split is not None else "")
    if Path(name).name != name:
        raise DataError(f"--name: got {name!r}, expected a plain folder name; choose the place with --data_dir")
    folder = data_dir / name
    files: RawFiles | None = None
    if source.needs_files:
        files = RawFiles(raw if raw is not None else source.fetch(data_dir), source.sha256)
    elif raw is not None:
        raise DataError(f"--raw: dataset {name!r} is generated and reads no file; leave --raw out")
    options = source.options if shuffle_ties is None else {**source.options, "shuffle_ties": shuffle_ties}
    options = {**options, **(split.options if split is not None else {})}
    if csv and split is not None:
        raise DataError("--csv: got it with --split, expected one of them; the format has no place for splits")
    chosen = source.chosen_files(files) if files is not None else []
    current = None if force else _current(folder, options, files, chosen, csv)
    if current is not None:
        return Prepared(folder, current, written=False)

    if not force:
        _refuse_to_replace(folder, options)
    events = source.read(files)
    if shuffle_ties is not None and "timestamps" in events.facts:
        raise DataError(
            f"--shuffle_ties: {name} has no times ({events.facts['timestamps']}), hence no ties; leave it out"
        )
    if "timestamps" in events.facts and split is not None:
        raise DataError(f"--split: {name} has no times ({events.facts['timestamps']}), expected some; leave it out")
    items = events.items
    sequences = sequences_table(events, shuffle_ties)
    _check_events(name, events, sequences)
    counts = _counts(events, sequences)
    divided = _divided(name, events, sequences, split, shuffle_ties, csv)
    if divided is not None:
        counts |= divided.counts()
    max_item_id = int(pc.max(items["item_id"]).as_py())
    _check_expected(name, source.expected_counts, {**counts, "max_item_id": max_item_id})
    short = counts["users_with_fewer_than_3_events"]
    if short:
        logger.info("%s: %d of %d users have fewer than %d events", name, short, counts["users"], MIN_EVENTS)
    metadata = {
        "name": name,
        "version": VERSION,
        "source": files.path.name if files else source.name,
        "checksum": {member: f"sha256:{digest}" for member, digest in files.checksums.items()} if files else {},
        "options": options,
        "counts": counts,
        "max_item_id": max_item_id if divided is None else items.num_rows,
        "split": SPLIT if divided is None else EXPLICIT_SPLIT,
        "command": command,
        **(divided.facts() if divided is not None else {}),
        **events.facts,
    }
    _write(folder, sequences if divided is None else divided, items, metadata, source.csv_id_shift if csv else None)
    return Prepared(folder, metadata, written=True)


def _refuse_to_replace(folder: Path, options: Mapping[str, Any]) -> None:
    """A folder of other options goes when it is written anew, and with it IDs that trained models may know."""
    if not (folder / IDS_FOLDER).is_dir():
        return
    try:
        before = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8")).get("options")
    except (OSError, ValueError, AttributeError):
        before = None
    if before != options:
        raise DataError(
            f"{folder}: was prepared with {before}, got {options}, and holds semantic IDs, which would be lost; "
            "try another --name, or --force"
        )


def user_order(user_ids: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """int64 (E,): the permutation that sorts events by user, then time, ties in the given order."""
    user_low, time_low = int(user_ids.min()), int(timestamps.min())
    user_bits = (int(user_ids.max()) - user_low).bit_length()
    time_bits = (int(timestamps.max()) - time_low).bit_length()
    if user_bits + time_bits > 62:
        return np.lexsort((timestamps, user_ids))
    # One integer key sorts several times faster than two.
    key = ((user_ids - user_low) << time_bits) | (timestamps - time_low)
    return np.argsort(key, kind="stable")


def sequences_table(events: RawEvents, shuffle_ties: int | None = None) -> pa.Table:
    """One row a user, sorted by user id: `user_id`, list columns with the oldest event first, and the user columns."""
    order = _event_order(events, shuffle_ties)
    users = events.user_ids[order]
    starts = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
    user_ids = users[starts]
    offsets = pa.array(np.append(starts, len(users)).astype(np.int32))

    def lists(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values[order]))

    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "user_id": pa.array(user_ids),
        "item_ids": lists(events.item_ids),
        "ratings": lists(events.ratings),
        "timestamps": lists(events.timestamps),
    }
    if events.users is not None:
        rows = pc.index_in(pa.array(user_ids), events.users["user_id"].combine_chunks())
        if rows.null_count:
            missing = user_ids[int(np.argmax(rows.is_null().to_numpy(zero_copy_only=False)))]
            raise DataError(f"user table: user {missing} has events but is not listed; use the complete files")
        columns |= {name: events.users[name].take(rows) for name in events.users.column_names if name != "user_id"}
    return pa.table(columns)


def _event_order(events: RawEvents, shuffle_ties: int | None) -> np.ndarray:
    order = user_order(events.user_ids, events.timestamps)
    if shuffle_ties is None:
        return order
    draws = np.random.default_rng(shuffle_ties).random(len(order))
    return order[np.lexsort((draws, events.timestamps[order], events.user_ids[order]))]


def _divided(
    name: str, events: RawEvents, sequences: pa.Table, split: SplitRule | None, shuffle_ties: int | None, csv: bool
) -> DividedData | None:
    """The rows of explicit splits; None where one is left out."""
    if events.splits is not None:
        if split is not None or csv:
            raise DataError(f"--{'csv' if csv else 'split'}: {name} has splits of its own; leave it out")
        split = PublishedSplit(events.splits[_event_order(events, shuffle_ties)])
    if split is None:
        return None
    ordered = ordered_events(sequences)
    return DividedData.of(name, sequences, events.items, ordered, split.divide(ordered))


def _current(
    folder: Path, options: Mapping[str, Any], files: RawFiles | None, chosen: list[str], csv: bool
) -> Mapping[str, Any] | None:
    """Content of dataset.json if `folder` holds what this call would write, else None."""
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    divided = metadata.get("split") == EXPLICIT_SPLIT
    sequences = [f"sequences_{split}.parquet" for split in SPLITS] if divided else [SEQUENCES_FILE]
    wanted = [*sequences, ITEMS_FILE, *([CSV_FILE] if csv else [])]
    same = metadata.get("version") == VERSION and metadata.get("options") == options
    if not same or not all((folder / file).is_file() for file in wanted):
        return None
    if not set(chosen) <= set(metadata.get("checksum", {})):
        return None
    for member, checksum in metadata.get("checksum", {}).items():
        if files is None or not files.has(member):
            return None
        files.read(member)
        if f"sha256:{files.checksums[member]}" != checksum:
            return None
    return metadata


def _check_events(name: str, events: RawEvents, sequences: pa.Table) -> None:
    item_ids = to_sorted_ids(events.items)
    unlisted = ~np.isin(events.item_ids, item_ids)
    if unlisted.any():
        row = int(np.argmax(unlisted))
        raise DataError(
            f"{name}, event {row + 1}: item {events.item_ids[row]} is not in the item table; use the complete files"
        )
    longest = int(pc.max(pc.list_value_length(sequences["item_ids"])).as_py())
    if longest < MIN_EVENTS:
        what = "one event" if longest == 1 else f"at most {longest} events"
        raise DataError(
            f"{name}: every user has {what}, expected users with {MIN_EVENTS} or more (train, valid, test); "
            "check the user column"
        )


def to_sorted_ids(items: pa.Table) -> np.ndarray:
    """int64 (X,): `item_id` of an items table, checked to ascend from 1 or more."""
    item_ids = items["item_id"].to_numpy()
    if item_ids[0] < 1 or (np.diff(item_ids) <= 0).any():
        raise DataError("item table: item ids must be >= 1 and distinct, 0 is padding; fix the ids")
    return item_ids


def _counts(events: RawEvents, sequences: pa.Table) -> dict[str, int]:
    lengths = pc.list_value_length(sequences["item_ids"]).to_numpy()
    return {
        "users": sequences.num_rows,
        "items_listed": events.items.num_rows,
        "items_rated": int((np.bincount(events.item_ids) > 0).sum()),
        "events": len(events.item_ids),
        "users_with_fewer_than_3_events": int((lengths < MIN_EVENTS).sum()),
    }


def _check_expected(name: str, expected: Mapping[str, int], got: Mapping[str, int]) -> None:
    wrong = [f"{key} {got[key]:,} instead of {value:,}" for key, value in expected.items() if got[key] != value]
    if wrong:
        raise DataError(f"{name}: got {', '.join(wrong)}; the files are not the published ones, download them again")


def _csv_table(sequences: pa.Table, id_shift: int) -> pd.DataFrame:
    """The public code's CSV: a row a user, list cells as comma-separated text."""

    def joined(name: str, values: pa.Array) -> pa.Array:
        lists = sequences[name].combine_chunks()
        texts = pa.ListArray.from_arrays(lists.offsets, pc.cast(values, pa.string()))
        return pc.binary_join(texts, ",")

    def values(name: str) -> pa.Array:
        return sequences[name].combine_chunks().values

    ratings = values("ratings")
    if pc.all(pc.equal(ratings, pc.floor(ratings))).as_py():
        ratings = pc.cast(ratings, pa.int64())
    side = [name for name in sequences.column_names if name not in ("user_id", "item_ids", "ratings", "timestamps")]
    return pa.table(
        {
            "user_id": pc.subtract(sequences["user_id"], id_shift),
            "sequence_item_ids": joined("item_ids", pc.subtract(values("item_ids"), id_shift)),
            "sequence_ratings": joined("ratings", ratings),
            "sequence_timestamps": joined("timestamps", values("timestamps")),
            **{name: sequences[name] for name in side},
        }
    ).to_pandas()


def _write(
    folder: Path,
    sequences: pa.Table | DividedData,
    items: pa.Table,
    metadata: Mapping[str, Any],
    csv_id_shift: int | None,
) -> None:
    with whole_folder(folder) as partial:
        if isinstance(sequences, DividedData):
            items = sequences.items
            sequences.write(partial)
        else:
            pq.write_table(sequences, partial / SEQUENCES_FILE, compression="zstd")
        pq.write_table(items, partial / ITEMS_FILE, compression="zstd")
        if csv_id_shift is not None:
            _csv_table(sequences, csv_id_shift).to_csv(partial / CSV_FILE, index_label="index")
        text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
        (partial / METADATA_FILE).write_text(text, encoding="utf-8")
