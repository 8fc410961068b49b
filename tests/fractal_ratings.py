"""A small ratings matrix, and what the tests of fractal expansion read from it."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from generative_recommenders.data.fractal import (
    Ratings,
    Settings,
    index_ratings,
)

HEADER = "userId,movieId,rating,timestamp\n"


def rating_lines(users: int = 12, items: int = 9, seed: int = 0) -> list[tuple[int, int, float, int]]:
    """(user, item, rating, time): all times distinct, every item rated, at least 3 events a user."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for item in generator.permutation(items)[: int(generator.integers(3, items + 1))]:
            rows.append((user * 3 + 7, int(item) * 2 + 5, float(generator.integers(1, 11)) / 2, len(rows) + 1000))
    return rows


def write_csv(path: Path, lines: list[tuple[int, int, float, int]]) -> Path:
    path.write_text(HEADER + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in lines))
    return path


def small_ratings(**sizes: int) -> Ratings:
    users, items, values, times = (np.array(column) for column in zip(*rating_lines(**sizes), strict=True))
    columns = {"user_id": users, "item_id": items, "rating": values.astype(np.float32), "timestamp": times}
    return index_ratings(pa.table(columns), "here")


def dense_ratings(ratings: Ratings) -> np.ndarray:
    """(U, I), 0 where there is no rating."""
    result = np.zeros((ratings.num_users, ratings.num_items))
    owners = np.repeat(np.arange(ratings.num_users), np.diff(ratings.starts_U1))
    result[owners, ratings.items_E] = ratings.values_V[ratings.codes_E]
    return result


def small_settings(**changes: float) -> Settings:
    return Settings(**{"num_row_multiplier": 2, "num_col_multiplier": 3, **changes})  # type: ignore[arg-type]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
