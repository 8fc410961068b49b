"""Rank of a target and top-k: blocks and Triton against sorting everything, and all against the definition on lists."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.rank import blocked, gpu, rank_of_target, reference, topk
from ops.testing import Place, places

PLACES = places(blocked.refuses)
FAST_PLACES = places(blocked.refuses, reference=False)
TRITON = [place for place in FAST_PLACES if place.values[0].backend == "triton"]


def jagged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return lengths.cumsum(0), torch.tensor([x for row in rows for x in row], dtype=torch.int64)


def ranked(scores: dict[int, float], seen: list[int]) -> list[int]:
    """Unseen candidates, best first, ties by id (candidates ascend)."""
    return sorted((x for x in scores if x not in seen), key=lambda x: (-scores[x], x))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Small integers as coordinates: exact in float32, full of ties."""
    rows, batch, width = draw(st.integers(1, 12)), draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 3]))
    ids = st.integers(0, rows + 3)
    value = st.integers(-2, 2).map(float)
    return {
        "table": torch.tensor([[draw(value) for _ in range(width)] for _ in range(rows)]),
        "queries": torch.tensor([[draw(value) for _ in range(width)] for _ in range(batch)]).view(batch, width),
        "candidates": torch.tensor(sorted(draw(st.sets(st.integers(0, rows - 1)))), dtype=torch.int64),
        "targets": torch.tensor([draw(ids) for _ in range(batch)], dtype=torch.int64),
        "seen": [draw(st.lists(ids, max_size=8)) for _ in range(batch)],
        "k": draw(st.integers(1, 15)),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("filter_history", [True, False])
@given(data=problems())
@settings(max_examples=60, deadline=None)
def test_equals_the_definition_on_lists(place: Place, filter_history: bool, data: dict[str, Any]) -> None:
    arguments = place.put((data["queries"], data["table"], data["candidates"]))
    seen = place.put(jagged(data["seen"]))
    options: dict[str, Any] = {"filter_history": filter_history, "backend": place.backend}
    ranks = rank_of_target(*arguments, place.put(data["targets"]), *seen, **options)
    scores, ids, valid = topk(*arguments, data["k"], *seen, **options)
    assert ranks.dtype == ids.dtype == valid.dtype == torch.int64
    assert scores.shape == ids.shape == (len(data["queries"]), data["k"])
    for b, query in enumerate(data["queries"]):
        exact = {int(x): float(query @ data["table"][x]) for x in data["candidates"]}
        order = ranked(exact, data["seen"][b] if filter_history else [])
        target = int(data["targets"][b])
        assert int(ranks[b]) == (order.index(target) + 1 if target in order else 0)
        best = order[: data["k"]]
        padding = data["k"] - len(best)
        assert int(valid[b]) == len(best)
        assert ids[b].tolist() == best + [0] * padding
        assert scores[b].tolist() == [exact[x] for x in best] + [float("-inf")] * padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("width", [1, 50, 64])
def test_blocked_equals_reference_on_random_scores(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, contiguous: bool, width: int
) -> None:
    # Several blocks, the last one short.
    monkeypatch.setattr(blocked, "block_rows", lambda candidates, device: 7)
    data = random_problem(31, 400, width, dtype, contiguous)
    wanted = rank_of_target(*data.for_rank, backend="reference")
    assert torch.equal(rank_of_target(*data.for_rank, backend="cpu"), wanted)
    assert len(wanted.unique()) > 5
    for value, expected in zip(
        topk(*data.for_topk(20), backend="cpu"), topk(*data.for_topk(20), backend="reference"), strict=True
    ):
        torch.testing.assert_close(value, expected)


class Problem(NamedTuple):
    queries: Tensor
    table: Tensor
    candidates: Tensor
    targets: Tensor
    seen: tuple[Tensor, Tensor]

    @property
    def for_rank(self) -> tuple[Tensor, ...]:
        return (*self[:4], *self.seen)

    def for_topk(self, k: int) -> tuple[Any, ...]:
        return (*self[:3], k, *self.seen)


def random_problem(batch: int, rows: int, width: int, dtype: torch.dtype, contiguous: bool = True) -> Problem:
    """Row b has seen b ids, some of them twice, some no candidates; some have seen their target."""
    generator = torch.Generator().manual_seed(width)
    candidates = torch.arange(1, rows)
    if not contiguous:
        candidates = candidates[torch.rand(rows - 1, generator=generator) < 0.7]
    targets = candidates[torch.randint(0, len(candidates), (batch,), generator=generator)]
    seen = [torch.randint(0, rows + 50, (b,), generator=generator).tolist() for b in range(batch)]
    if batch > 3:
        seen[3].append(int(targets[3]))
    table, queries = (torch.randn(size, width, generator=generator).to(dtype) for size in (rows, batch))
    return Problem(queries, table, candidates, targets, jagged(seen))


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contiguous", [True, False], ids=["range", "gaps"])
# One split and several, the last one short; one query, blocks of queries, the last one short; one piece of columns.
@pytest.mark.parametrize(("shape", "k"), [((1, 5, 1), 9), ((40, 400, 50), 20), ((7, 2500, 16), 130), ((3, 300, 96), 1)])
def test_triton_ranks_within_rounding(
    shape: tuple[int, int, int], k: int, contiguous: bool, dtype: torch.dtype, place: Place
) -> None:
    """No score is off by more than rounding, and no order is unlike that of the exact scores by more."""
    data = random_problem(*shape, dtype, contiguous)
    exact = data.queries.double() @ data.table[data.candidates].double().T
    bound = 1e-6 * float(data.queries.float().norm(dim=1).max() * data.table.float().norm(dim=1).max())
    for b, ids in enumerate(data.seen[1].split(data.seen[0].diff().tolist())):
        exact[b, torch.isin(data.candidates, ids)] = float("-inf")
    own = exact[torch.arange(shape[0]), torch.searchsorted(data.candidates, data.targets)][:, None]
    hit = own[:, 0] > float("-inf")

    ranks = rank_of_target(*place.put(data.for_rank), backend="triton").cpu()
    assert torch.equal(ranks > 0, hit)
    assert bool((~hit | (ranks >= 1 + (exact > own + bound).sum(1))).all())
    assert bool((~hit | (ranks <= (exact >= own - bound).sum(1))).all())

    scores, ids, valid = (x.cpu() for x in topk(*place.put(data.for_topk(k)), backend="triton"))
    assert scores.dtype == torch.float32
    assert torch.equal(valid, (exact > float("-inf")).sum(1).clamp_max(k))
    held = torch.arange(k) < valid[:, None]
    best = exact.topk(min(k, exact.shape[1])).values
    best = torch.cat([best, best.new_full((len(best), k - best.shape[1]), float("-inf"))], dim=1)
    theirs = exact.gather(1, torch.searchsorted(data.candidates, ids).clamp_max(exact.shape[1] - 1))
    for name, wanted in (("best", best), ("their own", theirs)):
        assert bool((~held | ((scores - wanted).abs() <= bound)).all()), name
    assert bool((held | ((scores == float("-inf")) & (ids == 0))).all())
    assert bool((scores.diff(dim=1) <= 0)[held[:, 1:]].all())
    for row, count in zip(ids, valid, strict=True):
        assert len(set(row[:count].tolist())) == count


@pytest.mark.parametrize("place", TRITON)
def test_triton_takes_rows_in_blocks_of_given_scores(place: Place) -> None:
    generator = torch.Generator().manual_seed(0)
    data = random_problem(13, 300, 4, torch.float32)
    # Halves: full of ties.
    scores = torch.randint(-4, 5, (13, 299), generator=generator) / 2
    held = place.put(scores.float())
    candidates, targets, seen = place.put((data.candidates, data.targets, data.seen))

    def blocks() -> list[gpu.Block]:
        return [(slice(b, min(b + 5, 13)), gpu.given(held[b : b + 5])) for b in (0, 5, 10)]

    wanted = reference.rank_by_scores(scores, data.candidates, data.targets, data.seen)
    assert torch.equal(gpu.rank_in_blocks(blocks(), candidates, targets, seen).cpu(), wanted)
    for got, value in zip(
        gpu.topk_in_blocks(blocks(), candidates, 30, seen, 13),
        reference.topk_by_scores(scores, data.candidates, 30, data.seen),
        strict=True,
    ):
        assert torch.equal(got.cpu(), value.to(got.dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("place", TRITON)
def test_triton_leaves_out_what_is_no_number(place: Place) -> None:
    """On a GPU nothing looks beforehand; the values of a CPU tensor are refused, so the kernels are called directly."""
    table = torch.tensor([[1.0], [float("nan")], [3.0], [float("-inf")], [2.0]])
    queries, targets = torch.ones(5, 1), torch.arange(5)
    ids = torch.arange(5)
    ranks = gpu.rank_of_target(*place.put((queries, table, ids, targets)), None)
    assert ranks.tolist() == [3, 0, 1, 0, 2]
    scores, best, valid = gpu.topk(*place.put((queries[:1], table, ids)), 4, None)
    assert scores.tolist() == [[3.0, 2.0, 1.0, float("-inf")]]
    assert (best.tolist(), valid.tolist()) == ([[2, 4, 0, 0]], [3])


@pytest.mark.parametrize("place", PLACES)
def test_a_constant_model_gains_nothing(place: Place) -> None:
    table, candidates = place.put((torch.ones(101, 4), torch.arange(1, 101)))
    queries, targets = place.put((torch.ones(100, 4), torch.randperm(100, generator=torch.Generator()) + 1))
    nothing, something = place.put((jagged([[]] * 100), jagged([[2], []])))
    ranks = rank_of_target(queries, table, candidates, targets, *nothing, backend=place.backend)
    assert torch.equal(ranks, targets)
    _, ids, _ = topk(queries[:2], table, candidates, 5, *something, backend=place.backend)
    assert ids.tolist() == [[1, 3, 4, 5, 6], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("place", PLACES)
def test_target_never_outranks_its_own_copies_by_rounding(place: Place) -> None:
    generator = torch.Generator().manual_seed(3)
    # Every row twice: the second copy of a row must stand right behind the first, whatever the product rounds to.
    rows, queries = torch.randn(500, 50, generator=generator), torch.randn(64, 50, generator=generator)
    if place.backend == "triton" and place.device == "cpu":
        # The interpreter multiplies by numpy, which rounds by a row's place on some machines: eighths are exact.
        rows, queries = (8 * rows).round() / 8, (8 * queries).round() / 8
    table = place.put(rows.repeat_interleave(2, dim=0))
    queries, none_seen = place.put((queries, jagged([[]] * 64)))
    first = place.put(2 * torch.randint(0, 500, (64,), generator=generator))
    candidates = place.put(torch.arange(1000))
    ahead = rank_of_target(queries, table, candidates, first, *none_seen, backend=place.backend)
    behind = rank_of_target(queries, table, candidates, first + 1, *none_seen, backend=place.backend)
    assert torch.equal(behind, ahead + 1)


@pytest.mark.parametrize("place", PLACES)
def test_misses(place: Place) -> None:
    seen = jagged([[2, 2], [], [], [], [1, 1, 0, 99]])
    targets = torch.tensor([2, 3, 0, 99, 2])
    arguments = place.put((torch.ones(5, 5), torch.eye(5), torch.tensor([1, 2, 4]), targets, *seen))
    ranks = partial(rank_of_target, *arguments, backend=place.backend)
    assert ranks().tolist() == [0, 0, 0, 0, 1]
    assert ranks(filter_history=False).tolist() == [2, 0, 0, 0, 2]


@pytest.mark.parametrize("place", FAST_PLACES)
def test_operators_are_registered_soundly(place: Place) -> None:
    data, triton = Problem(*place.put(tuple(random_problem(5, 40, 8, torch.float32)))), place.backend == "triton"
    for seen in (data.seen, (None, None)):
        torch.library.opcheck(torch.ops.gr.rank_of_target.default, (*data[:4], *seen, triton))
        torch.library.opcheck(torch.ops.gr.topk.default, (*data[:3], 7, *seen, triton))


@pytest.mark.parametrize("place", FAST_PLACES)
def test_is_compiled_whole(place: Place) -> None:
    data = random_problem(5, 40, 8, torch.float32)

    def both(*arguments: Tensor) -> tuple[Tensor, ...]:
        ranks = rank_of_target(*arguments, backend=place.backend)
        return ranks, *topk(*arguments[:3], 7, *arguments[4:], backend=place.backend)

    arguments = place.put(data.for_rank)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(*arguments), both(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("place", PLACES)
def test_strided_inputs(place: Place) -> None:
    data = random_problem(9, 70, 16, torch.float32)
    plain = rank_of_target(*data.for_rank, backend="reference")
    wide = torch.full((79, 40), float("nan"))
    wide[:9, 3:19], wide[9:, 20:36] = data.queries, data.table
    ids = torch.stack([data.candidates, -data.candidates], dim=1)[:, 0]
    for pair in ((wide[:9, 3:19], wide[9:, 20:36]), (data.queries.T.clone().T, data.table.T.clone().T)):
        arguments = place.put((*pair, ids, data.targets, *data.seen))
        assert torch.equal(rank_of_target(*arguments, backend=place.backend).cpu(), plain)


def test_ids_above_two_to_the_24_stay_apart() -> None:
    """Neighbouring ids that one float32 cannot tell apart, through a table that is a broadcast view."""
    big = 2**24
    table = torch.tensor([[1.0]]).expand(big + 10, 1)
    candidates = torch.tensor([big, big + 1, big + 2, big + 3])
    seen = jagged([[big + 1]])
    assert rank_of_target(torch.ones(1, 1), table, candidates, torch.tensor([big + 2]), *seen).tolist() == [2]
    assert topk(torch.ones(1, 1), table, candidates, 3, *seen)[1].tolist() == [[big, big + 2, big + 3]]


@pytest.mark.parametrize("function", ["rank", "topk"])
def test_bad_arguments_are_named(function: str) -> None:
    queries, table, candidates = torch.ones(2, 3), torch.ones(6, 3), torch.arange(1, 6)
    seen = jagged([[], []])

    def call(queries: Tensor, table: Tensor, candidates: Tensor, seen: tuple[Any, Any]) -> None:
        if function == "rank":
            rank_of_target(queries, table, candidates, torch.tensor([1, 2])[: len(queries)], *seen)
        else:
            topk(queries, table, candidates, 2, *seen)

    for bad in (float("nan"), float("inf"), 1e38):
        with pytest.raises(ValueError, match="expected finite products"):
            call(queries * bad, table * 10, candidates, seen)
        with pytest.raises(ValueError, match="expected finite products"):
            call(queries * 10, table * bad, candidates, seen)
    for ids in ([2, 1], [1, 1], [-1, 2], [1, 6]):
        with pytest.raises(ValueError, match="candidate_ids: expected ascending"):
            call(queries, table, torch.tensor(ids), seen)
    with pytest.raises(ValueError, match="seen_offsets: got"):
        call(queries, table, candidates, jagged([[]]))
    with pytest.raises(ValueError, match="queries and table: got"):
        call(queries[:, :2], table, candidates, seen)


def test_k_and_targets_are_checked() -> None:
    arguments = (torch.ones(2, 3), torch.ones(6, 3), torch.arange(1, 6))
    with pytest.raises(ValueError, match="k: got 0"):
        topk(*arguments, 0, *jagged([[], []]))
    with pytest.raises(ValueError, match="targets: got"):
        rank_of_target(*arguments, torch.tensor([1]), *jagged([[], []]))


def test_blocks_stay_within_their_bounds() -> None:
    for candidates in (1, 3_883, 10**6, 10**9):
        rows = blocked.block_rows(candidates, torch.device("cpu"))
        assert rows >= 1
        assert rows == 1 or rows * candidates <= 2**26
