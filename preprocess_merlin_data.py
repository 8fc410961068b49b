"""Prepare Merlin session tables: `<data_dir>/<name>/{train,valid,test}.parquet` to a dataset in the same folder.

    python preprocess_merlin_data.py                                    # tmp/merlin
    python preprocess_merlin_data.py --raw=exports/october --name=october
    python preprocess_merlin_data.py --expand_sequences_to_prefixes

Writes sequences_{train,valid,test}.parquet, items.parquet, dataset.json and sasrec_format_{train,valid,test}.csv; see
generative_recommenders/data/merlin.py. Exit status: 0 prepared (or already there), 2 with one line on what is wrong;
143 on SIGTERM.
"""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.merlin import prepare_merlin
from generative_recommenders.data.preprocess import Prepared
from generative_recommenders.errors import run_cli, stop_on_sigterm


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Prepare Merlin session tables for training.")
    result.add_argument("--data_dir", type=Path, default=Path("tmp"), help="where <name>/ is; default: tmp")
    result.add_argument("--name", default="merlin", help="name of the dataset and its folder; default: merlin")
    result.add_argument(
        "--raw", type=Path, help="folder or zip with train, valid and test.parquet; default: <data_dir>/<name>"
    )
    result.add_argument(
        "--expand_sequences_to_prefixes",
        action="store_true",
        help="replace every sequence by its prefixes of two events and more",
    )
    csv = result.add_mutually_exclusive_group()
    csv.add_argument("--csv", action="store_true", default=True, help="write the sasrec_format CSVs; the default")
    csv.add_argument("--no_csv", action="store_false", dest="csv", help="write no CSVs")
    result.add_argument("--force", action="store_true", help="prepare again what is already there")
    return result


def main() -> int:
    """Prepare what the command line asks for; see the module's docstring."""
    stop_on_sigterm()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    options = parser().parse_args()
    if options.name in ("", "..") or Path(options.name).name != options.name:
        raise DataError(f"--name: got {options.name!r}, expected a plain folder name; choose the place with --data_dir")
    folder = options.data_dir / options.name
    started = time.perf_counter()
    done = prepare_merlin(
        options.raw if options.raw is not None else folder,
        folder,
        expand_sequences_to_prefixes=options.expand_sequences_to_prefixes,
        csv=options.csv,
        force=options.force,
        command=shlex.join(["python", *sys.argv]),
    )
    sys.stdout.write(summary(done, time.perf_counter() - started) + "\n")
    return 0


def summary(done: Prepared, elapsed: float) -> str:
    """One line on a prepared dataset."""
    if not done.written:
        return f"{done.path}: already prepared from the same files, nothing to do (--force prepares it again)"
    counts = done.metadata["counts"]
    sequences = ", ".join(f"{split} {facts['sequences']:,}" for split, facts in done.metadata["splits"].items())
    return (
        f"{done.path}: sequences {sequences}; {counts['events']:,} events of {done.metadata['num_event_types']} types; "
        f"{counts['items_rated']:,} items, {counts['items_unseen_in_train']:,} of them unseen in train; "
        f"{counts['short_rows_dropped']:,} rows of fewer than 2 events dropped; {elapsed:.1f} s"
    )


if __name__ == "__main__":
    run_cli(main)
