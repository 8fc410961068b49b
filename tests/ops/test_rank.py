"""Rank of a target and top-k: blocked against sorting everything, and both against the definition on lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.rank import blocked, rank_of_target, topk

BACKENDS = ["reference", "cpu"]


def jagged(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filter_history", [True, False])
@given(data=problems())
@settings(max_examples=60, deadline=None)
def test_equals_the_definition_on_lists(backend: str, filter_history: bool, data: dict[str, Any]) -> None:
    arguments = (data["queries"], data["table"], data["candidates"])
    options: dict[str, Any] = {"filter_history": filter_history, "backend": backend}
    ranks = rank_of_target(*arguments, data["targets"], *jagged(data["seen"]), **options)
    scores, ids, valid = topk(*arguments, data["k"], *jagged(data["seen"]), **options)
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
    monkeypatch.setattr(blocked, "_block_rows", lambda candidates: 7)
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(400, width, generator=generator).to(dtype)
    queries = torch.randn(31, width, generator=generator).to(dtype)
    candidates = torch.arange(1, 400)
    if not contiguous:
        candidates = candidates[torch.rand(399, generator=generator) < 0.7]
    targets = candidates[torch.randint(0, len(candidates), (31,), generator=generator)]
    seen = jagged([torch.randint(0, 450, (b,), generator=generator).tolist() for b in range(31)])
    wanted = rank_of_target(queries, table, candidates, targets, *seen, backend="reference")
    assert torch.equal(rank_of_target(queries, table, candidates, targets, *seen, backend="cpu"), wanted)
    assert len(wanted.unique()) > 5
    for value, reference in zip(
        topk(queries, table, candidates, 20, *seen, backend="cpu"),
        topk(queries, table, candidates, 20, *seen, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_model_gains_nothing(backend: str) -> None:
    table, candidates = torch.ones(101, 4), torch.arange(1, 101)
    targets = torch.randperm(100, generator=torch.Generator().manual_seed(0)) + 1
    ranks = rank_of_target(torch.ones(100, 4), table, candidates, targets, *jagged([[]] * 100), backend=backend)
    assert torch.equal(ranks, targets)
    _, ids, _ = topk(torch.ones(2, 4), table, candidates, 5, *jagged([[2], []]), backend=backend)
    assert ids.tolist() == [[1, 3, 4, 5, 6], [1, 2, 3, 4, 5]]


def test_target_never_outranks_its_own_copies_by_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    # Every row twice: the second copy of a row must stand right behind the first, whatever the product rounds to.
    table = torch.randn(500, 50, generator=generator).repeat_interleave(2, dim=0)
    queries, none_seen = torch.randn(64, 50, generator=generator), jagged([[]] * 64)
    first = 2 * torch.randint(0, 500, (64,), generator=generator)
    candidates = torch.arange(1000)
    ahead = rank_of_target(queries, table, candidates, first, *none_seen)
    behind = rank_of_target(queries, table, candidates, first + 1, *none_seen)
    assert torch.equal(behind, ahead + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_misses(backend: str) -> None:
    table, candidates = torch.eye(5), torch.tensor([1, 2, 4])
    targets = torch.tensor([2, 3, 0, 99, 2])
    seen = jagged([[2, 2], [], [], [], [1, 1, 0, 99]])
    queries = torch.ones(5, 5)
    assert rank_of_target(queries, table, candidates, targets, *seen, backend=backend).tolist() == [0, 0, 0, 0, 1]
    unfiltered = rank_of_target(queries, table, candidates, targets, *seen, filter_history=False, backend=backend)
    assert unfiltered.tolist() == [2, 0, 0, 0, 2]


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

    def call(queries: torch.Tensor, table: torch.Tensor, candidates: torch.Tensor, seen: tuple[Any, Any]) -> None:
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
        rows = blocked._block_rows(candidates)
        assert rows >= 1
        assert rows == 1 or rows * candidates <= 2**26
