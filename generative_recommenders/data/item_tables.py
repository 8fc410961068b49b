"""Further columns of items from a table of the source, for datasets whose events come without them.

A `.parquet` or `.csv` file with a row an item. Its key is `raw_id`, or `item_id` where it has no `raw_id`; either way
it holds the ids of the source, those of `raw_id` in `items.parquet`.
"""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError

logger = logging.getLogger(__name__)

_KEYS = ("raw_id", "item_id")
_TEXT = pa.string()


def with_item_table(items: pa.Table, path: Path) -> pa.Table:
    """`items` with the columns of the table, null for items that it does not list; a column of both is the table's.

    Raises:
        DataError: the file is unreadable, has no key, repeats one, or lists none of the items.
    """
    table, key = _read(path)
    ids = table[key].cast(pa.string()).combine_chunks()
    counts = pc.value_counts(ids)
    if ids.null_count or len(counts) < len(ids):
        repeated = counts.filter(pc.or_(pc.greater(counts.field("counts"), 1), pc.is_null(counts.field("values"))))
        raise DataError(f"{path}: got {key} {repeated[0]['values'].as_py()!r} empty or twice, expected one row an item")
    rows = pc.index_in(items["raw_id"].cast(pa.string()).combine_chunks(), ids)
    if rows.null_count == items.num_rows:
        raise DataError(
            f"{path}: lists none of the {items.num_rows:,} items, such as {items['raw_id'][0].as_py()!r}; "
            f"expected their raw ids in {key}"
        )
    if rows.null_count:
        logger.warning("%s: %d of %d items are not listed", path, rows.null_count, items.num_rows)
    for name in table.column_names:
        if name in _KEYS:
            continue
        column = table[name].combine_chunks().take(rows)
        items = items.drop_columns([name]) if name in items.column_names else items
        items = items.append_column(name, column)
    return items


def _read(path: Path) -> tuple[pa.Table, str]:
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        elif path.suffix == ".csv":
            # Ids such as 007 stay as they are.
            table = pacsv.read_csv(path, convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(_KEYS, _TEXT)))
        else:
            raise DataError(f"item_table: got {path}, expected a .parquet or .csv file; convert it")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]:.120}); check the path") from error
    key = next((name for name in _KEYS if name in table.column_names), None)
    if key is None:
        names = ", ".join(table.column_names[:20])
        raise DataError(f"{path}: got the columns {names}, expected raw_id or item_id among them; rename one")
    return table, key
