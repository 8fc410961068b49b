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
from generative_recommenders.generative.config import Candidates, GenerativeConfig
from generative_recommenders.generative.decoding import GenerativeModel
from generative_recommenders.generative.draft_head import DraftConfig, DraftHead, EncoderDrafter
from generative_recommenders.generative.drafters import Drafter, MixedDrafter, SemanticKNN
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_decoding import ParallelSearch, joint_ids
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.reranking import Reranker
from generative_recommenders.generative.sid_gr import SIDGR
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.specgr import SpecGR
from generative_recommenders.generative.specgr_config import SpecGRConfig
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
_HEAD_BINDINGS = ("width", "temperature", "l2_norm", "items")


@dataclass(frozen=True)
class Plan:
    """Everything the configuration says about a generative experiment, as plain dataclasses."""

    experiment: GenerativeConfig
    model: ModelConfig
    search: BeamSearchConfig
    draft: DraftConfig = field(default_factory=DraftConfig)
    # None with `train_generative.search = "beam"`.
    specgr: SpecGRConfig | None = None

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
        if draft.finetune_epochs and experiment.early_stopping_patience:
            raise ConfigError(
                f"train_generative.early_stopping_patience: got {experiment.early_stopping_patience} with "
                f"draft_head.finetune_epochs = {draft.finetune_epochs}, expected 0: stopping in stage one would leave "
                "out stage two; the best epoch of both is kept anyway"
            )
        if draft.finetune_epochs > experiment.num_epochs:
            raise ConfigError(
                f"draft_head.finetune_epochs: got {draft.finetune_epochs}, expected at most "
                f"train_generative.num_epochs = {experiment.num_epochs}, which they are the last of"
            )
        if experiment.rerank_weight and not draft.width:
            raise ConfigError(
                f"train_generative.rerank_weight: got {experiment.rerank_weight} with draft_head.width = 0, expected a "
                "model that scores items too; try draft_head.width = 128"
            )
        if experiment.rerank_weight:
            _check_reranked(model, search)
        specgr = config.build(SpecGRConfig) if experiment.search == "specgr" else None
        if specgr is not None and specgr.drafter == "encoder" and not draft.width:
            raise ConfigError(
                "specgr.drafter: got 'encoder' with draft_head.width = 0, expected a model that is trained to draft; "
                "try draft_head.width = 64, or specgr.drafter = 'semantic_knn'"
            )
        return cls(experiment, model, search, draft, specgr)

    def check_training(self) -> None:
        """Raises ConfigError for what cannot be trained, whatever a checkpoint of it may be used for."""
        model, draft, parts = self.model, self.draft, self.experiment.accumulation_steps
        # Parts of a batch are weighted by the codes that they hide, a drafter's by their samples.
        by_codes = isinstance(model, ParallelTigerConfig) and model.loss_normalization == "per_batch"
        if draft.width and parts > 1 and by_codes:
            raise ConfigError(
                f"train_generative.accumulation_steps: got {parts} with draft_head.width = {draft.width} and "
                "parallel_tiger.loss_normalization = 'per_batch', expected 1; or 'per_sample'"
            )

    def model_bindings(self) -> dict[str, object]:
        """The bindings that decide what a trained model computes."""
        own: dict[str, object] = {f"train_generative.{n}": getattr(self.experiment, n) for n in _MODEL_BINDINGS}
        prefix = MODELS[self.experiment.model]
        chosen = {name: value for name, value in asdict(self.model).items() if name not in _USE_BINDINGS}
        head = {f"draft_head.{name}": getattr(self.draft, name) for name in _HEAD_BINDINGS}
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


def _check_reranked(model: ModelConfig, search: BeamSearchConfig) -> None:
    """Raises ConfigError where lists are to be reranked whose scores or order are not those of log p(ID)."""
    for name in ("length_normalize", "stochastic", "certify"):
        if getattr(search, name):
            raise ConfigError(
                f"beam_search.{name}: got True with train_generative.rerank_weight > 0, expected False: what is "
                "reranked are the best IDs by their log-probabilities, and nothing is proven of the new order"
            )
    if isinstance(model, ParallelTigerConfig) and model.modality_merge == "published":
        raise ConfigError(
            "parallel_tiger.modality_merge: got 'published' with train_generative.rerank_weight > 0, expected one that "
            "keeps log-probabilities; try 'joint'"
        )


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


def joined_ids(tables: Sequence[SemanticIds]) -> SemanticIds:
    """The one table, or that of all modalities side by side."""
    return tables[0] if len(tables) == 1 else joint_ids(*tables)


