"""Files of a fractal expansion, written a row of blocks (a shard) at a time.

With P the output prefix, the expansion of R x C writes

    P{R}x{C}_{i}.csv            user_id,"item ids","ratings" for i in 0..R-1, no header: the published layout
    P{R}x{C}_{i}.parquet        the same as user_id, item_ids, ratings, timestamps, one row group a chunk of users
    P{R}x{C}_users.csv          i,number of rows
    P{R}x{C}_statistics.csv     see `fractal_report`

and, where P ends in a slash, sequences.parquet (the rows of all shards), items.parquet and dataset.json: the folder is
then a prepared dataset. An expansion has no times: timestamps are positions, 0 for a user's oldest event. User ids are
i*U + k for row k of shard i, from 0; users without events have no row.

Every file appears whole or not at all, and a shard that is there is kept. A parquet shard carries the settings and the
checksums of its input, and comes after its CSV.

Memory: R, the block at hand, and one chunk of users. Blocks are made one after the other; each is cut into chunks of
users, which go to a nameless file on the same disk, and come back chunk by chunk to be merged by user.
"""

import glob
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import is_running, write_failure
from generative_recommenders.data.fractal import Expansion
from generative_recommenders.data.fractal_report import Activity, source_activity, statistics_table
from generative_recommenders.data.preprocess import (
    ITEMS_FILE,
    METADATA_FILE,
    MIN_EVENTS,
    SEQUENCES_FILE,
    SEQUENCES_SCHEMA,
    SPLIT,
    VERSION,
)

# Merging takes about 150 bytes an event: 4 Mi events are 0.6 GB.
CHUNK_EVENTS = 1 << 22
_ITEMS_AT_ONCE = 1 << 20
# Lists with 32-bit offsets cannot be joined into one column past this size.
_MOST_NARROW = (1 << 31) - 1
_METADATA_KEY = "fractal_expansion"
_CSV_SCHEMA = pa.schema({"user_id": pa.int64(), "item_ids": pa.string(), "ratings": pa.string()})
# Item ids are close to random numbers of few bits, and positions count up.
_ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["ratings.list.element"],
    "column_encoding": {
        "user_id": "DELTA_BINARY_PACKED",
        "item_ids.list.element": "BYTE_STREAM_SPLIT",
        "timestamps.list.element": "DELTA_BINARY_PACKED",
    },
}


