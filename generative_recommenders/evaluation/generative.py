"""Evaluates generated lists of items, at the level of items and at the level of semantic IDs.

Item level: the rank of the target item in the list; items that share an ID take places of their own, so a shared ID is
no free hit. SID level, as the literature counts: the rank of the target's ID among the distinct IDs of the list. A
target that is not in the list is a miss. Means are over all users of all ranks' batches.

Beside them: `valid`, the share of the places of all lists that hold an item; `duplicates`, the share of items that
their list holds already; `coverage@10`, the share of the catalogue in anybody's first ten, or k where lists are
shorter; `certified`, the share of lists proven to be the exact top-K under the model, and of a beam search
`certified@20`, the share that 20 beams at most were enough for, by the widths that there were; and the metrics of
`slices` over users whose target occurs in training (`_warm`) and over those whose target does not (`_cold`). Of lists
that SpecGR made: `acceptance`, the share of drafts that were accepted, and `rounds` a user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime, all_gather_concat
from generative_recommenders.evaluation.metrics import HR_AT, MAX_RANK, NDCG_AT, per_user_metrics
from generative_recommenders.evaluation.retrieval import Evaluation
from generative_recommenders.evaluation.slices import sliced_means
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.specgr import SpecGRResult

_COVERED = 10
Recommend = Callable[[SequenceBatch], BeamResult]


@dataclass(frozen=True)
class Catalogue:
    """What metrics need of the items: `codes_VL`, int64 (V, L), row i of item id i; `trained_V`, bool, whether item i
    occurs in training; `size`, how many items there are."""

    codes_VL: Tensor
    trained_V: Tensor
    size: int


def list_ranks(result: BeamResult, targets_B: Tensor, codes_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (B,) of target items and of target IDs among the distinct IDs; misses are `MAX_RANK + 1`."""
    valid_BK = result.valid_BK
    item_hits_BK = valid_BK & (result.items_BK == targets_B[:, None])
    # An ID is new where no place before has it; items of one ID need not stand together where lists were reordered.
    keys = torch.unique(result.codes_BKL.flatten(0, 1), dim=0, return_inverse=True)[1]
    key_BK, order_BK = keys.view(valid_BK.shape).sort(dim=1, stable=True)
    new_BK = torch.ones_like(valid_BK)
    new_BK[:, 1:] = key_BK[:, 1:] != key_BK[:, :-1]
    distinct_BK = torch.zeros_like(keys.view(valid_BK.shape)).scatter(1, order_BK, new_BK.long()).cumsum(1)
    id_hits_BK = valid_BK & (result.codes_BKL == codes_BL[:, None]).all(-1)
    places_BK = torch.arange(1, valid_BK.shape[1] + 1, device=valid_BK.device).expand_as(distinct_BK)
    return _first(item_hits_BK, places_BK), _first(id_hits_BK, distinct_BK)


def _first(hits_BK: Tensor, ranks_BK: Tensor) -> Tensor:
    return torch.where(hits_BK, ranks_BK, MAX_RANK + 1).amin(1)


def repeated(result: BeamResult) -> Tensor:
    """How many items of each list stand in it already, (B,)."""
    empty = -1 - torch.arange(result.items_BK.shape[1], device=result.items_BK.device)
    ordered_BK = torch.where(result.valid_BK, result.items_BK, empty).sort(1).values
    return (ordered_BK.diff(dim=1) == 0).sum(1)


@torch.no_grad()
def evaluate_lists(
    model: nn.Module,
    recommend: Recommend,
    batches: Iterable[SequenceBatch],
    runtime: Runtime,
    catalogue: Catalogue,
    k: int,
) -> Evaluation:
    """Metrics of the lists of `k` items that `recommend` makes with `model`."""
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    rows: list[Tensor] = []
    shown_V = torch.zeros(catalogue.codes_VL.shape[0], dtype=torch.bool, device=runtime.device)
    for batch in batches:
        if batch.size:
            batch = batch.to(runtime.device)
            result = recommend(batch)
            targets_B = batch.target_ids_B
            item_B, id_B = list_ranks(result, targets_B, catalogue.codes_VL[targets_B])
            trained_B = catalogue.trained_V[targets_B].long()
            columns = [
                item_B,
                id_B,
                result.valid_count_B,
                repeated(result),
                result.exact_B.long(),
                trained_B,
                result.width_B,
            ]
            rows.append(torch.stack([*columns, *_speculation(result)], 1))
            # Places without a result hold item 0.
            shown_V[result.items_BK[:, :_COVERED].flatten()] = True
    model.train(was_training)
    nobody = torch.empty(0, 10, dtype=torch.int64, device=runtime.device)
    table = all_gather_concat(torch.cat(rows) if rows else nobody).cpu()
    shown = all_gather_concat(shown_V[None].long()).any(0)
    shown[0] = False
    metrics = _means(table, k) | {f"coverage@{min(k, _COVERED)}": float(shown.sum()) / catalogue.size}
    return Evaluation(metrics, table.shape[0], time.perf_counter() - started)


def _speculation(result: BeamResult) -> tuple[Tensor, ...]:
    """How many items were drafted and accepted, and in how many rounds, (B,) each; 0 of a beam search."""
    if isinstance(result, SpecGRResult):
        return result.drafted_B, result.accepted_B, result.rounds_B
    return (torch.zeros_like(result.valid_count_B),) * 3


def _means(table: Tensor, k: int) -> dict[str, float]:
    """Means over users of the columns that `evaluate_lists` gathers."""
    # The order of users depends on the ranks; sums of sorted values do not.
    order = torch.argsort((table[:, 0] * (MAX_RANK + 2) + table[:, 1]) * 2 + table[:, 5])
    item_U, id_U, count_U, repeated_U, exact_U, trained_U, width_U, *speculation = table[order].unbind(1)
    drafted_U, accepted_U, rounds_U = speculation
    wanted = {f"hr@{n}" for n in HR_AT if n <= k} | {f"ndcg@{n}" for n in NDCG_AT if n <= k} | {"mrr"}
    item = {name: values for name, values in per_user_metrics(item_U).items() if name in wanted}
    ids = {name: values for name, values in per_user_metrics(id_U).items() if name in wanted}
    # A target outside the list has no rank to be inverted.
    item["mrr"], ids["mrr"] = (torch.where(r <= k, v["mrr"], 0.0) for r, v in ((item_U, item), (id_U, ids)))
    means = {name: float(values.mean()) for name, values in item.items()}
    means |= {f"sid_{name}": float(values.mean()) for name, values in ids.items()}
    means |= sliced_means(item, trained_U == 1)
    total, drafted = max(int(count_U.sum()), 1), int(drafted_U.sum())
    if drafted:
        means |= {"acceptance": float(accepted_U.sum()) / drafted, "rounds": float(rounds_U.double().mean())}
    for width in width_U[width_U > 0].unique().tolist():
        means[f"certified@{width}"] = float(((exact_U == 1) & (width_U <= width)).double().mean())
    return means | {
        "valid": float(count_U.double().mean()) / k,
        "duplicates": float(repeated_U.sum()) / total,
        "certified": float(exact_U.double().mean()),
    }
