"""Delimited text to Arrow columns, with errors that name the file, the row and the column.

The fast path is one multi-threaded pass of Arrow's CSV reader. Only when that fails is the text read a second time, as
strings, to find the row to blame: good data pays nothing for good messages. Rows are counted from 1, header excluded.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from generative_recommenders.data.errors import DataError

_INTEGER = r"^\s*[+-]?\d+\s*$"
NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_BLOCK_BYTES = 8 << 20
# Times in seconds lie strictly between -TIME_LIMIT and TIME_LIMIT: differences of any two fit int64.
TIME_LIMIT = 1 << 62


def read_delimited(
    source: pa.Buffer,
    types: Mapping[str, pa.DataType | None],
    *,
    where: str,
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    nullable: Sequence[str] = (),
) -> pa.Table:
    """Columns of a delimited text.

    Args:
        types: the wanted columns and their types; `None` lets Arrow infer the type.
        where: how messages name the file.
        names: all column names in order, for a text without a header line.
        nullable: columns in which a cell may be empty.
    Raises:
        DataError: empty text, a wanted column is missing, a row has another number of cells, or a cell is empty or
            does not have the type asked for.
    """
    if source.size == 0:
        raise DataError(f"{where}: got an empty file, expected the columns {', '.join(types)}")
    read = pacsv.ReadOptions(column_names=list(names) if names else None, block_size=_BLOCK_BYTES)
    parse = pacsv.ParseOptions(delimiter=delimiter)
    convert = pacsv.ConvertOptions(
        column_types={name: kind for name, kind in types.items() if kind is not None},
        include_columns=list(types),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    try:
        table = pacsv.read_csv(pa.BufferReader(source), read, parse, convert)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        _check_header(source, types, where, delimiter, names)
        _check_rows(source, types, where, delimiter, names)
        if None in types.values():
            # Arrow infers a type from the first block, and a later one may not have it.
            texts = {name: kind or pa.string() for name, kind in types.items()}
            return read_delimited(source, texts, where=where, delimiter=delimiter, names=names, nullable=nullable)
        raise DataError(f"{where}: not a readable table ({error})") from error
    if table.num_rows == 0:
        raise DataError(f"{where}: got no rows, expected one row an event; check that the file is complete")
    check_no_missing(table.drop_columns(list(nullable)), where)
    return table


def check_no_missing(table: pa.Table, where: str) -> None:
    """Raise `DataError` naming the first row with an empty or NaN cell."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        missing = pc.is_null(column, nan_is_null=True)
        if pc.any(missing).as_py():
            row = int(np.argmax(to_numpy(missing))) + 1
            raise DataError(
                f"{where}, row {row}, column {name}: got an empty or NaN cell, expected a value; fix the row"
            )


def encoded(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Codes int32 (E,) and the distinct values they stand for, in no particular order."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return array.indices.to_numpy(zero_copy_only=False), array.dictionary


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """One contiguous NumPy array of a column without nulls."""
    return column.to_numpy() if column.num_chunks != 1 else column.chunk(0).to_numpy(zero_copy_only=False)


def column_names(source: pa.Buffer, delimiter: str) -> list[str]:
    """Cells of the header line."""
    first_line = source.slice(0, min(source.size, 1 << 16)).to_pybytes().split(b"\n", 1)[0]
    return [cell.strip().strip('"') for cell in first_line.decode("utf-8-sig", "replace").split(delimiter)]


def _check_header(
    source: pa.Buffer, types: Mapping[str, pa.DataType | None], where: str, delimiter: str, names: Sequence[str] | None
) -> None:
    present = list(names) if names else column_names(source, delimiter)
    missing = [name for name in types if name not in present]
    if missing:
        raise DataError(
            f"{where}: column {missing[0]!r} is missing, got the columns {', '.join(present[:20])}; "
            "fix the header or name the column by its flag"
        )


def _check_rows(
    source: pa.Buffer,
    types: Mapping[str, pa.DataType | None],
    where: str,
    delimiter: str,
    names: Sequence[str] | None,
) -> None:
    header_lines = 0 if names else 1
    columns = list(names) if names else column_names(source, delimiter)
    ragged: list[pacsv.InvalidRow] = []

    def keep_first(row: pacsv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    parse = pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=keep_first)
    # One thread: only then does Arrow number the rows.
    read = pacsv.ReadOptions(column_names=list(names) if names else None, use_threads=False)
    convert = pacsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=list(types))
    try:
        table = pacsv.read_csv(pa.BufferReader(source), read, parse, convert)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: not a readable table ({error})") from error
    if ragged:
        row = ragged[0]
        raise DataError(
            f"{where}, row {row.number - header_lines}: got {row.actual_columns} cells ({row.text[:60]!r}), "
            f"expected {row.expected_columns}; fix the row"
        )
    for name, kind in types.items():
        if kind is None or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            continue
        integer = pa.types.is_integer(kind)
        good = pc.match_substring_regex(table[name], _INTEGER if integer else NUMBER)
        if not pc.all(good).as_py():
            index = int(np.argmin(to_numpy(good)))
            raise DataError(
                f"{where}, row {index + 1}, column {name}: got {table[name][index].as_py()!r}, "
                f"expected {'an integer' if integer else 'a number'}; fix the row"
            )
