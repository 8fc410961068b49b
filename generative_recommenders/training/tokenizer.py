"""Runs a semantic-ID experiment: embed the items, fit the tokenizer, write the IDs, report their quality."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generative_recommenders.config import Config, ConfigError
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import IDS_FOLDER
from generative_recommenders.data.text_embeddings import Embeddings
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.errors import one_line
from generative_recommenders.tokenizers.build import (
    PICTURE_FILE,
    QUALITY_FILE,
    Built,
    Method,
    build_semantic_ids,
    identity_of,
    write_built,
)
from generative_recommenders.tokenizers.catalogue import TOKENIZER, load_current
from generative_recommenders.tokenizers.config import TokenizerConfig
from generative_recommenders.tokenizers.quality import QualityReport, quality_report
from generative_recommenders.tokenizers.quantizer import fingerprint, load_quantizer
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from generative_recommenders.training.environment import environment
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.item_texts import embeddings_of
from generative_recommenders.training.reporting import Reporter

logger = logging.getLogger(__name__)

_NOT_IDENTITY = ("train_tokenizer.resume", "main.*")


class TokenizerExperiment:
    """A configuration bound to its dataset and to the folder of its IDs."""

    def __init__(self, config: Config, places: Places, runtime: Runtime) -> None:
        self.config = config
        self.settings: TokenizerConfig = config.build(TokenizerConfig)
        self.method: Method = config.build(self.settings.tokenizer)
        self.runtime = runtime
        s = self.settings
        self.dataset = PreparedDataset.load(places.data_dir, s.dataset_name)
        self.folder = places.data_dir / s.dataset_name / IDS_FOLDER / s.name
        self.run_folder = places.exps_dir / f"{s.dataset_name}-semantic-ids" / s.name

    def dry_run(self) -> str:
        """What a run would be."""
        fitted = int(self._fitted().sum())
        return "\n".join(
            (
                f"semantic IDs {self.folder}",
                f"dataset      {self.dataset.name}: {len(self.dataset.catalog):,} items, fitted on {fitted:,}",
                f"embeddings   {self.settings.encoder}",
                f"tokenizer    {self.method}",
                f"collisions   {self.settings.collision_policy}",
            )
        )

    def run(self) -> list[str]:
        """Make the IDs, or find them made; the report and where they are."""
        if not self.runtime.is_main:
            return []
        embeddings = embeddings_of(self.settings, self.dataset.folder)
        identity = (
            f"{self.config.fingerprint(exclude=_NOT_IDENTITY)}-{self.dataset.fingerprint}-{embeddings.fingerprint}"
        )
        found = identity_of(self.folder)
        if self.settings.resume == "auto" and found == identity:
            # Raises DataError where its files are damaged.
            self._whole()
            return [*self._quality(), f"{self.folder}: there already; train_tokenizer.resume = 'never' makes it again"]
        self._require_place(identity)
        return self._make(embeddings, identity)

    def report(
        self, checkpoint: Path | None, split: str, top_k_method: str | None, record: Path | None = None
    ) -> list[str]:
        """The quality of the IDs that are there."""
        if checkpoint is not None or top_k_method is not None or record is not None:
            raise ConfigError(
                "--checkpoint, --top_k_method, --record: got one, expected none with main.experiment = "
                f"@train_tokenizer; its IDs are in {self.folder}"
            )
        table = self._whole()
        if table.version > 1:
            # The report of the build is of the first version; codes alone tell the rest.
            grown = table.without_removed()
            return [quality_report(grown.codes_NL, grown.sizes).table(), grown.summary()]
        return [*self._quality(), table.summary()]

    def _require_place(self, identity: str) -> None:
        """Refuse to replace IDs of other settings, which another process may have made meanwhile, and grown ones."""
        versions = list(self.folder.glob("v[0-9]*"))
        if len(versions) > 1:
            raise ConfigError(
                f"{self.folder}: has grown to {len(versions)} versions, which models may be of, got a config that "
                "would make it anew; try another train_tokenizer.name, or move the folder away"
            )
        if self.settings.resume == "auto" and self.folder.exists() and identity_of(self.folder) != identity:
            raise ConfigError(
                f"{self.folder}: holds IDs of other settings or data, got this config; models know their IDs by "
                "fingerprint: try another train_tokenizer.name, or train_tokenizer.resume = 'never' to replace them"
            )

    def _whole(self) -> SemanticIds:
        """The table in use, after a look at its tokenizer.

        Raises:
            DataError: one of them is missing or damaged, or they do not belong together.
        """
        if not self.folder.exists():
            raise DataError(f"{self.folder}: no such folder, expected semantic IDs; try --mode=train first")
        table = load_current(self.folder)
        found = fingerprint(load_quantizer(self.folder / TOKENIZER))
        if found != table.tokenizer_fingerprint:
            raise DataError(
                f"{self.folder}: got tokenizer {found}, expected {table.tokenizer_fingerprint}, which the table was "
                "made with; put it back, or make both again with train_tokenizer.resume = 'never'"
            )
        return table

    def _make(self, embeddings: Embeddings, identity: str) -> list[str]:
        reporter = Reporter(self.run_folder)
        started = time.monotonic()
        steps: dict[str, int] = {}

        def progress(stage: str, step: int, metrics: dict[str, float]) -> None:
            steps[stage] = step
            reporter.scalars(metrics, step, f"{stage.replace(' ', '_')}/")

        try:
            built = build_semantic_ids(
                self.settings,
                self.method,
                embeddings,
                self._fitted(),
                raw_ids=self.dataset.catalog.raw_ids,
                dataset_fingerprint=self.dataset.fingerprint,
                progress=progress,
            )
            text = self.config.operative()
            reporter.config(text)
            self._require_place(identity)
            write_built(built, embeddings.values_ND, self.folder, identity, text)
            reporter.scalars(built.report.scalars(), 0, "quality/")
            reporter.final(self._record(built, time.monotonic() - started), asdict(self.settings))
        finally:
            reporter.close()
        unused = self.config.unused_bindings()
        if unused:
            logger.warning("bindings that nothing uses in this experiment: %s", ", ".join(unused))
        return [
            built.report.table(),
            built.table.summary(),
            f"{self.folder}: {QUALITY_FILE}, {PICTURE_FILE}, fingerprint {built.table.fingerprint[:12]} "
            f"({time.monotonic() - started:.1f}s)",
        ]

    def _fitted(self) -> Tensor:
        """Items, bool (N,), that the tokenizer is fitted on: those with events in the training split, or all."""
        data = self.dataset
        if self.settings.fit_on == "all":
            return torch.ones(len(data.catalog), dtype=torch.bool)
        if data.explicit:
            first, last = data.split_rows["train"]
            events = data.item_ids_E[data.offsets[first] : data.offsets[last]]
        else:
            # Leave-one-out: a user's last event is test, the one before it validation.
            place_E = torch.arange(data.item_ids_E.numel())
            ends_E = data.offsets[1:].repeat_interleave(data.lengths_U)
            events = data.item_ids_E[place_E < ends_E - 2]
        return torch.isin(data.catalog.item_ids, events)

    def _quality(self) -> list[str]:
        path = self.folder / QUALITY_FILE
        try:
            return [QualityReport.from_json(path.read_text(encoding="utf-8")).table()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be read ({one_line(error)}); try --mode=train with train_tokenizer.resume = 'never'"
            ) from error

    def _record(self, built: Built, seconds: float) -> dict[str, Any]:
        return {
            "date": time.strftime("%Y-%m-%d"),
            "dataset": self.dataset.name,
            "metrics": built.report.scalars(),
            "counts": {"items": len(built.table), "fitted": int(self._fitted().sum())},
            "fingerprint": built.table.fingerprint,
            "seconds": seconds,
            "seed": self.settings.random_seed,
            **environment(torch.device("cpu")),
        }
