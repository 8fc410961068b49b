"""SpecGR: a drafter proposes items, a generative model verifies them: items that training never saw are found too.

"Inductive Generative Recommendation via Retrieval-based Speculation" (arXiv 2410.02939). A generative model hardly ever
generates the ID of an item it was not trained with, but it scores one well. So, round by round,

    draft    the best items by the drafter's score, from round two on only such as begin with a prefix of the beam
    verify   V(item) = mean over its scored codes of log p(code | codes before, history)
    accept   where V > threshold; a request with K accepted items is done
    extend   the beam by one code

What is listed: of K or more accepted items the K of the highest V; else, by score, all accepted and rejected drafts and
the items that the beam arrives at. Which codes are scored: `SpecGRConfig.score`. Ours: the drafter may have
a say in the order too, by `SpecGRConfig.drafter_weight`.

Differences from the public code, which takes one user at a time: requests of a batch go through a round together and
leave it when they are done; drafts continue from the prefixes the beam has decoded, and what they share is decoded once
(`prefix_scoring`); an item that can no longer be accepted is not decoded to its end, unless the list turns out to need
its score; beams keep to the trie. Results are the same.

Letters: B requests, b of them that are in a round, N places of items (`item_paths`), K results, X drafted items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import all_gather_concat
from generative_recommenders.errors import UserError
from generative_recommenders.generative.beam_items import excluded_history, leaf_order
from generative_recommenders.generative.beam_result import BeamResult, slots_of
from generative_recommenders.generative.beam_steps import Beams
from generative_recommenders.generative.decoding import Context, GenerativeModel
from generative_recommenders.generative.draft_head import EncoderDrafter, HistoryStates
from generative_recommenders.generative.drafters import Drafter, MixedDrafter
from generative_recommenders.generative.item_filter import Ranges, allowed_at
from generative_recommenders.generative.item_paths import ItemPaths
from generative_recommenders.generative.prefix_scoring import Prefixes, check_sizes, prefix_sums
from generative_recommenders.generative.specgr_config import SpecGRConfig
from generative_recommenders.generative.specgr_rounds import Drafts, Frontier
from generative_recommenders.generative.trie import ItemFilter, Trie

C = TypeVar("C", bound=Context)

# By how much scores over the same codes may differ where they were decoded in different rounds.
_ROUNDING = 1e-5


@runtime_checkable
class SharedPrefill(Protocol):
    """A model whose prefill has the states that its own draft head reads."""

    def begin_with_states(self, batch: SequenceBatch) -> tuple[Any, HistoryStates]:
        """What `begin` and `history_states` return, of one pass over the histories."""
        ...


@dataclass(frozen=True)
class SpecGRResult(BeamResult):
    """Scores are V (the mean log-probability of a code) or, of items the beam arrived at, as if training had seen them;
    the drafter's share is added to either.

    accepted_B, rounds_B, drafted_B: int64. exact_B: every item that is allowed was drafted, so the list is the top-K by
    score (where the drafter has a share, if also no rejected draft was left out); gap_B is inf elsewhere.
    """

    accepted_B: Tensor
    rounds_B: Tensor
    drafted_B: Tensor


@dataclass(frozen=True)
class _Search(Generic[C]):
    """What the rounds leave: drafts of all requests, counts, and the requests that still want items with their beams.

    context and prefixes are those of the root, of all requests. share_BN: what the drafter adds to an item's score;
    None for nothing.
    """

    drafts: Drafts
    accepted_B: Tensor
    rounds_B: Tensor
    drafted_B: Tensor
    total_B: Tensor
    context: C
    prefixes: Prefixes
    share_BN: Tensor | None
    unfinished: Frontier[C] | None

    def share(self, drafts: Drafts) -> Tensor | float:
        """The drafter's share of the scores of drafts, (B, X)."""
        if self.share_BN is None:
            return 0.0
        return self.share_BN.gather(1, drafts.places_BK.clamp(max=self.share_BN.shape[1] - 1))


