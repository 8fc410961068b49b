"""A level of the search: equal to the definition on lists, and in every back-end to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.testing import Place, places
from ops.trie_step import NORMALIZATIONS, TrieStep, cpu, gpu, trie_step

PLACES = places(cpu.refuses)
FAST_PLACES = places(cpu.refuses, reference=False)
NOTHING = -math.inf


@dataclass(frozen=True)
class Problem:
    """One call; `children[s]` are the codes after state s, ascending."""

    children: list[list[int]]
    logits: Tensor
    states: Tensor
    scores: Tensor
    allowed: Tensor | None = None

    @property
    def level(self) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([0, *map(len, self.children)])
        tokens = torch.tensor([c for codes in self.children for c in codes], dtype=torch.int32)
        return lengths.cumsum(0).to(torch.int32), tokens

    def step(self, place: Place, k: int, normalization: str, most_children: int | None = None) -> TrieStep:
        arguments = place.put((self.logits, self.states, self.scores, *self.level))
        allowed = place.put(self.allowed)
        found = trie_step(
            *(*arguments, k),
            normalization=normalization,
            allowed=allowed,
            most_children=most_children,
            backend=place.backend,
        )
        return TrieStep(*(x.cpu() for x in found))


def by_definition(problem: Problem, k: int, normalization: str) -> list[tuple[list[tuple[float, ...]], int, float]]:
    """Of each request (score, parent, token, state) of its best children, how many, and the best score left out."""
    offsets, found = problem.level[0].tolist(), []
    for b, logits in enumerate(problem.logits.double().tolist()):
        ranked: list[tuple[float, ...]] = []
        for m, row in enumerate(logits):
            state, score = int(problem.states[b, m]), float(problem.scores[b, m])
            if state < 0 or score == NOTHING:
                continue
            nodes = {code: offsets[state] + i for i, code in enumerate(problem.children[state])}
            if problem.allowed is not None:
                own = problem.allowed if problem.allowed.dim() == 1 else problem.allowed[b]
                nodes = {code: node for code, node in nodes.items() if own[node]}
            over = {"vocabulary": row, "legal": [row[code] for code in nodes], "none": []}[normalization]
            top = max((x for x in over if x > NOTHING), default=0.0)
            whole = sum(math.exp(x - top) for x in over)
            log_sum = top + math.log(whole) if whole > 0 else 0.0
            ranked += [(row[code] - log_sum + score, m, code, node) for code, node in nodes.items()]
        ranked = sorted((x for x in ranked if x[0] > NOTHING), key=lambda x: (-x[0], x[1], x[2]))
        found.append((ranked[:k], len(ranked[:k]), ranked[k][0] if len(ranked) > k else NOTHING))
    return found


def assert_is(found: TrieStep, wanted: list[tuple[list[tuple[float, ...]], int, float]], k: int, rtol: float) -> None:
    for b, (best, count, pruned) in enumerate(wanted):
        padding = [(NOTHING, -1, -1, -1)] * (k - count)
        assert int(found.count_B[b]) == count
        names = [x[b].tolist() for x in (found.parents_BK, found.tokens_BK, found.states_BK)]
        assert list(zip(*names, strict=True)) == [x[1:] for x in best + padding]
        scores = torch.tensor([x[0] for x in best + padding] + [pruned], dtype=torch.float64)
        given_scores = torch.cat([found.scores_BK[b], found.pruned_B[b : b + 1]]).double()
        torch.testing.assert_close(given_scores, scores, rtol=rtol, atol=rtol)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small integers as logits and scores: exact where nothing is normalized, full of ties."""
    codes, states = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    children = [sorted(draw(st.sets(st.integers(0, codes - 1)))) for _ in range(states)]
    batch, beams = draw(st.integers(0, 3)), draw(st.integers(0, 4))

    def tensor(element: st.SearchStrategy[Any], *shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(element, min_size=count, max_size=count))).view(shape)

    value = st.one_of(st.integers(-2, 2).map(float), st.just(NOTHING))
    edges = sum(map(len, children))
    shape = draw(st.sampled_from([None, (edges,), (batch, edges)]))
    return Problem(
        children,
        tensor(value, batch, beams, codes).float(),
        tensor(st.integers(-1, states - 1), batch, beams).long(),
        tensor(value, batch, beams).float(),
        None if shape is None else tensor(st.booleans(), *shape).bool(),
    )


