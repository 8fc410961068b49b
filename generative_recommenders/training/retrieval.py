"""Runs a retrieval experiment: train, evaluate a checkpoint, or print what a run would be."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import Config, ConfigError, load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
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
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointError, Progress, disk_error
from generative_recommenders.training.environment import environment
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.loop import Trainer
from generative_recommenders.training.reporting import Reporter
from generative_recommenders.training.runs import Run, choose_run, find_checkpoint, newest_run
from generative_recommenders.training.task import Settings, Task

logger = logging.getLogger(__name__)

# Bindings that do not change what is computed, so a run may be continued under other values of them.
_NOT_IDENTITY = ("train_fn.resume", "create_data_loader.num_workers", "create_data_loader.prefetch_factor")


class RetrievalExperiment:
    """A configuration bound to its data; building it reads the dataset and validates both."""

    def __init__(self, config: Config, places: Places, runtime: Runtime) -> None:
        self.config = config
        self.plan = Plan.of(config)
        metric = self.plan.experiment.early_stopping_metric
        if metric not in METRIC_NAMES:
            raise ConfigError(
                f"train_fn.early_stopping_metric: got {metric!r}, expected one of {', '.join(METRIC_NAMES)}"
            )
        self.places = places
        self.runtime = runtime
        e = self.plan.experiment
        self.dataset = PreparedDataset.load(places.data_dir, e.dataset_name, sorted(e.event_columns))
        if self.dataset.explicit and metric.endswith(LIKED_SUFFIX):
            raise ConfigError(
                f"train_fn.early_stopping_metric: got {metric!r}, expected one of all targets: the ratings of "
                f"{e.dataset_name!r} are event types; try 'ndcg@10'"
            )
        require_ratings(e, self.dataset)
        require_events(e, self.dataset)
        self.splits = Splits.of(self.plan.experiment, self.dataset)
        _configure_precision(self.plan.experiment.enable_tf32)

    @property
    def group(self) -> Path:
        e = self.plan.experiment
        return self.places.exps_dir / f"{e.dataset_name}-l{e.max_sequence_length}"

    @property
    def identity(self) -> str:
        return f"{self.config.fingerprint(exclude=_NOT_IDENTITY)}-{self.dataset.fingerprint}-w{self.runtime.world_size}"

    def model(self) -> RetrievalModel:
        held_out = self.splits.train.ignore_last_n
        counts = training_counts(self.dataset, held_out)
        return build_model(self.plan, self.dataset.catalog.item_ids, counts).to(self.runtime.device)

    def batches(self, split: str, limit: int | None = None) -> Iterable[SequenceBatch]:
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
        )
        return replace(evaluation, metrics=self._meant(evaluation.metrics))

    def _meant(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Without those over liked targets, where ratings are codes of event types."""
        return {n: value for n, value in metrics.items() if not (self.dataset.explicit and n.endswith(LIKED_SUFFIX))}

    @property
    def followed_split(self) -> str:
        """Evaluated every epoch: explicit splits have a validation set, whether it selects or not."""
        return "valid" if self.dataset.explicit else self.plan.experiment.eval_split

    def with_loss(self, evaluation: Evaluation, model: RetrievalModel, split: str) -> Evaluation:
        """The evaluation with the mean loss of the targets among its metrics."""
        loss = mean_target_loss(model, self.batches(split), self.runtime, self.plan.experiment.random_seed)
        return replace(evaluation, metrics=evaluation.metrics | {"loss": loss})

    def run(self) -> list[str]:
        """Train; the lines that follow the last epoch's."""
        evaluation, folder = self.train()
        return [f"curves: tensorboard --logdir {folder.parent}", test_line(evaluation, "test")]

    def report(self, checkpoint: Path | None, split: str, top_k_method: str | None) -> list[str]:
        """Evaluate; every metric, then the closing line."""
        evaluation = self.evaluate_checkpoint(checkpoint, split, top_k_method)
        return [*(f"{n:<12} {v:.4f}" for n, v in evaluation.metrics.items()), test_line(evaluation, split)]

    def train(self) -> tuple[Evaluation, Path]:
        """Train to the end; returns the reported evaluation and the run's folder."""
        self._require_users()
        model = self.model()
        run = self._choose_run()
        try:
            if run.checkpoint is not None:
                # Everything that can speak against continuing is looked at before the folder is touched.
                self.require_fit(run.checkpoint)
                run.checkpoint.load_model(model, self.runtime.device)
            return self._train(run, model), run.folder
        except OSError as error:
            raise disk_error(error, run.folder) from error
        finally:
            run.release()

    def _train(self, run: Run, model: RetrievalModel) -> Evaluation:
        e = self.plan.experiment
        progress = run.checkpoint.progress if run.checkpoint else Progress()
        if self.runtime.is_main:
            run.claim(self.identity)
        reporter = Reporter(run.folder if self.runtime.is_main else None, progress.step, progress.epoch)
        reporter.config(self.config.operative())
        self._announce(reporter, run, model)
        trainer = Trainer(
            self._task(model),
            self._settings(),
            self.runtime,
            reporter,
            run.checkpoints,
            self.config.operative(),
            {"dataset": self.dataset.fingerprint, "environment": environment(self.runtime.device)},
            extra_files=self._extra_files(run.folder),
        )
        try:
            evaluation, progress = trainer.run(run.checkpoint)
            split = trainer.settings.reported_split
            evaluation = self.with_loss(evaluation, model, split)
            record = self._record(evaluation, split) | {
                "seconds": progress.seconds,
                "epochs": progress.epoch,
                "best_epoch": progress.best_epoch,
                "steps": progress.step,
            }
            reporter.final(record, asdict(e) | asdict(self.plan.encoder))
        finally:
            reporter.close()
        return evaluation

    def _extra_files(self, folder: Path) -> list[Path]:
        """What a checkpoint needs of the data: the item map, and the users where the model has features of them."""
        items = self.dataset.folder / "items.parquet"
        if self.plan.similarity is None or not self.plan.similarity.uid_embedding_hash_sizes:
            return [items]
        if self.runtime.is_main:
            write_users(self.dataset, folder / USERS_FILE)
        return [items, folder / USERS_FILE]

    def _choose_run(self) -> Run:
        """Rank 0 looks at the folders and the clock and takes the lock; the others follow it."""
        own, folder, checkpoint, refusal = None, "", "", ""
        if self.runtime.is_main:
            try:
                own = choose_run(self.group, self.plan.describe(), self.identity, self.plan.experiment.resume)
                folder, checkpoint = str(own.folder), str(own.checkpoint.path) if own.checkpoint else ""
            except CheckpointError as error:
                refusal = str(error)
        folder, checkpoint, refusal = (self.runtime.from_main(text) for text in (folder, checkpoint, refusal))
        if refusal:
            raise CheckpointError(refusal)
        return own or Run(Path(folder), Checkpoint.open(Path(checkpoint)) if checkpoint else None)

    def evaluate_checkpoint(self, path: Path | None, split: str, top_k_method: str | None = None) -> Evaluation:
        """Metrics of a checkpoint, of this config's newest run where no path is given; `top_k_method` replaces the
        config's."""
        method = checked_top_k_method(self.plan.experiment, top_k_method)
        if path is None:
            path = newest_run(self.group, self.identity)
            if path is None:
                raise CheckpointError(
                    f"--checkpoint: not given and no run of this config in {self.group}; "
                    "try --mode=train first, or name one"
                )
        checkpoint = find_checkpoint(path)
        self.require_fit(checkpoint)
        if split == "valid" and self.followed_split != "valid":
            raise ConfigError(
                "--split=valid: this model was trained on the validation events (train_fn.eval_split = 'test'), "
                "expected a model trained with train_fn.eval_split = 'valid'; try --split=test"
            )
        model = self.model()
        checkpoint.load_model(model, self.runtime.device)
        model.top_k_method = method
        logger.info("checkpoint %s (epoch %d)", checkpoint.path, checkpoint.progress.epoch)
        return self.with_loss(self.evaluate(model, split), model, split)

    def dry_run(self) -> str:
        """What a run would be: model, parameters, memory and steps; one batch goes through forward and backward."""
        self._require_users()
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
        trained_on = checkpoint.facts.get("dataset")
        if trained_on != self.dataset.fingerprint:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: was trained on dataset {trained_on}, got {self.dataset.fingerprint}; "
                "try the dataset it was trained on, or train_fn.resume = 'never'"
            )
        trained = Plan.of(load([str(checkpoint.path / "config.gin")])).model_bindings()
        for name, value in self.plan.model_bindings().items():
            if trained[name] != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: was trained with {name} = {trained[name]!r}, got {value!r}; "
                    "try the config it was trained with"
                )

    def _require_users(self) -> None:
        for name in ("train", "valid", "test") if self.followed_split == "valid" else ("train", "test"):
            split = self.splits.named(name)
            if len(split) == 0:
                raise DataError(
                    f"dataset {self.dataset.name!r}: no user has a history and a target in the {name} split, "
                    f"expected users with at least {split.ignore_last_n + 2} events"
                )
            if name == "train" and len(training_loader(self.plan, split, 0, self.runtime.world_size)) == 0:
                raise DataError(
                    f"dataset {self.dataset.name!r}: {len(split)} users give no whole batch of "
                    f"{self.plan.experiment.local_batch_size} a rank; try create_data_loader.drop_last = False"
                )
            if split.num_skipped and self.runtime.is_main:
                logger.info(
                    "%s split: %d of %d users have too few events and are left out",
                    name,
                    split.num_skipped,
                    split.num_rows,
                )

    def _task(self, model: RetrievalModel) -> Task:
        e = self.plan.experiment

        def follow(epoch: int, complete: bool) -> Evaluation:
            self._check_bindings(epoch)
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

    def _check_bindings(self, epoch: int) -> None:
        """Bindings nothing used by the first evaluation are reported once."""
        unused = self.config.unused_bindings()
        if epoch == 0 and unused and self.runtime.is_main:
            logger.warning("bindings that nothing uses in this experiment: %s", ", ".join(unused))

    def _settings(self) -> Settings:
        e = self.plan.experiment
        return Settings(
            num_epochs=e.num_epochs,
            learning_rate=e.learning_rate,
            num_warmup_steps=e.num_warmup_steps,
            weight_decay=e.weight_decay,
            gradient_clip_norm=e.gradient_clip_norm,
            random_seed=e.random_seed,
            eval_interval=e.eval_interval,
            full_eval_every_n=e.full_eval_every_n,
            save_ckpt_every_n=e.save_ckpt_every_n,
            checkpoint_every_n_steps=e.checkpoint_every_n_steps,
            followed_split=self.followed_split,
            reported_split="test",
            keep_best=e.eval_split == "valid",
            early_stopping_metric=e.early_stopping_metric,
            early_stopping_patience=e.early_stopping_patience,
        )

    def _announce(self, reporter: Reporter, run: Run, model: RetrievalModel) -> None:
        parameters = sum(p.numel() for p in model.parameters())
        reporter.say(f"run folder {run.folder}")
        reporter.say(
            f"{self.dataset.name}: {len(self.splits.train):,} users, {len(self.dataset.catalog):,} items; "
            f"{parameters:,} parameters on {environment(self.runtime.device)['device']} x {self.runtime.world_size}"
        )
        if run.checkpoint is not None:
            p = run.checkpoint.progress
            reporter.say(
                f"continuing at epoch {p.epoch}, step {p.step}; train_fn.resume = 'never' would start a new run"
            )

    def _protocol(self) -> str:
        if self.plan.experiment.eval_split == "valid":
            return "selected on valid"
        return "explicit splits, last epoch" if self.dataset.explicit else "test curve, no validation set"

    def _record(self, evaluation: Evaluation, split: str) -> dict[str, Any]:
        e = self.plan.experiment
        return {
            "date": time.strftime("%Y-%m-%d"),
            "dataset": self.dataset.name,
            "split": split,
            "protocol": self._protocol(),
            "metrics": evaluation.metrics,
            "counts": {
                "users_evaluated": evaluation.num_users,
                "users_trained": len(self.splits.train),
                "items": len(self.dataset.catalog),
                "events": self.dataset.item_ids_E.numel(),
            },
            "world_size": self.runtime.world_size,
            "seed": e.random_seed,
            **environment(self.runtime.device),
        }


def _configure_precision(enable_tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = enable_tf32
    torch.backends.cudnn.allow_tf32 = enable_tf32


def test_line(evaluation: Evaluation, split: str) -> str:
    """The line a run ends with."""
    measured = f"{split}, {evaluation.num_users} users, {evaluation.seconds:.1f}s"
    return f"{split.upper()} eval: {evaluation.summary()} ({measured})"
