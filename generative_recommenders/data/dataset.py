"""A prepared dataset in memory: the flat event arrays of `sequences.parquet` and the catalogue of `items.parquet`.

An Arrow list column is offsets and values; both are kept as they are and every batch is a slice of them. Where the
splits are files of their own (`"split": "explicit"` in dataset.json), the rows of
`sequences_{train,valid,test}.parquet` lie end to end and `split_rows` says which are whose.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from generative_recommenders.data import sources
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.split_files import SOURCE_ITEM_ID

_LISTS = ("item_ids", "ratings", "timestamps")
EXPLICIT = "explicit"
SPLIT_NAMES = ("train", "valid", "test")
# Names that preprocess_public_data.py gives to datasets with explicit splits.
_DERIVED = re.compile(r"(.+)-(temporal|cold)(?:-([0-9]+(?:\.[0-9]+)?))?")
_AGAIN = "try preparing the dataset again with --force"


@dataclass(frozen=True)
class Catalog:
    """What can be recommended: ids ascending, (X,), with raw ids and, where known, titles in the same order.

    Where splits were made by numbering items anew, `source_item_ids` (X,) are the ids of the dataset without splits.
    """

    item_ids: Tensor
    raw_ids: list[str]
    titles: list[str | None]
    source_item_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.item_ids.numel()

    @property
    def max_item_id(self) -> int:
        return int(self.item_ids[-1])


@dataclass(frozen=True)
class PreparedDataset:
    """Events of all users laid end to end, oldest first within a user; E events, U users.

    `split_rows` is empty where splits are made by leaving events out; with explicit splits it holds, by split, the
    first row and the one after the last, and a user may own several of the U rows. `events` are further columns of the
    events by name, int64 (E,) each, as `load` was asked for them.
    """

    name: str
    folder: Path
    offsets: Tensor
    item_ids_E: Tensor
    ratings_E: Tensor
    timestamps_E: Tensor
    user_ids_U: Tensor
    catalog: Catalog
    metadata: dict[str, object]
    split_rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    events: dict[str, Tensor] = field(default_factory=dict)

    @property
    def explicit(self) -> bool:
        """Whether the splits are rows of their own."""
        return bool(self.split_rows)

    @property
    def num_users(self) -> int:
        return self.user_ids_U.numel()

    @property
    def lengths_U(self) -> Tensor:
        return self.offsets.diff()

    def trained_items(self, held_out: int = 2) -> Tensor:
        """Which item ids occur in training events, bool (V,), V being the largest id and one.

        Training events are those of the train rows; where the splits are not rows of their own, all but the last
        `held_out` of each user.
        """
        trained_V = torch.zeros(self.catalog.max_item_id + 1, dtype=torch.bool)
        if self.explicit:
            first, last = self.split_rows["train"]
            trained_V[self.item_ids_E[self.offsets[first] : self.offsets[last]]] = True
            return trained_V
        place_E = torch.arange(self.item_ids_E.numel())
        ends_E = (self.offsets[1:] - held_out).repeat_interleave(self.lengths_U)
        trained_V[self.item_ids_E[place_E < ends_E]] = True
        return trained_V

    def unseen_items(self, held_out: int = 2) -> Tensor:
        """Ids of the catalogue's items that no training event has, int64, ascending; see `trained_items`."""
        ids = self.catalog.item_ids
        return ids[~self.trained_items(held_out)[ids]]

    @property
    def fingerprint(self) -> str:
        """Identifies what a model was trained on: name, counts, checksums of events and users, and explicit splits."""
        parts = (self.item_ids_E.numel(), self.num_users, len(self.catalog), self.catalog.max_item_id)
        # Ratings may be fractions, of which the bits count.
        columns = [self.item_ids_E, self.timestamps_E, self.ratings_E.view(torch.int32).long(), self.user_ids_U]
        columns += [self.events[name] for name in sorted(self.events)]
        splits = [f"{name}{first}-{last}" for name, (first, last) in sorted(self.split_rows.items())]
        return ":".join([self.name, *map(str, parts), *map(_checksum, columns), *splits])

    @classmethod
    def load(cls, data_dir: str | Path, name: str, event_columns: Sequence[str] = ()) -> PreparedDataset:
        """Read `<data_dir>/<name>/`, with the columns `event_columns` of the sequences, lists of an integer an event.

        Raises:
            DataError: the folder is missing or incomplete, a file lacks a column, an event refers to an item that is
                not in the catalogue, or an event column has other types or lengths than its events.
        """
        folder = Path(data_dir) / name
        metadata = _metadata(folder, name, data_dir)
        explicit = metadata.get("split") == EXPLICIT
        files = [f"sequences_{split}.parquet" for split in SPLIT_NAMES] if explicit else ["sequences.parquet"]
        _require(folder, [*files, "items.parquet"], name, data_dir)
        tables = [_read_sequences(folder / file, event_columns) for file in files]
        ends = np.cumsum([table.num_rows for table in tables]).tolist()
        split_rows = dict(zip(SPLIT_NAMES, zip([0, *ends], ends, strict=False), strict=True)) if explicit else {}
        sequences = pa.concat_tables(tables)
        offsets, item_ids = _list_column(sequences, "item_ids", torch.int64)
        _, ratings = _list_column(sequences, "ratings", torch.float32)
        _, timestamps = _list_column(sequences, "timestamps", torch.int64)
        catalog = read_catalog(folder / "items.parquet")
        _check(name, split_rows, offsets, item_ids, ratings, timestamps, catalog)
        users = _tensor(sequences.column("user_id").to_numpy(), torch.int64)
        events = {column: _list_column(sequences, column, torch.int64)[1] for column in event_columns}
        return cls(name, folder, offsets, item_ids, ratings, timestamps, users, catalog, metadata, split_rows, events)


