"""Drafters from what bindings name: a checkpoint of a retrieval model, or the source of text vectors."""

from __future__ import annotations

import logging
from pathlib import Path

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.generative.drafters import RetrievalDrafter, SemanticKNN
from generative_recommenders.retrieval.assemble import Plan, build_model, training_counts
from generative_recommenders.retrieval.text_items import Whitening
from generative_recommenders.training.checkpoint import CheckpointError
from generative_recommenders.training.experiment import Places, experiment_of
from generative_recommenders.training.item_texts import TextSource, item_embeddings
from generative_recommenders.training.runs import find_checkpoint, newest_finished
from generative_recommenders.training.trained import TrainedExperiment

logger = logging.getLogger(__name__)


def trained_drafter(
    config_file: str, dataset: PreparedDataset, places: Places, runtime: Runtime, *, train: bool
) -> Path:
    """The newest finished run of a config of `train_fn`; with `train` it is trained first where there is none.

    All ranks must call it together.

    Raises:
        ConfigError: the config is of another experiment or of other data than `dataset`. CheckpointError: there is no
            finished run and `train` is off.
    """
    experiment = experiment_of(load([config_file]), places, runtime)
    if not isinstance(experiment, TrainedExperiment) or experiment.prefix != "train_fn":
        raise ConfigError(f"specgr.drafter_config: got {config_file}, expected a config of main.experiment = @train_fn")
    if experiment.dataset.fingerprint != dataset.fingerprint:
        raise ConfigError(
            f"specgr.drafter_config: got {config_file} on dataset {experiment.dataset.name!r}, expected the generative "
            f"model's, {dataset.name!r} as it is now; bind train_fn.dataset_name in it"
        )
    found = newest_finished(experiment.group, experiment.identity()) if runtime.is_main else None
    finished = runtime.from_main("" if found is None else str(found))
    if finished:
        return Path(finished)
    if not train:
        raise CheckpointError(
            f"specgr.drafter_config: no finished run of {config_file} in {experiment.group}; try --mode=train first"
        )
    if runtime.is_main:
        logger.info("%s: no finished run yet, training the drafter first", config_file)
    _, folder = experiment.train()
    return folder


def retrieval_drafter(path: Path, dataset: PreparedDataset, runtime: Runtime) -> RetrievalDrafter:
    """The model of a run folder of `train_fn` or of one of its checkpoints.

    Raises:
        CheckpointError: there is none, or it is of other data than the dataset or reads more of an event than a
            generative model's histories hold.
        ConfigError: it is no checkpoint of `train_fn`.
    """
    checkpoint = find_checkpoint(path)
    plan = Plan.of(load([str(checkpoint.path / "config.gin")]))
    columns = sorted(plan.experiment.event_columns)
    if columns:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: reads the event columns {', '.join(columns)}, expected a drafter that "
            "needs none; try one trained without train_fn.event_columns"
        )
    trained_on = checkpoint.facts.get("dataset")
    if trained_on != dataset.fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: was trained on dataset {trained_on}, expected {dataset.fingerprint}; "
            "try a drafter that was trained on the dataset of the generative model"
        )
    model = build_model(plan, dataset.catalog.item_ids).to(runtime.device)
    checkpoint.load_model(model, runtime.device)
    return RetrievalDrafter(model, plan.experiment.max_sequence_length)


def semantic_knn(
    source: TextSource, dataset: PreparedDataset, runtime: Runtime, *, last_n: int = 0, whiten: bool = False
) -> SemanticKNN:
    """Nearest items by the text vectors of a source, such as those that the semantic IDs are made of.

    last_n: newest events of a history that count, 0 for all. whiten: whether the vectors are whitened first, over the
    items that occur in training; all items of the catalogue are scored either way.

    Raises:
        DataError: the vectors cannot be had.
    """
    found, whitening = item_embeddings(source, dataset.folder, runtime), None
    if whiten:
        # Leave-one-out holds two events of a user out, or one: what two leave has been trained on in any case.
        fitted_X = training_counts(dataset, held_out=0 if dataset.explicit else 2) > 0
        whitening = Whitening.fit(found.values_ND, fitted_X)
    return SemanticKNN.of(found, runtime.device, last_n, whitening)
