"""Runs a generative experiment: semantic IDs if they are not there yet, training, evaluation of generated lists."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import Config, ConfigError, load
from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.loader import Loader
from generative_recommenders.data.preprocess import IDS_FOLDER
from generative_recommenders.data.users import USERS_FILE, write_users
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.evaluation.drafting import DRAFT_METRICS, Scores, evaluate_drafts
from generative_recommenders.evaluation.generative import Catalogue, evaluate_lists
from generative_recommenders.evaluation.metrics import HR_AT, MAX_RANK, NDCG_AT
from generative_recommenders.evaluation.retrieval import Evaluation
from generative_recommenders.generative.assemble import (
    GenerativeRecommender,
    Plan,
    Searcher,
    Splits,
    build_model,
    build_searcher,
    build_trie,
    codebooks_of,
    load_ids,
)
from generative_recommenders.generative.draft_head import EncoderDrafter
from generative_recommenders.generative.drafters import TEXTS_FILE, Drafter, SemanticKNN
from generative_recommenders.generative.specgr_config import SpecGRConfig
from generative_recommenders.generative.tiger import TigerConfig
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.generative.trie import Trie
from generative_recommenders.tokenizers.catalogue import CURRENT_FILE
from generative_recommenders.tokenizers.config import TokenizerConfig
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointError
from generative_recommenders.training.drafters import retrieval_drafter, semantic_knn, trained_drafter
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.task import Finetune, Settings, Task
from generative_recommenders.training.tokenizer import TokenizerExperiment
from generative_recommenders.training.trained import TrainedExperiment, configure_precision, settings_of

logger = logging.getLogger(__name__)

# Bindings that do not change what is computed, so a run may be continued under other values of them.
_NOT_IDENTITY = ("train_generative.resume", "train_generative.num_workers", "train_tokenizer.resume")
# Of the validation split, to tune SpecGR's threshold on.
_TUNING_BATCHES = 16
# Among the facts of a checkpoint, ids of items that no training event has.
UNSEEN_ITEMS = "unseen_items"


class GenerativeExperiment(TrainedExperiment[GenerativeRecommender]):
    """A configuration bound to its data and semantic IDs."""

    prefix = "train_generative"

    def __init__(self, config: Config, places: Places, runtime: Runtime) -> None:
        super().__init__(config, places, runtime)
        self.plan = Plan.of(config)
        e = self.plan.experiment
        self.max_sequence_length, self.resume, self.random_seed = e.max_sequence_length, e.resume, e.random_seed
        _check_metric(e.early_stopping_metric, e.top_k, drafts=self.plan.draft.width > 0)
        self.dataset = PreparedDataset.load(places.data_dir, e.dataset_name)
        self.id_folders = [places.data_dir / e.dataset_name / IDS_FOLDER / name for name in e.semantic_ids]
        self.tokenizer: TokenizerConfig = config.build(TokenizerConfig)
        # Used in any case, whether the IDs are there or are still to be made.
        config.build(self.tokenizer.tokenizer)
        self._check_ids()
        self.splits = Splits.of(e, self.dataset)
        # Whether what is missing may be trained.
        self.trains = False
        configure_precision(e.enable_tf32)

    @cached_property
    def tables(self) -> list[SemanticIds]:
        """The semantic IDs, of each modality.

        Raises:
            DataError: they are not there, damaged, or of another dataset.
        """
        return load_ids(self.id_folders, self.dataset)

    @cached_property
    def trie(self) -> Trie:
        return build_trie(self.tables, self.runtime.device)

    def _missing(self) -> list[Path]:
        return [folder for folder in self.id_folders if not (folder / CURRENT_FILE).exists()]

    def _check_ids(self) -> None:
        """Refuse IDs that are not there and that this configuration does not make."""
        e = self.plan.experiment
        for folder in self._missing():
            if (self.tokenizer.name, self.tokenizer.dataset_name) != (folder.name, e.dataset_name):
                raise DataError(
                    f"{folder}: no semantic IDs of this name, expected those of train_generative.semantic_ids; try "
                    f"python main.py --gin_config_file=configs/{e.dataset_name}/{folder.name}.gin, or include that "
                    "file before main.experiment = @train_generative"
                )

    def _make_ids(self) -> None:
        # Only rank 0 looks: others might find what it has just made, and would then not wait with it.
        for folder in self._missing() if self.runtime.is_main else []:
            logger.info("%s: not there yet, making them", folder)
            for line in TokenizerExperiment(self.config, self.places, self.runtime).run():
                logger.info("%s", line)
        self.runtime.barrier()

    def train(self) -> tuple[Evaluation, Path]:
        self.trains = True
        self.plan.check_training()
        self._make_ids()
        # Before the model, as a drafter may have to be trained.
        _ = self.drafter, self.drafter_texts
        return super().train()

    def describe(self) -> str:
        return self.plan.describe()

    def identity(self) -> str:
        bindings = self.config.fingerprint(exclude=_NOT_IDENTITY)
        ids = "-".join(table.fingerprint[:16] for table in self.tables)
        return f"{bindings}-{self.dataset.fingerprint}-{ids}-w{self.runtime.world_size}"

    def hyperparameters(self) -> dict[str, Any]:
        return asdict(self.plan.experiment) | asdict(self.plan.model) | asdict(self.plan.search)

    def facts(self) -> dict[str, Any]:
        unseen = self.dataset.unseen_items(self.splits.train.ignore_last_n)
        return super().facts() | {
            "semantic_ids": [table.fingerprint for table in self.tables],
            UNSEEN_ITEMS: unseen.tolist(),
        }

    def split(self, name: str) -> Split:
        return self.splits.named(name)

    def model(self) -> GenerativeRecommender:
        codebooks = codebooks_of(self.id_folders, self.tables) if self.plan.experiment.codebook_start else None
        model = build_model(self.plan, self.tables, codebooks)
        if model.draft is not None:
            model.draft.negatives_n = self._trained_ids(model)
            if self.plan.draft.negatives == "catalogue" and not model.draft.negatives_n.numel():
                raise DataError(
                    f"{self.dataset.name}: got semantic IDs of no item that training has, expected some with "
                    "draft_head.negatives = 'catalogue'; try IDs of this dataset"
                )
        return model.to(self.runtime.device)

    def _trained_ids(self, model: GenerativeRecommender) -> Tensor:
        """Items with an ID that occur in training, ascending."""
        ids_N = model.table.item_ids_N
        return ids_N[self.catalogue.trained_V.to(ids_N.device)[ids_N]]

    def model_to_load(self) -> GenerativeRecommender:
        return build_model(self.plan, self.tables).to(self.runtime.device)

    def batches(self, split: str, limit: int | None = None) -> Iterable[SequenceBatch]:
        """Batches of a held-out split, as this rank sees them; `limit` of them hold users from all over the split."""
        users, specgr = self.splits.named(split), self.plan.specgr
        # A choice of users is one of evaluating a checkpoint; what training selects by is everybody.
        specgr = None if self.trains else specgr
        if specgr is not None and specgr.eval_mode != "all":
            trained_V = self.catalogue.trained_V.cpu()
            users = users.with_targets(trained_V if specgr.eval_mode == "in_sample" else ~trained_V)
        if specgr is not None and specgr.max_eval_steps:
            limit = min(limit or specgr.max_eval_steps, specgr.max_eval_steps)
        loader = self._loader(users, self.plan.experiment.eval_batch_size, shuffle=limit is not None)
        return itertools.islice(loader.epoch(0), limit)

    def _loader(self, split: Split, batch_size: int, shuffle: bool) -> Loader:
        e = self.plan.experiment
        return Loader(
            split,
            batch_size,
            e.random_seed,
            shuffle,
            self.runtime.rank,
            self.runtime.world_size,
            num_workers=e.num_workers,
        )

    def searcher(self, model: GenerativeRecommender) -> Searcher:
        """The search of the present weights; SpecGR's threshold is tuned on valid where that is asked for."""
        trained_ids = self.catalogue.trained_V.cpu().nonzero().flatten()
        drafter, texts = self.drafter, self.drafter_texts
        searcher = build_searcher(self.plan, model, self.trie, self.tables, trained_ids, drafter, texts)
        if searcher.specgr is not None and searcher.specgr.config.target_acceptance:
            loader = self._loader(self.splits.valid, self.plan.experiment.eval_batch_size, shuffle=True)
            batches = itertools.islice(loader.epoch(0), _TUNING_BATCHES)
            on_device = (batch.to(self.runtime.device) for batch in batches)
            searcher.specgr = searcher.specgr.calibrated(
                on_device, allowed=searcher.allowed, exclude_history=self.plan.experiment.filter_history
            )
            if model.draft is not None:
                model.draft.threshold.fill_(searcher.specgr.config.threshold)
        return searcher

    @cached_property
    def drafter(self) -> Drafter | None:
        """What SpecGR drafts with, None for the model itself."""
        specgr = self.plan.specgr
        if specgr is None or specgr.drafter == "encoder":
            return None
        if specgr.drafter == "semantic_knn":
            return self._neighbors(specgr)
        if specgr.drafter_checkpoint:
            run = Path(specgr.drafter_checkpoint)
        else:
            run = trained_drafter(specgr.drafter_config, self.dataset, self.places, self.runtime, train=self.trains)
        return retrieval_drafter(run, self.dataset, self.runtime)

    @cached_property
    def drafter_texts(self) -> SemanticKNN | None:
        """What is added to the scores of SpecGR's drafter."""
        specgr = self.plan.specgr
        return self._neighbors(specgr) if specgr is not None and specgr.knn_weight else None

    def _neighbors(self, specgr: SpecGRConfig) -> SemanticKNN:
        last_n, whiten = specgr.knn_last_n, specgr.knn_whiten
        return semantic_knn(self.tokenizer, self.dataset, self.runtime, last_n=last_n, whiten=whiten)

    @cached_property
    def catalogue(self) -> Catalogue:
        """What metrics need of the items; trained are those that are a target or in a history of the training split."""
        ids = IdTable(*self.tables)
        trained_V = self.dataset.trained_items(self.splits.train.ignore_last_n)
        # Items that were added since are listed too.
        added = int(ids.item_ids_N[-1]) + 1 - len(trained_V)
        trained_V = F.pad(trained_V, (0, max(0, added)))
        codes_VL = ids.codes_of_items(torch.arange(len(trained_V)))
        device = self.runtime.device
        listed = torch.cat([self.dataset.catalog.item_ids, ids.item_ids_N]).unique()
        return Catalogue(codes_VL.to(device), trained_V.to(device), len(listed))

    def evaluate(self, model: GenerativeRecommender, split: str, limit: int | None = None) -> Evaluation:
        searcher = self.searcher(model)
        evaluation = evaluate_lists(
            model,
            searcher,
            self.batches(split, limit),
            self.runtime,
            self.catalogue,
            self.plan.experiment.top_k,
        )
        # The searcher's own where it has one: its items are encoded already.
        drafter: Scores | None = None
        if searcher.specgr is not None:
            drafter = searcher.specgr.drafter
        elif searcher.rerank is not None:
            drafter = searcher.rerank.drafter
        elif model.draft is not None:
            drafter = EncoderDrafter(model)
        if drafter is None:
            return evaluation
        was_training = model.training
        model.eval()
        drafts = evaluate_drafts(
            *(drafter, self.batches(split, limit), self.runtime, self.catalogue.trained_V),
            exclude_history=self.plan.experiment.filter_history,
        )
        model.train(was_training)
        return replace(evaluation, metrics=evaluation.metrics | drafts)

    def extra_files(self, folder: Path) -> list[Path]:
        """The item map, the tables of semantic IDs, and what is read or drafted by: users, and texts of items."""
        places = [folder / f"{IDS_FOLDER}-{number}" for number in range(len(self.tables))]
        if self.runtime.is_main:
            for table, place in zip(self.tables, places, strict=True):
                table.save(place)
        files = [self.dataset.folder / "items.parquet", *places]
        texts = self.drafter if isinstance(self.drafter, SemanticKNN) else self.drafter_texts
        if texts is not None:
            if self.runtime.is_main:
                texts.save(folder / TEXTS_FILE)
            files.append(folder / TEXTS_FILE)
        if isinstance(self.plan.model, TigerConfig) and self.plan.model.user_tokens:
            if self.runtime.is_main:
                write_users(self.dataset, folder / USERS_FILE)
            files.append(folder / USERS_FILE)
        return files

    def checked_method(self, top_k_method: str | None) -> Callable[[GenerativeRecommender], None]:
        if top_k_method is not None:
            raise ConfigError(
                f"--top_k_method: got {top_k_method!r}, expected none with main.experiment = @train_generative; "
                "its search has the bindings beam_search.*"
            )
        return lambda model: None

    def require_fit(self, checkpoint: Checkpoint) -> None:
        self.require_same_dataset(checkpoint)
        noted = checkpoint.facts.get("semantic_ids")
        if not isinstance(noted, list) or len(noted) != len(self.tables):
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: got {noted or 'no semantic IDs'}, expected {len(self.tables)} tables; "
                "try the config it was trained with"
            )
        for fingerprint, table in zip(noted, self.tables, strict=True):
            table.check_fingerprint(fingerprint)
        trained = Plan.of(load([str(checkpoint.path / "config.gin")])).model_bindings()
        for name, value in self.plan.model_bindings().items():
            if trained.get(name) != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: was trained with {name} = {trained.get(name)!r}, got {value!r}; "
                    "try the config it was trained with"
                )

    def dry_run(self) -> str:
        """What a run would be; one batch goes through forward and backward, if the semantic IDs are there."""
        self.require_users()
        self.plan.check_training()
        if missing := self._missing():
            places = ", ".join(map(str, missing))
            return f"run          {self.plan.describe()}\nsemantic IDs {places}: not there yet, training makes them"
        model = self.model()
        parameters = sum(p.numel() for p in model.parameters())
        e = self.plan.experiment
        loader = self._loader(self.splits.train, e.local_batch_size, shuffle=True)
        batch = next(iter(loader.epoch(0))).to(self.runtime.device)
        loss, _ = model(batch, 0)
        loss.backward()
        return "\n".join(
            (
                f"run          {self.plan.describe()}",
                f"dataset      {self.dataset.name}: {self.dataset.num_users:,} users, "
                f"{len(self.dataset.catalog):,} items, {self.dataset.item_ids_E.numel():,} events",
                *(
                    f"semantic IDs {folder}: {table.summary()}"
                    for folder, table in zip(self.id_folders, self.tables, strict=True)
                ),
                f"parameters   {parameters:,}",
                f"steps        {len(loader):,} an epoch, {len(loader) * e.num_epochs:,} in {e.num_epochs} epochs",
                f"first batch  {batch.size} samples, {batch.item_ids_T.numel():,} events, loss {loss.item():.4f}",
            )
        )

    def task(self, model: GenerativeRecommender) -> Task:
        e = self.plan.experiment

        def follow(epoch: int, complete: bool) -> Evaluation:
            self.check_bindings(epoch)
            return self.evaluate(model, self.followed_split, None if complete else e.partial_eval_num_iters)

        return Task(
            model=model,
            batches=self._loader(self.splits.train, e.local_batch_size, shuffle=True),
            evaluate=follow,
            probe=lambda batch: {},
            final=lambda: self.evaluate(model, "test"),
            begin_epoch=lambda epoch: self._begin_epoch(model, epoch),
        )

    def _begin_epoch(self, model: GenerativeRecommender, epoch: int) -> None:
        stage_two = self.plan.experiment.num_epochs - self.plan.draft.finetune_epochs
        if model.draft is not None and epoch == stage_two:
            model.draft.begin_stage_two(model, self._trained_ids(model))

    def settings(self) -> Settings:
        e = self.plan.experiment
        followed = "valid" if self.dataset.explicit else e.eval_split
        draft, finetune = self.plan.draft, None
        if draft.finetune_epochs:
            finetune = Finetune(draft.finetune_epochs, draft.finetune_learning_rate, draft.finetune_warmup_steps)
        return settings_of(e, followed, schedule=e.schedule, accumulation=e.accumulation_steps, finetune=finetune)

    def protocol(self) -> str:
        e = self.plan.experiment
        selected = "selected on valid" if e.eval_split == "valid" else "test curve, no validation set"
        return f"{selected}, history {'filtered' if e.filter_history else 'not filtered'}"


def _check_metric(name: str, top_k: int, drafts: bool) -> None:
    if top_k > MAX_RANK:
        raise ConfigError(f"train_generative.top_k: got {top_k}, expected at most {MAX_RANK}, the rank of a miss")
    measured = [f"hr@{k}" for k in HR_AT if k <= top_k] + [f"ndcg@{k}" for k in NDCG_AT if k <= top_k] + ["mrr"]
    names = measured + [f"sid_{metric}" for metric in measured]
    names += [f"draft_{metric}" for metric in DRAFT_METRICS if drafts]
    if name not in names:
        raise ConfigError(
            f"train_generative.early_stopping_metric: got {name!r}, expected one of {', '.join(names)} "
            f"with train_generative.top_k = {top_k}"
        )
