"""What the train loop asks of a task, and the settings it needs; it knows nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.evaluation.retrieval import Evaluation
from generative_recommenders.training.optim import Schedule, learning_rate_at


class Batches(Protocol):
    """A loader: `len` is steps an epoch, `epoch` can start anywhere."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[SequenceBatch]: ...


COUNTS = ("tokens", "loss_weight", "unknown_items")


@dataclass(frozen=True)
class Task:
    """`model(batch, seed)` returns (loss, {name: scalar tensor}).

    `tokens` is how many places were learned; the loss is divided by it, or by `loss_weight` where there is one.
    `COUNTS` are sums over the batch, all other scalars means.

    `evaluate(epoch, complete)` returns the metrics of the split that is followed, `probe(batch)` those of one training
    batch, `final(best)` those of the reported split with the weights as they are.
    """

    model: nn.Module
    batches: Batches
    evaluate: Callable[[int, bool], Evaluation]
    probe: Callable[[SequenceBatch], Mapping[str, float]]
    final: Callable[[], Evaluation]
    # Called with the number of an epoch before its first step.
    begin_epoch: Callable[[int], None] = lambda epoch: None


@dataclass(frozen=True)
class Finetune:
    """A second stage: the last `num_epochs` of the epochs, with a rate and a warm-up of its own."""

    num_epochs: int
    learning_rate: float
    num_warmup_steps: int


@dataclass(frozen=True)
class Settings:
    """Optimization, evaluation and checkpoint settings; names and meanings are those of `train_fn`.

    `followed_split` is evaluated every epoch, `reported_split` at the end; with `keep_best` the epoch best in
    `early_stopping_metric` is restored first. `schedule` of the learning rate, see `optim`; a step's batch goes through
    the model in `accumulation` parts.
    """

    num_epochs: int
    learning_rate: float
    num_warmup_steps: int
    weight_decay: float
    gradient_clip_norm: float
    random_seed: int
    eval_interval: int
    full_eval_every_n: int
    save_ckpt_every_n: int
    checkpoint_every_n_steps: int
    followed_split: str
    reported_split: str
    keep_best: bool
    early_stopping_metric: str
    early_stopping_patience: int
    schedule: Schedule = "constant"
    accumulation: int = 1
    finetune: Finetune | None = None

    def learning_rate_at(self, step: int, steps_an_epoch: int) -> float:
        """The rate of a step; each stage has a schedule of its own."""
        last = self.finetune.num_epochs if self.finetune else 0
        first_steps, last_steps = (self.num_epochs - last) * steps_an_epoch, last * steps_an_epoch
        if self.finetune is None or step < first_steps:
            return learning_rate_at(self.learning_rate, step, self.num_warmup_steps, self.schedule, first_steps)
        own = self.finetune
        return learning_rate_at(own.learning_rate, step - first_steps, own.num_warmup_steps, self.schedule, last_steps)
