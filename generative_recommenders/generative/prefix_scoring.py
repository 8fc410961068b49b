"""Scores of given items in which every prefix that they share is decoded once.

Items of a request are taken in the trie's order, so those that begin alike lie side by side. At each level the distinct
prefixes are fed to the model as beams, whose ancestors are the prefixes they extend; an item gathers its code's
log-probability from the logits of its prefix. Teacher forcing decodes all L codes of all K items; here one request
costs the nodes of the trie above its items. Public SpecGR (arXiv 2410.02939) verifies items one by one.

Letters: B requests, M prefixes that a context holds, K items, U distinct prefixes of a level, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.generative.decoding import Context, GenerativeModel
from generative_recommenders.generative.item_paths import ItemPaths
from generative_recommenders.generative.trie import Trie

C = TypeVar("C", bound=Context)

# Items of all requests that are decoded at a time.
_ITEMS_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class Prefixes:
    """M prefixes of equal length that were fed to a context, and what the model says of the code after each.

    logits_BMC: of the next level, (B, M, C). ancestors: of each level the row a prefix descends from, (B, M).
    """

    logits_BMC: Tensor
    ancestors: tuple[Tensor, ...] = ()

    @property
    def level(self) -> int:
        return len(self.ancestors)

    def select(self, rows: Tensor) -> Prefixes:
        """Those of the given requests."""
        return Prefixes(self.logits_BMC[rows], tuple(index_BM[rows] for index_BM in self.ancestors))


@dataclass(frozen=True)
class ItemSums:
    """Sums of the log-probabilities of the first codes of items, float32 (B, K).

    complete_BK: of as many codes as were asked for. Elsewhere the sum of fewer, which is at least as high. levels: the
    log-probabilities themselves, (B, K) for each level behind the prefixes, 0 where they do not count.
    """

    values_BK: Tensor
    complete_BK: Tensor
    levels: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Distinct:
    """The distinct nodes of items: of each its first item, (B, U), and of each item its node, (B, K)."""

    first_BU: Tensor
    node_BK: Tensor

    @classmethod
    def of(cls, nodes_BK: Tensor, wanted_BK: Tensor) -> _Distinct:
        """From nodes that ascend in each row, those of wanted items alone. A GPU is waited for."""
        known_BK = nodes_BK.masked_fill(~wanted_BK, -1)
        before_BK = F.pad(known_BK.cummax(1).values, (1, 0), value=-1)[:, :-1]
        new_BK = known_BK > before_BK
        counts_BK = new_BK.cumsum(1)
        width = int(counts_BK[:, -1].max()) if counts_BK.numel() else 0
        node_BK = (counts_BK - 1).clamp(min=0)
        # Items that are not the first of a node go to one more column.
        own_BK = torch.arange(nodes_BK.shape[1], device=nodes_BK.device).expand_as(nodes_BK)
        first_BX = nodes_BK.new_zeros(len(nodes_BK), width + 1)
        first_BX.scatter_(1, torch.where(new_BK, node_BK, width), own_BK)
        return cls(first_BX[:, :width], node_BK)


def prefix_sums(
    model: GenerativeModel[C],
    context: C,
    prefixes: Prefixes,
    paths: ItemPaths,
    places_BK: Tensor,
    prefix_BK: Tensor,
    sums_BK: Tensor,
    lengths_BK: Tensor,
    floor: float = -math.inf,
) -> ItemSums:
    """Sums over the first `lengths_BK` codes of items each of which continues one of the prefixes.

    Args:
        context: holds the prefixes and stays as it is.
        places_BK: the items' places of `ItemPaths`, ascending in each row.
        prefix_BK: the prefix of each item, 0 to M - 1. sums_BK: the sum over its codes, float32.
        lengths_BK: at least the prefixes' length, where they count; 0 for a place that is no item.
        floor: an item whose mean is sure not to exceed it is not decoded any further.
    """
    depth, context = prefixes.level, context.branch()
    logits_BMC, ancestors, node_BK = prefixes.logits_BMC, prefixes.ancestors, prefix_BK
    wanted_BK, counted_BK = lengths_BK > depth, torch.full_like(lengths_BK, depth)
    levels: list[Tensor] = []
    while True:
        chosen_BK = chosen_log_probs(logits_BMC, node_BK, paths.codes(depth, places_BK))
        levels.append(chosen_BK.masked_fill(~wanted_BK, 0.0))
        sums_BK = sums_BK + levels[-1]
        counted_BK = counted_BK + wanted_BK
        depth += 1
        wanted_BK = wanted_BK & (lengths_BK > depth)
        if floor > -math.inf:
            wanted_BK = wanted_BK & (sums_BK > lengths_BK * floor)
        found = _Distinct.of(paths.nodes(depth - 1, places_BK), wanted_BK)
        if not found.first_BU.shape[1]:
            return ItemSums(sums_BK, counted_BK >= lengths_BK, tuple(levels))
        parent_BU = node_BK.gather(1, found.first_BU)
        own_BU = torch.arange(parent_BU.shape[1], device=parent_BU.device).expand_as(parent_BU)
        ancestors = (*(index.gather(1, parent_BU) for index in ancestors), own_BU)
        tokens_BU = paths.codes(depth - 1, places_BK.gather(1, found.first_BU))
        logits_BMC, node_BK = model.logits(context, depth, tokens_BU, ancestors).float(), found.node_BK


def chosen_log_probs(logits_BMC: Tensor, prefix_BK: Tensor, codes_BK: Tensor) -> Tensor:
    """Log-probabilities of single codes, each after one of the M prefixes: (B, K) float32."""
    if logits_BMC.stride(1) == 0:
        # The same after all prefixes: no need to normalize a row for each.
        logits_BMC, prefix_BK = logits_BMC[:, :1], torch.zeros_like(prefix_BK)
    cells_BK = prefix_BK * logits_BMC.shape[2] + codes_BK
    return logits_BMC.flatten(1).gather(1, cells_BK) - logits_BMC.logsumexp(-1).gather(1, prefix_BK)


@torch.no_grad()
def code_log_probs(
    model: GenerativeModel[C],
    context: C,
    paths: ItemPaths,
    places_BK: Tensor,
    lengths_BK: Tensor | None = None,
    *,
    chunk: int = _ITEMS_AT_A_TIME,
) -> Tensor:
    """Log-probability of each code of items given those before it, (B, K, L) float32; as `model.teacher_forced` has it.

    Args:
        context: what `model.begin` returned, with nothing stored for beams yet. It is used up.
        places_BK: places of `ItemPaths` in any order.
        lengths_BK: how many codes are wanted, 0 to L; all by default. Others are not decoded, and 0.
        chunk: items of all requests that are decoded at a time; a prefix that spans two of them is decoded in both.
    """
    size, count = places_BK.shape
    found_BKL = torch.zeros(size, count, len(model.sizes), device=places_BK.device)
    if not places_BK.numel():
        return found_BKL
    order_BK = places_BK.argsort(dim=1)
    sorted_BK = places_BK.gather(1, order_BK)
    if lengths_BK is None:
        lengths_BK = torch.full_like(places_BK, len(model.sizes))
    lengths_BK = lengths_BK.gather(1, order_BK)
    root = Prefixes(model.logits(context, 0, None, ()).float())
    parts = []
    for places, lengths in zip(*(x.split(max(1, chunk // size), 1) for x in (sorted_BK, lengths_BK)), strict=True):
        first = torch.zeros_like(places)
        levels = prefix_sums(model, context, root, paths, places, first, first.float(), lengths).levels
        missing = (torch.zeros_like(levels[0]),) * (len(model.sizes) - len(levels))
        parts.append(torch.stack([*levels, *missing], -1))
    return found_BKL.scatter_(1, order_BK[..., None].expand_as(found_BKL), torch.cat(parts, 1))


@torch.no_grad()
def rank_items(
    model: GenerativeModel[C],
    batch: SequenceBatch,
    trie: Trie,
    item_ids: Tensor,
    *,
    paths: ItemPaths | None = None,
    lengths_N: Tensor | None = None,
    chunk: int = _ITEMS_AT_A_TIME,
) -> Tensor:
    """Scores of given items, their mean log-probability a code: (B, K) float32, in the order of `item_ids`.

    Args:
        item_ids: int64, (K,) for all requests or (B, K). Items that the trie does not have score -inf.
        paths: `ItemPaths.of(trie)`, where it is at hand.
        lengths_N: how many codes the mean is over (`ItemPaths.scored_lengths`); all of them by default.
    Raises:
        UserError: the trie, or the shape of `item_ids`, does not fit.
    """
    check_sizes("item ranking", model.sizes, trie)
    if item_ids.dim() not in (1, 2) or (item_ids.dim() == 2 and len(item_ids) != batch.size):
        raise UserError(f"item ranking: got items {tuple(item_ids.shape)}, expected (K,) or ({batch.size}, K)")
    paths = ItemPaths.of(trie) if paths is None else paths
    places_BK = paths.places_of(item_ids).expand(batch.size, -1)
    inside_BK = places_BK.clamp(min=0)
    lengths_BK = torch.full_like(places_BK, trie.levels) if lengths_N is None else lengths_N[inside_BK]
    lengths_BK = lengths_BK.masked_fill(places_BK < 0, 0)
    log_probs_BKL = code_log_probs(model, model.begin(batch), paths, inside_BK, lengths_BK, chunk=chunk)
    return (log_probs_BKL.sum(-1) / lengths_BK).masked_fill(places_BK < 0, -math.inf)


def check_sizes(what: str, sizes: Sequence[int], trie: Trie) -> None:
    """Raises UserError where a trie has other codes than a model."""
    if tuple(trie.sizes) != tuple(sizes):
        raise UserError(
            f"{what}: got a trie of codes {tuple(trie.sizes)} for a model of {tuple(sizes)}, expected the same; build "
            "it from the table the model was trained with"
        )
