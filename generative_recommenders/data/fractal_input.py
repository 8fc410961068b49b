"""What can be expanded: ratings.csv of MovieLens 20M, ratings.dat of MovieLens 1M, or a prepared dataset."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import SEQUENCES_FILE
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.tables import read_delimited

_COLUMNS = {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}


def read_events(path: Path) -> tuple[pa.Table, RawFiles]:
    """Events of a ratings file, as `index_ratings` takes them, and the files they come from.

    Args:
        path: a CSV with the columns userId, movieId, rating and timestamp; a .dat with the same cells in this order
            between double colons; or a folder with sequences.parquet. A ratings.csv that is not there stands for its
            folder, where that is a prepared dataset.
    Raises:
        DataError: the file is absent or not as expected.
    """
    if not path.exists() and (path.parent / SEQUENCES_FILE).is_file():
        path = path.parent
    if not path.exists():
        raise DataError(
            f"--input-csv-file {path}: no such file or folder; name a ratings.csv, a ratings.dat or a folder that "
            "preprocess_public_data.py has written"
        )
    raw = RawFiles(path)
    if path.is_dir():
        if not raw.has(SEQUENCES_FILE):
            raise DataError(f"{path}: got a folder without {SEQUENCES_FILE}; prepare it, or name the file of ratings")
        return _read_sequences(raw), raw
    buffer = raw.read(path.name)
    if path.suffix == ".dat":
        text = pa.py_buffer(buffer.to_pybytes().replace(b"::", b":"))
        return read_delimited(text, _COLUMNS, where=str(path), delimiter=":", names=tuple(_COLUMNS)), raw
    names = {"userId": "user_id", "movieId": "item_id", "rating": "rating", "timestamp": "timestamp"}
    table = read_delimited(buffer, {name: _COLUMNS[column] for name, column in names.items()}, where=str(path))
    return table.rename_columns([names[name] for name in table.column_names]), raw


def _read_sequences(raw: RawFiles) -> pa.Table:
    where = raw.where(SEQUENCES_FILE)
    lists = {"item_ids": "item_id", "ratings": "rating", "timestamps": "timestamp"}
    try:
        table = pq.read_table(pa.BufferReader(raw.read(SEQUENCES_FILE)), columns=["user_id", *lists])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: cannot be read ({str(error).splitlines()[0]}); prepare the dataset again") from error
    missing = [name for name in ("user_id", *lists) if name not in table.column_names]
    if missing:
        raise DataError(f"{where}: column {missing[0]} is missing; prepare the dataset again")
    owners = np.repeat(table["user_id"].to_numpy(), pc.list_value_length(table["item_ids"]).to_numpy())
    flat = {column: pc.list_flatten(table[name]).cast(_COLUMNS[column]) for name, column in lists.items()}
    if any(len(values) != len(owners) for values in flat.values()) or not len(owners):
        raise DataError(f"{where}: got lists of unequal length, or no events; prepare the dataset again")
    return pa.table({"user_id": pa.chunked_array([pa.array(owners)]), **flat})