def build_trie(tables: Sequence[SemanticIds], device: torch.device) -> Trie:
    """The trie of all active items; histories may hold what was removed, lists may not."""
    table = joined_ids(tables)
    return Trie.build(table.codes_NL, table.sizes, table.item_ids_N, table.active_N).to(device)


def candidate_filter(
    trie: Trie, tables: Sequence[SemanticIds], candidates: Candidates, trained_ids: Tensor
) -> ItemFilter | None:
    """The items that lists may hold by `train_generative.candidates`; None for all of them.

    Args:
        tables: what the trie was built of.
        trained_ids: ids of items that occur in training; others, those added since among them, are unseen.
    Raises:
        ConfigError: there is no such item.
    """
    if candidates == "all":
        return None
    inside_N = torch.isin(joined_ids(tables).item_ids_N, trained_ids)
    allowed = trie.allow(inside_N if candidates == "in_sample" else ~inside_N)
    if not bool(allowed.items.any()):
        raise ConfigError(
            f"train_generative.candidates: got {candidates!r}, which no item of the catalogue is; try 'all', or a "
            "dataset made with preprocess_public_data.py --split"
        )
    return allowed


class Searcher:
    """Lists of items from a model: `searcher(batch)` is a `BeamResult` of `top_k` places.

    `allowed` are the items of all lists, None for those of the trie. With `specgr` it makes the lists; with `rerank` it
    orders them.
    """

    def __init__(
        self,
        model: GenerativeRecommender,
        trie: Trie,
        search: BeamSearchConfig,
        top_k: int,
        filter_history: bool,
        allowed: ItemFilter | None = None,
        specgr: SpecGR[Any] | None = None,
        rerank: Reranker | None = None,
    ) -> None:
        self.model, self.trie, self.search, self.specgr, self.rerank = model, trie, search, specgr, rerank
        self.top_k, self.filter_history, self.allowed = top_k, filter_history, allowed
        self.parallel = ParallelSearch(model, trie) if isinstance(model, ParallelTiger) else None

    def __call__(self, batch: SequenceBatch) -> BeamResult:
        return self._search(batch, self.top_k, self.allowed, self.filter_history)

    def search_for(self, batch: SequenceBatch, k: int, allowed: ItemFilter | None) -> BeamResult:
        """Lists of k places from the items of a filter in place of `allowed`, the histories' among them."""
        return self._search(batch, k, self.allowed if allowed is None else allowed, False)

    def _search(self, batch: SequenceBatch, k: int, allowed: ItemFilter | None, filter_history: bool) -> BeamResult:
        if self.specgr is not None:
            # Candidates that a configuration names are a subset to be ranked; a history that is left out is none.
            subset = self.allowed is not None
            return self.specgr(batch, k, allowed=allowed, exclude_history=filter_history, subset=subset)
        if self.rerank is None:
            return self._found(batch, k, allowed, filter_history)
        found = self._found(batch, max(k, self.rerank.candidates), allowed, filter_history)
        return self.rerank(batch, found, k)

    def _found(self, batch: SequenceBatch, k: int, allowed: ItemFilter | None, filter_history: bool) -> BeamResult:
        if self.parallel is not None:
            return self.parallel(batch, k, self.search, allowed=allowed, exclude_history=filter_history)
        model: GenerativeModel[Any] = self.model
        return beam_search(model, batch, self.trie, k, self.search, allowed=allowed, exclude_history=filter_history)


def build_searcher(
    plan: Plan,
    model: GenerativeRecommender,
    trie: Trie,
    tables: Sequence[SemanticIds],
    trained_ids: Tensor,
    drafter: Drafter | None = None,
    texts: SemanticKNN | None = None,
) -> Searcher:
    """The search that a plan names, over a trie of `tables`; `trained_ids` as of `candidate_filter`.

    drafter: of SpecGR; None is the model's own. texts: what is added to its scores, by `specgr.knn_weight`.
    """
    e, specgr = plan.experiment, None
    allowed = candidate_filter(trie, tables, e.candidates, trained_ids)
    if plan.specgr is not None:
        # None of the items may be left that training has seen.
        in_sample = trie.allow(torch.isin(joined_ids(tables).item_ids_N, trained_ids))
        verifier: GenerativeModel[Any] = model
        chosen = drafter or EncoderDrafter(model)
        if texts is not None:
            chosen = MixedDrafter(chosen, texts, plan.specgr.knn_weight)
        specgr = SpecGR(verifier, trie, chosen, plan.specgr, in_sample)
    rerank = Reranker(EncoderDrafter(model), e.rerank_weight, e.rerank_candidates) if e.rerank_weight else None
    return Searcher(model, trie, plan.search, e.top_k, e.filter_history, allowed, specgr, rerank)