class Output:
    """Where an expansion goes and how much of it is there.

    Args:
        prefix: start of all file names; one that ends in a slash is a folder, which becomes a prepared dataset.
        source: file or folder name of the input, for dataset.json.
        checksums: SHA-256 of the input by file name.
        command: the command line, for dataset.json.
    Raises:
        DataError: the place holds shards or a dataset of other settings or of other ratings, or is a folder named
            without a slash.
    """

    def __init__(
        self,
        expansion: Expansion,
        prefix: str,
        *,
        source: str = "",
        checksums: Mapping[str, str] | None = None,
        command: str = "",
    ) -> None:
        self.expansion = expansion
        self._fingerprint = expansion.fingerprint()
        self._source, self._command = source, command
        self._checksums = dict(checksums or {})
        rows, cols = expansion.block_events.shape
        self.folder = Path(prefix) if prefix.endswith("/") else Path(prefix).parent
        self.is_dataset = prefix.endswith("/")
        self._start = f"{'' if prefix.endswith('/') else Path(prefix).name}{rows}x{cols}_"
        if not self.is_dataset and prefix and Path(prefix).is_dir():
            raise DataError(f"--output-prefix: got the folder {prefix}, expected a slash at its end; try {prefix}/")
        self.finished = [i for i in range(rows) if self._is_finished(i)]
        self.complete = self.is_dataset and self._is_complete()

    def path(self, ending: str) -> Path:
        """The file `P{R}x{C}_{ending}`."""
        return self.folder / (self._start + ending)

    @property
    def name(self) -> str:
        """Name of the dataset: that of the folder."""
        return self.folder.resolve().name

    def write(self, i: int) -> None:
        """Write shard `i`, whether it is there or not. Raises `DataError` where the disk is full or refuses."""
        expansion = self.expansion
        # From the plan alone, so that the bytes do not depend on the machine.
        share = CHUNK_EVENTS / max(CHUNK_EVENTS, int(expansion.block_events[i].sum()))
        chunk_users = max(1, int(expansion.ratings.num_users * share))
        firsts = range(0, expansion.ratings.num_users, chunk_users)
        csv, parquet = self.path(f"{i}.csv"), self.path(f"{i}.parquet")
        headless = pacsv.WriteOptions(include_header=False)
        with (
            _whole_files(csv, parquet) as (csv_part, parquet_part),
            tempfile.TemporaryFile(dir=self.folder) as spill,
        ):
            offsets = self._spill_blocks(i, firsts, chunk_users, spill)
            counts = {"rows": 0, "events": 0}
            with pq.ParquetWriter(parquet_part, SEQUENCES_SCHEMA, **_ENCODING) as parquet_writer:
                with pacsv.CSVWriter(str(csv_part), _CSV_SCHEMA, write_options=headless) as csv_writer:
                    for number, first in enumerate(firsts):
                        size = min(chunk_users, expansion.ratings.num_users - first)
                        chunk, text = self._merged(i, first, size, spill, offsets[:, number].tolist())
                        if not chunk.num_rows:
                            continue
                        parquet_writer.write_table(chunk, row_group_size=chunk.num_rows)
                        csv_writer.write_table(text)
                        counts["rows"] += chunk.num_rows
                        counts["events"] += len(chunk["item_ids"].chunk(0).values)
                facts = {**self._fingerprint, **counts, "csv_bytes": csv_part.stat().st_size}
                parquet_writer.add_key_value_metadata({_METADATA_KEY: json.dumps(facts)})

    def finish(self) -> Activity:
        """Write what describes all shards: rows, statistics and, in a folder, the prepared dataset.

        Returns:
            Counts of the whole expansion.
        """
        rows = len(self.expansion.block_events)
        activity = Activity(self.expansion.num_items)
        if self.is_dataset:
            with _whole_files(self.folder / SEQUENCES_FILE, self.folder / ITEMS_FILE) as (sequences, items):
                wide = int(self.expansion.block_events.sum()) > _MOST_NARROW
                schema = pa.schema([_large(field) for field in SEQUENCES_SCHEMA]) if wide else SEQUENCES_SCHEMA
                with pq.ParquetWriter(sequences, schema, **_ENCODING) as writer:
                    for chunk in self._chunks(activity):
                        writer.write_table(chunk.cast(schema), row_group_size=chunk.num_rows)
                self._write_items(items)
        else:
            for _ in self._chunks(activity):
                pass
        with _whole_files(self.path("users.csv")) as (path,):
            path.write_text("".join(f"{i},{self._shard_facts(i)['rows']}\n" for i in range(rows)))
        self.write_statistics(activity)
        if self.is_dataset:
            self._write_metadata(activity)
        return activity

    def write_statistics(self, activity: Activity) -> None:
        """Write the curves of the source and of the expansion."""
        table = statistics_table({"source": source_activity(self.expansion.ratings), "expansion": activity})
        with _whole_files(self.path("statistics.csv")) as (path,):
            table.to_pandas().to_csv(path, index=False, lineterminator="\n")

    def _spill_blocks(self, i: int, firsts: range, chunk_users: int, spill: BinaryIO) -> np.ndarray:
        """Write the pieces of all blocks of row `i`; offsets int64 (blocks, chunks)."""
        used = np.flatnonzero(self.expansion.block_events[i]).tolist()
        offsets = np.empty((len(used), len(firsts)), dtype=np.int64)
        for row, j in enumerate(used):
            block = self.expansion.block(i, j)
            for number, first in enumerate(firsts):
                offsets[row, number] = spill.tell()
                piece = block.rows(first, min(first + chunk_users, self.expansion.ratings.num_users))
                for part in ("counts", "columns", "places", "codes"):
                    spill.write(piece[part].data)
        return offsets

    def _merged(self, i: int, first: int, size: int, spill: BinaryIO, offsets: list[int]) -> tuple[pa.Table, pa.Table]:
        """Users first..first + size - 1 of row `i`: the rows of the parquet file and those of the CSV."""
        ratings = self.expansion.ratings
        owners, items, places, codes = [], [], [], []
        for j, offset in zip(np.flatnonzero(self.expansion.block_events[i]).tolist(), offsets, strict=True):
            spill.seek(offset)
            counts = _read(spill, np.uint32, size)
            total = int(counts.sum())
            owners.append(np.repeat(np.arange(size, dtype=np.int64), counts))
            items.append(_read(spill, np.uint32, total).astype(np.int64) + (j * ratings.num_items + 1))
            places.append(_read(spill, np.uint16, total))
            codes.append(_read(spill, ratings.codes_E.dtype, total))
        owner = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)
        if not len(owner):
            return SEQUENCES_SCHEMA.empty_table(), _CSV_SCHEMA.empty_table()
        order = np.argsort((owner << 16) | np.concatenate(places), kind="stable")
        lengths = np.bincount(owner, minlength=size)
        users = np.flatnonzero(lengths)
        starts = np.concatenate(([0], np.cumsum(lengths[users])))
        item, code = np.concatenate(items)[order], np.concatenate(codes)[order]
        position = np.arange(len(item)) - np.repeat(starts[:-1], lengths[users])
        row_offsets = pa.array(starts.astype(np.int32))

        def lists(values: pa.Array | np.ndarray) -> pa.ListArray:
            return pa.ListArray.from_arrays(row_offsets, values)

        user_ids = pa.array(users + (i * ratings.num_users + first))
        columns = [user_ids, lists(item), lists(ratings.values_V[code]), lists(position)]
        names = pa.array([str(value) for value in ratings.values_V]).take(pa.array(code))
        texts = [user_ids, pc.binary_join(lists(pc.cast(item, pa.string())), ","), pc.binary_join(lists(names), ",")]
        return pa.table(columns, schema=SEQUENCES_SCHEMA), pa.table(texts, schema=_CSV_SCHEMA)

    def _chunks(self, activity: Activity) -> Iterator[pa.Table]:
        """Row groups of all shards in order, counted into `activity`."""
        for i in range(len(self.expansion.block_events)):
            with pq.ParquetFile(self.path(f"{i}.parquet")) as shard:
                for group in range(shard.num_row_groups):
                    chunk = shard.read_row_group(group)
                    activity.add_users(pc.list_value_length(chunk["item_ids"]).to_numpy())
                    activity.add_items(pc.list_flatten(chunk["item_ids"]).to_numpy() - 1)
                    yield chunk

    def _write_items(self, path: Path) -> None:
        """All items, rated or not; an item of an expansion has no name but its id."""
        schema = pa.schema({"item_id": pa.int64(), "raw_id": pa.string()})
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for first in range(1, self.expansion.num_items + 1, _ITEMS_AT_ONCE):
                ids = pa.array(np.arange(first, min(first + _ITEMS_AT_ONCE, self.expansion.num_items + 1)))
                writer.write_table(pa.table([ids, pc.cast(ids, pa.string())], schema=schema))

    def _write_metadata(self, activity: Activity) -> None:
        metadata = {
            "name": self.name,
            "version": VERSION,
            "source": self._source,
            "checksum": {member: f"sha256:{digest}" for member, digest in self._checksums.items()},
            "options": {_METADATA_KEY: self._fingerprint},
            "counts": {
                "users": activity.users,
                "items_listed": self.expansion.num_items,
                "items_rated": activity.items,
                "events": activity.events,
                "users_with_fewer_than_3_events": activity.users_shorter_than(MIN_EVENTS),
            },
            "max_item_id": self.expansion.num_items,
            "split": SPLIT,
            "command": self._command,
            "timestamps": "position in the sequence",
        }
        with _whole_files(self.folder / METADATA_FILE) as (path,):
            path.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _is_finished(self, i: int) -> bool:
        parquet, csv = self.path(f"{i}.parquet"), self.path(f"{i}.csv")
        if not parquet.exists():
            return False
        facts = self._shard_facts(i)
        self._check_same(facts, parquet)
        return csv.is_file() and csv.stat().st_size == facts["csv_bytes"]

    def _is_complete(self) -> bool:
        """Whether the folder is this expansion as a prepared dataset; raises where it is another dataset."""
        path = self.folder / METADATA_FILE
        if not path.exists():
            return False
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))["options"][_METADATA_KEY]
        except (OSError, ValueError, LookupError, TypeError):
            facts = {}
        self._check_same(facts, path)
        files = [self.folder / SEQUENCES_FILE, self.folder / ITEMS_FILE]
        files += [self.path("users.csv"), self.path("statistics.csv")]
        return len(self.finished) == len(self.expansion.block_events) and all(file.is_file() for file in files)

    def _shard_facts(self, i: int) -> dict[str, Any]:
        path = self.path(f"{i}.parquet")
        try:
            facts: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[_METADATA_KEY.encode()])
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
            raise DataError(
                f"{path}: got a file that is no shard of an expansion; move it or change the prefix"
            ) from None
        return facts

    def _check_same(self, facts: Mapping[str, Any], path: Path) -> None:
        """Raise `DataError` naming the first difference between what was written and what would be."""
        for key, value in self._fingerprint.items():
            if facts.get(key) == value:
                continue
            known = key in facts and key in ("random_seed", "element_sample_rate", "block_sample_rate")
            difference = (
                f"--{key.replace('_', '-')} {facts[key]}, not {value}" if known else "other ratings or settings"
            )
            raise DataError(
                f"{path}: was made with {difference}; choose another --output-prefix or remove the old files"
            )


def _read(file: BinaryIO, kind: Any, count: int) -> np.ndarray:
    return np.frombuffer(file.read(np.dtype(kind).itemsize * count), dtype=kind)


def _large(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.large_list(field.type.value_type)) if pa.types.is_list(field.type) else field


@contextmanager
def _whole_files(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Names beside the targets to write to; they take the targets' names, in this order, when the block ends well.

    Raises:
        DataError: the disk is full or the place cannot be written.
    """
    parts = tuple(target.with_name(f"{target.name}.partial-{os.getpid()}") for target in targets)
    try:
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        for target in targets:
            _clear_leftovers(target)
        yield parts
        for part in parts:
            with part.open("rb") as handle:
                os.fsync(handle.fileno())
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
    except OSError as error:
        otherwise = "choose another --output-prefix, the shards that are complete are kept"
        raise DataError(write_failure(targets[0], error, otherwise)) from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes have left of their attempts to write `target`."""
    for path in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and not is_running(int(number)):
            path.unlink(missing_ok=True)
