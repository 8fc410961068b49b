"""Evaluates a drafter by itself: the rank of each target among all items it knows, by its scores alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime, all_gather_concat
from generative_recommenders.evaluation.metrics import per_user_metrics, published_ranks

DRAFT_METRICS = ("hr@10", "hr@50", "ndcg@10", "ndcg@50")


class Scores(Protocol):
    """What is evaluated; see `generative.drafters.Drafter`."""

    def scores(self, batch: SequenceBatch) -> Tensor: ...


@torch.no_grad()
def evaluate_drafts(drafter: Scores, batches: Iterable[SequenceBatch], runtime: Runtime) -> dict[str, float]:
    """Means over all users of all ranks, by the name of the metric with `draft_` before it.

    A target ranks behind the items of equal score; one that the drafter does not know is a miss.
    """
    ranks = [torch.empty(0, dtype=torch.int64, device=runtime.device)]
    for batch in batches:
        if batch.size:
            batch = batch.to(runtime.device)
            scores_BV = drafter.scores(batch)
            own_B1 = scores_BV.gather(1, batch.target_ids_B[:, None])
            rank_B = (scores_BV >= own_B1).sum(1)
            ranks.append(published_ranks(torch.where(own_B1[:, 0].isneginf(), 0, rank_B), scores_BV.shape[1]))
    ranks_U = all_gather_concat(torch.cat(ranks)).sort().values.cpu()
    metrics = per_user_metrics(ranks_U)
    return {f"draft_{name}": float(metrics[name].mean()) for name in DRAFT_METRICS}
