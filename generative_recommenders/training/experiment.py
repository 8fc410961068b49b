"""What `main.experiment` may refer to, and what the launcher asks of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from generative_recommenders.config import Config, ConfigError, Main
from generative_recommenders.config_syntax import suggestion
from generative_recommenders.distributed.runtime import Runtime

# The configurable's name -> module and class, imported when it is launched.
EXPERIMENTS = {
    "train_fn": "generative_recommenders.training.retrieval.RetrievalExperiment",
    "train_generative": "generative_recommenders.training.generative.GenerativeExperiment",
    "train_tokenizer": "generative_recommenders.training.tokenizer.TokenizerExperiment",
}


@dataclass(frozen=True)
class Places:
    """Folders given on the command line."""

    data_dir: Path
    exps_dir: Path


class Experiment(Protocol):
    """A configuration bound to its data; building it reads the dataset and validates both.

    Each method returns the lines a launch ends with.
    """

    def __init__(self, config: Config, places: Places, runtime: Runtime) -> None: ...

    def dry_run(self) -> str:
        """What a run would be."""

    def run(self) -> list[str]:
        """Train, or continue, to the end."""

    def report(
        self, checkpoint: Path | None, split: str, top_k_method: str | None, record: Path | None = None
    ) -> list[str]:
        """Evaluate what was trained: `checkpoint`, or this config's newest where it is None.

        record: folder that gets a `metrics.json` as that of a run.
        """


def experiment_of(config: Config, places: Places, runtime: Runtime) -> Experiment:
    """The experiment that `main.experiment` refers to.

    Raises:
        ConfigError: it is no experiment, or anything that its construction refuses.
    """
    name = config.build(Main).experiment
    if name not in EXPERIMENTS:
        raise ConfigError(f"main.experiment = @{name}: not an experiment; {suggestion(name, EXPERIMENTS)}")
    module, _, class_name = EXPERIMENTS[name].rpartition(".")
    experiment: Experiment = getattr(importlib.import_module(module), class_name)(config, places, runtime)
    return experiment
