"""Runs a retrieval experiment: train, evaluate a checkpoint, or print what a run would be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import Config, ConfigError, load
from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.text_embeddings import Embeddings
from generative_recommenders.data.users import USERS_FILE, write_users
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.evaluation.metrics import LIKED_SUFFIX, METRIC_NAMES, mean_metrics
from generative_recommenders.evaluation.retrieval import Evaluation, evaluate, mean_target_loss, rank_targets
from generative_recommenders.retrieval.assemble import (
    Plan,
    Splits,
    build_model,
    checked_top_k_method,
    evaluation_loader,
    require_events,
    require_ratings,
    training_counts,
    training_loader,
)
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointError
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.item_texts import item_embeddings
from generative_recommenders.training.task import Settings, Task
from generative_recommenders.training.trained import TrainedExperiment, configure_precision, settings_of, test_line

__all__ = ["RetrievalExperiment", "test_line"]

# Bindings that do not change what is computed, so a run may be continued under other values of them.
_NOT_IDENTITY = ("train_fn.resume", "create_data_loader.num_workers", "create_data_loader.prefetch_factor")


class RetrievalExperiment(TrainedExperiment[RetrievalModel]):
    """A configuration bound to its data; building it reads the dataset and validates both."""

    prefix = "train_fn"

    def __init__(self, config: Config, places: Places, runtime: Runtime) -> None:
        super().__init__(config, places, runtime)
        self.plan = Plan.of(config)
        e = self.plan.experiment
        self.max_sequence_length, self.resume, self.random_seed = e.max_sequence_length, e.resume, e.random_seed
        metric = e.early_stopping_metric
        if metric not in METRIC_NAMES:
            raise ConfigError(
                f"train_fn.early_stopping_metric: got {metric!r}, expected one of {', '.join(METRIC_NAMES)}"
            )
        self.dataset = PreparedDataset.load(places.data_dir, e.dataset_name, sorted(e.event_columns))
        if self.dataset.explicit and metric.endswith(LIKED_SUFFIX):
            raise ConfigError(
                f"train_fn.early_stopping_metric: got {metric!r}, expected one of all targets: the ratings of "
                f"{e.dataset_name!r} are event types; try 'ndcg@10'"
            )
        require_ratings(e, self.dataset)
        require_events(e, self.dataset)
        self.splits = Splits.of(e, self.dataset)
        configure_precision(e.enable_tf32)

    def describe(self) -> str:
        return self.plan.describe()

    @cached_property
    def texts(self) -> Embeddings | None:
        """Vectors of the items' texts, where the model makes its items of them.

        Raises:
            DataError: they cannot be had.
        """
        source = self.plan.text_items
        return None if source is None else item_embeddings(source, self.dataset.folder, self.runtime)

    def identity(self) -> str:
        texts = "" if self.texts is None else f"-{self.texts.fingerprint[:16]}"
        bindings = self.config.fingerprint(exclude=_NOT_IDENTITY)
        return f"{bindings}-{self.dataset.fingerprint}{texts}-w{self.runtime.world_size}"

    def hyperparameters(self) -> dict[str, Any]:
        values = asdict(self.plan.experiment) | asdict(self.plan.encoder)
        if self.plan.text_items is not None:
            values |= {f"text_{name}": value for name, value in asdict(self.plan.text_items).items()}
        return values

    def split(self, name: str) -> Split:
        return self.splits.named(name)

    def model(self) -> RetrievalModel:
        return self._build(None if self.texts is None else self.texts.values_ND)

    def model_to_load(self) -> RetrievalModel:
        return self._build(None)

    def _build(self, text_XE: Tensor | None) -> RetrievalModel:
        counts = training_counts(self.dataset, self.splits.train.ignore_last_n)
        return build_model(self.plan, self.dataset.catalog.item_ids, counts, text_XE).to(self.runtime.device)

    def batches(self, split: str, limit: int | None = None) -> Iterable[SequenceBatch]:
        """Batches of a held-out split, as this rank sees them."""
        loader = evaluation_loader(self.plan, self.splits.named(split), self.runtime.rank, self.runtime.world_size)
        return itertools.islice(loader.epoch(0), limit)

    def evaluate(self, model: RetrievalModel, split: str, limit: int | None = None) -> Evaluation:
        e = self.plan.experiment
        evaluation = evaluate(
            model,
            self.batches(split, limit),
            self.runtime,
            filter_history=e.filter_history,
            max_rows=e.eval_user_max_batch_size,
            trained_V=self.dataset.trained_items(self.splits.train.ignore_last_n),
        )
        return replace(evaluation, metrics=self._meant(evaluation.metrics))

    def _meant(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Without those over liked targets, where ratings are codes of event types."""
        return {n: value for n, value in metrics.items() if not (self.dataset.explicit and n.endswith(LIKED_SUFFIX))}

    @property
    def followed_split(self) -> str:
        """Evaluated every epoch: explicit splits have a validation set, whether it selects or not."""
        return "valid" if self.dataset.explicit else self.plan.experiment.eval_split

    def completed(self, evaluation: Evaluation, model: RetrievalModel, split: str) -> Evaluation:
        """The evaluation with the mean loss of the targets among its metrics."""
        loss = mean_target_loss(model, self.batches(split), self.runtime, self.plan.experiment.random_seed)
        return replace(evaluation, metrics=evaluation.metrics | {"loss": loss})

    def extra_files(self, folder: Path) -> list[Path]:
        """What a checkpoint needs of the data: the item map, and the users where the model has features of them."""
        items = self.dataset.folder / "items.parquet"
        if self.plan.similarity is None or not self.plan.similarity.uid_embedding_hash_sizes:
            return [items]
        if self.runtime.is_main:
            write_users(self.dataset, folder / USERS_FILE)
        return [items, folder / USERS_FILE]

    def checked_method(self, top_k_method: str | None) -> Callable[[RetrievalModel], None]:
        method = checked_top_k_method(self.plan.experiment, top_k_method)

        def use(model: RetrievalModel) -> None:
            model.top_k_method = method

        return use

    def dry_run(self) -> str:
        """What a run would be: model, parameters, memory and steps; one batch goes through forward and backward."""
        self.require_users()
        model = self.model()
        parameters = sum(p.numel() for p in model.parameters())
        loader = training_loader(self.plan, self.splits.train, self.runtime.rank, self.runtime.world_size)
        batch = next(iter(loader.epoch(0))).to(self.runtime.device)
        loss, _ = model(batch, seed=0)
        loss.backward()
        e = self.plan.experiment
        return "\n".join(
            (
                f"run         {self.plan.describe()}",
                f"dataset     {self.dataset.name}: {self.dataset.num_users:,} users, "
                f"{len(self.dataset.catalog):,} items, {self.dataset.item_ids_E.numel():,} events",
                f"parameters  {parameters:,} ({parameters * 4 / 1e6:.1f} MB; "
                f"{parameters * 16 / 1e6:.1f} MB with gradients and AdamW)",
                f"steps       {len(loader):,} an epoch, {len(loader) * e.num_epochs:,} in {e.num_epochs} epochs",
                f"first batch {batch.size} users, {batch.item_ids_T.numel():,} events, loss {loss.item():.4f}",
            )
        )

    def require_fit(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError where the checkpoint is of other data or of another model than this config's."""
        self.require_same_dataset(checkpoint)
        trained = Plan.of(load([str(checkpoint.path / "config.gin")])).model_bindings()
        for name, value in self.plan.model_bindings().items():
            if trained[name] != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: was trained with {name} = {trained[name]!r}, got {value!r}; "
                    "try the config it was trained with"
                )

    def require_users(self) -> None:
        super().require_users()
        split = self.splits.train
        if len(training_loader(self.plan, split, 0, self.runtime.world_size)) == 0:
            raise DataError(
                f"dataset {self.dataset.name!r}: {len(split)} users give no whole batch of "
                f"{self.plan.experiment.local_batch_size} a rank; try create_data_loader.drop_last = False"
            )

    def task(self, model: RetrievalModel) -> Task:
        e = self.plan.experiment

        def follow(epoch: int, complete: bool) -> Evaluation:
            self.check_bindings(epoch)
            return self.evaluate(model, self.followed_split, None if complete else e.partial_eval_num_iters)

        def probe(batch: SequenceBatch) -> Mapping[str, float]:
            filled = batch.offsets.diff() > 0
            if not bool(filled.all()):
                return {}
            model.eval()
            ranks = rank_targets(model, model.top_k(e.eval_user_max_batch_size), batch, e.filter_history)
            model.train()
            return self._meant(mean_metrics(ranks.cpu(), batch.target_ratings_B.cpu()))

        return Task(
            model=model,
            batches=training_loader(self.plan, self.splits.train, self.runtime.rank, self.runtime.world_size),
            evaluate=follow,
            probe=probe,
            final=lambda: self.evaluate(model, "test"),
        )

    def settings(self) -> Settings:
        return settings_of(self.plan.experiment, self.followed_split)

    def protocol(self) -> str:
        if self.plan.experiment.eval_split == "valid":
            return "selected on valid"
        return "explicit splits, last epoch" if self.dataset.explicit else "test curve, no validation set"
