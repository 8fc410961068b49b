"""Top-k under Mixture of Logits: the exact module against all scores, the two-stage ones against the exact one."""

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from generative_recommenders.errors import UserError
from generative_recommenders.indexing.approximate import MOL_TOP_K_NAMES, is_mol_top_k, top_k_by_name
from generative_recommenders.indexing.mol import MoLBruteForceTopK
from ops.mol_score import MoLGate, MoLItems, MoLQueries, mol_score

ITEMS, QUERIES, P_Q, P_X, WIDTH = 37, 7, 3, 2, 5
FAISS = importlib.util.find_spec("faiss") is not None
TWO_STAGE = ["MoLNaiveTopK3", "MoLAvgTopK6", "MoLCombTopK2_4", "MoLHIndexerTopK6", "MoLFittedTopK6"]
# First stages that leave nothing out.
COMPLETE = [
    "MoLNaiveTopK37",
    "MoLAvgTopK37",
    "MoLCombTopK1_37",
    "MoLHIndexerTopK100",
    "MoLNaiveTopK1000",
    "MoLFittedTopK40",
]
IDS = torch.arange(ITEMS) * 3 + 2


def sides(gated: bool = True, dtype: torch.dtype = torch.float32) -> tuple[MoLQueries, MoLItems, MoLGate]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    pairs = P_Q * P_X
    queries = MoLQueries(draw(QUERIES, P_Q, WIDTH), draw(QUERIES, pairs) if gated else None)
    items = MoLItems(draw(ITEMS, P_X, WIDTH), draw(ITEMS, pairs) if gated else None)
    return queries, items, MoLGate(draw(pairs, 4), draw(4), draw(4, pairs), draw(pairs))


def build(name: str, gated: bool = True, max_rows: int | None = None) -> tuple[MoLQueries, MoLBruteForceTopK]:
    queries, items, gate = sides(gated)
    return queries, top_k_by_name(name)(items, gate, 0.5, IDS, max_rows)


def seen() -> tuple[Tensor, Tensor]:
    """Histories of 0 to 6 items, one of them unknown."""
    g = torch.Generator().manual_seed(1)
    lists = [IDS[torch.randperm(ITEMS, generator=g)[:n]] for n in range(QUERIES)]
    lists[3] = torch.cat([lists[3], torch.tensor([1])])
    lengths = torch.tensor([0, *(len(x) for x in lists)])
    return lengths.cumsum(0), torch.cat(lists)


def all_scores(gated: bool = True) -> Tensor:
    queries, items, gate = sides(gated)
    return mol_score(queries, items, gate, temperature=0.5, backend="reference")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["MoLBruteForceTopK", *COMPLETE])
def test_a_complete_first_stage_gives_the_exact_order(name: str, gated: bool) -> None:
    queries, module = build(name, gated)
    scores, ids = module(queries, 9)
    wanted = all_scores(gated).sort(dim=1, descending=True)
    torch.testing.assert_close(scores, wanted.values[:, :9])
    assert torch.equal(ids, IDS[wanted.indices[:, :9]])


@pytest.mark.parametrize("name", ["MoLBruteForceTopK", *TWO_STAGE, *COMPLETE])
def test_no_item_is_seen_twice_or_from_the_history(name: str) -> None:
    queries, module = build(name)
    offsets, history = seen()
    scores, ids = module(queries, 8, offsets, history)
    exact = all_scores()
    for row in range(QUERIES):
        found = ids[row][ids[row] > 0]
        own = history[offsets[row] : offsets[row + 1]]
        assert len(found.unique()) == len(found) and not torch.isin(found, own).any()
        assert bool((scores[row][:-1] >= scores[row][1:]).all())
        torch.testing.assert_close(scores[row][: len(found)], exact[row, torch.searchsorted(IDS, found)])


@pytest.mark.parametrize("name", TWO_STAGE)
def test_a_history_leaves_as_many_as_without_one(name: str) -> None:
    queries, module = build(name)
    k = {"MoLNaiveTopK3": 3, "MoLAvgTopK6": 6, "MoLCombTopK2_4": 4, "MoLHIndexerTopK6": 1, "MoLFittedTopK6": 6}[name]
    assert bool((module(queries, k, *seen())[1] > 0).all())


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("name", ["MoLBruteForceTopK", *TWO_STAGE, *COMPLETE])
def test_the_rank_is_the_place_in_the_list(name: str, filtered: bool) -> None:
    queries, module = build(name)
    offsets, history = seen()
    histories = (offsets, history) if filtered else (None, None)
    _, listed = module(queries, ITEMS, *histories)
    for target in IDS[::4].tolist():
        targets = torch.full((QUERIES,), target)
        if filtered or name.startswith("MoLBrute") or name in COMPLETE:
            ranks = module.rank_of_target(queries, targets, offsets, history, filter_history=filtered)
            places = (listed == target).float()
            wanted = torch.where(places.any(1), places.argmax(1) + 1, 0)
            assert torch.equal(ranks, wanted), target
    stranger = torch.full((QUERIES,), 1)
    assert not module.rank_of_target(queries, stranger, offsets, history, filter_history=filtered).any()


