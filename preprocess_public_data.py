"""Prepare datasets: raw files to `<data_dir>/<dataset>/` (sequences.parquet, items.parquet, dataset.json).

    python preprocess_public_data.py                                    # ml-1m, ml-20m and amzn-books
    python preprocess_public_data.py --dataset=ml-1m [--raw=ml-1m.zip]  # a zip or folder that is already here
    python preprocess_public_data.py --dataset=amzn14-beauty [--raw=FOLDER]  # its reviews_*_5.json.gz, meta_*.json.gz
    python preprocess_public_data.py --dataset=synthetic
    python preprocess_public_data.py --dataset=custom --raw=events.csv --user_column=customer --timestamp_column=time
    python preprocess_public_data.py --dataset=custom --raw=FOLDER   # sequential_data.txt or interactions.parquet
    python preprocess_public_data.py --dataset=custom --raw=inter.json --semantic_ids=semantic_ids.json --name=toy
    python preprocess_public_data.py --dataset=amzn14-beauty --split=temporal [--cutoffs=0.85,0.9]  # or two days
    python preprocess_public_data.py --dataset=amzn14-beauty --split=cold [--cold_share=0.02]  # the newest items

The last two write explicit splits into `<dataset>-temporal/` and `<dataset>-cold-2/`, whose held-out events hold items
that training does not show.

Exit status: 0 all prepared (or already there), 2 with one line for every dataset that failed; 143 on SIGTERM, which
leaves no half-written dataset behind.
"""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from generative_recommenders.data import sources
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.preprocess import Prepared, prepare
from generative_recommenders.data.temporal import (
    COLD_SHARE,
    CUTOFFS,
    MAX_HISTORY,
    SPLITS,
    ColdSplit,
    SplitRule,
    TimeSplit,
)
from generative_recommenders.errors import EXIT_USER_ERROR, UserError, one_line, run_cli, stop_on_sigterm
from generative_recommenders.tokenizers.catalogue import publish
from generative_recommenders.tokenizers.importers import IMPORTED, import_semantic_ids
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

PUBLIC = ("ml-1m", "ml-20m", "amzn-books")


def parser() -> argparse.ArgumentParser:
    """The command line; options that belong to one source are absent from the result unless given."""
    result = argparse.ArgumentParser(description="Prepare datasets for training.", argument_default=argparse.SUPPRESS)
    result.add_argument(
        "--dataset", default=None, help=f"one of {', '.join(sources.names())}; default: {', '.join(PUBLIC)}"
    )
    result.add_argument("--raw", type=Path, default=None, help="raw file, zip or folder; default: download")
    result.add_argument("--data_dir", type=Path, default=Path("tmp"), help="where <dataset>/ is written; default: tmp")
    result.add_argument("--name", default=None, help="name of the prepared dataset; default: that of the dataset")
    result.add_argument("--csv", action="store_true", default=False, help="also write sasrec_format.csv")
    result.add_argument("--force", action="store_true", default=False, help="prepare again what is already there")
    result.add_argument(
        "--shuffle_ties",
        type=int,
        default=None,
        metavar="SEED",
        help="events of one user at equal times in random order; default: the order of the source",
    )
    splits = result.add_argument_group("explicit splits")
    splits.add_argument("--split", choices=("temporal", "cold"), help="default: leave one out")
    splits.add_argument(
        "--cutoffs", help=f"temporal: shares of the events, or days, YYYY-MM-DD; default: {','.join(CUTOFFS)}"
    )
    splits.add_argument("--cold_share", type=float, help=f"cold: share of the items held out; default: {COLD_SHARE}")
    splits.add_argument("--max_history", type=int, help=f"events before a held-out one; default: {MAX_HISTORY}")
    custom = result.add_argument_group("custom data")
    custom.add_argument("--user_column", help="default: user_id")
    custom.add_argument("--item_column", help="default: item_id")
    custom.add_argument("--timestamp_column", help="default: timestamp (seconds, or ISO 8601)")
    custom.add_argument("--rating_column", help="default: rating if there is one, else all ratings are 1")
    custom.add_argument("--items", type=Path, help="table of items: item column, titles and perhaps text, categories")
    custom.add_argument("--title_column", help="column of --items; default: title")
    custom.add_argument("--string_ids", action="store_true", help="take ids as text even where most are integers")
    custom.add_argument(
        "--semantic_ids",
        type=Path,
        default=None,
        metavar="FILE",
        help="semantic IDs of another project, such as semantic_ids.json or item-sid-mapping.pt; they become the "
        "dataset's semantic_ids/imported",
    )
    synthetic = result.add_argument_group("synthetic data")
    synthetic.add_argument("--synthetic_users", type=int)
    synthetic.add_argument("--synthetic_items", type=int)
    synthetic.add_argument("--synthetic_seed", type=int)
    return result


