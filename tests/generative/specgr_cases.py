"""SpecGR in plain Python, one user at a time, that the real one is held against, and random cases for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.item_paths import Score
from generative_recommenders.generative.specgr import SpecGRResult
from generative_recommenders.generative.specgr_config import SpecGRConfig
from generative_recommenders.generative.trie import ItemFilter, Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests.generative.beam_cases import TableModel, random_ids, trie_of

USERS = 4
SCORES: tuple[Score, ...] = ("drop_last", "in_sample_prefix", "drop_last_of_all")
Codes = tuple[int, ...]
Row = Callable[[int, Codes], Sequence[float]]


class TableDrafter:
    """Scores that are looked up by user; the drafter's view of a history is in the user id."""

    def __init__(self, scores_UV: Tensor) -> None:
        self.scores_UV = scores_UV

    def scores(self, batch: SequenceBatch) -> Tensor:
        return self.scores_UV[batch.user_ids_B]


class Listed(NamedTuple):
    """What SpecGR returns for one user: (item, score) of each result, and the counts."""

    results: list[tuple[int, float]]
    accepted: int
    rounds: int
    drafted: int
    exact: bool


@dataclass(frozen=True)
class NaiveSpecGR:
    """The published loop. row(user, prefix) are log-probabilities; codes and seen are of items that are on."""

    row: Row
    codes: dict[int, Codes]
    seen: set[int]
    config: SpecGRConfig

    def scored_length(self, item: int) -> int:
        codes, levels = self.codes[item], len(self.codes[item])
        if self.config.score == "drop_last_of_all":
            return max(levels - 1, 1)
        if item in self.seen:
            return levels
        if self.config.score == "drop_last":
            return max(levels - 1, 1)
        shared = 0
        for length in range(1, levels + 1):
            if any(self.codes[other][:length] == codes[:length] for other in self.seen):
                shared = length
        return max(shared, min(self.config.min_prefix, levels))

    def log_prob(self, user: int, codes: Codes) -> float:
        return sum(self.row(user, codes[:level])[codes[level]] for level in range(len(codes)))

    def score(self, user: int, item: int) -> float:
        length = self.scored_length(item)
        return self.log_prob(user, self.codes[item][:length]) / length

    def __call__(self, user: int, drafter: Sequence[float], k: int, allowed: set[int], subset: bool) -> Listed:
        levels = len(next(iter(self.codes.values())))
        beams: list[tuple[Codes, float]] = [((), 0.0)]
        scored: dict[int, float] = {}
        accepted: set[int] = set()
        depth = 0
        while len(accepted) < k and depth < levels and (depth == 0 or len(scored) < len(allowed)):
            prefixes = {prefix for prefix, _ in beams}
            candidates = [
                item
                for item in allowed - set(scored)
                if self.codes[item][:depth] in prefixes and item < len(drafter) and drafter[item] > -math.inf
            ]
            candidates.sort(key=lambda item: (-drafter[item], self.codes[item], item))
            for item in candidates[: self.config.draft_size]:
                scored[item] = self.score(user, item)
                if scored[item] > self.config.threshold:
                    accepted.add(item)
            longer = {self.codes[item][: depth + 1] for item in allowed}
            grown = [(prefix, self.log_prob(user, prefix)) for prefix in longer if prefix[:-1] in {p for p, _ in beams}]
            beams = sorted(grown, key=lambda beam: -beam[1])[: self.config.num_beams]
            depth += 1
        return Listed(
            self._ranked(user, scored, accepted, beams, drafter, allowed, k, subset),
            len(accepted),
            depth,
            len(scored),
            len(scored) == len(allowed)
            and (not self.config.drafter_weight or len(accepted) < k or len(accepted) == len(scored)),
        )

    def _ranked(
        self,
        user: int,
        scored: dict[int, float],
        accepted: set[int],
        beams: list[tuple[Codes, float]],
        drafter: Sequence[float],
        allowed: set[int],
        k: int,
        subset: bool,
    ) -> list[tuple[int, float]]:
        levels = len(next(iter(self.codes.values())))
        found = dict(scored)
        if len(accepted) >= k:
            found = {item: scored[item] for item in accepted}
        elif not subset:
            length = max(levels - 1, 1) if self.config.score == "drop_last_of_all" else levels
            for leaf, _ in beams:
                for item in allowed - set(scored):
                    if self.codes[item] == leaf:
                        found[item] = self.log_prob(user, leaf[:length]) / length
        known = {item: drafter[item] for item in allowed if item < len(drafter) and drafter[item] > -math.inf}
        worst = min(known.values(), default=0.0)
        found = {item: v + self.config.drafter_weight * known.get(item, worst) for item, v in found.items()}
        ranked = sorted(found.items(), key=lambda pair: (-pair[1], self.codes[pair[0]], pair[0]))
        return ranked[:k]


