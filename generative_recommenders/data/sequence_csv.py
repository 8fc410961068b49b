"""Reads the public code's `sasrec_format.csv`: a row a user, list cells such as "3186,1270", into a row an event."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from generative_recommenders.data.errors import DataError

USER = "user_id"
ITEMS, RATINGS, TIMESTAMPS = "sequence_item_ids", "sequence_ratings", "sequence_timestamps"
COLUMNS = (USER, ITEMS, RATINGS, TIMESTAMPS)


def events_of_sequences(rows: pa.Table, where: str) -> pa.Table:
    """One row an event, in the order of the file.

    Args:
        rows: the columns `COLUMNS` as text.
        where: how messages name the file.
    Returns:
        The same columns: users and items as text, ratings float32, timestamps int64.
    Raises:
        DataError: the lists of a row differ in length, an item is empty, or a rating or time is no number, with the
            row.
    """
    lists = {name: pc.split_pattern(rows[name].combine_chunks(), ",") for name in COLUMNS[1:]}
    lengths = {name: pc.list_value_length(values).to_numpy(zero_copy_only=False) for name, values in lists.items()}
    for name in (RATINGS, TIMESTAMPS):
        differs = lengths[name] != lengths[ITEMS]
        if differs.any():
            row = int(np.argmax(differs))
            raise DataError(
                f"{where}, row {row + 1}: got {lengths[ITEMS][row]} values in {ITEMS} "
                f"and {lengths[name][row]} in {name}, expected as many; fix the row"
            )
    owner = np.repeat(np.arange(rows.num_rows), lengths[ITEMS])
    flat = {name: pc.utf8_trim_whitespace(values.flatten()) for name, values in lists.items()}
    empty = pc.equal(flat[ITEMS], "").to_numpy(zero_copy_only=False)
    if empty.any():
        row = owner[int(np.argmax(empty))] + 1
        raise DataError(f"{where}, row {row}, column {ITEMS}: got an empty id, expected ids separated by commas")
    return pa.table(
        {
            USER: rows[USER].combine_chunks().take(pa.array(owner)),
            ITEMS: flat[ITEMS],
            RATINGS: _numbers(flat[RATINGS], pa.float32(), owner, where, RATINGS),
            TIMESTAMPS: _numbers(flat[TIMESTAMPS], pa.int64(), owner, where, TIMESTAMPS),
        }
    )


def _numbers(texts: pa.Array, kind: pa.DataType, owner: np.ndarray, where: str, name: str) -> pa.Array:
    pattern = r"^-?\d{1,18}$" if pa.types.is_integer(kind) else r"^-?\d+(\.\d*)?$"
    good = pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
    if not good.all():
        event = int(np.argmin(good))
        raise DataError(
            f"{where}, row {owner[event] + 1}, column {name}: got {texts[event].as_py()!r}, "
            "expected numbers separated by commas; fix the row"
        )
    return texts.cast(kind)
