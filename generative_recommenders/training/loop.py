"""The train loop.

Order of an epoch: for each batch - learning rate, loss, backward, clip, step, log - then evaluate, note the best, save.
A step's randomness derives from (seed, step) and an epoch's order from (seed, epoch), so a run continued from any
checkpoint ends with the parameters of one that was never interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.retrieval import Evaluation
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointFolder, Progress
from generative_recommenders.training.environment import peak_memory_mb
from generative_recommenders.training.optim import adamw
from generative_recommenders.training.reporting import Reporter
from generative_recommenders.training.task import COUNTS, Settings, Task
from ops.random import fold

# Reading a loss off a GPU waits for it; on a CPU it is free.
_FINITE_CHECK_EVERY = {"cpu": 1}
_FINITE_CHECK_ELSEWHERE = 20


class Diverged(UserError):
    """The loss is not finite."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; the state was saved. `by_hand` is Ctrl-C."""

    def __init__(self, message: str, by_hand: bool) -> None:
        super().__init__(message)
        self.by_hand = by_hand


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.received = False
        self.by_hand = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        def note(number: int, frame: FrameType | None) -> None:
            if self.by_hand and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received, self.by_hand = True, number == signal.SIGINT

        numbers = (signal.SIGTERM, signal.SIGINT)
        try:
            # A shell without job control has its background commands ignore SIGINT, and so it stays.
            previous = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        except ValueError:
            # Only the main thread may set handlers; a loop run elsewhere cannot be stopped this way.
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@dataclass
class Trainer:
    """One run: a task, its settings, and where it reports and saves.

    `config` is the operative gin text; it, `facts` (dataset fingerprint and the like) and `extra_files` (the item
    map) go into every checkpoint.
    """

    task: Task
    settings: Settings
    runtime: Runtime
    reporter: Reporter
    folder: CheckpointFolder
    config: str
    facts: dict[str, Any]
    extra_files: Sequence[Path] = ()

    def run(self, resume_from: Checkpoint | None = None) -> tuple[Evaluation, Progress]:
        """Train to the end and return the reported evaluation.

        Raises:
            Interrupted: SIGTERM or Ctrl-C arrived; a checkpoint of this very step was saved.
            Diverged: a loss was not finite; the message names the step and the last checkpoint.
        """
        self.optimizer = adamw(self.task.model, self.settings.learning_rate, self.settings.weight_decay)
        self.progress = Progress()
        if resume_from is not None:
            resume_from.load_model(self.task.model, self.runtime.device)
            resume_from.load_optimizer(self.optimizer, self.runtime.device)
            self.progress = resume_from.progress
        self.parallel: nn.Module = self.task.model
        if self.runtime.world_size > 1:
            ids = [self.runtime.device.index] if self.runtime.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.task.model, device_ids=ids, broadcast_buffers=False)
        self.started = time.perf_counter() - self.progress.seconds
        self.evaluation: Evaluation | None = None
        with StopSignal().listening() as stop:
            self.stop = stop
            while self.progress.epoch < self.settings.num_epochs and not self._patience_exhausted():
                self._epoch()
            return self._finish(), self.progress

    def _epoch(self) -> None:
        progress, epoch = self.progress, self.progress.epoch
        self.task.model.train()
        # Kept on the device: its value is read once an epoch.
        loss_sum = torch.zeros((), device=self.runtime.device)
        tokens = torch.zeros((), device=self.runtime.device)
        began, first = time.perf_counter(), progress.batch
        if first == 0:
            self.task.begin_epoch(epoch)
        batches = self.task.batches.epoch(epoch, start=first)
        for batch in self.reporter.progress(batches, len(self.task.batches), first, f"epoch {epoch}"):
            scalars = self._step(batch.to(self.runtime.device))
            loss_sum += scalars["ar_loss"]
            tokens += scalars["tokens"]
            self._stop_if_asked()
            every = self.settings.checkpoint_every_n_steps
            if every and progress.step % every == 0 and progress.batch < len(self.task.batches):
                self._save()
        self._require_finite(loss_sum)
        self._require_finite_parameters()
        seconds = time.perf_counter() - began
        steps = progress.batch - first
        train = {
            "loss": float(loss_sum) / max(1, steps),
            "seconds": seconds,
            "tokens_per_second": float(tokens) / seconds,
        }
        self._evaluate_epoch(epoch, train if steps else None)
        progress.epoch, progress.batch = epoch + 1, 0
        every = self.settings.save_ckpt_every_n
        if epoch > 0 and epoch % every == 0:
            progress.kept_steps.append(progress.step)
        self._save()
        self._stop_if_asked(saved=True)

    def _step(self, batch: Any) -> dict[str, Tensor]:
        progress, settings = self.progress, self.settings
        rate = settings.learning_rate_at(progress.step, len(self.task.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        probed = progress.step % settings.eval_interval == 0 and batch.size > 0
        if probed:
            self._require_finite_parameters()
        probe = self.task.probe(batch) if probed and self.reporter.active else None
        self.optimizer.zero_grad(set_to_none=True)
        scalars = self._backward(batch, fold(settings.random_seed, progress.step))
        if settings.gradient_clip_norm > 0:
            nn.utils.clip_grad_norm_(self.task.model.parameters(), settings.gradient_clip_norm)
        if progress.step % _FINITE_CHECK_EVERY.get(self.runtime.device.type, _FINITE_CHECK_ELSEWHERE) == 0:
            self._require_finite(scalars["ar_loss"])
        self.optimizer.step()
        if self.reporter.active:
            self._log_step(scalars, probe, rate)
        progress.step += 1
        progress.batch += 1
        return scalars

    def _backward(self, batch: SequenceBatch, seed: int) -> dict[str, Tensor]:
        """Gradients of the batch, `accumulation` parts of it one after the other.

        A part's loss is a mean, so it is weighted by what it was divided by, over all ranks.
        """
        if self.settings.accumulation == 1:
            loss, scalars = self.parallel(batch, seed)
            loss.backward()
            return dict(scalars)
        # Every rank has as many parts, empty ones if need be: each of them is an exchange.
        parts = batch.split(self.settings.accumulation)
        reported: list[dict[str, Tensor]] = []
        weights: list[Tensor] = []
        for part in parts:
            with self._gradients_stay_here() if part is not parts[-1] else contextlib.nullcontext():
                loss, scalars = self.parallel(part, seed)
                weights.append(scalars.get("loss_weight", scalars["tokens"]))
                (loss * weights[-1]).backward()
            reported.append(dict(scalars))
        total = torch.stack(weights).sum().clamp(min=1.0)
        for parameter in self.task.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(total)
        return {name: _over_parts(name, [r[name] for r in reported], weights, total) for name in reported[0]}

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients once a step, with the last part."""
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _log_step(self, scalars: dict[str, Tensor], probe: Any, rate: float) -> None:
        step = self.progress.step
        if self.runtime.device.type == "cpu" or probe is not None:
            values = {name: float(value) for name, value in scalars.items() if name not in ("tokens", "loss_weight")}
            self.reporter.scalars(values, step, "losses/")
            if probe is not None:
                self.reporter.scalars({"loss/train": values["main_loss"], "lr": rate}, step)
                self.reporter.scalars(probe, step, "eval/")

    def _require_finite(self, loss: Tensor) -> None:
        if math.isfinite(float(loss)):
            return
        latest = self.folder.latest()
        last = f"the last checkpoint is {latest.path}" if latest else "no checkpoint was written yet"
        raise Diverged(
            f"training loss: got a value that is not finite at step {self.progress.step} "
            f"(epoch {self.progress.epoch}); "
            f"{last}; try a lower train_fn.learning_rate or train_fn.gradient_clip_norm = 1.0"
        )

    def _require_finite_parameters(self) -> None:
        """An update can overflow after a loss that was still finite; such weights are neither evaluated nor saved."""
        with torch.no_grad():
            self._require_finite(torch.stack([p.sum(dtype=torch.float64) for p in self.task.model.parameters()]).sum())

    def _evaluate_epoch(self, epoch: int, train: dict[str, float] | None) -> None:
        settings, progress = self.settings, self.progress
        complete = epoch % settings.full_eval_every_n == 0 or epoch == settings.num_epochs - 1
        evaluation = self.task.evaluate(epoch, complete)
        self.evaluation = evaluation if complete else None
        progress.seconds = time.perf_counter() - self.started
        if complete and settings.keep_best:
            value = evaluation.metrics[settings.early_stopping_metric]
            # NaN (nobody to average over) is never an improvement.
            if value > (-math.inf if progress.best_value is None else progress.best_value):
                progress.best_value, progress.best_step, progress.best_epoch = value, progress.step, epoch
                progress.stale_evaluations = 0
            else:
                progress.stale_evaluations += 1
        reporter = self.reporter
        reporter.scalars(evaluation.metrics, epoch, "eval_epoch/")
        reporter.scalars(evaluation.metrics, epoch, f"eval_{settings.followed_split}/")
        if complete and settings.full_eval_every_n > 1:
            reporter.scalars(evaluation.metrics, epoch, "eval_epoch_full/")
        performance = {"eval_seconds": evaluation.seconds, "peak_memory_mb": peak_memory_mb(self.runtime.device)}
        if train is not None:
            performance |= {"train_seconds": train["seconds"], "tokens_per_second": train["tokens_per_second"]}
        reporter.scalars(performance, epoch, "perf/")
        record = {"epoch": epoch, "step": progress.step, "split": settings.followed_split, "complete": complete}
        reporter.line(
            record | {"users": evaluation.num_users, "train": train, "perf": performance, "metrics": evaluation.metrics}
        )
        told = f"loss {train['loss']:.4f} in {train['seconds']:.1f}s, " if train else ""
        partial = "" if complete else f" ({evaluation.num_users} users)"
        reporter.say(
            f"epoch {epoch}: {told}{settings.followed_split} {evaluation.summary()} "
            f"in {evaluation.seconds:.1f}s{partial}"
        )

    def _patience_exhausted(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience > 0 and self.progress.stale_evaluations >= patience

    def _finish(self) -> Evaluation:
        settings, progress = self.settings, self.progress
        if settings.keep_best and progress.best_step is not None and progress.best_step != progress.step:
            best = Checkpoint.open(self.folder.path(progress.best_step))
            best.load_model(self.task.model, self.runtime.device)
            self.evaluation = None
            self.reporter.say(
                f"best {settings.followed_split} {settings.early_stopping_metric} {progress.best_value:.4f} "
                f"at epoch {progress.best_epoch}: its weights are restored"
            )
        if self.evaluation is None or settings.followed_split != settings.reported_split:
            self.evaluation = self.task.final()
            if settings.followed_split != settings.reported_split:
                self._report_final(self.evaluation)
        progress.seconds = time.perf_counter() - self.started
        return self.evaluation

    def _report_final(self, evaluation: Evaluation) -> None:
        split, progress = self.settings.reported_split, self.progress
        self.reporter.scalars(evaluation.metrics, progress.epoch, f"eval_{split}/")
        record = {"epoch": progress.epoch, "step": progress.step, "split": split, "complete": True}
        self.reporter.line(record | {"users": evaluation.num_users, "metrics": evaluation.metrics})

    def _save(self) -> None:
        self._require_finite_parameters()
        self.progress.seconds = time.perf_counter() - self.started
        if self.runtime.is_main:
            self.folder.save(self.task.model, self.optimizer, self.progress, self.config, self.facts, self.extra_files)
        self.runtime.barrier()

    def _stop_if_asked(self, saved: bool = False) -> None:
        if self.runtime.any(self.stop.received):
            if not saved:
                self._save()
            name = "Ctrl-C" if self.stop.by_hand else "SIGTERM"
            message = f"stopped by {name} at step {self.progress.step}; checkpoint in {self.folder.folder}"
            raise Interrupted(message, self.stop.by_hand)


def _over_parts(name: str, values: list[Tensor], weights: list[Tensor], total: Tensor) -> Tensor:
    """A scalar of a step from those of its parts: counts add up, everything else is a mean."""
    stacked = torch.stack(values).float()
    if name in COUNTS:
        return stacked.sum()
    return (stacked * torch.stack(weights)).sum() / total