def _require(folder: Path, files: Sequence[str], name: str, data_dir: str | Path) -> None:
    missing = next((folder / file for file in files if not (folder / file).exists()), None)
    if missing is None:
        return
    command = f"preprocess_public_data.py --dataset={name}"
    derived = _DERIVED.fullmatch(name)
    if derived is not None and derived[1] in sources.names():
        command = f"preprocess_public_data.py --dataset={derived[1]} --split={derived[2]}"
        if derived[3] is not None:
            command += f" --cold_share={float(derived[3]) / 100:g}"
    elif name in sources.names():
        pass
    elif name == "merlin" or missing.name.startswith("sequences_"):
        command = f"preprocess_merlin_data.py --name={name}"
    else:
        nearest = difflib.get_close_matches(name.lower().replace("_", "-"), sources.names(), n=1)
        meant = f"did you mean {nearest[0]!r}? Else " if nearest else ""
        raise DataError(
            f"dataset {name!r}: {missing} not found, expected a prepared dataset; {meant}"
            f"try python preprocess_public_data.py --dataset=custom --raw=FILE --name={name} --data_dir={data_dir}"
        )
    raise DataError(
        f"dataset {name!r}: {missing} not found, expected a prepared dataset; "
        f"try python {command} --data_dir={data_dir}"
    )


def _metadata(folder: Path, name: str, data_dir: str | Path) -> dict[str, object]:
    path = folder / "dataset.json"
    _require(folder, [path.name], name, data_dir)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}; {_AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {type(content).__name__}, expected a JSON object; {_AGAIN}")
    return content


def _read_sequences(path: Path, event_columns: Sequence[str]) -> pa.Table:
    """`user_id` and the list columns, with the types that tables must share to be laid end to end."""
    table = _read_columns(path, ("user_id", *_LISTS), event_columns)
    for column in _LISTS:
        kind = table.schema.field(column).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise DataError(f"{path}, column {column}: got type {kind}, expected lists; {_AGAIN}")
    chosen = table.select(["user_id", *_LISTS])
    for column in event_columns:
        chosen = chosen.append_column(column, _event_column(path, table, column))
    return chosen


def _event_column(path: Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    """Lists of int64 as long as the lists of items."""
    if name not in table.column_names:
        present = ", ".join(pq.read_schema(path).names[:20])
        raise DataError(f"{path}: event column {name} is missing, got {present}; try one of these")
    column = table.column(name)
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists and pa.types.is_integer(kind.value_type)):
        raise DataError(f"{path}, column {name}: got type {kind}, expected lists of integers; try another column")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    items = pc.fill_null(pc.list_value_length(table.column("item_ids")), 0).to_numpy()
    differs = np.flatnonzero(lengths != items)
    if differs.size:
        row = int(differs[0])
        raise DataError(
            f"{path}, row {row}: got {items[row]} values in item_ids and {lengths[row]} in {name}, expected equal; "
            f"{differs.size} of {table.num_rows} rows differ"
        )
    empty = pc.list_flatten(column).null_count
    if empty:
        raise DataError(f"{path}, column {name}: got {empty} empty values, expected an integer for every event")
    try:
        return column.cast(pa.list_(pa.int64()))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}, column {name}: cannot be read as int64: {reason}; try another column") from error


