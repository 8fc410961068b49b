"""What an expansion will be before it is made: rows, events and bytes of every shard, and the memory it takes."""

import math
from dataclasses import dataclass

import numpy as np

from generative_recommenders.data.fractal import Expansion
from generative_recommenders.data.fractal_output import CHUNK_EVENTS

# Measured: Python with PyTorch and Arrow, then bytes an event of each stage and of the chunk that is merged.
_BASE_BYTES = 400e6
_READ_BYTES, _SINGULAR_BYTES, _BLOCK_BYTES, _MERGE_BYTES = 110, 70, 40, 150
_SINGULAR_PASSES = 12


@dataclass(frozen=True)
class Plan:
    """Expected size of an expansion of R rows of blocks.

    Attributes:
        rows_R: users with at least one event; an estimate.
        events_R: int64, exact.
        csv_bytes_R, parquet_bytes_R: estimates.
        spill_bytes: largest nameless file that is on disk while a shard is written.
        items_bytes: items.parquet.
        memory_bytes: peak of the process; an estimate.
        wanted_events: sum of G times the entries of the ratings times the block rate, before anything is drawn.
    """

    rows_R: np.ndarray
    events_R: np.ndarray
    csv_bytes_R: np.ndarray
    parquet_bytes_R: np.ndarray
    spill_bytes: float
    items_bytes: float
    memory_bytes: float
    wanted_events: float

    def disk_bytes(self, is_dataset: bool) -> float:
        """Bytes of all files; a folder holds the parquet rows twice, in shards and in sequences.parquet."""
        shards = float(self.csv_bytes_R.sum() + self.parquet_bytes_R.sum())
        return shards + (float(self.parquet_bytes_R.sum()) + self.items_bytes if is_dataset else 0.0)


def plan(expansion: Expansion) -> Plan:
    """The plan of an expansion; its cost does not grow with the events."""
    ratings, settings = expansion.ratings, expansion.settings
    events_RC = expansion.block_events
    events_R = expansion.shard_events
    rows_R = np.array([_expected_rows(expansion, i) for i in range(len(events_RC))])
    item_digits = np.array([_mean_digits(j * ratings.num_items, ratings.num_items) for j in range(events_RC.shape[1])])
    shares = np.bincount(ratings.codes_E) / ratings.num_events
    rating_digits = float(shares @ np.array([len(str(value)) for value in ratings.values_V]))
    # A row adds its user id, two commas, four quotes and a line end, and lists have one comma fewer than values.
    csv_bytes_R = (
        events_RC @ item_digits + events_R * (rating_digits + 2) + rows_R * (math.log10(expansion.num_users) + 5)
    )
    rating_bits = float(-(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum())
    event_bytes = (math.log2(expansion.num_items + 1) + rating_bits) / 8 + 0.15
    spilled = 6 + ratings.codes_E.itemsize
    smallest, largest = sorted((ratings.num_users, ratings.num_items))
    vectors = 8 * (smallest + largest) * _SINGULAR_PASSES * (min(events_RC.shape) + 8)
    stages = (
        _READ_BYTES * ratings.num_events,
        _SINGULAR_BYTES * ratings.num_events + 2 * vectors,
        _BLOCK_BYTES * ratings.num_events + _MERGE_BYTES * min(CHUNK_EVENTS, int(events_R.max())),
        _BLOCK_BYTES * ratings.num_events + 20 * expansion.num_items,
    )
    return Plan(
        rows_R=rows_R,
        events_R=events_R,
        csv_bytes_R=csv_bytes_R,
        parquet_bytes_R=event_bytes * events_R + 2.0 * rows_R,
        spill_bytes=float(
            spilled * events_R.max() + 4 * ratings.num_users * int(np.count_nonzero(events_RC, axis=1).max())
        ),
        items_bytes=4.0 * expansion.num_items,
        memory_bytes=_BASE_BYTES + max(stages),
        wanted_events=float(expansion.pattern.sum())
        * settings.element_sample_rate
        * settings.block_sample_rate
        * ratings.num_events,
    )


def describe(expansion: Expansion, source: str, is_dataset: bool, finished: int = 0) -> str:
    """The plan as text, a line a shard."""
    ratings, settings, expected = expansion.ratings, expansion.settings, plan(expansion)
    lines = [
        f"input      {source}: {ratings.num_users:,} users, {ratings.num_items:,} items, {ratings.num_events:,} "
        "ratings (without users of at most 2 distinct times)",
        f"expansion  {settings.num_row_multiplier} x {settings.num_col_multiplier}: {expansion.num_users:,} users, "
        f"items 1..{expansion.num_items:,}, {int(expected.events_R.sum()):,} ratings "
        f"(sum of rates x ratings: {expected.wanted_events:,.0f})",
        f"{'shard':>6} {'rows':>14} {'ratings':>17} {'csv':>10} {'parquet':>10}",
    ]
    columns = (expected.rows_R, expected.events_R, expected.csv_bytes_R, expected.parquet_bytes_R)
    for i, (rows, events, csv, parquet) in enumerate(zip(*columns, strict=True)):
        lines.append(_line(str(i), rows, events, csv, parquet))
    lines.append(_line("total", *(column.sum() for column in columns)))
    lines.append(
        f"disk       {_size(expected.disk_bytes(is_dataset))} in all, and {_size(expected.spill_bytes)} while a shard "
        f"is written; {finished} of {len(expected.rows_R)} shards are there"
    )
    lines.append(f"memory     {_size(expected.memory_bytes)} at most")
    return "\n".join(lines)


def _expected_rows(expansion: Expansion, i: int) -> float:
    """Users of row `i` with an event: every block is shuffled alone, so that its empty rows are independent."""
    lengths, numbers = np.unique(np.diff(expansion.ratings.starts_U1), return_counts=True)
    events = np.unique(expansion.block_events[i], return_counts=True)
    share = numbers / numbers.sum()
    log_empty = 0.0
    for kept, times in zip(*events, strict=True):
        empty = float(share @ np.power(1 - kept / expansion.ratings.num_events, lengths))
        log_empty += times * math.log(max(empty, 1e-300))
    return expansion.ratings.num_users * (1 - math.exp(log_empty))


def _mean_digits(first: int, count: int) -> float:
    """Mean number of decimal digits of first + 1..first + count."""
    powers = 10 ** np.arange(19, dtype=np.int64)
    return float(np.clip(first + count - np.maximum(powers - 1, first), 0, count).sum()) / count


def _line(name: str, rows: float, events: float, csv: float, parquet: float) -> str:
    return f"{name:>6} {round(rows):>14,} {int(events):>17,} {_size(csv):>10} {_size(parquet):>10}"


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