@pytest.mark.parametrize("place", PLACES)
@given(problem=problems(), k=st.integers(1, 30))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_the_definition_on_lists(place: Place, problem: Problem, k: int) -> None:
    assert_is(problem.step(place, k, "none"), by_definition(problem, k, "none"), k, 0.0)


def random_problem(
    batch: int = 3, beams: int = 7, codes: int = 70, states: int = 30, share: float = 0.4, seed: int = 0
) -> Problem:
    """Every logit and score is another number; some beams have no state, some no score; some states no children."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(states, codes, generator=generator) < share * torch.rand(states, 1, generator=generator) * 2
    children = [row.nonzero()[:, 0].tolist() for row in chosen]
    at = torch.randint(-1, states, (batch, beams), generator=generator)
    scores = torch.randn(batch, beams, generator=generator)
    scores[torch.rand(batch, beams, generator=generator) < 0.1] = NOTHING
    allowed = torch.rand(batch, sum(map(len, children)), generator=generator) < 0.5
    return Problem(children, 4 * torch.randn(batch, beams, codes, generator=generator), at, scores, allowed)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("filtered", ["no", "shared", "each"])
# Requests, beams, codes, states; fewer, about as many, and more children than k.
@pytest.mark.parametrize(
    ("shape", "k"), [((1, 1, 1, 1), 3), ((3, 4, 70, 30), 20), ((2, 3, 130, 5), 500), ((1, 17, 33, 9), 7)]
)
def test_equals_the_definition_on_random_scores(
    place: Place, normalization: str, filtered: str, shape: tuple[int, int, int, int], k: int
) -> None:
    problem = random_problem(*shape)
    assert problem.allowed is not None
    problem = replace(problem, allowed={"no": None, "shared": problem.allowed[0], "each": problem.allowed}[filtered])
    assert_is(problem.step(place, k, normalization), by_definition(problem, k, normalization), k, 2e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(place: Place, dtype: torch.dtype) -> None:
    problem = random_problem(seed=3)
    problem = replace(problem, logits=problem.logits.to(dtype), scores=problem.scores.to(dtype))
    if place.backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="no kernel for"):
            problem.step(place, 9, "legal")
        return
    found = problem.step(place, 9, "legal")
    assert found.scores_BK.dtype == found.pruned_B.dtype == torch.promote_types(dtype, torch.float32)
    exact = problem if dtype == torch.float64 else replace(problem, logits=problem.logits.float())
    # Scores of half precision repeat, so that only those of equal score may trade places.
    wanted = by_definition(exact, 9, "legal")
    for b, (best, count, _) in enumerate(wanted):
        assert int(found.count_B[b]) == count
        scores = torch.tensor([x[0] for x in best])
        torch.testing.assert_close(found.scores_BK[b, :count].float(), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equal_scores_go_to_the_lower_parent_then_the_lower_token(place: Place, normalization: str) -> None:
    codes = list(range(0, 90, 2))
    problem = Problem([codes], torch.zeros(2, 6, 90), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6))
    # Zeros of both signs are equal.
    problem.logits[:, ::2] = -0.0
    found = problem.step(place, 100, normalization)
    assert found.parents_BK[0].tolist() == [0] * 45 + [1] * 45 + [2] * 10
    assert found.tokens_BK[1].tolist() == (codes * 3)[:100]
    assert found.pruned_B.tolist() == found.scores_BK[:, -1].tolist()
    late = problem.scores.clone()
    late[:, 5] = 1.0
    raised = replace(problem, scores=late).step(place, 50, normalization)
    assert raised.parents_BK[0].tolist() == [5] * 45 + [0] * 5


@pytest.mark.parametrize("place", PLACES)
def test_many_ties_at_the_edge(place: Place) -> None:
    """More equal scores than are held at a time, best ones last."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 3, (1, 5, 1000), generator=generator).float()
    problem = Problem([list(range(1000))], logits, torch.zeros(1, 5, dtype=torch.int64), torch.arange(5.0)[None] / 4)
    for k in (1, 128, 700):
        assert_is(problem.step(place, k, "none"), by_definition(problem, k, "none"), k, 0.0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_zero_and_few_legal_children(place: Place, normalization: str) -> None:
    problem = random_problem(2, 4, 12, 9)
    dead = replace(problem, states=torch.full((2, 4), -1))
    assert problem.allowed is not None
    closed = replace(problem, allowed=torch.zeros_like(problem.allowed))
    none = replace(problem, children=[[]] * 9, allowed=None)
    for empty in (dead, closed, none, replace(problem, scores=torch.full((2, 4), NOTHING))):
        found = empty.step(place, 5, normalization)
        assert not found.count_B.any() and bool((found.pruned_B == NOTHING).all())
        assert bool((found.scores_BK == NOTHING).all())
        assert all(bool((x == -1).all()) for x in (found.parents_BK, found.tokens_BK, found.states_BK))
    one = Problem([[], [3]], torch.zeros(1, 2, 5), torch.tensor([[0, 1]]), torch.zeros(1, 2))
    found = one.step(place, 3, normalization)
    assert (found.count_B.tolist(), found.tokens_BK.tolist(), found.parents_BK.tolist()) == (
        [1],
        [[3, -1, -1]],
        [[1, -1, -1]],
    )
    assert float(found.scores_BK[0, 0]) == pytest.approx(
        -math.log(5) if normalization == "vocabulary" else 0.0, abs=1e-6
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_is_no_number_is_left_out_and_spoils_no_other_beam(place: Place, normalization: str) -> None:
    problem = random_problem(2, 6, 40, 8, share=0.9, seed=2)
    problem = replace(problem, allowed=None, states=problem.states.clamp_min(0), scores=torch.zeros(2, 6))
    whole = problem.step(place, 400, normalization)
    logits = problem.logits.clone()
    logits[0, 1, :] = float("nan")
    logits[1, 2, :] = NOTHING
    found = replace(problem, logits=logits).step(place, 400, normalization)
    for b, parent in ((0, 1), (1, 2)):
        kept = whole.parents_BK[b] != parent
        kept &= whole.parents_BK[b] >= 0
        count = int(found.count_B[b])
        assert count == int(kept.sum()) < int(whole.count_B[b])
        assert torch.equal(found.scores_BK[b, :count], whole.scores_BK[b][kept])
        assert torch.equal(found.states_BK[b, :count], whole.states_BK[b][kept])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalization", ["vocabulary", "legal"])
def test_large_logits_keep_their_digits(place: Place, normalization: str) -> None:
    problem = random_problem(2, 5, 60, 8, seed=5)
    shifted = replace(problem, logits=(problem.logits * 64).round() / 64 + 4096.0)
    wanted = replace(shifted, logits=shifted.logits - 4096.0)
    found = shifted.step(place, 30, normalization)
    for got, plain in zip(found, wanted.step(place, 30, normalization), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("place", PLACES)
def test_memory_layout_does_not_matter(place: Place) -> None:
    problem = random_problem(3, 5, 40, 12)
    wanted = problem.step(place, 11, "vocabulary")
    wide = torch.full((3, 9, 100), float("nan"))
    wide[:, 2:7, 30:70] = problem.logits
    shared = torch.zeros(40, 5, 3)
    shared[:] = problem.logits.permute(2, 1, 0)
    states = problem.states.T.contiguous().T
    for logits in (wide[:, 2:7, 30:70], shared.permute(2, 1, 0)):
        found = replace(problem, logits=logits, states=states).step(place, 11, "vocabulary")
        assert all(map(torch.equal, found, wanted))
    first = replace(problem, logits=problem.logits[:1, :1].expand(3, 5, 40))
    again = replace(problem, logits=first.logits.clone())
    assert all(map(torch.equal, first.step(place, 11, "legal"), again.step(place, 11, "legal")))


@pytest.mark.parametrize("place", PLACES)
def test_the_widest_state_is_enough_room(place: Place) -> None:
    problem = random_problem(3, 5, 40, 12)
    widest = max(map(len, problem.children))
    wanted = problem.step(place, 60, "legal")
    assert widest < 40
    assert all(map(torch.equal, problem.step(place, 60, "legal", most_children=widest), wanted))


@pytest.mark.parametrize("place", PLACES)
def test_requests_do_not_depend_on_one_another(place: Place) -> None:
    problem = random_problem(4, 5, 40, 12)
    whole = problem.step(place, 9, "legal")
    assert problem.allowed is not None
    for b in range(4):
        rows = slice(b, b + 1)
        alone = Problem(
            problem.children, problem.logits[rows], problem.states[rows], problem.scores[rows], problem.allowed[rows]
        )
        for got, wanted in zip(alone.step(place, 9, "legal"), whole, strict=True):
            assert torch.equal(got, wanted[rows])


@pytest.mark.parametrize(
    "place", [x for x in PLACES if x.values[0].device == "cpu" and x.values[0].backend != "triton"]
)
def test_a_state_that_is_not_there_is_named(place: Place) -> None:
    problem = random_problem(2, 3, 10, 4)
    states = problem.states.clone()
    states[1, 1] = 4
    with pytest.raises(IndexError, match="trie_step: got state 4, expected at most 3"):
        replace(problem, states=states).step(place, 2, "none")


@pytest.mark.parametrize("place", FAST_PLACES)
def test_operator_is_registered_soundly(place: Place) -> None:
    problem = random_problem(2, 3, 10, 4)
    inputs = place.put((problem.logits, problem.states, problem.scores, *problem.level))
    for allowed in (None, place.put(problem.allowed)):
        arguments = (*inputs, allowed, 5, "legal", 10, place.backend == "triton")
        torch.library.opcheck(torch.ops.gr.trie_step.default, arguments)


@pytest.mark.parametrize("place", FAST_PLACES)
def test_compiles_without_graph_breaks(place: Place) -> None:
    problem = random_problem(2, 3, 10, 4)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(trie_step(*inputs, 5, backend=place.backend))

    inputs = place.put((problem.logits, problem.states, problem.scores, *problem.level))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*inputs), run(*inputs)))