@dataclass(frozen=True)
class Case:
    """One catalogue, a model and a drafter for each of the users."""

    ids: SemanticIds
    trie: Trie
    model: TableModel
    drafter: TableDrafter
    seen: set[int]
    in_sample: ItemFilter
    config: SpecGRConfig
    generator: torch.Generator

    def drawn(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    @property
    def codes(self) -> dict[int, Codes]:
        rows = zip(self.ids.item_ids_N.tolist(), self.ids.codes_NL.tolist(), self.ids.active_N.tolist(), strict=True)
        return {item: tuple(codes) for item, codes, active in rows if active}

    def naive(self) -> NaiveSpecGR:
        tables = [table.log_softmax(-1) for table in self.model.tables]

        def row(user: int, prefix: Codes) -> Sequence[float]:
            place = 0
            for size, code in zip(self.model.sizes, prefix, strict=False):
                place = place * size + code
            found: list[float] = tables[len(prefix)][user, place].tolist()
            return found

        return NaiveSpecGR(row, self.codes, self.seen, self.config)


def case(seed: int, ids: SemanticIds | None = None, **settings: Any) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    ids = ids or random_ids(generator, levels=drawn(1, 4), size=drawn(1, 6), items=40)
    trie = trie_of(ids)
    model = TableModel(ids.sizes, USERS, generator)
    seen_N = torch.rand(len(ids), generator=generator) < 0.1 * drawn(2, 9)
    # Some ids lie behind the drafter's last, some it does not know; whole numbers tie.
    scores_UV = torch.randn(USERS, max(1, int(ids.item_ids_N[-1]) + drawn(-2, 1)), generator=generator)
    if drawn(0, 1):
        scores_UV = scores_UV.round()
    if drawn(0, 2) == 0:
        scores_UV[torch.rand(scores_UV.shape, generator=generator) < 0.3] = -math.inf
    chosen: dict[str, Any] = {
        "draft_size": drawn(1, 12),
        "num_beams": drawn(1, 8),
        "threshold": -0.5 - 0.25 * drawn(0, 12),
        "score": SCORES[drawn(0, 2)],
        "min_prefix": drawn(1, 4),
        "drafter_weight": (0.0, 0.0, 0.25, 2.0)[drawn(0, 3)],
    }
    active = ids.item_ids_N[seen_N & ids.active_N].tolist()
    config = SpecGRConfig(drafter="semantic_knn", **(chosen | settings))
    return Case(ids, trie, model, TableDrafter(scores_UV), set(active), trie.allow(seen_N), config, generator)


def large_ids(seed: int = 0) -> SemanticIds:
    """60 items with gaps between their ids, nearly all with a tuple of their own."""
    generator = torch.Generator().manual_seed(seed)
    codes_NL = torch.randint(6, (60, 3), generator=generator)
    return SemanticIds.of(torch.arange(60) * 2 + 1, codes_NL, (6, 6, 6))


def listed(result: SpecGRResult, row: int) -> Listed:
    count = int(result.valid_count_B[row])
    assert result.items_BK[row, count:].eq(0).all() and result.codes_BKL[row, count:].eq(-1).all()
    assert result.scores_BK[row, count:].isneginf().all()
    pairs = zip(result.items_BK[row, :count].tolist(), result.scores_BK[row, :count].tolist(), strict=True)
    counts = (int(x[row]) for x in (result.accepted_B, result.rounds_B, result.drafted_B))
    return Listed(list(pairs), *counts, bool(result.exact_B[row]))


def assert_same(found: Listed, expected: Listed) -> None:
    assert found[1:] == expected[1:]
    assert [item for item, _ in found.results] == [item for item, _ in expected.results]
    for (_, score), (_, own) in zip(found.results, expected.results, strict=True):
        assert math.isclose(score, own, abs_tol=1e-5)
