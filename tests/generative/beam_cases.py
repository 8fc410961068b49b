"""Small random models and catalogues, and a beam search in plain Python that the real one is held against.

The reference knows no tensors: prefixes are tuples, a trie is a set of tuples, a beam is a list of pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.trie import ItemFilter, Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

NO_EVENTS = torch.empty(0, dtype=torch.int64)


def batch_of(user_ids: Sequence[int], histories: Sequence[Sequence[int]] | None = None) -> SequenceBatch:
    """A batch of users whose histories are given (none by default)."""
    histories = [[] for _ in user_ids] if histories is None else histories
    items = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.int64)
    offsets = torch.zeros(len(user_ids) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    users = torch.tensor(user_ids, dtype=torch.int64)
    none = torch.zeros_like(users)
    return SequenceBatch(
        item_ids_T=items,
        ratings_T=torch.zeros_like(items),
        timestamps_T=torch.zeros_like(items),
        next_item_ids_T=torch.zeros_like(items),
        next_timestamps_T=torch.zeros_like(items),
        offsets=offsets,
        user_ids_B=users,
        target_ids_B=none,
        target_ratings_B=none,
        target_timestamps_B=none,
        row_numbers_B=torch.arange(len(user_ids)),
    )


@dataclass
class TableContext:
    """Codes fed so far, a step each, in the places they were fed at."""

    users_B: Tensor
    tokens: list[Tensor] = field(default_factory=list)

    def select(self, rows: Tensor) -> TableContext:
        return TableContext(self.users_B[rows])

    def branch(self, rows: Tensor | None = None) -> TableContext:
        if rows is None:
            return TableContext(self.users_B, [*self.tokens])
        return TableContext(self.users_B[rows], [tokens_BM[rows] for tokens_BM in self.tokens])


class TableModel:
    """A model that looks the logits up by user and prefix; it finds its prefixes through the ancestors alone."""

    def __init__(self, sizes: tuple[int, ...], users: int, generator: torch.Generator, scale: float = 2.0) -> None:
        self.sizes = sizes
        self.calls: list[int] = []
        self.tables = [
            torch.randn(users, math.prod(sizes[:level]), size, generator=generator) * scale
            for level, size in enumerate(sizes)
        ]

    def begin(self, batch: SequenceBatch) -> TableContext:
        return TableContext(batch.user_ids_B)

    def logits(
        self, context: TableContext, level: int, tokens_BM: Tensor | None, ancestors: Sequence[Tensor]
    ) -> Tensor:
        assert len(context.tokens) == max(level - 1, 0) and len(ancestors) == level
        prefix = torch.zeros(len(context.users_B), 1, dtype=torch.int64)
        if tokens_BM is not None:
            assert bool(((tokens_BM >= 0) & (tokens_BM < self.sizes[level - 1])).all())
            context.tokens.append(tokens_BM)
            assert torch.equal(ancestors[-1], torch.arange(tokens_BM.shape[1]).expand_as(tokens_BM))
            for size, tokens, index in zip(self.sizes, context.tokens, ancestors, strict=False):
                prefix = prefix * size + tokens.gather(1, index)
        self.calls.append(prefix.numel())
        return self.tables[level][context.users_B[:, None], prefix]

    def teacher_forced(self, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
        prefix = torch.zeros(codes_BKL.shape[:2], dtype=torch.int64)
        found = []
        for level, size in enumerate(self.sizes):
            rows = self.tables[level][batch.user_ids_B[:, None], prefix].log_softmax(-1)
            found.append(rows.gather(-1, codes_BKL[..., level : level + 1])[..., 0])
            prefix = prefix * size + codes_BKL[..., level]
        return torch.stack(found, -1)

    def row(self, user: int, prefix: tuple[int, ...]) -> list[float]:
        """Logits after one prefix."""
        place = 0
        for size, code in zip(self.sizes, prefix, strict=False):
            place = place * size + code
        return self.tables[len(prefix)][user, place].tolist()


def random_ids(generator: torch.Generator, *, levels: int, size: int, items: int) -> SemanticIds:
    """Up to `items` items with any codes, ids with gaps; several may share a tuple and some are switched off."""

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    sizes = tuple(1 + below(size) for _ in range(levels))
    count = 1 + below(items)
    codes = torch.stack([torch.randint(n, (count,), generator=generator) for n in sizes], 1)
    item_ids = torch.randperm(3 * count, generator=generator)[:count] + 1
    active = torch.rand(count, generator=generator) < 0.9
    active[0] |= not active.any()
    return SemanticIds.of(item_ids, codes, sizes, active_N=active)


def trie_of(ids: SemanticIds) -> Trie:
    return Trie.build(ids.codes_NL, ids.sizes, ids.item_ids_N, ids.active_N)


def filter_of(trie: Trie, ids: SemanticIds, allowed: Sequence[set[int]]) -> ItemFilter:
    """One set of items for all requests, or a set for each."""
    rows = torch.tensor([[item in row for item in ids.item_ids_N.tolist()] for row in allowed])
    return trie.allow(rows if len(allowed) > 1 else rows[0])


def leaves_of(ids: SemanticIds, allowed: set[int] | None = None) -> dict[tuple[int, ...], list[int]]:
    """Items of each tuple that are on and allowed, ascending."""
    leaves: dict[tuple[int, ...], list[int]] = {}
    for codes, item, active in zip(ids.codes_NL.tolist(), ids.item_ids_N.tolist(), ids.active_N.tolist(), strict=True):
        if active and (allowed is None or item in allowed):
            leaves.setdefault(tuple(codes), []).append(item)
    return leaves


@dataclass(frozen=True)
class Expected:
    """(item, codes, score) of each result, and the best score given up."""

    results: list[tuple[int, tuple[int, ...], float]]
    pruned: float


@dataclass(frozen=True)
class Reference:
    """Beam search for one user over dictionaries."""

    model: TableModel
    leaves: dict[tuple[int, ...], list[int]]
    constrained: bool = True
    legal: bool = False
    temperature: tuple[float, ...] = ()

    def log_probs(self, user: int, prefix: tuple[int, ...]) -> dict[int, float]:
        """Of every code that may follow."""
        level = len(prefix)
        temperature = self.temperature[level] if self.temperature else 1.0
        row = {code: logit / temperature for code, logit in enumerate(self.model.row(user, prefix))}
        children = {leaf[level] for leaf in self.leaves if leaf[:level] == prefix}
        kept = {code: logit for code, logit in row.items() if not self.constrained or code in children}
        total = math.log(sum(math.exp(logit) for logit in (kept if self.legal else row).values())) if kept else 0.0
        return {code: logit - total for code, logit in kept.items()}

    def score(self, user: int, codes: tuple[int, ...]) -> float:
        return sum(self.log_probs(user, codes[:level])[codes[level]] for level in range(len(codes)))

    def beam(self, user: int, widths: Sequence[int], k: int) -> Expected:
        beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        pruned = -math.inf
        for level, width in enumerate(widths):
            width = max(width, k) if level == len(widths) - 1 else width
            grown = [
                ((*prefix, code), score + log_prob)
                for prefix, score in beams
                for code, log_prob in self.log_probs(user, prefix).items()
            ]
            grown.sort(key=lambda pair: -pair[1])
            pruned = max([pruned, *(score for _, score in grown[width:])])
            beams = grown[:width]
        return Expected(self._items(beams, k), pruned)

    def exhaustive(self, user: int, k: int) -> list[tuple[int, tuple[int, ...], float]]:
        return self._items([(leaf, self.score(user, leaf)) for leaf in self.leaves], k)

    def _items(self, beams: list[tuple[tuple[int, ...], float]], k: int) -> list[tuple[int, tuple[int, ...], float]]:
        ordered = sorted(beams, key=lambda pair: (-pair[1], pair[0]))
        items = ((item, codes, score) for codes, score in ordered for item in self.leaves.get(codes, []))
        return list(itertools.islice(items, k))
