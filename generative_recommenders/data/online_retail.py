"""The sessions table of UCI Online Retail II to Merlin session tables.

    python -m generative_recommenders.data.online_retail --raw online-retail/sessions.parquet --out tmp/merlin

The data set (Chen, 2019, doi 10.24432/C5CG6D; CC BY 4.0) holds the invoices of a gift wholesaler over two years. The
table that is read has a row an invoice: `session_id`, `timestamp` (Unix seconds), and the parallel lists `item_id_list`
and `event_type_list` (1 purchase, 2 cancellation or return).

A session is an invoice of two lines or more; its `user_session` is the invoice number, so nothing links the sessions of
one customer. Items repeat within a session where the invoice repeats them. All lines of an invoice have one type, so
event types tell cancellations from purchases and nothing more. Sessions go by time: about 80 % are train, the next 10 %
valid, the last 10 % test. A boundary never parts sessions of equal times: they all go to the later split. Sessions of
valid and test stay, whether or not train has their items.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, SPLITS, TIME, USER, write_tables
from generative_recommenders.errors import run_cli

MIN_EVENTS = 2
SHARES = (0.8, 0.9)
# Column of the session table: column of the Merlin table.
_COLUMNS = {"item_id_list": ITEMS, "event_type_list": EVENT_TYPES, "session_id": USER, "timestamp": TIME}


def convert(raw: Path) -> dict[str, pa.Table]:
    """The Merlin tables by split, sessions in time order, equal times in the order of `raw`.

    Raises:
        DataError: the file is absent or unreadable, lacks a column, or has too few distinct times for three splits.
    """
    try:
        present = pq.read_schema(raw).names
        missing = next((name for name in _COLUMNS if name not in present), None)
        if missing is not None:
            raise DataError(
                f"{raw}: column {missing!r} is missing, got the columns {', '.join(present[:20])}; "
                "give the table with a row an invoice"
            )
        table = pq.read_table(raw, columns=list(_COLUMNS)).rename_columns(list(_COLUMNS.values()))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{raw}: cannot be read ({str(error).splitlines()[0]}); check --raw") from error
    table = table.filter(pc.greater_equal(pc.list_value_length(table[ITEMS]), MIN_EVENTS))
    times = table[TIME].to_numpy()
    order = np.argsort(times, kind="stable")
    table, times = table.take(pa.array(order)), times[order]
    # The first session of the time at which a share of the sessions is reached.
    firsts = [int(np.searchsorted(times, times[int(len(times) * share)])) for share in SHARES] if len(times) else []
    edges = [0, *firsts, len(times)]
    if len(set(edges)) < len(SPLITS) + 1:
        raise DataError(
            f"{raw}: got {len(times)} sessions of {MIN_EVENTS} events or more at {len(np.unique(times))} distinct "
            f"times, expected enough for {', '.join(SPLITS)}; give the complete table"
        )
    return {split: table.slice(edges[i], edges[i + 1] - edges[i]) for i, split in enumerate(SPLITS)}


def with_unseen_items(tables: Mapping[str, pa.Table]) -> dict[str, int]:
    """For valid and test, the sessions with an item that train does not have."""
    known = pc.unique(pc.list_flatten(tables["train"][ITEMS]))
    counts = {}
    for split in SPLITS[1:]:
        lists = tables[split][ITEMS]
        unseen = ~pc.is_in(pc.list_flatten(lists), known).to_numpy()
        counts[split] = len(np.unique(pc.list_parent_indices(lists).to_numpy()[unseen]))
    return counts


def main() -> int:
    """Convert what the command line names, and say what came out."""
    parser = argparse.ArgumentParser(description="Convert the sessions of Online Retail II to the Merlin format.")
    parser.add_argument("--raw", type=Path, required=True, help="sessions.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder to write train, valid and test.parquet into")
    options = parser.parse_args()
    tables = convert(options.raw)
    write_tables(options.out, tables)
    sessions = ", ".join(f"{split} {table.num_rows:,}" for split, table in tables.items())
    unseen = ", ".join(f"{split} {count:,}" for split, count in with_unseen_items(tables).items())
    sys.stdout.write(f"{options.out}: sessions {sessions}; sessions with an item that train lacks: {unseen}\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