class SpecGR(Generic[C]):
    """Lists of items: `specgr(batch, k)`; what depends on the catalogue alone is prepared once.

    Args:
        model: any that a beam search takes.
        trie: on the model's device. With a grown catalogue make another SpecGR; it needs no training.
        drafter: scores items by id. Items it scores -inf are not drafted, but the beam may arrive at them.
        in_sample: the items that training has seen, made by `trie.allow`.
    Raises:
        UserError: the trie is of another table. DataError: the filter is of another trie.
    """

    def __init__(
        self, model: GenerativeModel[C], trie: Trie, drafter: Drafter, config: SpecGRConfig, in_sample: ItemFilter
    ) -> None:
        check_sizes("SpecGR", model.sizes, trie)
        self.model, self.trie, self.drafter, self.config, self.in_sample = model, trie, drafter, config, in_sample
        self.paths = ItemPaths.of(trie)
        self.lengths_N = self.paths.scored_lengths(in_sample, config.score, config.min_prefix)

    @torch.no_grad()
    def __call__(
        self,
        batch: SequenceBatch,
        k: int,
        *,
        allowed: ItemFilter | None = None,
        exclude_history: bool = False,
        subset: bool = False,
    ) -> SpecGRResult:
        """The K items of each request.

        Args:
            batch: histories of B requests, on the device of model and trie.
            k: results a request, at least 1.
            allowed: which items may be returned, for all requests or for each. With `exclude_history` none of a
                request's own history is.
            subset: the allowed items are candidates to be ranked: a list that is short of accepted items is filled with
                drafts alone.
        """
        if k < 1:
            raise UserError(f"SpecGR: got k {k}, expected at least 1")
        if exclude_history:
            allowed = excluded_history(self.trie, batch, allowed)
        search = self._rounds(batch, k, allowed, subset)
        drafts = search.drafts
        if search.unfinished is not None and not subset:
            arrived = self._arrived(search.unfinished, drafts, k)
            drafts = drafts.joined(search.unfinished.rows_b, arrived, len(self.paths))
        enough_B1 = (search.accepted_B >= k)[:, None]
        drafts = self._completed(search, drafts, k, ~enough_B1)
        listed_BX = torch.where(enough_B1, drafts.accepted_BK, drafts.complete_BK)
        scores_BX = self._by_prefix(drafts, drafts.scores_BK.masked_fill(~listed_BX, -math.inf))
        return self._result(search, drafts.places_BK, scores_BX + search.share(drafts), k)

    @torch.no_grad()
    def first_scores(
        self, batch: SequenceBatch, *, allowed: ItemFilter | None = None, exclude_history: bool = False
    ) -> Tensor:
        """V of the first round's drafts of each request, (B, X) float32, -inf where there are fewer."""
        if exclude_history:
            allowed = excluded_history(self.trie, batch, allowed)
        frontier = self._begin(batch, allowed).decoded(self.model)
        places_BX = frontier.draft(self.paths, self.config.draft_size)
        return frontier.verify(self.model, self.paths, self.lengths_N, places_BX, -math.inf).scores_BK

    def calibrated(
        self, batches: Iterable[SequenceBatch], *, allowed: ItemFilter | None = None, exclude_history: bool = False
    ) -> SpecGR[C]:
        """The same with the threshold that accepts `config.target_acceptance` of the first round's drafts of `batches`.

        Those are the batches of this rank; the threshold is that of all ranks' drafts, which must call it together. A
        per-request filter does not fit several batches. Itself where the target is 0.
        """
        if not self.config.target_acceptance:
            return self
        parts = [
            self.first_scores(batch, allowed=allowed, exclude_history=exclude_history).flatten()
            for batch in batches
            if batch.size
        ]
        scores_X = all_gather_concat(torch.cat([torch.empty(0, device=self.trie.device), *parts]))
        return self.with_threshold(threshold_for(scores_X, self.config.target_acceptance))

    def with_threshold(self, threshold: float) -> SpecGR[C]:
        config = replace(self.config, threshold=threshold)
        return SpecGR(self.model, self.trie, self.drafter, config, self.in_sample)

    def _begin(self, batch: SequenceBatch, allowed: ItemFilter | None) -> Frontier[C]:
        """All requests before the first round, with the drafter's scores of what is allowed, not decoded yet."""
        context: C
        model: Any = self.model
        mixed = self.drafter if isinstance(self.drafter, MixedDrafter) else None
        drafter = self.drafter if mixed is None else mixed.base
        own = isinstance(drafter, EncoderDrafter) and drafter.model is model
        if own and isinstance(model, SharedPrefill) and isinstance(drafter, EncoderDrafter):
            context, states = model.begin_with_states(batch)
            scores_BV = drafter.scores_of(states)
        else:
            context, scores_BV = self.model.begin(batch), drafter.scores(batch)
        scores_BV = scores_BV if mixed is None else mixed.added_to(scores_BV, batch)
        ids_N, known = self.paths.item_ids_N, scores_BV.shape[1]
        drafter_BN = scores_BV.float().index_select(1, ids_N.clamp(max=known - 1))
        drafter_BN.masked_fill_(~(self.paths.allowed(allowed) & (ids_N < known)), -math.inf)
        rows = torch.arange(batch.size, device=ids_N.device)
        return Frontier(rows, context, Beams.start(self.trie, rows), (), drafter_BN[:, None], drafter_BN, allowed)

    def _rounds(self, batch: SequenceBatch, k: int, allowed: ItemFilter | None, subset: bool) -> _Search[C]:
        config, missing, levels = self.config, len(self.paths), self.trie.levels
        frontier = self._begin(batch, allowed).decoded(self.model)
        root, prefixes, rows = frontier.context.branch(), Prefixes(frontier.logits_bMC), frontier.rows_b
        # Before the rounds, which take what they draft out of the drafter's scores.
        share_BN = _share(frontier.drafter_bN, config.drafter_weight) if config.drafter_weight else None
        accepted_B, rounds_B, drafted_B = (torch.zeros_like(rows) for _ in range(3))
        total_B = self.paths.allowed(allowed).sum(-1).expand(batch.size)
        drafts = Drafts.none(batch.size, rows.device)
        for level in range(levels if batch.size else 0):
            if level:
                frontier = frontier.decoded(self.model)
            rows = frontier.rows_b
            places_bX = frontier.draft(self.paths, config.draft_size)
            if places_bX.shape[1]:
                found = frontier.verify(self.model, self.paths, self.lengths_N, places_bX, config.threshold)
                drafts = drafts.joined(rows, found, missing)
                accepted_B = accepted_B.index_add(0, rows, found.accepted_BK.sum(1))
                drafted_B = drafted_B.index_add(0, rows, (places_bX < missing).sum(1))
            rounds_B = rounds_B.index_fill(0, rows, level + 1)
            wanting = ((accepted_B[rows] < k) & (drafted_B[rows] < total_B[rows])).nonzero()[:, 0]
            if not wanting.numel() or (subset and level + 1 == levels):
                return _Search(drafts, accepted_B, rounds_B, drafted_B, total_B, root, prefixes, share_BN, None)
            if wanting.numel() < rows.numel():
                frontier = frontier.select(wanting)
            frontier = frontier.extended(self.paths, config.num_beams)
        unfinished = frontier if batch.size else None
        return _Search(drafts, accepted_B, rounds_B, drafted_B, total_B, root, prefixes, share_BN, unfinished)

    def _arrived(self, frontier: Frontier[C], drafts: Drafts, k: int) -> Drafts:
        """The items of the beams' leaves that were not drafted, of the requests of the frontier.

        Only the first k of them where those are the best, as they are by the mean over all codes.
        """
        beams, rows_b, missing = frontier.beams, frontier.rows_b, len(self.paths)
        open_bN = self.paths.allowed(frontier.allowed).expand(len(rows_b), -1)
        open_bN = torch.cat([open_bN, torch.zeros_like(open_bN[:, :1])], 1)
        open_bN.scatter_(1, drafts.places_BK[rows_b], False)
        last = 1 if self.config.score == "drop_last_of_all" else 0
        length = max(self.trie.levels - last, 1)
        sums_bM = frontier.sums[length - 1].gather(1, beams.ancestors[length - 1])
        order_bM = leaf_order(beams.scores_BM, beams.states_BM)
        leaves_bM, scores_bM = beams.states_BM.gather(1, order_bM), sums_bM.gather(1, order_bM)
        offsets, known_bM = self.trie.offsets[-1], leaves_bM.clamp(min=0)
        first_bM, last_bM = offsets[known_bM].long(), offsets[known_bM + 1].long()
        ranges = Ranges.of(first_bM.flatten(), torch.where(leaves_bM < 0, first_bM, last_bM).flatten())
        owners = ranges.owners // leaves_bM.shape[1]
        ranges = ranges.kept(allowed_at(open_bN, ranges.places, owners))
        counts_bM = ranges.offsets.diff().view(leaves_bM.shape)
        # The beams are in order of all of their codes, so another order may need the last of them.
        slots = slots_of(counts_bM, int(counts_bM.sum(1).max()) if self.config.drafter_weight or last else k)
        starts_bK = ranges.offsets[:-1].view(leaves_bM.shape).gather(1, slots.leaf_BK)
        # One more place, to be taken where there is none.
        places = torch.cat([ranges.places, ranges.places.new_full((1,), missing)])
        index_bK = torch.where(slots.valid_BK, starts_bK + slots.place_BK, len(ranges.places))
        scores_bK = (scores_bM.gather(1, slots.leaf_BK) / length).masked_fill(~slots.valid_BK, -math.inf)
        lengths_bK = slots.valid_BK * length
        whole, nothing = torch.ones_like(slots.valid_BK), torch.zeros_like(slots.valid_BK)
        return Drafts(places[index_bK], lengths_bK, scores_bK, whole, nothing)

    def _completed(self, search: _Search[C], drafts: Drafts, k: int, short_B1: Tensor) -> Drafts:
        """With V of the drafts that may be among the k best of a list that is short of accepted items."""
        if not drafts.places_BK.numel():
            return drafts
        # The drafter's share is exact, so what bounds V bounds the score.
        bound_BX = drafts.scores_BK + search.share(drafts)
        known_BX = bound_BX.masked_fill(~drafts.complete_BK, -math.inf)
        kth_B1 = known_BX.topk(min(k, known_BX.shape[1]), dim=1).values[:, -1:]
        if known_BX.shape[1] < k:
            kth_B1 = torch.full_like(kth_B1, -math.inf)
        wanted_BX = ~drafts.complete_BK & short_B1 & (bound_BX >= kth_B1 - _ROUNDING)
        rows = wanted_BX.any(1).nonzero()[:, 0]
        if not rows.numel():
            return drafts
        missing = len(self.paths)
        wanted_bX = wanted_BX[rows]
        places_bX, order_bX = torch.where(wanted_bX, drafts.places_BK[rows], missing).sort(dim=1)
        width = int(wanted_bX.sum(1).max())
        places_bK, order_bK = places_bX[:, :width], order_bX[:, :width]
        valid_bK = places_bK < missing
        inside_bK = places_bK.clamp(max=missing - 1)
        lengths_bK = drafts.lengths_BK[rows].gather(1, order_bK).masked_fill(~valid_bK, 0)
        first_bK, context = torch.zeros_like(places_bK), search.context.branch(rows)
        found = prefix_sums(
            *(self.model, context, search.prefixes.select(rows), self.paths, inside_bK),
            *(first_bK, first_bK.float(), lengths_bK),
        )
        old_bK = drafts.scores_BK[rows].gather(1, order_bK)
        new_bK = torch.where(valid_bK, found.values_BK / lengths_bK.clamp(min=1), old_bK)
        complete_bX = drafts.complete_BK[rows] | wanted_bX
        scores_bX = drafts.scores_BK[rows].scatter(1, order_bK, new_bK)
        return replace(
            drafts,
            scores_BK=drafts.scores_BK.index_copy(0, rows, scores_bX),
            complete_BK=drafts.complete_BK.index_copy(0, rows, complete_bX),
        )

    def _by_prefix(self, drafts: Drafts, scores_BX: Tensor) -> Tensor:
        """Scores of which those over the same codes are the same to the last bit, whichever round they are from."""
        if not scores_BX.numel():
            return scores_BX
        count, levels_BX = len(self.paths), (drafts.lengths_BK - 1).clamp(min=0)
        nodes_BX = self.paths.nodes_LN[levels_BX, drafts.places_BK.clamp(max=count - 1)]
        key_BX, order_BX = (drafts.lengths_BK * count + nodes_BX).sort(dim=1)
        group_BX = (key_BX.diff(dim=1, prepend=key_BX[:, :1]) != 0).cumsum(1)
        best_BX = torch.full_like(scores_BX, -math.inf)
        best_BX = best_BX.scatter_reduce(1, group_BX, scores_BX.gather(1, order_BX), "amax").gather(1, group_BX)
        return torch.empty_like(scores_BX).scatter_(1, order_BX, best_BX).masked_fill(scores_BX.isneginf(), -math.inf)

    def _result(self, search: _Search[C], places_BX: Tensor, scores_BX: Tensor, k: int) -> SpecGRResult:
        missing = len(self.paths)
        size, short = len(places_BX), max(0, k - places_BX.shape[1])
        places_BX = torch.cat([places_BX, places_BX.new_full((size, short), missing)], 1)
        scores_BX = torch.cat([scores_BX, scores_BX.new_full((size, short), -math.inf)], 1)
        order_BK = leaf_order(scores_BX, places_BX)[:, :k]
        places_BK, scores_BK = places_BX.gather(1, order_BK).clamp(max=missing - 1), scores_BX.gather(1, order_BK)
        valid_BK = scores_BK > -math.inf
        exact_B = search.drafted_B == search.total_B
        if self.config.drafter_weight:
            # A draft that was rejected for its V may have the better score.
            exact_B &= (search.accepted_B < k) | (search.accepted_B == search.drafted_B)
        return SpecGRResult(
            self.paths.item_ids_N[places_BK].masked_fill(~valid_BK, 0),
            self.paths.all_codes(places_BK).masked_fill(~valid_BK[..., None], -1),
            scores_BK,
            valid_BK.sum(1),
            exact_B,
            torch.where(exact_B, -math.inf, math.inf),
            torch.zeros_like(search.rounds_B),
            search.accepted_B,
            search.rounds_B,
            search.drafted_B,
        )


