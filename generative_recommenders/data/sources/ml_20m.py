"""MovieLens 20M (Harper & Konstan, ACM TiiS 5(4), 2015): twenty million ratings in half stars, time in seconds.

Item ids are the movie ids as published, unrated movies included; there is no user table. The text is read as UTF-8,
which is what the archive's README says it is (the published preprocessing decodes it as Latin-1).
"""

import pyarrow as pa

from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source
from generative_recommenders.data.sources.ml_1m import movie_table
from generative_recommenders.data.tables import read_delimited, to_numpy


class MovieLens20M(Source):
    """Reads `ratings.csv` and `movies.csv`."""

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        ratings = read_delimited(
            raw.read("ratings.csv"),
            {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()},
            where=raw.where("ratings.csv"),
        )
        movies = read_delimited(
            raw.read("movies.csv"),
            {"movieId": pa.string(), "title": pa.string(), "genres": pa.string()},
            where=raw.where("movies.csv"),
        )
        rows = [[row["movieId"], row["title"], row["genres"]] for row in movies.to_pylist()]
        return RawEvents(
            user_ids=to_numpy(ratings["userId"]),
            item_ids=to_numpy(ratings["movieId"]),
            ratings=to_numpy(ratings["rating"]),
            timestamps=to_numpy(ratings["timestamp"]),
            items=movie_table(rows, raw.where("movies.csv")),
        )


SOURCE = MovieLens20M(
    name="ml-20m",
    urls=(
        "https://files.grouplens.org/datasets/movielens/ml-20m.zip",
        "http://files.grouplens.org/datasets/movielens/ml-20m.zip",
    ),
    file_name="movielens20m.zip",
    expected_counts={
        "users": 138_493,
        "items_rated": 26_744,
        "items_listed": 27_278,
        "events": 20_000_263,
        "max_item_id": 131_262,
    },
)
