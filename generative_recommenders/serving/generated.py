"""Recommendations generated from a checkpoint of a generative model: the directory holds its semantic IDs too."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import ConfigError, Main, load
from generative_recommenders.data.dataset import Catalog, read_catalog
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import IDS_FOLDER
from generative_recommenders.data.users import USERS_FILE, read_users
from generative_recommenders.generative.assemble import (
    GenerativeRecommender,
    Plan,
    Searcher,
    build_model,
    build_searcher,
    build_trie,
)
from generative_recommenders.generative.drafters import TEXTS_FILE, SemanticKNN
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.serving.recommender import HistoryRecommender, Recommender, offsets_of
from generative_recommenders.tokenizers.importers import level_names
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointError
from generative_recommenders.training.generative import UNSEEN_ITEMS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedRecommender(HistoryRecommender):
    """A generative model with its IDs; `recommend` adds the column `semantic_id`, such as `<a_3><b_17>`.

    Scores are those of the search: log-probabilities, with SpecGR their means a code, or what they were mixed with.
    Users get fewer than k rows where the search's widths leave fewer.
    """

    model: GenerativeRecommender
    plan: Plan = field(kw_only=True)
    searcher: Searcher = field(kw_only=True)
    # Ids of the items that training had.
    trained_ids: Tensor = field(kw_only=True)
    # What drafts go by beside the model's states, or alone, where it is texts.
    texts: SemanticKNN | None = field(default=None, kw_only=True)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device | str = "cpu", top_k_method: str | None = None
    ) -> GeneratedRecommender:
        """Raises CheckpointError or ConfigError where the directory was not written by this project, and ConfigError
        for a `top_k_method`: the search has bindings of its own."""
        if top_k_method is not None:
            raise ConfigError(
                f"--top_k_method: got {top_k_method!r}, expected none for a generative model; it has beam_search.*"
            )
        plan = Plan.of(load([str(checkpoint.path / "config.gin")], []))
        _check_drafter(plan)
        tables = [
            SemanticIds.load(checkpoint.path / f"{IDS_FOLDER}-{number}")
            for number in range(len(plan.experiment.semantic_ids))
        ]
        model = build_model(plan, tables).to(device)
        checkpoint.load_model(model, device)
        model.eval()
        plan = _tuned(plan, model)
        e, place = plan.experiment, torch.device(device)
        trie, catalog = build_trie(tables, place), read_catalog(checkpoint.path / "items.parquet")
        trained_ids, texts = _trained_ids(checkpoint, catalog, plan), _texts(checkpoint, plan, place)
        return cls(
            model=model,
            catalog=catalog,
            max_sequence_length=e.max_sequence_length,
            device=place,
            filter_history=e.filter_history,
            users=read_users(checkpoint.path / USERS_FILE),
            plan=plan,
            searcher=build_searcher(plan, model, trie, tables, trained_ids, *_drafting(plan, texts)),
            trained_ids=trained_ids,
            texts=texts,
        )

    def with_ids(
        self, *tables: SemanticIds, text_vectors: Mapping[int, Tensor | np.ndarray] | None = None
    ) -> GeneratedRecommender:
        """A recommender of the same weights over later versions of its semantic IDs, which items were added to.

        New items are listed from then on, and read in histories; removed ones are not listed. Both recommenders can go
        on side by side. Titles of items that the checkpoint does not know are None.

        text_vectors: by item id, (D,), from the encoder whose vectors drafts go by, where they go by any. A new item
        without one is drafted by the model's states alone with `specgr.knn_weight`, and with `specgr.drafter =
        "semantic_knn"` it is listed where the beam arrives at it.

        Raises:
            DataError: a table is no version that has grown from the model's, or vectors do not fit those of the
                checkpoint or are of no use to it.
        """
        fingerprints = self.model.table.fingerprints
        if len(tables) != len(fingerprints):
            raise DataError(f"semantic IDs: got {len(tables)} tables, expected {len(fingerprints)}, one a modality")
        for table, fingerprint in zip(tables, fingerprints, strict=True):
            table.check_fingerprint(fingerprint)
        # The parameters are shared, the look-up of items is not.
        model = copy.copy(self.model)
        model._modules = dict(self.model._modules)
        model.table = IdTable(*tables).to(self.device)
        trie = build_trie(tables, self.device)
        texts = self.texts if text_vectors is None else self._texts_with(text_vectors, model.table)
        searcher = build_searcher(self.plan, model, trie, tables, self.trained_ids, *_drafting(self.plan, texts))
        return replace(self, model=model, searcher=searcher, texts=texts, catalog=_grown(self.catalog, tables[0]))

    def _texts_with(self, text_vectors: Mapping[int, Any], table: IdTable) -> SemanticKNN | None:
        if not isinstance(text_vectors, Mapping):
            raise DataError(
                f"text vectors: got {type(text_vectors).__name__}, expected a mapping from item id to vector"
            )
        if not text_vectors:
            return self.texts
        specgr = self.plan.specgr
        if self.texts is None or specgr is None:
            raise DataError(
                "text vectors: got some for a recommender whose drafts do not go by texts, expected none; try "
                "specgr.knn_weight or specgr.drafter = 'semantic_knn'"
            )
        if specgr.knn_whiten and self.texts.whitening is None:
            raise DataError(
                "text vectors: got some, and a checkpoint whose texts are whitened but which does not keep by what; "
                "train again, or add items without their vectors"
            )
        width, vectors = self.texts.vectors_VD.shape[1], {}
        for number, vector in text_vectors.items():
            if not isinstance(number, int | np.integer) or isinstance(number, bool) or abs(int(number)) >= 2**63:
                raise DataError(f"text vectors: got one of item {number!r}, expected item ids, whole numbers")
            try:
                found = torch.as_tensor(vector).detach().to("cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"text vectors: got {type(vector).__name__} for item {number}, expected a tensor or array"
                ) from error
            if found.shape != (width,) or found.is_complex():
                raise DataError(
                    f"text vectors: got {found.dtype} of shape {tuple(found.shape)} for item {number}, expected real "
                    f"numbers of shape ({width},), as the encoder of the checkpoint's texts gives them"
                )
            vectors[int(number)] = found.float()
        ids_n = torch.tensor(sorted(vectors), dtype=torch.int64)
        unknown = ids_n[table.rows_of(ids_n.to(self.device)).cpu() < 0].tolist()
        if unknown:
            raise DataError(f"text vectors: got one of item {unknown[0]}, expected those of items with a semantic ID")
        return self.texts.with_items(ids_n, torch.stack([vectors[number] for number in ids_n.tolist()]))

    def _frame(self, user_ids: list[str], batch: SequenceBatch, seen: list[Tensor] | None, k: int) -> pd.DataFrame:
        batch = batch.to(self.device)
        allowed = self.searcher.allowed
        if seen is not None:
            rows_T = torch.arange(len(seen)).repeat_interleave(offsets_of(seen).diff()).to(self.device)
            allowed = self.searcher.trie.exclude(rows_T, torch.cat(seen).to(self.device), len(seen), allowed=allowed)
        result = self.searcher.search_for(batch, k, allowed)
        codes_BKL = result.codes_BKL.cpu()
        table = self._table(user_ids, result.items_BK.cpu(), result.scores_BK.cpu(), result.valid_BK.cpu())
        names = level_names(codes_BKL.shape[-1])
        table["semantic_id"] = [
            "".join(f"<{name}_{code}>" for name, code in zip(names, codes, strict=True))
            for codes in codes_BKL[result.valid_BK.cpu()].tolist()
        ]
        return table


def _grown(catalog: Catalog, table: SemanticIds) -> Catalog:
    """The catalogue with the items of the table that it lacks; their raw ids are the table's."""
    place_N = torch.searchsorted(catalog.item_ids, table.item_ids_N).clamp_max(len(catalog) - 1)
    new_N = catalog.item_ids[place_N] != table.item_ids_N
    if not bool(new_N.any()):
        return catalog
    ids = torch.cat([catalog.item_ids, table.item_ids_N[new_N]])
    numbers = table.item_ids_N[new_N].tolist()
    raw_ids = [str(n) for n in numbers] if table.raw_ids is None else table.raw_ids[new_N.numpy()].tolist()
    every_raw, every_title = [*catalog.raw_ids, *raw_ids], [*catalog.titles, *[None] * len(raw_ids)]
    order = ids.argsort().tolist()
    return Catalog(ids[order], [every_raw[n] for n in order], [every_title[n] for n in order])


def _check_drafter(plan: Plan) -> None:
    """Raises ConfigError where the checkpoint does not hold what drafts."""
    if plan.specgr is None:
        return
    if plan.specgr.drafter == "retrieval":
        raise ConfigError(
            "specgr.drafter: got 'retrieval', a model that a generative model's checkpoint does not hold, expected "
            "'encoder' or 'semantic_knn'; try a model trained with train_generative.search = 'beam'"
        )


def _texts(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> SemanticKNN | None:
    """The vectors that drafts go by, None where they go by none. Raises DataError where the checkpoint lacks them."""
    if plan.specgr is None or not (plan.specgr.knn_weight or plan.specgr.drafter == "semantic_knn"):
        return None
    return SemanticKNN.load(checkpoint.path / TEXTS_FILE, device)


def _drafting(plan: Plan, texts: SemanticKNN | None) -> tuple[SemanticKNN | None, SemanticKNN | None]:
    """What drafts in place of the model itself, and what is added to a drafter's scores."""
    alone = plan.specgr is not None and plan.specgr.drafter == "semantic_knn"
    return (texts, None) if alone else (None, texts)


def _tuned(plan: Plan, model: GenerativeRecommender) -> Plan:
    """The plan with the threshold that was tuned for the weights, where one was."""
    if plan.specgr is None or not plan.specgr.target_acceptance:
        return plan
    if model.draft is None:
        raise ConfigError(
            f"specgr.target_acceptance: got {plan.specgr.target_acceptance} with draft_head.width = 0, whose "
            "checkpoint does not hold the threshold that was tuned, expected 0; try specgr.threshold"
        )
    threshold = float(model.draft.threshold)
    return plan if math.isnan(threshold) else replace(plan, specgr=replace(plan.specgr, threshold=threshold))


def _trained_ids(checkpoint: Checkpoint, catalog: Catalog, plan: Plan) -> Tensor:
    """Ids of the items that occur in the training of a checkpoint."""
    unseen = checkpoint.facts.get(UNSEEN_ITEMS)
    if isinstance(unseen, list):
        ids = catalog.item_ids
        return ids[~torch.isin(ids, torch.tensor(unseen, dtype=ids.dtype))]
    candidates = plan.experiment.candidates
    if candidates == "all" and plan.specgr is None:
        return catalog.item_ids
    raise CheckpointError(
        f"checkpoint {checkpoint.path}: does not note which items training lacks, expected it with "
        f"train_generative.candidates = {candidates!r} and search = {plan.experiment.search!r}; train again"
    )


def recommender_of(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", top_k_method: str | None = None
) -> HistoryRecommender:
    """The recommender for whatever experiment the checkpoint is of.

    Raises:
        CheckpointError: there is no model in it that recommends.
    """
    path = Path(checkpoint.path) / "config.gin"
    experiment = load([str(path)], []).build(Main).experiment
    kinds: dict[str, type[Recommender] | type[GeneratedRecommender]] = {
        "train_fn": Recommender,
        "train_generative": GeneratedRecommender,
    }
    if experiment not in kinds:
        raise CheckpointError(f"{path}: main.experiment = @{experiment} has no model that recommends")
    return kinds[experiment].from_checkpoint(checkpoint, device, top_k_method)
