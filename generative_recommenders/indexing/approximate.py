"""Two-stage top-k under Mixture of Logits: dot products choose candidates, the full score orders them.

From "Retrieval with Learned Similarities" (arXiv 2407.15462), section 4, as its public code computes it:

    MoLNaiveTopK{k}       the k best items by each of the P_Q x P_X dot products of components
    MoLAvgTopK{m}         the m best by <sum_n q_n, mean_m x_m>
    MoLCombTopK{k}_{m}    both
    MoLNaiveFaissTopK{k}  as the first, each search by an inverted file of FAISS (pip install faiss-cpu)
    MoLHIndexerTopK{m}    about m items above a threshold that a sample of the items sets, nothing sorted: the first
                          stage of "Revisiting Neural Retrieval on Accelerators" (arXiv 2306.04039), section 4.2

A module knows only what its first stage keeps: a target left out there is a miss. Items of the history do not count
among the k or m of the first stage, so that a list depends on its own query and history alone. The public code scores
duplicates of the union with -32767; here they are marked and never scored above anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from generative_recommenders.indexing.exact import seen_of, slices
from generative_recommenders.indexing.mol import MoLBruteForceTopK, no_seen, query_rows
from ops.mol_score import MoLItems, MoLQueries, mol_score

_NOTHING = -torch.inf
_SAMPLE = 4096
# Numbers that the gathered components of the candidates may hold: 64 MB in fp32.
_BLOCK_NUMBERS = 1 << 24
_SLACK = 1.25
_SPARE = 64


class TwoStageTopK(MoLBruteForceTopK):
    """Rescores what `candidates` finds."""

    @abstractmethod
    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        """Places of items in the catalogue, (B, R) int64, in any order; an item may occur twice, -1 is none."""

    def __call__(
        self, queries: MoLQueries, k: int, seen_offsets: Tensor | None = None, seen_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        count = len(queries.components)
        if seen_offsets is None or seen_ids is None:
            seen_offsets, seen_ids = no_seen(count, queries.components.device)
        found = [self._rescored(queries, rows, seen_offsets, seen_ids) for rows in self._row_blocks(count)]
        return self._padded(found, k)

    def rank_of_target(
        self, queries: MoLQueries, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, *, filter_history: bool
    ) -> Tensor:
        ranks = []
        seen = (seen_offsets, seen_ids)
        nobody = no_seen(len(queries.components), targets_B.device)
        for rows in self._row_blocks(len(queries.components)):
            scores, ids = self._rescored(queries, rows, *(seen if filter_history else nobody))
            is_target = (ids == targets_B[rows, None]) & (scores > _NOTHING)
            own = torch.where(is_target, scores, _NOTHING).amax(1, keepdim=True)
            # Equal scores rank by id, as everywhere.
            before = (scores > own) | ((scores == own) & (ids < targets_B[rows, None]))
            ranks.append(torch.where(is_target.any(1), before.sum(1) + 1, 0))
        return torch.cat(ranks)

    def _row_blocks(self, count: int) -> list[slice]:
        width = self.items.components[0].numel() if len(self.items.components) else 1
        fitting = max(1, _BLOCK_NUMBERS // max(1, self.expected_candidates() * width))
        return slices(count, min(fitting, self.max_rows or fitting))

    @abstractmethod
    def expected_candidates(self) -> int:
        """About how many candidates a query has, duplicates included."""

    def _rescored(
        self, queries: MoLQueries, rows: slice, seen_offsets: Tensor, seen_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids (b, R) of the distinct unseen candidates; -inf and id 0 elsewhere."""
        own = query_rows(queries, rows)
        history = History(*seen_of(rows, seen_offsets, seen_ids), self.candidate_ids_X)
        places = self.candidates(own, history).sort(dim=1).values
        absent = places < 0
        absent[:, 1:] |= places[:, 1:] == places[:, :-1]
        places = places.clamp(min=0)
        ids = self.candidate_ids_X[places]
        gate = None if self.items.gate is None else _rows(self.items.gate, places)
        items = MoLItems(_rows(self.items.components, places), gate)
        scores = mol_score(own, items, self.gate, temperature=self.temperature).float()
        return scores.masked_fill(absent, _NOTHING), ids.masked_fill(absent, 0)

    def _padded(self, found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
        best_scores, best_ids = [], []
        for scores, ids in found:
            # Ids ascend with places, so that a stable sort leaves equal scores in the order of ids.
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
            top, named = scores.gather(1, order), ids.gather(1, order)
            missing = k - top.shape[1]
            if missing > 0:
                top = torch.nn.functional.pad(top, (0, missing), value=_NOTHING)
                named = torch.nn.functional.pad(named, (0, missing))
            best_scores.append(top)
            best_ids.append(named)
        return torch.cat(best_scores), torch.cat(best_ids)


def _rows(table: Tensor, places_BR: Tensor) -> Tensor:
    """`table[places]`, several times as fast as indexing on a CPU, which copies element by element."""
    rows = table.flatten(1).index_select(0, places_BR.flatten())
    return rows.view(*places_BR.shape, *table.shape[1:])


class History:
    """The places in the catalogue that each row has seen."""

    def __init__(self, offsets: Tensor, seen_ids: Tensor, candidate_ids_X: Tensor) -> None:
        places = torch.searchsorted(candidate_ids_X, seen_ids).clamp_(max=len(candidate_ids_X) - 1)
        known = candidate_ids_X[places] == seen_ids
        rows = torch.arange(len(offsets) - 1, device=offsets.device)
        owners = rows.repeat_interleave(offsets.diff())[known]
        self._span = len(candidate_ids_X)
        self._rows_B1 = rows[:, None]
        self._keys = owners * self._span + places[known]
        self.lengths_B = torch.bincount(owners, minlength=len(rows))
        self.longest = int(self.lengths_B.max()) if len(self._keys) else 0

    def holds(self, places_BR: Tensor) -> Tensor:
        """Whether each place is in its row's history."""
        if not len(self._keys):
            return torch.zeros_like(places_BR, dtype=torch.bool)
        return torch.isin(self._rows_B1 * self._span + places_BR, self._keys)

    def first_unseen(self, places_BR: Tensor, count: int) -> Tensor:
        """The places with all but the first `count` unseen ones of each row made -1."""
        unseen = ~self.holds(places_BR)
        return torch.where(unseen & (unseen.cumsum(1) <= count), places_BR, -1)

    def repeated(self, times: int) -> History:
        """The history of each row `times` times in a row."""
        again = object.__new__(History)
        again._span, again.longest = self._span, self.longest
        again._rows_B1 = torch.arange(len(self._rows_B1) * times, device=self._rows_B1.device)[:, None]
        owners, places = self._keys // self._span, self._keys % self._span
        steps = torch.arange(times, device=self._keys.device)
        again._keys = ((owners[:, None] * times + steps) * self._span + places[:, None]).flatten()
        again.lengths_B = self.lengths_B.repeat_interleave(times)
        return again


def _best_places(queries_BD: Tensor, vectors_XD: Tensor, k: int) -> Tensor:
    """Places (B, min(k, X)) of the largest inner products, best first."""
    return torch.topk(queries_BD @ vectors_XD.T, min(k, len(vectors_XD)), dim=1).indices


class MoLNaiveTopK(TwoStageTopK):
    """The union of the `k_g` best items by each product of a query's and an item's component."""

    def __init__(self, *arguments: Any, k_g: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.k_g = k_g
        # (P_X, X, D_P): a search reads one component of all items.
        self._by_component = self.items.components.transpose(0, 1).contiguous()

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        batch, width, _ = queries.components.shape
        flat = queries.components.flatten(0, 1).to(self._by_component.dtype)
        each = history.repeated(width)
        found = [
            each.first_unseen(self._search(component, flat, self.k_g + history.longest), self.k_g)
            for component in range(len(self._by_component))
        ]
        return torch.cat([places.view(batch, width * places.shape[1]) for places in found], dim=1)

    def _search(self, component: int, queries_QD: Tensor, k: int) -> Tensor:
        return _best_places(queries_QD, self._by_component[component], k)

    def expected_candidates(self) -> int:
        p_q = self.items.gate.shape[1] // self.items.components.shape[1] if self.items.gate is not None else 8
        return max(self.k_g * len(self._by_component) * p_q, len(self) // 8)


class MoLNaiveFaissTopK(MoLNaiveTopK):
    """The same with one inverted-file index of FAISS an item component: `nlist` cells, `nprobe` of them searched."""

    def __init__(self, *arguments: Any, k_g: int, nlist: int = 100, nprobe: int = 8, **options: Any) -> None:
        super().__init__(*arguments, k_g=k_g, **options)
        faiss = importlib.import_module("faiss")
        self._indexes = []
        for vectors in self._by_component.float().cpu():
            width, cells = vectors.shape[1], max(1, min(nlist, len(vectors) // 40))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors.numpy())
            index.add(vectors.numpy())
            index.nprobe = min(nprobe, cells)
            self._indexes.append(index)

    def _search(self, component: int, queries_QD: Tensor, k: int) -> Tensor:
        _, places = self._indexes[component].search(queries_QD.float().cpu().numpy(), min(k, len(self)))
        return torch.from_numpy(places).to(queries_QD.device)


class MoLAvgTopK(TwoStageTopK):
    """The `m` best by the product of the summed query components and the mean item component."""

    def __init__(self, *arguments: Any, m: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.m = m
        self._means_XD = self.items.components.mean(dim=1)

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        places = _best_places(self._sums(queries), self._means_XD, self.m + history.longest)
        return history.first_unseen(places, self.m)

    def _sums(self, queries: MoLQueries) -> Tensor:
        return queries.components.sum(dim=1).to(self._means_XD.dtype)

    def expected_candidates(self) -> int:
        return max(self.m, len(self) // 8)


class MoLHIndexerTopK(MoLAvgTopK):
    """About `m` items whose first-stage product is above a threshold estimated from a sample of the items."""

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        products_BX = self._sums(queries) @ self._means_XD.T
        count = len(self)
        sample, _ = products_BX[:, :: max(1, count // _SAMPLE)].sort(dim=1, descending=True)
        wanted_B1 = (self.m + history.lengths_B[:, None]).clamp(max=count)
        # The sample's share of what is wanted, and one more, as too few cannot be made up for later.
        place_B1 = (wanted_B1 * sample.shape[1] // count + 1).clamp(max=sample.shape[1] - 1)
        threshold_B1 = sample.gather(1, place_B1)
        above = products_BX >= threshold_B1
        # A threshold lets a little more through than is wanted; what is beyond the limit is dropped unsorted.
        limit_B1 = (wanted_B1.double() * _SLACK).long() + _SPARE
        column = above.cumsum(1) - 1
        rows, places = (above & (column < limit_B1)).nonzero(as_tuple=True)
        width = min(count, int(limit_B1.max()))
        found = torch.full((len(products_BX), width), -1, dtype=torch.int64, device=products_BX.device)
        found[rows, column[rows, places]] = places
        return torch.where(history.holds(found), -1, found)


class MoLCombTopK(TwoStageTopK):
    """The union of `MoLNaiveTopK` and `MoLAvgTopK`."""

    def __init__(self, *arguments: Any, k_g: int, m: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stages = (MoLNaiveTopK(*arguments, k_g=k_g, **options), MoLAvgTopK(*arguments, m=m, **options))

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        return torch.cat([stage.candidates(queries, history) for stage in self._stages], dim=1)

    def expected_candidates(self) -> int:
        return sum(stage.expected_candidates() for stage in self._stages)


_PATTERNS: dict[str, Callable[..., MoLBruteForceTopK]] = {
    r"MoLBruteForceTopK": MoLBruteForceTopK,
    r"MoLNaiveTopK(?P<k_g>[1-9]\d*)": MoLNaiveTopK,
    r"MoLNaiveFaissTopK(?P<k_g>[1-9]\d*)": MoLNaiveFaissTopK,
    r"MoLAvgTopK(?P<m>[1-9]\d*)": MoLAvgTopK,
    r"MoLCombTopK(?P<k_g>[1-9]\d*)_(?P<m>[1-9]\d*)": MoLCombTopK,
    r"MoLHIndexerTopK(?P<m>[1-9]\d*)": MoLHIndexerTopK,
}
MOL_TOP_K_NAMES = (
    "MoLBruteForceTopK, MoLNaiveTopK{k}, MoLNaiveFaissTopK{k}, MoLAvgTopK{m}, MoLCombTopK{k}_{m} or MoLHIndexerTopK{m}"
)


def is_mol_top_k(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in _PATTERNS)


def lacks_faiss(name: str) -> bool:
    """Whether a method needs FAISS and this machine has none."""
    return "Faiss" in name and importlib.util.find_spec("faiss") is None


def top_k_by_name(name: str) -> Callable[..., MoLBruteForceTopK]:
    """What builds a module from (items, gate, temperature, candidate_ids_X, max_rows).

    Raises ValueError for a name of no module.
    """
    for pattern, module in _PATTERNS.items():
        match = re.fullmatch(pattern, name)
        if match:
            return partial(module, **{key: int(value) for key, value in match.groupdict().items()})
    raise ValueError(f"top-k method: got {name!r}, expected {MOL_TOP_K_NAMES}")