def _read_columns(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    try:
        present = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in (*required, *optional) if name in present])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}; {_AGAIN}") from error
    missing = next((name for name in required if name not in present), None)
    if missing is not None:
        raise DataError(f"{path}: column {missing} is missing, got {', '.join(present[:20])}; {_AGAIN}")
    return table


def _checksum(column: Tensor) -> str:
    places = torch.arange(1, column.numel() + 1, dtype=torch.int64)
    return f"{int((column * places).sum() & 0xFFFFFFFF):08x}"


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _list_column(table: pa.Table, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    column = table.column(name).combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    offsets = _tensor(array.offsets.to_numpy(), torch.int64)
    # `flatten` honours a sliced array; `values` would not.
    return offsets - offsets[0], _tensor(array.flatten().to_numpy(zero_copy_only=False), dtype)


def read_catalog(path: Path) -> Catalog:
    """The catalogue of an `items.parquet`.

    Raises:
        DataError: the file is missing, unreadable, lacks `item_id` or `raw_id`, or is not ascending in `item_id`.
    """
    items = _read_columns(path, ("item_id", "raw_id"), ("title", SOURCE_ITEM_ID))
    titles = items.column("title").to_pylist() if "title" in items.column_names else [None] * items.num_rows
    ids = _tensor(items.column("item_id").to_numpy(), torch.int64)
    if ids.numel() == 0 or int(ids[0]) < 1 or not bool((ids.diff() > 0).all()):
        raise DataError(f"{path}: item_id must be ascending, unique and at least 1; {_AGAIN}")
    source_ids = None
    if SOURCE_ITEM_ID in items.column_names:
        source_ids = _tensor(items.column(SOURCE_ITEM_ID).to_numpy(), torch.int64)
    raw_ids = [str(x) for x in items.column("raw_id").to_pylist()]
    return Catalog(item_ids=ids, raw_ids=raw_ids, titles=titles, source_item_ids=source_ids)


def _check(
    name: str,
    split_rows: dict[str, tuple[int, int]],
    offsets: Tensor,
    item_ids: Tensor,
    ratings: Tensor,
    timestamps: Tensor,
    catalog: Catalog,
) -> None:
    if item_ids.numel() == 0:
        raise DataError(f"dataset {name!r}: got no events, expected at least one; try preparing it again")
    if not (item_ids.numel() == ratings.numel() == timestamps.numel() == int(offsets[-1])):
        raise DataError(
            f"dataset {name!r}: list columns differ in length ({item_ids.numel()} item_ids, {ratings.numel()} ratings, "
            f"{timestamps.numel()} timestamps), expected equal; try preparing it again"
        )
    position = torch.searchsorted(catalog.item_ids, item_ids).clamp_(max=len(catalog) - 1)
    unknown = (catalog.item_ids[position] != item_ids).nonzero()
    if unknown.numel():
        event = int(unknown[0])
        row = int(torch.searchsorted(offsets, event, right=True)) - 1
        file = "sequences.parquet"
        for split, (first, last) in split_rows.items():
            if first <= row < last:
                file, row = f"sequences_{split}.parquet", row - first
                break
        raise DataError(
            f"dataset {name!r}: {file} row {row} holds item {int(item_ids[event])}, which items.parquet lacks"
        )
