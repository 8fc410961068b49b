"""Seconds and peak memory of preparing an input of MovieLens-20M's shape: 20 M rows, 138,493 users, 27,278 movies.

    python benchmarks/e2e/preprocess.py [--rows=20000000] [--folder=DIR] [--keep]

The rows are drawn at random (popular movies more often), written as ratings.csv and movies.csv as in the public
archive, and prepared in a process of its own. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from generative_recommenders.data import sources
from generative_recommenders.data.preprocess import prepare

_USERS = 138_493
_MOVIES = 27_278
_MAX_ITEM_ID = 131_262
_ROWS_PER_WRITE = 2_000_000


def write_raw(folder: Path, rows: int, seed: int = 0) -> None:
    """ratings.csv and movies.csv of `rows` ratings, grouped by user and not ordered by time, like the original."""
    rng = np.random.default_rng(seed)
    movies = np.sort(rng.choice(np.arange(1, _MAX_ITEM_ID + 1), _MOVIES, replace=False))
    titles = [f"Film, The {movie} (1999)" for movie in movies]
    table = pa.table({"movieId": movies, "title": titles, "genres": ["Comedy|Drama"] * _MOVIES})
    pacsv.write_csv(table, folder / "movies.csv")
    users = np.sort(rng.integers(1, _USERS + 1, rows))
    schema = pa.schema(
        [("userId", pa.int64()), ("movieId", pa.int64()), ("rating", pa.float64()), ("timestamp", pa.int64())]
    )
    with pacsv.CSVWriter(folder / "ratings.csv", schema) as writer:
        for start in range(0, rows, _ROWS_PER_WRITE):
            part = users[start : start + _ROWS_PER_WRITE]
            popular = (_MOVIES * rng.random(len(part)) ** 3).astype(np.int64)
            columns = [
                part,
                movies[popular],
                rng.integers(1, 11, len(part)) / 2,
                rng.integers(789_652_004, 1_427_784_002, len(part)),
            ]
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))


def measure(folder: Path, results: "multiprocessing.Queue[tuple[float, float]]") -> None:
    """Prepare the files of `folder`; put seconds and peak resident GB of this process."""
    source = replace(sources.get("ml-20m"), expected_counts={})
    started = time.perf_counter()
    prepare(source, raw=folder, data_dir=folder / "prepared", force=True)
    elapsed = time.perf_counter() - started
    results.put((elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def main() -> None:
    """Write the input, measure in a fresh process, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the raw files go; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the folder, and use the raw files that are there")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="preprocess-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (arguments.keep and (folder / "ratings.csv").exists()):
            write_raw(folder, arguments.rows)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=measure, args=(folder, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"the measured process ended with status {process.exitcode}")
        seconds, peak_gb = results.get()
        megabytes = (folder / "ratings.csv").stat().st_size / 1e6
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    figures = {
        "rows": arguments.rows,
        "csv_mb": round(megabytes),
        "seconds": round(seconds, 1),
        "peak_gb": round(peak_gb, 2),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
