"""MovieLens 1M (Harper & Konstan, ACM TiiS 5(4), 2015): a million ratings with time in seconds.

Item ids are the movie ids as published, unrated movies included. Users carry sex, age group, occupation and zip code
as codes 0.. of the sorted distinct values. Titles keep their year.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source, item_text
from generative_recommenders.data.tables import read_delimited, to_numpy


class MovieLens1M(Source):
    """Reads `ratings.dat`, `movies.dat` and `users.dat`."""

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        # No cell of ratings.dat holds a colon, so that one byte can stand for the two-byte separator.
        ratings = read_delimited(
            pa.py_buffer(raw.read("ratings.dat").to_pybytes().replace(b"::", b":")),
            {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()},
            where=raw.where("ratings.dat"),
            delimiter=":",
            names=("user_id", "item_id", "rating", "timestamp"),
        )
        return RawEvents(
            user_ids=to_numpy(ratings["user_id"]),
            item_ids=to_numpy(ratings["item_id"]),
            ratings=to_numpy(ratings["rating"]),
            timestamps=to_numpy(ratings["timestamp"]),
            items=movie_table(_rows(raw, "movies.dat", 3), raw.where("movies.dat")),
            users=_users(_rows(raw, "users.dat", 5), raw.where("users.dat")),
        )


def movie_table(rows: list[list[str]], where: str) -> pa.Table:
    """Items table of rows (id, title, genres joined by `|`), sorted by id.

    Raises:
        DataError: an id is no integer or occurs twice.
    """
    ids = parse_ids([row[0] for row in rows], where)
    order = np.argsort(ids, kind="stable")
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"{where}: got an item id twice, expected one row an item; fix the file")
    titles = [rows[i][1].strip() for i in order]
    genres = [[] if rows[i][2] == "(no genres listed)" else rows[i][2].split("|") for i in order]
    return pa.table(
        {
            "item_id": ids[order],
            "raw_id": [str(item) for item in ids[order]],
            "title": titles,
            "text": [item_text(title, names, "Genres") for title, names in zip(titles, genres, strict=True)],
            "categories": pa.array(genres, pa.list_(pa.string())),
        }
    )


def parse_ids(cells: list[str], where: str) -> np.ndarray:
    """int64 ids of text cells. Raises `DataError` naming the first row that is no integer."""
    for row, cell in enumerate(cells, start=1):
        if not cell.strip().isdecimal():
            raise DataError(f"{where}, row {row}: got the id {cell!r}, expected an integer; fix the row")
    return np.array([int(cell) for cell in cells], dtype=np.int64)


def codes(values: list[str] | list[int]) -> np.ndarray:
    """int64 codes 0.. of the sorted distinct values."""
    return pd.Categorical(values).codes.astype(np.int64)


def _rows(raw: RawFiles, name: str, cells: int) -> list[list[str]]:
    rows = [line.split("::") for line in raw.read(name).to_pybytes().decode("latin-1").splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != cells:
            raise DataError(f"{raw.where(name)}, row {number}: got {len(row)} cells, expected {cells}; fix the row")
    return rows


def _users(rows: list[list[str]], where: str) -> pa.Table:
    ids = parse_ids([row[0] for row in rows], where)
    order = np.argsort(ids, kind="stable")
    return pa.table(
        {
            "user_id": ids[order],
            "sex": codes([row[1] for row in rows])[order],
            "age_group": codes([int(row[2]) for row in rows])[order],
            "occupation": codes([int(row[3]) for row in rows])[order],
            "zip_code": codes([row[4] for row in rows])[order],
        }
    )


SOURCE = MovieLens1M(
    name="ml-1m",
    urls=(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "http://files.grouplens.org/datasets/movielens/ml-1m.zip",
    ),
    file_name="movielens1m.zip",
    sha256={
        "ratings.dat": "506d64ca44484487c11dc2d9a28de5c54948213e6b96285e298afe28d6ea4e0f",
        "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
        "users.dat": "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3",
    },
    expected_counts={
        "users": 6_040,
        "items_rated": 3_706,
        "items_listed": 3_883,
        "events": 1_000_209,
        "max_item_id": 3_952,
    },
)
