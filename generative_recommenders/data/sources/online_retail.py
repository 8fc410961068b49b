"""UCI Online Retail II (Chen, 2019, doi 10.24432/C5CG6D; CC BY 4.0): what a gift wholesaler's customers bought.

A folder with two tables:

    sessions.parquet    a row an invoice: `user_id`, `timestamp` (seconds), and the parallel lists `item_id_list` and
                        `event_type_list` (1 purchase, 2 cancellation or return)
    items.parquet       `item_id`, `stock_code`, `description`

An event is a purchased line, ratings are all 1; cancellations are dropped and counted, and who has nothing else is no
user. Lines of an invoice share its time and keep their order; customers buy the same item again and again.

The invoices as sessions of event types are another dataset, `python -m generative_recommenders.data.online_retail`.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source
from generative_recommenders.data.tables import check_no_missing, to_numpy

SESSIONS, ITEMS = "sessions.parquet", "items.parquet"
_PURCHASE = 1
_SESSION_COLUMNS = ["user_id", "timestamp", "item_id_list", "event_type_list"]
_ITEM_COLUMNS = ["item_id", "stock_code", "description"]


class OnlineRetail(Source):
    """Reads `sessions.parquet` and `items.parquet`."""

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        sessions, items = _table(raw, SESSIONS, _SESSION_COLUMNS), _table(raw, ITEMS, _ITEM_COLUMNS)
        where = raw.where(SESSIONS)
        try:
            lists, kinds = (sessions[name].combine_chunks() for name in _SESSION_COLUMNS[2:])
            counts, others = (pc.list_value_length(column).to_numpy() for column in (lists, kinds))
            if (counts != others).any():
                row = int(np.argmax(counts != others))
                raise DataError(
                    f"{where}, row {row + 1}: got {counts[row]} items and {others[row]} event types, expected equal"
                )
            bought = kinds.flatten().to_numpy() == _PURCHASE
            owners = np.repeat(np.arange(sessions.num_rows), counts)[bought]
            times = to_numpy(sessions["timestamp"].cast(pa.int64()))[owners]
            # Invoices go by user and time; the order of lines inside one must survive.
            return RawEvents(
                user_ids=to_numpy(sessions["user_id"].cast(pa.int64()))[owners],
                item_ids=lists.flatten().cast(pa.int64()).to_numpy()[bought],
                ratings=np.ones(len(owners), dtype=np.float32),
                timestamps=times,
                items=pa.table(
                    {
                        "item_id": items["item_id"].cast(pa.int64()),
                        "raw_id": items["stock_code"].cast(pa.string()),
                        "title": items["description"].cast(pa.string()),
                        "description": items["description"].cast(pa.string()),
                    }
                ).sort_by("item_id"),
                facts={"ratings": "all 1: purchases", "cancelled_lines_dropped": int((~bought).sum())},
            )
        except (pa.ArrowException, AttributeError) as error:
            raise DataError(
                f"{raw.path}: columns of other types than expected ({error!s:.120}); check --raw"
            ) from error


def _table(raw: RawFiles, name: str, columns: list[str]) -> pa.Table:
    where = raw.where(name)
    content = pa.BufferReader(raw.read(name))
    try:
        present = pq.read_schema(content).names
        missing = next((column for column in columns if column not in present), None)
        if missing is not None:
            raise DataError(f"{where}: column {missing!r} is missing, got {', '.join(present[:20])}; check --raw")
        table = pq.read_table(content, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: truncated or damaged ({str(error).splitlines()[0]}); get it again") from error
    if table.num_rows == 0:
        raise DataError(f"{where}: got no rows, expected some; check that the file is complete")
    check_no_missing(table.drop_columns(["description"]) if "description" in columns else table, where)
    return table


SOURCE = OnlineRetail(
    name="online-retail",
    expected_counts={"users": 5_853, "items_listed": 4_633, "events": 788_247},
)