def main() -> int:
    """Prepare what the command line asks for; see the module's docstring."""
    stop_on_sigterm()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = vars(parser().parse_args())
    dataset, raw, data_dir = options.pop("dataset"), options.pop("raw"), options.pop("data_dir")
    name, csv, force = options.pop("name"), options.pop("csv"), options.pop("force")
    shuffle_ties, semantic_ids = options.pop("shuffle_ties"), options.pop("semantic_ids")
    split = split_rule(options)
    if dataset is None and (raw is not None or name is not None or options or split is not None):
        raise UserError(
            "--dataset: got none, expected one beside --raw, --name or a dataset's own options; add --dataset=NAME"
        )
    command = shlex.join(["python", *sys.argv])
    status = 0
    for wanted in PUBLIC if dataset is None else (dataset,):
        started = time.perf_counter()
        try:
            source = sources.get(wanted).with_options(**options)
            done = prepare(
                source,
                raw=raw,
                data_dir=data_dir,
                name=name,
                csv=csv,
                force=force,
                shuffle_ties=shuffle_ties,
                split=split,
                command=command,
            )
            if semantic_ids is not None:
                sys.stdout.write(import_for(done, semantic_ids) + "\n")
        except UserError as error:
            sys.stderr.write(f"error: {one_line(error)}\n")
            status = EXIT_USER_ERROR
        else:
            sys.stdout.write(summary(done, time.perf_counter() - started) + "\n")
    return status


def import_for(done: Prepared, file: Path) -> str:
    """Make the IDs of `file` the dataset's `semantic_ids/imported`; a line that says so."""
    dataset = PreparedDataset.load(done.path.parent, done.path.name)
    catalog = dataset.catalog
    # The file goes by the ids that items had before splits numbered them anew.
    known_as = catalog.item_ids if catalog.source_item_ids is None else catalog.source_item_ids
    table = import_semantic_ids(
        file, item_ids=known_as, raw_ids=catalog.raw_ids, dataset_fingerprint=dataset.fingerprint
    )
    if catalog.source_item_ids is not None:
        table = SemanticIds.of(
            catalog.item_ids,
            table.codes_NL[table.rows_of(known_as)],
            table.sizes,
            raw_ids=catalog.raw_ids,
            policy=table.policy,
            dataset_fingerprint=dataset.fingerprint,
        )
    folder = done.path / "semantic_ids" / IMPORTED
    publish(folder, table)
    return f"{folder}: {table.summary()}"


def split_rule(options: dict[str, Any]) -> SplitRule | None:
    """The rule that the options ask for, None for leave-one-out; takes its options out of `options`.

    Raises:
        UserError: an option that the rule has no use for.
    """
    kind = options.pop("split", None)
    given = {name: options.pop(name) for name in ("cutoffs", "cold_share", "max_history") if name in options}
    used = {"temporal": ("cutoffs", "max_history"), "cold": ("cold_share", "max_history")}.get(kind, ())
    for name, value in given.items():
        if name not in used:
            wanted = {"cutoffs": "--split=temporal", "cold_share": "--split=cold"}.get(name, "--split")
            raise UserError(f"--{name}: got {value} without {wanted}, expected both; add it, or leave this out")
    if kind is None:
        return None
    history = given.get("max_history", MAX_HISTORY)
    if kind == "cold":
        return ColdSplit(given.get("cold_share", COLD_SHARE), history)
    return TimeSplit(tuple(given["cutoffs"].split(",")) if "cutoffs" in given else CUTOFFS, history)


def summary(done: Prepared, elapsed: float) -> str:
    """One line on a prepared dataset."""
    if not done.written:
        return f"{done.path}: already prepared from the same files, nothing to do (--force prepares it again)"
    counts = done.metadata["counts"]
    line = (
        f"{done.path}: {counts['users']:,} users, {counts['items_rated']:,} rated of {counts['items_listed']:,} items, "
        f"{counts['events']:,} events in {elapsed:.1f} s"
    )
    splits = done.metadata.get("splits")
    if splits is None:
        return line
    rows = ", ".join(f"{split} {splits[split]['sequences']:,}" for split in SPLITS)
    unseen = ", ".join(f"{splits[split]['sequences_ending_in_unseen_item']:,} of {split}" for split in SPLITS[1:])
    return f"{line}; sequences: {rows}; of these end in an item that train lacks: {unseen}"


if __name__ == "__main__":
    run_cli(main)
