"""From configuration, prepared data and semantic IDs to a generative model, its trie and its search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import Config, ConfigError
from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.windows import Windows
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.config import GenerativeConfig
from generative_recommenders.generative.decoding import GenerativeModel
from generative_recommenders.generative.draft_head import DraftConfig, DraftHead
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_decoding import ParallelSearch, joint_ids
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.sid_gr import SIDGR
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.tiger import Tiger, TigerConfig
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.generative.trie import ItemFilter, Trie
from generative_recommenders.tokenizers.catalogue import TOKENIZER, load_current
from generative_recommenders.tokenizers.quantizer import load_quantizer
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

ModelConfig = TigerConfig | ParallelTigerConfig | SIDGRConfig
GenerativeRecommender = Tiger | ParallelTiger | SIDGR
# train_generative.model -> the configurable of its bindings.
MODELS = {"TIGER": "tiger", "ParallelTIGER": "parallel_tiger", "SIDGR": "sid_gr"}
# Of the models' bindings, those that change how a trained model is used or computed, or nothing, not what it is.
_USE_BINDINGS = ("decoding", "modality_merge", "activation_checkpoint", "has_relative_decoder_item_bias_sa")
_MODEL_BINDINGS = ("model", "max_sequence_length", "eval_split")


@dataclass(frozen=True)
class Plan:
    """Everything the configuration says about a generative experiment, as plain dataclasses."""

    experiment: GenerativeConfig
    model: ModelConfig
    search: BeamSearchConfig
    draft: DraftConfig = field(default_factory=DraftConfig)

    @classmethod
    def of(cls, config: Config) -> Plan:
        experiment = config.experiment()
        model = config.build(MODELS[experiment.model])
        search = config.build(BeamSearchConfig)
        if isinstance(model, SIDGRConfig) and model.loss_on == "all" and experiment.samples == "all_prefixes":
            raise ConfigError(
                "train_generative.samples: got 'all_prefixes' with sid_gr.loss_on = 'all', which learns every event of "
                "a sequence already, expected 'last' or 'random_end'; or sid_gr.loss_on = 'last'"
            )
        draft = config.build(DraftConfig)
        if draft.width and isinstance(model, TigerConfig) and model.user_tokens:
            raise ConfigError(
                f"tiger.user_tokens: got {model.user_tokens} with draft_head.width = {draft.width}, expected 0: items "
                "are encoded too, and have no user"
            )
        if draft.finetune_epochs > experiment.num_epochs:
            raise ConfigError(
                f"draft_head.finetune_epochs: got {draft.finetune_epochs}, expected at most "
                f"train_generative.num_epochs = {experiment.num_epochs}, which they are the last of"
            )
        return cls(experiment, model, search, draft)

    def model_bindings(self) -> dict[str, object]:
        """The bindings that decide what a trained model computes."""
        own: dict[str, object] = {f"train_generative.{n}": getattr(self.experiment, n) for n in _MODEL_BINDINGS}
        prefix = MODELS[self.experiment.model]
        chosen = {name: value for name, value in asdict(self.model).items() if name not in _USE_BINDINGS}
        head = {"draft_head.width": self.draft.width, "draft_head.temperature": self.draft.temperature}
        return own | {f"{prefix}.{name}": value for name, value in chosen.items()} | head

    def describe(self) -> str:
        """The name of a run."""
        e = self.experiment
        parts = [
            self.model.describe(),
            "-".join(e.semantic_ids),
            e.samples,
            f"b{e.local_batch_size}-lr{e.learning_rate}-wu{e.num_warmup_steps}-{e.schedule}-wd{e.weight_decay}",
            "codebooks" if e.codebook_start else "",
            self.draft.describe(),
            e.eval_split,
            f"s{e.random_seed}",
        ]
        return "-".join(part for part in parts if part)[:200]


@dataclass(frozen=True)
class Splits:
    """Leave-one-out, or the splits of the files; training samples are windows of the training events."""

    train: Windows
    valid: Split
    test: Split

    @classmethod
    def of(cls, config: GenerativeConfig, dataset: PreparedDataset) -> Splits:
        length = config.max_sequence_length
        held_out = 1 if config.eval_split == "test" else 2
        rows = dataset.split_rows
        train = Windows(
            dataset,
            length,
            0 if rows else held_out,
            of_rows=rows.get("train"),
            mode=config.samples,
            seed=config.random_seed,
        )
        return cls(
            train,
            Split(dataset, length, 0 if rows else 1, of_rows=rows.get("valid")),
            Split(dataset, length, 0, of_rows=rows.get("test")),
        )

    def named(self, name: str) -> Split:
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]


def load_ids(folders: Sequence[Path], dataset: PreparedDataset) -> list[SemanticIds]:
    """The tables in use, checked to be of this dataset."""
    tables = [load_current(folder) for folder in folders]
    for table in tables:
        table.check_for(dataset.fingerprint)
    return tables


def codebooks_of(folders: Sequence[Path], tables: Sequence[SemanticIds]) -> list[Tensor | None]:
    """Codebooks of the tokenizers, one modality after the other; None for levels that a tokenizer does not have.

    Raises:
        DataError: IDs without a tokenizer, or with one that has no codebooks.
    """
    found: list[Tensor | None] = []
    for folder, table in zip(folders, tables, strict=True):
        books = load_quantizer(folder / TOKENIZER).codebooks()
        found += [*books, *[None] * (table.levels - len(books))]
    return found


def build_model(
    plan: Plan, tables: Sequence[SemanticIds], codebooks: Sequence[Tensor | None] | None = None
) -> GenerativeRecommender:
    """A new model; initial values depend on `train_generative.random_seed` alone."""
    torch.manual_seed(plan.experiment.random_seed)
    ids = IdTable(*tables)
    config = plan.model
    model: GenerativeRecommender
    if isinstance(config, SIDGRConfig):
        model = SIDGR(config, ids, plan.experiment.max_sequence_length)
    elif isinstance(config, TigerConfig):
        model = Tiger(config, ids)
    else:
        model = ParallelTiger(config, ids)
    if codebooks is not None:
        model.tokens.from_codebooks(codebooks)
    if plan.draft.width:
        model.draft = DraftHead(plan.draft, config.dim)
    return model


def build_trie(tables: Sequence[SemanticIds], device: torch.device) -> Trie:
    """The trie of all active items; histories may hold what was removed, lists may not."""
    table = tables[0] if len(tables) == 1 else joint_ids(*tables)
    return Trie.build(table.codes_NL, table.sizes, table.item_ids_N, table.active_N).to(device)


class Searcher:
    """Lists of items from a model: `searcher(batch)` is a `BeamResult` of `top_k` places."""

    def __init__(
        self, model: GenerativeRecommender, trie: Trie, search: BeamSearchConfig, top_k: int, filter_history: bool
    ) -> None:
        self.model, self.trie, self.search = model, trie, search
        self.top_k, self.filter_history = top_k, filter_history
        self.parallel = ParallelSearch(model, trie) if isinstance(model, ParallelTiger) else None

    def __call__(self, batch: SequenceBatch) -> BeamResult:
        return self._search(batch, self.top_k, None, self.filter_history)

    def search_for(self, batch: SequenceBatch, k: int, allowed: ItemFilter | None) -> BeamResult:
        """Lists of k places from the items of a filter, the histories' among them."""
        return self._search(batch, k, allowed, False)

    def _search(self, batch: SequenceBatch, k: int, allowed: ItemFilter | None, filter_history: bool) -> BeamResult:
        if self.parallel is not None:
            return self.parallel(batch, k, self.search, allowed=allowed, exclude_history=filter_history)
        model: GenerativeModel[Any] = self.model
        return beam_search(model, batch, self.trie, k, self.search, allowed=allowed, exclude_history=filter_history)
