"""What experiments that train a model share: run folders, their locks, resuming, reports, evaluating checkpoints."""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from generative_recommenders.config import Config, ConfigError
from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.evaluation.retrieval import Evaluation
from generative_recommenders.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    disk_error,
    write_atomically,
)
from generative_recommenders.training.environment import environment
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.loop import Trainer
from generative_recommenders.training.reporting import METRICS_FINAL, Reporter
from generative_recommenders.training.runs import Run, choose_run, find_checkpoint, newest_run
from generative_recommenders.training.task import Settings, Task

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_SHARED_SETTINGS = (
    "num_epochs learning_rate num_warmup_steps weight_decay gradient_clip_norm random_seed eval_interval "
    "full_eval_every_n save_ckpt_every_n checkpoint_every_n_steps early_stopping_metric early_stopping_patience"
).split()


class TrainedExperiment(ABC, Generic[M]):
    """An experiment whose result is a model; `M` is its type.

    A subclass sets `dataset` and the attributes below in its constructor, and says what the model, the task and the
    settings are.
    """

    # The configurable of its bindings, for messages.
    prefix: str
    dataset: PreparedDataset
    max_sequence_length: int
    resume: str
    random_seed: int

    def __init__(self, config: Config, places: Places, runtime: Runtime) -> None:
        self.config = config
        self.places = places
        self.runtime = runtime

    @abstractmethod
    def describe(self) -> str:
        """Name of a run of this configuration, without the date."""

    @abstractmethod
    def identity(self) -> str:
        """Equal for two launches that would compute the same."""

    @abstractmethod
    def model(self) -> M:
        """A new model on the device of the run."""

    def model_to_load(self) -> M:
        """A model whose parameters a checkpoint replaces."""
        return self.model()

    @abstractmethod
    def split(self, name: str) -> Split:
        """The users, or samples, of "train", "valid" or "test"."""

    @abstractmethod
    def task(self, model: M) -> Task: ...

    @abstractmethod
    def settings(self) -> Settings: ...

    @abstractmethod
    def protocol(self) -> str:
        """How the reported weights were selected, in words."""

    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]: ...

    @abstractmethod
    def require_fit(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError where the checkpoint is of other data or of another model than this config's."""

    @abstractmethod
    def evaluate(self, model: M, split: str, limit: int | None = None) -> Evaluation:
        """Metrics of a held-out split, of its first `limit` batches where that is given."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint notes of the data."""
        return {"dataset": self.dataset.fingerprint}

    def extra_files(self, folder: Path) -> Sequence[Path]:
        """Files that go into every checkpoint, the item map first; `folder` is the run's."""
        return [self.dataset.folder / "items.parquet"]

    def completed(self, evaluation: Evaluation, model: M, split: str) -> Evaluation:
        """The final evaluation, with what is measured only then."""
        return evaluation

    @property
    def group(self) -> Path:
        """Folder of the runs on this dataset with this window."""
        return self.places.exps_dir / f"{self.dataset.name}-l{self.max_sequence_length}"

    @property
    def followed_split(self) -> str:
        """Evaluated every epoch."""
        return self.settings().followed_split

    def run(self) -> list[str]:
        """Train; the lines that follow the last epoch's."""
        evaluation, folder = self.train()
        return [f"curves: tensorboard --logdir {folder.parent}", test_line(evaluation, "test")]

    def report(
        self, checkpoint: Path | None, split: str, top_k_method: str | None, record: Path | None = None
    ) -> list[str]:
        """Evaluate; every metric, then the closing line. With `record` they are written there too."""
        evaluation = self.evaluate_checkpoint(checkpoint, split, top_k_method)
        if record is not None and self.runtime.is_main:
            content = self._record(evaluation, split) | {"seconds": evaluation.seconds, "checkpoint": str(checkpoint)}
            try:
                record.mkdir(parents=True, exist_ok=True)
                write_atomically(record / METRICS_FINAL, json.dumps(content, indent=1) + "\n")
            except OSError as error:
                raise disk_error(error, record) from error
        return [*(f"{n:<12} {v:.4f}" for n, v in evaluation.metrics.items()), test_line(evaluation, split)]

    def train(self) -> tuple[Evaluation, Path]:
        """Train to the end; returns the reported evaluation and the run's folder."""
        self.require_users()
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

    def evaluate_checkpoint(self, path: Path | None, split: str, top_k_method: str | None = None) -> Evaluation:
        """Metrics of a checkpoint, of this config's newest run where no path is given; `top_k_method` replaces the
        config's."""
        use_method = self.checked_method(top_k_method)
        if path is None:
            path = newest_run(self.group, self.identity())
            if path is None:
                raise CheckpointError(
                    f"--checkpoint: not given and no run of this config in {self.group}; "
                    "try --mode=train first, or name one"
                )
        checkpoint = find_checkpoint(path)
        self.require_fit(checkpoint)
        if split == "valid" and self.followed_split != "valid":
            raise ConfigError(
                f"--split=valid: this model was trained on the validation events ({self.prefix}.eval_split = 'test'), "
                f"expected a model trained with {self.prefix}.eval_split = 'valid'; try --split=test"
            )
        model = self.model_to_load()
        checkpoint.load_model(model, self.runtime.device)
        use_method(model)
        logger.info("checkpoint %s (epoch %d)", checkpoint.path, checkpoint.progress.epoch)
        return self.completed(self.evaluate(model, split), model, split)

    @abstractmethod
    def checked_method(self, top_k_method: str | None) -> Any:
        """What makes a model use the retrieval method of `--top_k_method`, a function of the model.

        Raises:
            ConfigError: there is no such method here.
        """

    def require_same_dataset(self, checkpoint: Checkpoint) -> None:
        trained_on = checkpoint.facts.get("dataset")
        if trained_on != self.dataset.fingerprint:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: was trained on dataset {trained_on}, got {self.dataset.fingerprint}; "
                f"try the dataset it was trained on, or {self.prefix}.resume = 'never'"
            )

    def require_users(self) -> None:
        """Raises DataError where a split that is needed has nobody in it."""
        for name in ("train", "valid", "test") if self.followed_split == "valid" else ("train", "test"):
            split = self.split(name)
            if len(split) == 0:
                raise DataError(
                    f"dataset {self.dataset.name!r}: no user has a history and a target in the {name} split, "
                    f"expected users with at least {split.ignore_last_n + 2} events"
                )
            if split.num_skipped and self.runtime.is_main:
                logger.info(
                    "%s split: %d of %d users have too few events and are left out",
                    name,
                    split.num_skipped,
                    split.num_rows,
                )

    def check_bindings(self, epoch: int) -> None:
        """Bindings nothing used by the first evaluation are reported once."""
        unused = self.config.unused_bindings()
        if epoch == 0 and unused and self.runtime.is_main:
            logger.warning("bindings that nothing uses in this experiment: %s", ", ".join(unused))

    def _train(self, run: Run, model: M) -> Evaluation:
        progress = run.checkpoint.progress if run.checkpoint else Progress()
        if self.runtime.is_main:
            run.claim(self.identity())
        reporter = Reporter(run.folder if self.runtime.is_main else None, progress.step, progress.epoch)
        reporter.config(self.config.operative())
        self._announce(reporter, run, model)
        trainer = Trainer(
            self.task(model),
            self.settings(),
            self.runtime,
            reporter,
            run.checkpoints,
            self.config.operative(),
            self.facts() | {"environment": environment(self.runtime.device)},
            extra_files=self.extra_files(run.folder),
        )
        try:
            evaluation, progress = trainer.run(run.checkpoint)
            split = trainer.settings.reported_split
            evaluation = self.completed(evaluation, model, split)
            record = self._record(evaluation, split) | {
                "seconds": progress.seconds,
                "epochs": progress.epoch,
                "best_epoch": progress.best_epoch,
                "steps": progress.step,
            }
            reporter.final(record, self.hyperparameters())
        finally:
            reporter.close()
        return evaluation

    def _choose_run(self) -> Run:
        """Rank 0 looks at the folders and the clock and takes the lock; the others follow it."""
        own, folder, checkpoint, refusal = None, "", "", ""
        if self.runtime.is_main:
            try:
                own = choose_run(self.group, self.describe(), self.identity(), self.resume)
                folder, checkpoint = str(own.folder), str(own.checkpoint.path) if own.checkpoint else ""
            except CheckpointError as error:
                refusal = str(error)
        folder, checkpoint, refusal = (self.runtime.from_main(text) for text in (folder, checkpoint, refusal))
        if refusal:
            raise CheckpointError(refusal)
        return own or Run(Path(folder), Checkpoint.open(Path(checkpoint)) if checkpoint else None)

    def _announce(self, reporter: Reporter, run: Run, model: M) -> None:
        parameters = sum(p.numel() for p in model.parameters())
        reporter.say(f"run folder {run.folder}")
        reporter.say(
            f"{self.dataset.name}: {len(self.split('train')):,} users, {len(self.dataset.catalog):,} items; "
            f"{parameters:,} parameters on {environment(self.runtime.device)['device']} x {self.runtime.world_size}"
        )
        if run.checkpoint is not None:
            p = run.checkpoint.progress
            reporter.say(
                f"continuing at epoch {p.epoch}, step {p.step}; {self.prefix}.resume = 'never' would start a new run"
            )

    def _record(self, evaluation: Evaluation, split: str) -> dict[str, Any]:
        return {
            "date": time.strftime("%Y-%m-%d"),
            "dataset": self.dataset.name,
            "split": split,
            "protocol": self.protocol(),
            "metrics": evaluation.metrics,
            "counts": {
                "users_evaluated": evaluation.num_users,
                "users_trained": len(self.split("train")),
                "items": len(self.dataset.catalog),
                "events": self.dataset.item_ids_E.numel(),
            },
            "world_size": self.runtime.world_size,
            "seed": self.random_seed,
            **environment(self.runtime.device),
        }


def settings_of(experiment: Any, followed_split: str, **more: Any) -> Settings:
    """The settings of a run from the bindings of `train_fn` or `train_generative`, which share these names."""
    shared = {name: getattr(experiment, name) for name in _SHARED_SETTINGS}
    selects = experiment.eval_split == "valid"
    return Settings(**shared, followed_split=followed_split, reported_split="test", keep_best=selects, **more)


def configure_precision(enable_tf32: bool) -> None:
    """TF32 of matrix products on GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = enable_tf32
    torch.backends.cudnn.allow_tf32 = enable_tf32


def test_line(evaluation: Evaluation, split: str) -> str:
    """The line a run ends with."""
    measured = f"{split}, {evaluation.num_users} users, {evaluation.seconds:.1f}s"
    return f"{split.upper()} eval: {evaluation.summary()} ({measured})"
