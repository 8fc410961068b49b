"""Two-stage top-k under Mixture of Logits: dot products choose candidates, the full score orders them.

From "Retrieval with Learned Similarities" (arXiv 2407.15462), section 4, as its public code computes it:

    MoLNaiveTopK{k}       the k best items by each of the P_Q x P_X dot products of components
    MoLAvgTopK{m}         the m best by <sum_n q_n, mean_m x_m>
    MoLCombTopK{k}_{m}    both
    MoLNaiveFaissTopK{k}  as the first, each search by an inverted file of FAISS (pip install faiss-cpu)
    MoLHIndexerTopK{m}    about m items above a threshold that a sample of the items sets, nothing sorted: the first
                          stage of "Revisiting Neural Retrieval on Accelerators" (arXiv 2306.04039), section 4.2
    MoLFittedTopK{m}      the m best by a sum of the products with weights fitted to each query: ours, not published

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

from generative_recommenders.errors import UserError
from generative_recommenders.indexing.exact import seen_of, slices
from generative_recommenders.indexing.mol import MoLBruteForceTopK, no_seen, query_rows
from ops.mol_score import MoLItems, MoLQueries, mol_score

_NOTHING = -torch.inf
# Numbers that the products of a first stage, or the gathered components of candidates, may hold: 64 MB in fp32.
_BLOCK_NUMBERS = 1 << 24
# A threshold is a sample's value with about this many above it: their number is then right to about an eighth.
_SAMPLED_ABOVE = 64
_SLACK, _SPARE = 1.5, 64
# Items a weight of a fit is drawn from, and the pull towards 0 as a share of a product's variance: chosen on the corpus
# of benchmarks/e2e/topk.py with seed 0, so measure with another.
_ITEMS_A_WEIGHT, _RIDGE = 8, 0.01


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
        found = [self._rescored(queries, rows, seen_offsets, seen_ids) for rows in self._row_blocks(queries)]
        return self._padded(found, k)

    def rank_of_target(
        self, queries: MoLQueries, targets_B: Tensor, seen_offsets: Tensor, seen_ids: Tensor, *, filter_history: bool
    ) -> Tensor:
        ranks = []
        seen = (seen_offsets, seen_ids)
        nobody = no_seen(len(queries.components), targets_B.device)
        for rows in self._row_blocks(queries):
            scores, ids = self._rescored(queries, rows, *(seen if filter_history else nobody))
            is_target = (ids == targets_B[rows, None]) & (scores > _NOTHING)
            own = torch.where(is_target, scores, _NOTHING).amax(1, keepdim=True)
            # Equal scores rank by id, as everywhere.
            before = (scores > own) | ((scores == own) & (ids < targets_B[rows, None]))
            ranks.append(torch.where(is_target.any(1), before.sum(1) + 1, 0))
        return torch.cat(ranks)

    def _row_blocks(self, queries: MoLQueries) -> list[slice]:
        fitting = max(1, _BLOCK_NUMBERS // max(1, self.products(queries) * len(self)))
        return slices(len(queries.components), min(fitting, self.max_rows or fitting))

    def products(self, queries: MoLQueries) -> int:
        """Dot products of a query with an item that the first stage holds at a time."""
        return 1

    def sampled(self, queries: MoLQueries) -> int:
        """Items of which a query takes the full score to choose its candidates."""
        return 0

    def _rescored(
        self, queries: MoLQueries, rows: slice, seen_offsets: Tensor, seen_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids (b, R) of the distinct unseen candidates; -inf and id 0 elsewhere."""
        own = query_rows(queries, rows)
        if not len(self) or not len(own.components):
            ids = self.candidate_ids_X.new_zeros(len(own.components), 1)
            return torch.full_like(ids, _NOTHING, dtype=torch.float32), ids
        history = History.of(*seen_of(rows, seen_offsets, seen_ids), self.candidate_ids_X)
        places = self.candidates(own, history).sort(dim=1).values
        absent = places < 0
        absent[:, 1:] |= places[:, 1:] == places[:, :-1]
        places = places.clamp(min=0)
        ids = self.candidate_ids_X[places]
        return self._scores(own, places).masked_fill(absent, _NOTHING), ids.masked_fill(absent, 0)

    def _scores(self, queries: MoLQueries, places_BR: Tensor) -> Tensor:
        """Full scores (B, R) of each query's own items, not rounded to a half precision of the queries."""
        dtype = torch.promote_types(queries.components.dtype, torch.float32)
        queries = MoLQueries(queries.components.to(dtype), None if queries.gate is None else queries.gate.to(dtype))
        width = self.items.components[0].numel()
        fitting = max(1, _BLOCK_NUMBERS // max(1, places_BR.shape[1] * width))
        parts = [
            mol_score(query_rows(queries, rows), self._items(places_BR[rows]), self.gate, temperature=self.temperature)
            for rows in slices(len(places_BR), fitting)
        ]
        return torch.cat(parts)

    def _items(self, places_BR: Tensor) -> MoLItems:
        gate = None if self.items.gate is None else _rows(self.items.gate, places_BR)
        return MoLItems(_rows(self.items.components, places_BR), gate)

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
    """What each of B rows has seen of a catalogue, as distinct pairs of a row and a place, (S,) each."""

    def __init__(self, rows_S: Tensor, places_S: Tensor) -> None:
        self.rows_S = rows_S
        self.places_S = places_S

    @classmethod
    def of(cls, offsets: Tensor, seen_ids: Tensor, candidate_ids_X: Tensor) -> History:
        """Ids that are no candidates are left out."""
        places = torch.searchsorted(candidate_ids_X, seen_ids).clamp_(max=len(candidate_ids_X) - 1)
        known = candidate_ids_X[places] == seen_ids
        rows = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
        return cls(rows[known], places[known])

    def repeated(self, times: int) -> History:
        """The history of each row `times` times in a row."""
        steps = torch.arange(times, device=self.rows_S.device)
        return History((self.rows_S[:, None] * times + steps).flatten(), self.places_S.repeat_interleave(times))

    def hide(self, values_BX: Tensor) -> Tensor:
        """The values, in their place, with -inf for what has been seen."""
        values_BX[self.rows_S, self.places_S] = _NOTHING
        return values_BX

    def holds(self, places_BR: Tensor, num_items: int) -> Tensor:
        """Whether each place is in its row's history."""
        rows_B = torch.arange(len(places_BR), device=places_BR.device)
        return torch.isin(rows_B[:, None] * num_items + places_BR, self.rows_S * num_items + self.places_S)

    def longest(self) -> int:
        return int(torch.bincount(self.rows_S).max()) if len(self.rows_S) else 0


def _best_places(queries_BD: Tensor, vectors_XD: Tensor, k: int, history: History | None = None) -> Tensor:
    """Places (B, min(k, X)) of the largest inner products, best first; -1 where the history leaves none."""
    products_BX = queries_BD @ vectors_XD.T
    if history is None:
        return torch.topk(products_BX, min(k, len(vectors_XD)), dim=1).indices
    values, places = torch.topk(history.hide(products_BX), min(k, len(vectors_XD)), dim=1)
    return torch.where(values > _NOTHING, places, -1)


class MoLNaiveTopK(TwoStageTopK):
    """The union of the `k_g` best items by each product of a query's and an item's component."""

    def __init__(self, *arguments: Any, k_g: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.k_g = k_g

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        batch, width, _ = queries.components.shape
        flat = queries.components.flatten(0, 1).to(self.items.components.dtype)
        each = history.repeated(width)
        found = [self._search(component, flat, each) for component in range(self.items.components.shape[1])]
        return torch.cat([places.view(batch, width * places.shape[1]) for places in found], dim=1)

    def _search(self, component: int, queries_QD: Tensor, history: History) -> Tensor:
        """Places (Q, k_g) of the best unseen items, -1 where there are none."""
        return _best_places(queries_QD, self.items.components[:, component], self.k_g, history)

    def products(self, queries: MoLQueries) -> int:
        return queries.components.shape[1]


class MoLNaiveFaissTopK(MoLNaiveTopK):
    """The same with one inverted-file index of FAISS an item component: `nlist` cells, `nprobe` of them searched.

    Raises UserError where FAISS is not installed.
    """

    def __init__(self, *arguments: Any, k_g: int, nlist: int = 100, nprobe: int = 8, **options: Any) -> None:
        super().__init__(*arguments, k_g=k_g, **options)
        try:
            faiss = importlib.import_module("faiss")
        except ImportError:
            raise UserError(
                "MoLNaiveFaissTopK: got no FAISS, expected it installed; try pip install faiss-cpu"
            ) from None
        self._indexes = []
        for component in range(self.items.components.shape[1] if len(self) else 0):
            vectors = self.items.components[:, component].float().cpu().contiguous()
            width, cells = vectors.shape[1], max(1, min(nlist, len(vectors) // 40))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
            # A small catalogue has few items a cell, of which FAISS would warn.
            index.cp.min_points_per_centroid = 1
            index.train(vectors.numpy())
            index.add(vectors.numpy())
            index.nprobe = min(nprobe, cells)
            self._indexes.append(index)

    def _search(self, component: int, queries_QD: Tensor, history: History) -> Tensor:
        # An index cannot leave out what a row has seen: as many more are asked for, and those seen taken out.
        wanted = min(self.k_g + history.longest(), len(self))
        _, found = self._indexes[component].search(queries_QD.float().cpu().numpy(), wanted)
        places = torch.from_numpy(found).to(queries_QD.device)
        unseen = (places >= 0) & ~history.holds(places, len(self))
        return torch.where(unseen & (unseen.cumsum(1) <= self.k_g), places, -1)

    def index_bytes(self) -> int:
        """Vectors in fp32 and a number of eight bytes for each."""
        return sum(index.ntotal * (4 * index.d + 8) for index in self._indexes)


class MoLAvgTopK(TwoStageTopK):
    """The `m` best by the product of the summed query components and the mean item component."""

    def __init__(self, *arguments: Any, m: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.m = m
        self._means_XD = self.items.components.mean(dim=1)

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        return _best_places(self._sums(queries), self._means_XD, self.m, history)

    def _sums(self, queries: MoLQueries) -> Tensor:
        return queries.components.sum(dim=1).to(self._means_XD.dtype)

    def index_bytes(self) -> int:
        return self._means_XD.numel() * self._means_XD.element_size()


class MoLHIndexerTopK(MoLAvgTopK):
    """About `m` items whose first-stage product is above a threshold estimated from a sample of the items."""

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        products_BX = history.hide(self._sums(queries) @ self._means_XD.T)
        count = len(self)
        sample = products_BX[:, :: max(1, min(self.m, count) // _SAMPLED_ABOVE)]
        # The sample's share of what is wanted, and one more, as too few cannot be made up for later.
        place = self.m * sample.shape[1] // count + 1
        passes = products_BX > _NOTHING
        if place < sample.shape[1]:
            passes &= products_BX >= torch.topk(sample, place + 1, dim=1).values[:, -1:]
        rows, places = passes.nonzero(as_tuple=True)
        above_B = torch.bincount(rows, minlength=len(products_BX))
        column = torch.arange(len(rows), device=rows.device) - (above_B.cumsum(0) - above_B)[rows]
        # A threshold lets a little more through than is wanted; what is beyond the limit is dropped unsorted.
        limit = int(_SLACK * self.m) + _SPARE
        kept = column < limit
        width = max(1, min(int(above_B.max()), limit))
        found = torch.full((len(products_BX), width), -1, dtype=torch.int64, device=products_BX.device)
        found[rows[kept], column[kept]] = places[kept]
        return found


class MoLFittedTopK(MoLAvgTopK):
    """The `m` best by a weighted sum of all products of components, fitted to each query's full scores.

    Near the top of one query's list the mixture weights change little, so that the score is nearly linear in the
    products: the weights are found by ridge regression over the best items of `MoLAvgTopK`, and turn the query into one
    vector of all item components.
    """

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        components = self.items.components
        near_BN = _best_places(self._sums(queries), self._means_XD, self.sampled(queries))
        q = queries.components.float()
        products = torch.einsum("bqd,bnxd->bnqx", q, _rows(components, near_BN).float())
        weights_BP = _ridge(products.flatten(2), self._scores(queries, near_BN).float())
        vectors = torch.einsum("bqx,bqd->bxd", weights_BP.view(len(q), *products.shape[2:]), q).flatten(1)
        return _best_places(vectors.to(components.dtype), components.flatten(1), self.m, history)

    def sampled(self, queries: MoLQueries) -> int:
        return min(_ITEMS_A_WEIGHT * queries.components.shape[1] * self.items.components.shape[1], len(self))


def _ridge(inputs_BNP: Tensor, outputs_BN: Tensor) -> Tensor:
    """Weights (B, P) of each row's linear fit of the outputs, beside a constant."""
    inputs_BNP = inputs_BNP - inputs_BNP.mean(1, keepdim=True)
    outputs_BN = outputs_BN - outputs_BN.mean(1, keepdim=True)
    squares_BPP = inputs_BNP.mT @ inputs_BNP
    diagonal_BP = squares_BPP.diagonal(dim1=1, dim2=2)
    pull_B1 = _RIDGE * diagonal_BP.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    squares_BPP = squares_BPP + torch.diag_embed(pull_B1.expand_as(diagonal_BP))
    return torch.linalg.solve(squares_BPP, torch.einsum("bnp,bn->bp", inputs_BNP, outputs_BN))


class MoLCombTopK(TwoStageTopK):
    """The union of `MoLNaiveTopK` and `MoLAvgTopK`."""

    def __init__(self, *arguments: Any, k_g: int, m: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stages = (MoLNaiveTopK(*arguments, k_g=k_g, **options), MoLAvgTopK(*arguments, m=m, **options))

    def candidates(self, queries: MoLQueries, history: History) -> Tensor:
        return torch.cat([stage.candidates(queries, history) for stage in self._stages], dim=1)

    def products(self, queries: MoLQueries) -> int:
        return max(stage.products(queries) for stage in self._stages)

    def index_bytes(self) -> int:
        return sum(stage.index_bytes() for stage in self._stages)


_PATTERNS: dict[str, Callable[..., MoLBruteForceTopK]] = {
    r"MoLBruteForceTopK": MoLBruteForceTopK,
    r"MoLNaiveTopK(?P<k_g>[1-9]\d*)": MoLNaiveTopK,
    r"MoLNaiveFaissTopK(?P<k_g>[1-9]\d*)": MoLNaiveFaissTopK,
    r"MoLAvgTopK(?P<m>[1-9]\d*)": MoLAvgTopK,
    r"MoLCombTopK(?P<k_g>[1-9]\d*)_(?P<m>[1-9]\d*)": MoLCombTopK,
    r"MoLHIndexerTopK(?P<m>[1-9]\d*)": MoLHIndexerTopK,
    r"MoLFittedTopK(?P<m>[1-9]\d*)": MoLFittedTopK,
}
MOL_TOP_K_NAMES = (
    "MoLBruteForceTopK, MoLNaiveTopK{k}, MoLNaiveFaissTopK{k}, MoLAvgTopK{m}, MoLCombTopK{k}_{m}, MoLHIndexerTopK{m} "
    "or MoLFittedTopK{m}"
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
