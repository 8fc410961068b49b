"""Recommendations generated from a checkpoint of a generative model: the directory holds its semantic IDs too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import ConfigError, Main, load
from generative_recommenders.data.dataset import read_catalog
from generative_recommenders.data.users import USERS_FILE, read_users
from generative_recommenders.generative.assemble import GenerativeRecommender, Plan, Searcher, build_model, build_trie
from generative_recommenders.serving.recommender import HistoryRecommender, Recommender, offsets_of
from generative_recommenders.tokenizers.importers import level_names
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointError
from generative_recommenders.training.generative import IDS_FOLDER


@dataclass(frozen=True)
class GeneratedRecommender(HistoryRecommender):
    """A generative model with its IDs; `recommend` adds the column `semantic_id`, such as `<a_3><b_17>`.

    Scores are log-probabilities. Users get fewer than k rows where the search's widths leave fewer.
    """

    model: GenerativeRecommender
    searcher: Searcher = field(kw_only=True)

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
        tables = [
            SemanticIds.load(checkpoint.path / f"{IDS_FOLDER}-{number}")
            for number in range(len(plan.experiment.semantic_ids))
        ]
        model = build_model(plan, tables).to(device)
        checkpoint.load_model(model, device)
        model.eval()
        e, place = plan.experiment, torch.device(device)
        searcher = Searcher(model, build_trie(tables, place), plan.search, e.top_k, e.filter_history)
        return cls(
            model=model,
            catalog=read_catalog(checkpoint.path / "items.parquet"),
            max_sequence_length=e.max_sequence_length,
            device=place,
            filter_history=e.filter_history,
            users=read_users(checkpoint.path / USERS_FILE),
            searcher=searcher,
        )

    def _frame(self, user_ids: list[str], batch: SequenceBatch, seen: list[Tensor] | None, k: int) -> pd.DataFrame:
        batch = batch.to(self.device)
        allowed = None
        if seen is not None:
            rows_T = torch.arange(len(seen)).repeat_interleave(offsets_of(seen).diff())
            allowed = self.searcher.trie.exclude(rows_T.to(self.device), torch.cat(seen).to(self.device), len(seen))
        result = self.searcher.search_for(batch, k, allowed)
        codes_BKL = result.codes_BKL.cpu()
        table = self._table(user_ids, result.items_BK.cpu(), result.scores_BK.cpu(), result.valid_BK.cpu())
        names = level_names(codes_BKL.shape[-1])
        table["semantic_id"] = [
            "".join(f"<{name}_{code}>" for name, code in zip(names, codes, strict=True))
            for codes in codes_BKL[result.valid_BK.cpu()].tolist()
        ]
        return table


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
