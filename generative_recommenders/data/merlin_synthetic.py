"""Synthetic session tables in the Merlin format, for trying the pipeline without data of one's own.

    python -m generative_recommenders.data.merlin_synthetic --out tmp/merlin --sessions 2000 --items 500 --seed 0

The items lie on a circle that the seed draws. A session starts at an item of Zipf popularity; every event has one of
six types, and after an event of type t (counted from 0) the next item is, with probability `FOLLOW`, the one t + 1
steps further on the circle, and otherwise a fresh draw by popularity. So a model that sees items and event types can
rank the next item first in `FOLLOW` of the cases, and one that sees items only in `FOLLOW` times the share of the most
frequent type. Items repeat within sessions. Raw ids have gaps and say nothing of the circle or of popularity.

Sessions lie in time order: the first 80 % are train, the next 10 % valid, the rest test.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, SPLITS, TIME, USER, write_tables
from generative_recommenders.errors import run_cli

FOLLOW = 0.8
TYPE_SHARES = np.array([0.35, 0.25, 0.15, 0.1, 0.1, 0.05])
MIN_LENGTH, MEAN_LENGTH, MAX_LENGTH = 2, 8, 20
MIN_SESSIONS = 10
_FIRST_SECOND = 1_600_000_000
_MEAN_GAP_SECONDS = 60


def generate(sessions: int, items: int, seed: int) -> dict[str, pa.Table]:
    """The three tables by split; a function of the arguments.

    Args:
        sessions: `MIN_SESSIONS` or more in all.
        items: more than there are event types.
    Raises:
        DataError: a number is out of range.
    """
    for name, value, least in (
        ("sessions", sessions, MIN_SESSIONS),
        ("items", items, len(TYPE_SHARES) + 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise DataError(f"--{name}: got {value}, expected {least} or more")
    rng = np.random.default_rng(seed)
    raw_ids = rng.permutation(100 + np.cumsum(rng.integers(1, 9, items)))
    popularity = 1 / np.arange(1, items + 1)
    # Neighbors on the circle differ in popularity.
    popularity = rng.permutation(popularity / popularity.sum())
    spread = rng.geometric(1 / (MEAN_LENGTH - MIN_LENGTH + 1), sessions) - 1
    lengths = np.minimum(MIN_LENGTH + spread, MAX_LENGTH)
    types_SN = rng.choice(len(TYPE_SHARES), (sessions, MAX_LENGTH), p=TYPE_SHARES)
    places_SN = rng.choice(items, (sessions, MAX_LENGTH), p=popularity)
    follows_SN = rng.random((sessions, MAX_LENGTH)) < FOLLOW
    for n in range(1, MAX_LENGTH):
        followed = (places_SN[:, n - 1] + types_SN[:, n - 1] + 1) % items
        places_SN[:, n] = np.where(follows_SN[:, n], followed, places_SN[:, n])
    times = _FIRST_SECOND + np.cumsum(1 + rng.exponential(_MEAN_GAP_SECONDS, sessions).astype(np.int64))
    valid_SN = np.arange(MAX_LENGTH) < lengths[:, None]
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
    table = pa.table(
        {
            ITEMS: pa.ListArray.from_arrays(offsets, pa.array(raw_ids[places_SN[valid_SN]])),
            EVENT_TYPES: pa.ListArray.from_arrays(offsets, pa.array(types_SN[valid_SN] + 1)),
            USER: pa.array(rng.permutation(sessions) + 10_000).cast(pa.string()),
            TIME: times,
        }
    )
    edges = [0, sessions * 8 // 10, sessions * 9 // 10, sessions]
    return {split: table.slice(edges[i], edges[i + 1] - edges[i]) for i, split in enumerate(SPLITS)}


def main() -> int:
    """Write the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write synthetic session tables in the Merlin format.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write train, valid and test.parquet into")
    parser.add_argument("--sessions", type=int, default=2_000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tables = generate(options.sessions, options.items, options.seed)
    write_tables(options.out, tables)
    sessions = ", ".join(f"{split} {table.num_rows:,}" for split, table in tables.items())
    sys.stdout.write(f"{options.out}: sessions {sessions}\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