def test_more_children_than_places_are_left_to_others() -> None:
    logits = torch.zeros(1).expand(1, 1 << 20, 1 << 12)
    states = torch.zeros(1, dtype=torch.int64).expand(1, 1 << 20)
    arguments = (logits, states, states, None, None, None, 5, "none", 1 << 12)
    for refuses in (gpu.refuses, cpu.refuses):
        assert "expected under 2147483648" in (refuses(*arguments) or "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, "logits: got"),
        ({"logits": torch.zeros(2, 3, 4).long()}, "logits: got"),
        ({"states": torch.zeros(2, 2).long()}, "states: got"),
        ({"states": torch.zeros(2, 3).int()}, "states: got"),
        ({"scores": torch.zeros(2, 3).long()}, "scores: got"),
        ({"scores": torch.zeros(3, 2)}, "scores: got"),
        ({"allowed": torch.zeros(4).bool()}, "allowed: got"),
        ({"allowed": torch.zeros(2, 3)}, "allowed: got"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Tensor], message: str) -> None:
    plain = Problem([[0, 1, 3]], torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=f"trie_step {message}"):
        replace(plain, **changes).step(Place("auto"), 2, "none")


@pytest.mark.parametrize(
    ("offsets", "tokens", "k", "normalization", "message"),
    [
        (torch.zeros(2), torch.zeros(3).int(), 2, "none", "offsets and tokens: got"),
        (torch.zeros(2).int(), torch.zeros(3).long(), 2, "none", "offsets and tokens: got"),
        (torch.zeros(0).int(), torch.zeros(3).int(), 2, "none", "offsets and tokens: got"),
        (torch.zeros(2).int(), torch.zeros(3).int(), 0, "none", "k: got 0"),
        (torch.zeros(2).int(), torch.zeros(3).int(), 2, "softmax", "normalization: got 'softmax'"),
    ],
)
def test_bad_levels_are_named(offsets: Tensor, tokens: Tensor, k: int, normalization: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"trie_step {message}"):
        trie_step(
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3).long(),
            torch.zeros(2, 3),
            offsets,
            tokens,
            k,
            normalization=normalization,
        )
