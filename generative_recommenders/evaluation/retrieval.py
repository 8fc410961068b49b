"""Evaluates next-item retrieval: the rank of each user's held-out event in the catalogue, less the seen history.

Ranks are counted block by block, nothing is sorted. Each rank of a distributed run ranks its share of the users; the
ranks themselves are gathered, so every metric is computed once from all users and does not depend on the number of
ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime, all_gather_concat
from generative_recommenders.evaluation.metrics import mean_metrics, published_ranks
from generative_recommenders.indexing.exact import TopK
from generative_recommenders.retrieval.model import RetrievalModel


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    num_users: int
    seconds: float

    def summary(self) -> str:
        shown = (("NDCG@10", "ndcg@10"), ("NDCG@50", "ndcg@50"), ("HR@10", "hr@10"), ("HR@50", "hr@50"), ("MRR", "mrr"))
        return " ".join(f"{label} {self.metrics[name]:.4f}" for label, name in shown)


@torch.no_grad()
def rank_targets(model: RetrievalModel, top_k: TopK, batch: SequenceBatch, filter_history: bool) -> Tensor:
    """Ranks (B,) of the targets, in the published counting."""
    queries_BD = model.last_queries(batch)
    ranks = top_k.rank_of_target(
        queries_BD, batch.target_ids_B, batch.offsets, batch.item_ids_T, filter_history=filter_history
    )
    return published_ranks(ranks, len(top_k))


@torch.no_grad()
def evaluate(
    model: RetrievalModel,
    batches: Iterable[SequenceBatch],
    runtime: Runtime,
    *,
    filter_history: bool = True,
    max_rows: int | None = None,
) -> Evaluation:
    """Metrics over all users of all ranks' batches; `max_rows` bounds the queries scored at a time."""
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    top_k = model.top_k(max_rows)
    ranks, ratings = [], []
    for batch in batches:
        if batch.size:
            batch = batch.to(runtime.device)
            ranks.append(rank_targets(model, top_k, batch, filter_history))
            ratings.append(batch.target_ratings_B)
    model.train(was_training)
    device = runtime.device
    ranks_U = all_gather_concat(torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.int64, device=device))
    ratings_U = all_gather_concat(torch.cat(ratings) if ratings else torch.empty(0, device=device))
    # The order of users depends on the ranks; sums of sorted values do not.
    order = torch.argsort(ranks_U * 64 + ratings_U.long(), stable=True)
    metrics = mean_metrics(ranks_U[order].cpu(), ratings_U[order].cpu())
    return Evaluation(metrics, ranks_U.numel(), time.perf_counter() - started)