@pytest.mark.parametrize("name", ["MoLBruteForceTopK", *TWO_STAGE])
def test_rows_at_a_time_change_nothing(name: str) -> None:
    queries, module = build(name)
    _, sliced = build(name, max_rows=1)
    for one, other in zip(module(queries, 5), sliced(queries, 5), strict=True):
        torch.testing.assert_close(one, other)
    targets, histories = IDS[:QUERIES], seen()
    torch.testing.assert_close(
        module.rank_of_target(queries, targets, *histories, filter_history=True),
        sliced.rank_of_target(queries, targets, *histories, filter_history=True),
    )


@pytest.mark.parametrize("name", [*TWO_STAGE, "MoLBruteForceTopK"])
def test_beyond_the_candidates_there_is_nothing(name: str) -> None:
    queries, module = build(name)
    scores, ids = module(queries, 60)
    assert scores.shape == ids.shape == (QUERIES, 60)
    assert bool((ids[:, ITEMS:] == 0).all()) and bool(torch.isneginf(scores[ids == 0]).all())


def test_the_union_holds_both_stages() -> None:
    queries, both = build("MoLCombTopK2_4")
    union = [set(row) for row in both(queries, ITEMS)[1].tolist()]
    for name in ("MoLNaiveTopK2", "MoLAvgTopK4"):
        part = build(name)[1](queries, ITEMS)[1].tolist()
        assert all(set(row) <= whole for row, whole in zip(part, union, strict=True))


@pytest.mark.parametrize("name", ["MoLBruteForceTopK", *TWO_STAGE])
def test_items_of_half_precision(name: str) -> None:
    queries, items, gate = sides(dtype=torch.bfloat16)
    scores, ids = top_k_by_name(name)(items, gate, 0.5, IDS)(queries, 3)
    assert scores.dtype == torch.float32 and bool((ids > 0).all())


@pytest.mark.parametrize("name", COMPLETE)
def test_half_precision_is_ordered_as_by_the_exact_module(name: str) -> None:
    queries, items, gate = sides(dtype=torch.bfloat16)
    found, exact = (top_k_by_name(n)(items, gate, 0.5, IDS)(queries, ITEMS) for n in (name, "MoLBruteForceTopK"))
    torch.testing.assert_close(found[0], exact[0])
    assert torch.equal(found[1], exact[1])


@pytest.mark.parametrize("name", ["MoLBruteForceTopK", *TWO_STAGE])
@pytest.mark.parametrize(("rows", "items"), [(0, ITEMS), (QUERIES, 0), (QUERIES, 1), (1, 2)])
def test_few_or_no_queries_and_items(name: str, rows: int, items: int) -> None:
    queries, all_items, gate = sides()
    assert queries.gate is not None and all_items.gate is not None
    some = MoLQueries(queries.components[:rows], queries.gate[:rows])
    module = top_k_by_name(name)(MoLItems(all_items.components[:items], all_items.gate[:items]), gate, 0.5, IDS[:items])
    offsets = torch.arange(rows + 1)
    scores, ids = module(some, 3, offsets, IDS[:1].repeat(rows))
    wanted = torch.nn.functional.pad(IDS[1:items], (0, 3))[:3].expand(rows, 3)
    assert scores.shape == (rows, 3) and torch.equal(ids, wanted)
    ranks = module.rank_of_target(some, IDS[:1].repeat(rows), offsets, IDS[:1].repeat(rows), filter_history=True)
    assert torch.equal(ranks, torch.zeros(rows, dtype=torch.int64))


def test_each_product_of_components_finds_its_best() -> None:
    queries, module = build("MoLNaiveTopK1")
    products = torch.einsum("bqd,xpd->bqpx", queries.components, sides()[1].components)
    listed = module(queries, ITEMS)[1]
    for row, best in zip(listed, IDS[products.argmax(-1)].flatten(1), strict=True):
        assert set(row[row > 0].tolist()) == set(best.tolist())


def test_the_average_keeps_the_best_by_sum_and_mean() -> None:
    queries, module = build("MoLAvgTopK4")
    products = queries.components.sum(1) @ sides()[1].components.mean(1).T
    listed = module(queries, 4)[1]
    assert torch.equal(listed.sort(1).values, IDS[products.topk(4, 1).indices].sort(1).values)


