"""Lines of JSON objects, gzipped or not, to Arrow columns, with errors that name the file, the line and the field.

As in `tables`, the fast path is one pass of Arrow's reader; only when that fails are the lines read a second time, one
by one, to find the line to blame. Lines are counted from 1.
"""

import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.tables import to_numpy

# One line must fit into a block.
_BLOCK_BYTES = 16 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def read_json_lines(content: pa.Buffer, fields: pa.Schema, *, where: str, nullable: Collection[str] = ()) -> pa.Table:
    """The named fields of one object a line; others are ignored.

    Args:
        fields: names and types, of integers, floats, strings and lists of these.
        where: how messages name the file.
        nullable: fields that may be null or absent.
    Raises:
        DataError: truncated gzip, no lines, a line that is no JSON object, or a field that is absent, null, not finite
            or of another type.
    """
    parse = pajson.ParseOptions(explicit_schema=fields, unexpected_field_behavior="ignore")
    try:
        stream = pa.BufferReader(content)
        packed = pa.CompressedInputStream(stream, "gzip") if is_gzip(content) else stream
        table = pajson.read_json(packed, pajson.ReadOptions(block_size=_BLOCK_BYTES), parse)
        # Arrow takes bytes that are no UTF-8 for text until somebody looks at them.
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        _check_lines(content, fields, where, nullable)
        raise DataError(f"{where}: not lines of JSON objects ({str(error).splitlines()[0]}); get it again") from error
    except OSError as error:
        raise DataError(f"{where}: truncated or damaged ({error}); get the file again") from error
    if table.num_rows == 0:
        raise DataError(f"{where}: got no lines, expected one JSON object a line; check that the file is complete")
    for name in fields.names:
        if name not in nullable and pc.any(_is_bad(table[name])).as_py():
            _check_lines(content, fields, where, nullable)
            row = int(np.argmax(to_numpy(_is_bad(table[name])))) + 1
            raise DataError(f"{where}, object {row}, {name}: got a number that is not finite; fix the line")
    return table


def lines(content: pa.Buffer, where: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank, streamed. Raises `DataError` where the gzip is truncated."""
    stream = pa.BufferReader(content)
    try:
        with gzip.GzipFile(fileobj=stream) if is_gzip(content) else stream as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{where}: truncated or damaged ({error}); get the file again") from error


def is_gzip(content: pa.Buffer) -> bool:
    """Whether the bytes begin as gzip does."""
    return content.slice(0, min(2, content.size)).to_pybytes() == _GZIP_MAGIC


def _is_bad(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return pc.is_null(column)
    return pc.invert(pc.fill_null(pc.is_finite(column), False))


def _check_lines(content: pa.Buffer, fields: pa.Schema, where: str, nullable: Collection[str]) -> None:
    """Raise `DataError` for the first line that Arrow could not have taken."""
    number = 0
    for number, line in lines(content, where):
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, line {number}: not a JSON object ({error}); fix the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}, line {number}: got {_shown(record)}, expected a JSON object; fix the line")
        for field in fields:
            value = record.get(field.name)
            if value is None and field.name in nullable:
                continue
            if field.name not in record:
                present = ", ".join(list(record)[:20])
                raise DataError(f"{where}, line {number}: {field.name!r} is missing, got {present}; fix the line")
            if not _fits(value, field.type):
                raise DataError(
                    f"{where}, line {number}, {field.name}: got {_shown(value)}, expected {_kind(field.type)}; "
                    "fix the line"
                )
    if number == 0:
        raise DataError(f"{where}: got no lines, expected one JSON object a line; check that the file is complete")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _fits(value: Any, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(entry, kind.value_type) for entry in value)
    if pa.types.is_string(kind):
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if pa.types.is_integer(kind):
        return isinstance(value, int) and -(2**63) <= value < 2**63
    return isinstance(value, int | float) and abs(value) <= float(np.finfo(np.float32).max)


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return "a list of lists of texts" if pa.types.is_list(kind.value_type) else "a list of texts"
    if pa.types.is_string(kind):
        return "a text"
    return "an integer" if pa.types.is_integer(kind) else "a number"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
