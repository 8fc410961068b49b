"""Evaluates next-item retrieval: the rank of each user's held-out event in the catalogue, less the seen history.

Ranks are counted block by block, nothing is sorted. Each rank of a distributed run ranks its share of the users; the
ranks themselves are gathered, so every metric is computed once from all users and does not depend on the number of
ranks. Where targets do not occur in training, the metrics of `slices` tell the two kinds of users apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime, all_gather_concat
from generative_recommenders.evaluation.metrics import LABELS, mean_metrics, per_user_metrics, published_ranks
from generative_recommenders.evaluation.slices import sliced_means
from generative_recommenders.indexing.exact import TopK
from generative_recommenders.retrieval.model import RetrievalModel


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, `loss` among them where `mean_target_loss` was asked for."""

    metrics: dict[str, float]
    num_users: int
    seconds: float

    def summary(self) -> str:
        return " ".join(f"{label} {self.metrics[name]:.4f}" for name, label in LABELS.items() if name in self.metrics)


@torch.no_grad()
def rank_targets(model: RetrievalModel, top_k: TopK[Any], batch: SequenceBatch, filter_history: bool) -> Tensor:
    """Ranks (B,) of the targets, in the published counting."""
    ranks = top_k.rank_of_target(
        model.search_queries(batch), batch.target_ids_B, batch.offsets, batch.item_ids_T, filter_history=filter_history
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
    trained_V: Tensor | None = None,
) -> Evaluation:
    """Metrics over all users of all ranks' batches.

    Args:
        max_rows: bounds the queries scored at a time.
        trained_V: bool, whether item id i occurs in training; with it there are metrics of slices, if any target
            does not.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    top_k = model.top_k(max_rows)
    ranks, ratings, targets = [], [], []
    for batch in batches:
        if batch.size:
            batch = batch.to(runtime.device)
            ranks.append(rank_targets(model, top_k, batch, filter_history))
            ratings.append(batch.target_ratings_B)
            targets.append(batch.target_ids_B)
    model.train(was_training)
    device = runtime.device
    ranks_U = all_gather_concat(torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.int64, device=device))
    ratings_U = all_gather_concat(torch.cat(ratings) if ratings else torch.empty(0, device=device))
    # The order of users depends on the ranks; sums of sorted values do not.
    order = torch.argsort(ranks_U * 64 + ratings_U.long(), stable=True)
    metrics = mean_metrics(ranks_U[order].cpu(), ratings_U[order].cpu())
    if trained_V is not None:
        targets_U = all_gather_concat(torch.cat(targets) if targets else ranks_U.new_empty(0))
        metrics |= _slices(ranks_U.cpu(), trained_V.cpu()[targets_U.cpu()])
    return Evaluation(metrics, ranks_U.numel(), time.perf_counter() - started)


def _slices(ranks_U: Tensor, trained_U: Tensor) -> dict[str, float]:
    """Nothing where all targets occur in training."""
    if bool(trained_U.all()):
        return {}
    order = torch.argsort(ranks_U)
    return sliced_means(per_user_metrics(ranks_U[order]), trained_U[order])


@torch.no_grad()
def mean_target_loss(model: RetrievalModel, batches: Iterable[SequenceBatch], runtime: Runtime, seed: int) -> float:
    """Mean training loss of the targets, one a user, with the objective of the model and nothing dropped.

    Negatives depend on `seed`, user and length of the history alone, so two models meet the same ones,
    however users are batched. NaN where there is nobody.
    """
    was_training = model.training
    model.eval()
    losses, weights = [], []
    for batch in batches:
        if batch.size:
            tokens = model.target_losses(batch.to(runtime.device), seed)
            losses.append((tokens.losses_T * tokens.weights_T).double())
            weights.append(tokens.weights_T.double())
    model.train(was_training)
    nobody = [torch.empty(0, dtype=torch.float64, device=runtime.device)]
    losses_U, weights_U = (all_gather_concat(torch.cat(values or nobody)) for values in (losses, weights))
    # The order of users depends on the ranks; sums of sorted values do not.
    return float(losses_U.sort().values.sum() / weights_U.sum())
