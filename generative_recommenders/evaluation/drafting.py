"""Evaluates a drafter by itself: the rank of each target among all items it knows, by its scores alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime, all_gather_concat
from generative_recommenders.evaluation.metrics import per_user_metrics, published_ranks
from generative_recommenders.evaluation.slices import sliced_means

DRAFT_METRICS = ("hr@10", "hr@50", "ndcg@10", "ndcg@50")


class Scores(Protocol):
    """What is evaluated; see `generative.drafters.Drafter`."""

    def scores(self, batch: SequenceBatch) -> Tensor: ...


@torch.no_grad()
def evaluate_drafts(
    drafter: Scores,
    batches: Iterable[SequenceBatch],
    runtime: Runtime,
    trained_V: Tensor,
    *,
    exclude_history: bool = False,
) -> dict[str, float]:
    """Means over all users of all ranks, and over those whose target `trained_V` has and has not (`slices`).

    Names are those of the metrics with `draft_` before them. A target ranks behind the items of equal score; one that
    the drafter does not know is a miss, and so is one of the user's own history with `exclude_history`.
    """
    rows = [torch.empty(0, 2, dtype=torch.int64, device=runtime.device)]
    for batch in batches:
        if batch.size:
            batch = batch.to(runtime.device)
            scores_BV = drafter.scores(batch)
            if exclude_history:
                rows_T, known_T = batch.rows_T(), batch.item_ids_T < scores_BV.shape[1]
                scores_BV[rows_T[known_T], batch.item_ids_T[known_T]] = -math.inf
            own_B1 = scores_BV.gather(1, batch.target_ids_B[:, None])
            rank_B = (scores_BV >= own_B1).sum(1)
            rank_B = published_ranks(torch.where(own_B1[:, 0].isneginf(), 0, rank_B), scores_BV.shape[1])
            rows.append(torch.stack([rank_B, trained_V[batch.target_ids_B].long()], 1))
    table_U2 = all_gather_concat(torch.cat(rows)).cpu()
    # The order of users depends on the ranks; sums of sorted values do not.
    ranks_U, trained_U = table_U2[torch.argsort(table_U2[:, 0] * 2 + table_U2[:, 1])].unbind(1)
    values = per_user_metrics(ranks_U)
    means = {name: float(values[name].mean()) for name in DRAFT_METRICS}
    sliced = {name: mean for name, mean in sliced_means(values, trained_U == 1).items() if "@" in name}
    return {f"draft_{name}": mean for name, mean in (means | sliced).items()}