def _share(drafter_BN: Tensor, weight: float) -> Tensor:
    """The drafter's part of scores; an item that it may not draft has that of the worst one that it may."""
    known_BN = drafter_BN > -math.inf
    worst_B1 = drafter_BN.masked_fill(~known_BN, math.inf).amin(1, keepdim=True)
    worst_B1 = worst_B1.masked_fill(worst_B1.isposinf(), 0.0)
    return weight * torch.where(known_BN, drafter_BN, worst_B1)


def threshold_for(scores_X: Tensor, acceptance: float) -> float:
    """The threshold that accepts this share of the drafts, or the nearest above where scores are equal.

    Scores of -inf are no drafts.

    Raises:
        UserError: there are none.
    """
    drafted_X = scores_X[scores_X > -math.inf].sort().values.double()
    if not len(drafted_X):
        raise UserError("specgr.target_acceptance: got no drafts to tune the threshold on, expected users to validate")
    accepted = max(1, round(acceptance * len(drafted_X)))
    lowest = drafted_X[len(drafted_X) - accepted]
    below_X = drafted_X[drafted_X < lowest]
    # Between the scores, so that no draft's acceptance hangs on its last bit.
    return float((lowest + below_X[-1]) / 2) if len(below_X) else float(lowest) - 1.0
