"""Grow a ratings data set to any size by fractal expansion (arXiv 1901.08910): ML-20M to three billion ratings, say.

    python run_fractal_expansion.py --input-csv-file tmp/ml-20m/ratings.csv --output-prefix tmp/ml-3b/ --dry_run
    python run_fractal_expansion.py --input-csv-file tmp/ml-20m/ratings.csv --output-prefix tmp/ml-3b/ \
        --write-dataset True

The input is a ratings.csv (userId, movieId, rating, timestamp), ml-1m's ratings.dat, or the folder of a prepared
dataset, which also stands for a ratings.csv that is not in it. With --write-dataset True and a prefix that ends in a
slash the result is a prepared dataset, named as its folder. A run that was stopped goes on where it was: shards that
are complete are kept. Flags may be written with dashes or underscores.

Exit status: 0 done (or nothing to do), 2 with one line for a mistake in the flags or the input.
"""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.fractal import Expansion, Settings, index_ratings
from generative_recommenders.data.fractal_input import read_events
from generative_recommenders.data.fractal_output import Output
from generative_recommenders.data.fractal_plan import describe
from generative_recommenders.data.fractal_report import can_plot, plot_statistics, sampled_activity
from generative_recommenders.errors import run_cli, stop_on_sigterm

logger = logging.getLogger(__name__)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return values[text.lower()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise DataError(f"{message}; try --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = _Parser(description="Grow a ratings data set by fractal expansion.", allow_abbrev=False)

    def add(name: str, kind: type | object, default: object, text: str) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}", f"--{name.replace('_', '-')}"))
        switch = {"nargs": "?", "const": True, "metavar": "True"} if kind is _boolean else {}
        result.add_argument(*spellings, type=kind, default=default, help=f"{text}; default: {default!r}", **switch)  # type: ignore[arg-type]

    add("random-seed", int, 0, "seed of all draws")
    add("input-csv-file", Path, Path("ratings.csv"), "ratings.csv, ratings.dat or the folder of a prepared dataset")
    add("output-prefix", str, "", "start of the names of all files; one that ends in / is a folder")
    add("num-row-multiplier", int, 16, "times as many users, and the number of shards")
    add("num-col-multiplier", int, 32, "times as many items")
    add("element-sample-rate", float, 1.0, "share of a block's ratings to keep, times its element of the pattern")
    add("block-sample-rate", float, 1.0, "share of the blocks to keep")
    add("visualize", _boolean, False, "also draw the curves of the statistics (needs matplotlib)")
    add("write-dataset", _boolean, False, "write the expansion; otherwise its statistics alone")
    add(
        "visualize-num-samples",
        int,
        0,
        "rows of blocks the statistics of an unwritten expansion are taken from, 0: all",
    )
    add("dry_run", _boolean, False, "print the plan and write nothing")
    return result


def main() -> int:
    """Expand what the command line names; see the module's docstring."""
    stop_on_sigterm()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = parser().parse_args()
    settings = Settings(
        random_seed=flags.random_seed,
        num_row_multiplier=flags.num_row_multiplier,
        num_col_multiplier=flags.num_col_multiplier,
        element_sample_rate=flags.element_sample_rate,
        block_sample_rate=flags.block_sample_rate,
    )
    settings.check()
    if flags.visualize_num_samples < 0:
        raise DataError(
            f"--visualize-num-samples: got {flags.visualize_num_samples}, expected 0 or more; try 0 for all"
        )
    events, raw = read_events(flags.input_csv_file)
    ratings = index_ratings(events, str(raw.path))
    del events
    expansion = Expansion(ratings, settings)
    command = shlex.join(["python", *sys.argv])
    output = Output(expansion, flags.output_prefix, source=raw.path.name, checksums=raw.checksums, command=command)
    sys.stdout.write(describe(expansion, str(raw.path), output.is_dataset, len(output.finished)) + "\n")
    sys.stdout.flush()
    if flags.dry_run:
        return 0
    if flags.write_dataset:
        _write(output, settings.num_row_multiplier)
    else:
        activity = sampled_activity(expansion, flags.visualize_num_samples)
        output.write_statistics(activity)
        sys.stdout.write(
            f"{output.path('statistics.csv')}: {activity.users:,} users, {activity.events:,} ratings counted\n"
        )
    if flags.visualize:
        _visualize(output, f"{raw.path}, {settings.num_row_multiplier} x {settings.num_col_multiplier}")
    return 0


def _write(output: Output, shards: int) -> None:
    if output.complete:
        sys.stdout.write(f"{output.folder}: the expansion is complete, nothing to do\n")
        return
    for i in range(shards):
        if i in output.finished:
            logger.info("shard %d of 0..%d: there already", i, shards - 1)
            continue
        started = time.perf_counter()
        output.write(i)
        logger.info("shard %d of 0..%d: written in %.0f s", i, shards - 1, time.perf_counter() - started)
    activity = output.finish()
    sys.stdout.write(
        f"{output.path('*')}: {activity.users:,} users, {activity.items:,} rated items of "
        f"{output.expansion.num_items:,}, {activity.events:,} ratings\n"
    )


def _visualize(output: Output, title: str) -> None:
    if not can_plot():
        sys.stderr.write("warning: --visualize: no plot, matplotlib is not installed; try pip install matplotlib\n")
        return
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    image = output.path("statistics.png")
    plot_statistics(output.path("statistics.csv"), title, image)
    sys.stdout.write(f"{image}: written\n")


if __name__ == "__main__":
    run_cli(main)