def test_a_threshold_lets_about_as_many_through_as_are_wanted() -> None:
    g = torch.Generator().manual_seed(2)
    items = MoLItems(torch.randn(20_000, P_X, WIDTH, generator=g), torch.randn(20_000, P_Q * P_X, generator=g))
    queries, _, gate = sides()
    found = (top_k_by_name("MoLHIndexerTopK500")(items, gate, 0.5, torch.arange(20_000) + 1)(queries, 1000)[1] > 0).sum(
        1
    )
    assert bool((found > 350).all()) and bool((found <= 500 * 1.5 + 64).all())


def test_a_fit_finds_what_a_constant_mixture_weighs_heavily() -> None:
    """One pair of components carries all weight: a sum of all products is blind to that, a fit is not."""
    g = torch.Generator().manual_seed(3)
    items = MoLItems(torch.randn(4_000, P_X, WIDTH, generator=g))
    queries = MoLQueries(torch.randn(QUERIES, P_Q, WIDTH, generator=g))
    gate = MoLGate(w2=torch.zeros(P_Q * P_X, P_Q * P_X), b2=torch.tensor([0.0, 0.0, 0.0, 30.0, 0.0, 0.0]))
    exact, average, fitted = (
        top_k_by_name(name)(items, gate, 0.5, torch.arange(4_000) + 1)(queries, 20)[1]
        for name in ("MoLBruteForceTopK", "MoLAvgTopK60", "MoLFittedTopK60")
    )

    def share(found: Tensor) -> float:
        return float((found[:, :, None] == exact[:, None]).any(1).double().mean())

    assert share(average) < 0.7 and share(fitted) == 1.0


def test_what_an_index_holds_beside_the_items() -> None:
    held = {name: build(name)[1].index_bytes() for name in ("MoLBruteForceTopK", *TWO_STAGE)}
    means = ITEMS * WIDTH * 4
    assert held["MoLBruteForceTopK"] == held["MoLNaiveTopK3"] == 0
    assert held["MoLAvgTopK6"] == held["MoLCombTopK2_4"] == held["MoLFittedTopK6"] == means


def test_without_faiss_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *arguments: Any) -> Any:
        if name == "faiss":
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="try pip install faiss-cpu"):
        build("MoLNaiveFaissTopK5")


@pytest.mark.parametrize(
    "name", ["MoLNaiveTopK10", "MoLAvgTopK500", "MoLCombTopK5_200", "MoLNaiveFaissTopK5", "MoLFittedTopK7"]
)
def test_names(name: str) -> None:
    assert is_mol_top_k(name)


@pytest.mark.parametrize(
    "name", ["MoLNaiveTopK", "MoLAvgTopK0", "MoLCombTopK5", "MoLAvgTopK5_5", "Top", "MoLAvgTopK-1"]
)
def test_other_names_are_refused_with_the_known_ones(name: str) -> None:
    assert not is_mol_top_k(name)
    with pytest.raises(ValueError, match="expected MoLBruteForceTopK") as refusal:
        top_k_by_name(name)
    assert MOL_TOP_K_NAMES in str(refusal.value)


@pytest.mark.skipif(not FAISS, reason="FAISS is an optional extra (pip install faiss-cpu)")
def test_faiss_that_searches_every_cell_is_the_plain_search() -> None:
    queries, module = build("MoLNaiveFaissTopK5")
    wanted = build("MoLNaiveTopK5")[1](queries, 5)
    for found, expected in zip(module(queries, 5), wanted, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["MoLHIndexerTopK1000", "MoLAvgTopK1000", "MoLFittedTopK1000"])
def test_as_many_as_there_are_leave_nothing_out(name: str) -> None:
    """In a catalogue so large that the threshold comes from a sample."""
    g = torch.Generator().manual_seed(5)
    queries = MoLQueries(torch.randn(4, P_Q, WIDTH, generator=g))
    items = MoLItems(torch.randn(1000, P_X, WIDTH, generator=g))
    gate = sides(gated=False)[2]
    _, ids = top_k_by_name(name)(items, gate, 0.5, torch.arange(1, 1001))(queries, 1000)
    assert torch.equal(ids.sort(dim=1).values, torch.arange(1, 1001).expand(4, -1))


def test_each_product_finds_as_many_whatever_was_seen() -> None:
    queries, module = build("MoLNaiveTopK3")
    offsets, history = seen()
    for row in range(QUERIES):
        own = history[offsets[row] : offsets[row + 1]]
        left = (~torch.isin(IDS, own)).nonzero().flatten()
        components, items = queries.components[row], module.items.components[left]
        best = torch.einsum("nd,xmd->nmx", components, items).topk(3, dim=-1).indices
        wanted = set(IDS[left[best.flatten()]].tolist())
        found = module(queries, ITEMS, offsets, history)[1][row]
        assert set(found[found > 0].tolist()) == wanted
