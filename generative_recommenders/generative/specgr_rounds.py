"""One round of SpecGR for the requests that are in it: which items are drafted, and how they score.

Letters: b requests, N places of items (`item_paths`), K drafted items, M beams, E nodes of a level of the trie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from generative_recommenders.generative.beam_steps import Beams, Step
from generative_recommenders.generative.decoding import Context, GenerativeModel
from generative_recommenders.generative.item_paths import ItemPaths
from generative_recommenders.generative.parallel_exact import best_places
from generative_recommenders.generative.prefix_scoring import Prefixes, prefix_sums
from generative_recommenders.generative.trie import ItemFilter

C = TypeVar("C", bound=Context)


@dataclass(frozen=True)
class Drafts:
    """Items drafted for each request: places_BK, N where there is none; scores_BK, float32, V or -inf for none.

    lengths_BK: codes the score is over. complete_BK: the score is V; elsewhere V is at most the score, and not above
    the threshold. accepted_BK: V is above.
    """

    places_BK: Tensor
    lengths_BK: Tensor
    scores_BK: Tensor
    complete_BK: Tensor
    accepted_BK: Tensor

    @classmethod
    def none(cls, size: int, device: torch.device) -> Drafts:
        places_B0 = torch.empty(size, 0, dtype=torch.int64, device=device)
        return cls(places_B0, places_B0, places_B0.float(), places_B0.bool(), places_B0.bool())

    def joined(self, rows: Tensor, other: Drafts, missing: int) -> Drafts:
        """With those of the requests `rows` behind; the other requests get places that are `missing`."""
        filled = {
            "places_BK": missing,
            "lengths_BK": 0,
            "scores_BK": -math.inf,
            "complete_BK": True,
            "accepted_BK": False,
        }
        found = {}
        for name, value in filled.items():
            own, more = getattr(self, name), getattr(other, name)
            found[name] = torch.cat([own, own.new_full((len(own), more.shape[1]), value).index_copy_(0, rows, more)], 1)
        return Drafts(**found)


@dataclass(frozen=True)
class Frontier(Generic[C]):
    """The requests `rows_b` that are in a round.

    context holds the beams; logits_bMC are of the code after them; sums: the beams' scores of each level, in the places
    they were chosen at. drafter_bN: -inf of items that are not to be drafted; changed in place.
    """

    rows_b: Tensor
    context: C
    beams: Beams
    sums: tuple[Tensor, ...]
    logits_bMC: Tensor
    drafter_bN: Tensor
    allowed: ItemFilter | None

    def select(self, kept: Tensor) -> Frontier[C]:
        """Those of the requests at the given places, int64."""
        beams = self.beams
        return Frontier(
            self.rows_b[kept],
            self.context.branch(kept),
            Beams(
                beams.states_BM[kept],
                beams.scores_BM[kept],
                beams.pruned_B[kept],
                tuple(codes_BM[kept] for codes_BM in beams.codes),
                tuple(index_BM[kept] for index_BM in beams.ancestors),
            ),
            tuple(sums_BM[kept] for sums_BM in self.sums),
            self.logits_bMC[kept],
            self.drafter_bN[kept],
            None if self.allowed is None else self.allowed.select(kept),
        )

    def decoded(self, model: GenerativeModel[C]) -> Frontier[C]:
        """With the logits of the code after the beams."""
        beams = self.beams
        logits_bMC = model.logits(self.context, beams.level, beams.tokens_BM, beams.ancestors).float()
        return replace(self, logits_bMC=logits_bMC)

    def extended(self, paths: ItemPaths, width: int) -> Frontier[C]:
        """The best `width` beams that are a code longer."""
        step = Step(paths.trie, self.allowed, True, "vocabulary")
        nodes = len(paths.trie.tokens[self.beams.level])
        beams = step(self.beams, self.logits_bMC, min(width, nodes))
        return replace(self, beams=beams, sums=(*self.sums, beams.scores_BM))

    def draft(self, paths: ItemPaths, count: int) -> Tensor:
        """Places of the `count` best items by the drafter, ascending, (b, K); N where there are fewer.

        Equal scores are taken in order of places. An item is drafted once. Waits for a GPU.
        """
        scores_bN, level, missing = self.drafter_bN, self.beams.level, len(paths)
        if level:
            states_bM = self.beams.states_BM
            under_bE = torch.zeros(
                len(states_bM), len(paths.trie.tokens[level - 1]) + 1, dtype=torch.bool, device=states_bM.device
            )
            # Beams that are none go to one more column.
            under_bE.scatter_(1, torch.where(states_bM < 0, under_bE.shape[1] - 1, states_bM), True)
            scores_bN = torch.where(under_bE.index_select(1, paths.nodes_LN[level - 1]), scores_bN, -math.inf)
        best_bX, places_bX = scores_bN.topk(min(count + 1, missing), dim=1)
        best_bK, places_bK = best_bX[:, :count], places_bX[:, :count]
        if best_bX.shape[1] > count:
            # Which of equal scores `topk` leaves out is its own choice.
            tied = ((best_bX[:, count] == best_bX[:, count - 1]) & (best_bX[:, count] > -math.inf)).nonzero()[:, 0]
            if tied.numel():
                places_bK = places_bK.index_copy(0, tied, best_places(scores_bN[tied], count))
        valid_bK = best_bK > -math.inf
        places_bK = torch.where(valid_bK, places_bK, missing)[:, : int(valid_bK.sum(1).max())]
        rows, columns = (places_bK < missing).nonzero(as_tuple=True)
        self.drafter_bN[rows, places_bK[rows, columns]] = -math.inf
        return places_bK.sort(dim=1).values

    def verify(
        self, model: GenerativeModel[C], paths: ItemPaths, lengths_N: Tensor, places_bK: Tensor, threshold: float
    ) -> Drafts:
        """V of drafted items, of which `lengths_N` codes are scored."""
        level, valid_bK = self.beams.level, places_bK < len(paths)
        inside_bK = places_bK.clamp(max=len(paths) - 1)
        lengths_bK = lengths_N[inside_bK].masked_fill(~valid_bK, 0)
        prefix_bK, sums_bK = torch.zeros_like(places_bK), torch.zeros_like(places_bK, dtype=torch.float32)
        if level:
            states_bM, order_bM = self.beams.states_BM.sort(dim=1)
            found_bK = torch.searchsorted(states_bM, paths.nodes(level - 1, inside_bK)).clamp(
                max=states_bM.shape[1] - 1
            )
            prefix_bK = order_bM.gather(1, found_bK)
            upto = [
                sums_BM.gather(1, index_BM.gather(1, prefix_bK))
                for sums_BM, index_BM in zip(self.sums, self.beams.ancestors, strict=True)
            ]
            sums_bK = torch.stack(upto).gather(0, (lengths_bK.clamp(1, level) - 1)[None])[0]
        prefixes = Prefixes(self.logits_bMC, self.beams.ancestors)
        found = prefix_sums(
            model, self.context, prefixes, paths, inside_bK, prefix_bK, sums_bK, lengths_bK, floor=threshold
        )
        scores_bK = (found.values_BK / lengths_bK.clamp(min=1)).masked_fill(~valid_bK, -math.inf)
        accepted_bK = valid_bK & found.complete_BK & (scores_bK > threshold)
        return Drafts(places_bK, lengths_bK, scores_bK, found.complete_BK, accepted_bK)
