"""Policies against collisions: what each promises, against item-by-item loops that say the same."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers import reassignment
from generative_recommenders.tokenizers.collisions import POLICIES, Resolution, resolve
from generative_recommenders.tokenizers.matching import (
    first_choices,
    min_cost_codes,
    nearest_with_room,
    sinkhorn_codes,
)
from generative_recommenders.tokenizers.quantizer import ProductQuantizer, RandomQuantizer, ResidualQuantizer
from generative_recommenders.tokenizers.reassignment import nearest_codes
from generative_recommenders.tokenizers.tuple_space import TupleSpace

WIDTH = 6
CHANGING = [policy for policy in POLICIES if policy not in ("dedup", "none")]


def residual(sizes: tuple[int, ...], seed: int = 0) -> ResidualQuantizer:
    generator = torch.Generator().manual_seed(seed)
    return ResidualQuantizer(
        [torch.randn(size, WIDTH, generator=generator) / 2**level for level, size in enumerate(sizes)]
    )


def product(sizes: tuple[int, ...], seed: int = 0) -> ProductQuantizer:
    generator = torch.Generator().manual_seed(seed)
    return ProductQuantizer([torch.randn(size, WIDTH // len(sizes), generator=generator) for size in sizes])


def items(count: int, seed: int = 0, copies: int = 1) -> Tensor:
    """`copies` rows of each embedding, mixed."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(-(-count // copies), WIDTH, generator=generator).repeat(copies, 1)[:count]
    return x_ND[torch.randperm(count, generator=generator)]


def solve(policy: str, quantizer: ResidualQuantizer | ProductQuantizer, x_ND: Tensor, **options: object) -> Resolution:
    return resolve(policy, quantizer, x_ND, quantizer.encode(x_ND), **options)  # type: ignore[arg-type]


def tuples(codes_NL: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in codes_NL.tolist()]


def error_of(quantizer: ResidualQuantizer, x_ND: Tensor, codes_NL: Tensor) -> float:
    return float((quantizer.reconstruct(codes_NL) - x_ND).square().sum())


@pytest.mark.parametrize("policy", CHANGING)
@pytest.mark.parametrize("make", [residual, product])
@pytest.mark.parametrize("copies", [1, 9, 300])
def test_every_item_gets_a_tuple_of_its_own_and_only_colliding_ones_move(policy, make, copies) -> None:  # type: ignore[no-untyped-def]
    quantizer, x_ND = make((8, 8, 8)), items(300, copies=copies)
    before = tuples(quantizer.encode(x_ND))
    result = solve(policy, quantizer, x_ND)
    after = tuples(result.codes_NL)
    assert len(set(after)) == 300
    assert (result.unresolved, result.sizes) == (0, (8, 8, 8))
    alone = [row for row, codes in enumerate(before) if before.count(codes) == 1]
    assert [after[row] for row in alone] == [before[row] for row in alone]
    assert result.changed == sum(old != new for old, new in zip(before, after, strict=True)) > 0
    quantizer.check_codes(result.codes_NL)
    assert torch.equal(solve(policy, quantizer, x_ND).codes_NL, result.codes_NL)


@pytest.mark.parametrize("policy", CHANGING)
@pytest.mark.parametrize("sizes", [(4, 4, 4), (64,), (1, 64), (64, 1), (2, 16, 2)])
def test_a_full_space_is_filled_to_the_last_tuple(policy: str, sizes: tuple[int, ...]) -> None:
    result = solve(policy, residual(sizes), items(64, copies=16))
    assert sorted(tuples(result.codes_NL)) == list(itertools.product(*map(range, sizes)))


@pytest.mark.parametrize("policy", CHANGING)
def test_more_items_than_tuples_is_refused_in_one_line(policy: str) -> None:
    with pytest.raises(DataError, match="65 items beside 0 tuples in use, expected at most 64") as caught:
        solve(policy, residual((4, 4, 4)), items(65))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", CHANGING)
@pytest.mark.parametrize("copies", [1, 5])
def test_small_blocks_give_the_same_codes(monkeypatch: pytest.MonkeyPatch, policy: str, copies: int) -> None:
    """Residuals of small integers have exact distances, so that only the order of work differs."""
    x_ND = items(300, copies=copies).mul(4).round()
    quantizer = ResidualQuantizer([items(8, seed).mul(3).round() for seed in (5, 6, 7)])
    whole = solve(policy, quantizer, x_ND).codes_NL
    monkeypatch.setattr(reassignment.Reassignment._blocks, "__defaults__", (24,))
    monkeypatch.setattr(reassignment, "BLOCK_ENTRIES", 24)
    monkeypatch.setattr(reassignment, "KERNEL_ENTRIES", 24)
    assert torch.equal(solve(policy, quantizer, x_ND).codes_NL, whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_taken_tuples_are_neither_used_nor_needed(policy: str) -> None:
    quantizer, x_ND = residual((8, 8, 8)), items(300, copies=3)
    old = solve(policy, quantizer, x_ND[:200])
    new = solve(policy, quantizer, x_ND[200:], taken_ML=old.codes_NL)
    both = tuples(old.codes_NL) + tuples(new.codes_NL)
    if policy == "none":
        assert new.unresolved == 300 - len(set(both)) - old.unresolved > 0
        assert torch.equal(new.codes_NL, quantizer.encode(x_ND[200:]))
    else:
        assert len(set(both)) == 300


def test_dedup_counts_the_items_of_a_tuple_by_row_and_goes_on_after_old_ones() -> None:
    quantizer, x_ND = residual((4, 4)), items(200, copies=4)
    result = solve("dedup", quantizer, x_ND)
    seen: dict[tuple[int, ...], int] = {}
    for codes in tuples(result.codes_NL):
        assert codes[2] == seen.get(codes[:2], 0)
        seen[codes[:2]] = codes[2] + 1
    assert result.sizes == (4, 4, max(seen.values()))
    assert torch.equal(result.codes_NL[:, :2], quantizer.encode(x_ND))
    assert (result.changed, result.unresolved) == (0, 0)
    # Rows that went away leave gaps, which stay.
    kept = result.codes_NL[::2]
    more = solve("dedup", quantizer, x_ND, taken_ML=kept, width=500)
    highest: dict[tuple[int, ...], int] = {}
    for codes in tuples(kept):
        highest[codes[:2]] = max(highest.get(codes[:2], 0), codes[2] + 1)
    for codes in tuples(more.codes_NL):
        assert codes[2] == highest.get(codes[:2], 0)
        highest[codes[:2]] = codes[2] + 1
    assert more.sizes == (4, 4, 500)


def test_none_counts_what_it_leaves() -> None:
    quantizer, x_ND = residual((4, 4)), items(200)
    result = solve("none", quantizer, x_ND)
    assert torch.equal(result.codes_NL, quantizer.encode(x_ND))
    assert result.unresolved == 200 - len(set(tuples(result.codes_NL))) > 0
    assert result.changed == 0


def test_greedy_is_the_loop_over_items_nearest_first() -> None:
    """One prefix and room for all, so that only last codes change."""
    quantizer, x_ND = residual((1, 64)), items(50, copies=2)
    start = quantizer.encode(x_ND)
    distance_NC = quantizer.distances(x_ND, start, 1)
    own_N = distance_NC.gather(1, start[:, 1:])[:, 0]
    expected = start[:, 1].tolist()
    used, pending = set(), []
    for row in sorted(range(50), key=lambda row: (own_N[row], row)):
        pending += [row] if expected[row] in used else []
        used.add(expected[row])
    assert len(pending) > 20
    for row in pending:
        expected[row] = next(code for code in distance_NC[row].argsort(stable=True).tolist() if code not in used)
        used.add(expected[row])
    assert solve("greedy", quantizer, x_ND).codes_NL[:, 1].tolist() == expected


def test_greedy_changes_the_level_before_when_a_prefix_is_full() -> None:
    quantizer = ResidualQuantizer(
        [torch.tensor([[0.0], [10.0], [30.0]]), torch.tensor([[-1.0], [1.0]])],
    )
    x_ND = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    # Two stay below 0, two go to 10 (nearest -1 first), the last to 30.
    codes = solve("greedy", quantizer, x_ND).codes_NL
    assert tuples(codes) == [(0, 1), (0, 0), (1, 0), (1, 1), (2, 0)]


def test_first_free_is_the_loop_over_items_in_order() -> None:
    quantizer, x_ND, nearest = product((8, 8, 8)), items(180, copies=4), 6
    start = quantizer.encode(x_ND)
    rank = [quantizer.distances(x_ND, start, level).argsort(dim=1, stable=True)[:, :nearest] for level in range(3)]
    expected = tuples(start)
    used, pending = set(), []
    for row, codes in enumerate(expected):
        pending += [row] if codes in used else []
        used.add(codes)
    assert len(pending) > 90
    for level in (2, 1, 0):
        left = []
        for row in pending:
            choices = [
                (*start[row, :level].tolist(), code, *start[row, level + 1 :].tolist())
                for code in rank[level][row].tolist()
            ]
            free = [codes for codes in choices if codes not in used]
            expected[row] = free[0] if free else expected[row]
            used.add(expected[row])
            left += [] if free else [row]
        pending = left
    assert not pending
    assert tuples(solve("first_free", quantizer, x_ND, nearest=nearest).codes_NL) == expected


def test_first_free_chooses_the_levels_after_the_changed_one_anew() -> None:
    quantizer = ResidualQuantizer([torch.tensor([[0.0], [3.0]]), torch.tensor([[0.9], [-2.0]])])
    x_ND = torch.tensor([[0.9], [0.9], [0.95]])
    assert tuples(solve("first_free", quantizer, x_ND).codes_NL) == [(0, 0), (0, 1), (1, 1)]


def test_product_is_the_loop_over_single_substitutions() -> None:
    quantizer, x_ND, nearest = product((8, 8, 8)), items(200, copies=4), 7
    start = quantizer.encode(x_ND)
    distances = [quantizer.distances(x_ND, start, level) for level in range(3)]
    own_N = sum(d.gather(1, start[:, [level]])[:, 0].double() for level, d in enumerate(distances))
    expected, shared = tuples(start), [row for row in range(200) if tuples(start).count(tuples(start)[row]) > 1]
    used = set(expected) - {expected[row] for row in shared}
    order, pending = sorted(shared, key=lambda row: (own_N[row], row)), []  # type: ignore[index]
    for row in order:
        pending += [row] if expected[row] in used else []
        used.add(expected[row])
    for row in pending:
        changes = sorted(
            (float(distances[level][row, code]), level, rank, code)
            for level in range(3)
            for rank, code in enumerate(distances[level][row].argsort(stable=True)[:nearest].tolist())
            if code != start[row, level]
        )
        options = [(*expected[row][:level], code, *expected[row][level + 1 :]) for _, level, _, code in changes]
        expected[row] = next(codes for codes in options if codes not in used)
        used.add(expected[row])
    assert tuples(solve("product", quantizer, x_ND, nearest=nearest).codes_NL) == expected


def test_assignment_has_the_least_error_of_all_within_a_prefix() -> None:
    quantizer, x_ND = residual((1, 64)), items(50)
    errors = {policy: error_of(quantizer, x_ND, solve(policy, quantizer, x_ND).codes_NL) for policy in CHANGING}
    assert errors["assignment"] < min(error for policy, error in errors.items() if policy != "assignment")


def test_a_tuple_of_more_than_63_bits_is_resolved_too() -> None:
    quantizer = residual((256,) * 9)
    x_ND = items(300, copies=50)
    for policy in CHANGING:
        assert len(set(tuples(solve(policy, quantizer, x_ND).codes_NL))) == 300
        assert torch.equal(solve(policy, quantizer, x_ND).codes_NL, solve(policy, quantizer, x_ND, seed=3).codes_NL)


def test_codes_without_vectors_can_be_reassigned() -> None:
    quantizer = RandomQuantizer(
        (8, 8), torch.randint(2**60, (2, WIDTH + 1), generator=torch.Generator().manual_seed(0))
    )
    x_ND = items(60, copies=6)
    for policy in CHANGING:
        result = resolve(policy, quantizer, x_ND, quantizer.encode(x_ND))
        assert len(set(tuples(result.codes_NL))) == 60


def test_half_precision_and_no_items_are_legal() -> None:
    quantizer, x_ND = residual((8, 8, 8)), items(100, copies=3).half()
    assert len(set(tuples(solve("greedy", quantizer, x_ND).codes_NL))) == 100
    for policy in POLICIES:
        assert len(solve(policy, quantizer, x_ND[:0]).codes_NL) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "best"}, "collision policy: got 'best', expected one of dedup"),
        ({"nearest": 0}, "got nearest 0"),
        ({"width": -1}, "width -1"),
        ({"x_ND": items(9)}, "10 rows of codes for 9 embeddings"),
        ({"codes_NL": torch.full((10, 2), 8)}, "codes of level 0: got 8"),
        ({"taken_ML": torch.zeros(3, 3, dtype=torch.int64)}, r"taken codes: got shape \(3, 3\), expected \(items, 2\)"),
        ({"policy": "dedup", "taken_ML": torch.zeros(3, 2, dtype=torch.int64)}, r"expected \(items, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    quantizer, x_ND = residual((8, 8)), items(10)
    arguments = {"policy": "greedy", "quantizer": quantizer, "x_ND": x_ND, "codes_NL": quantizer.encode(x_ND)} | change
    with pytest.raises(DataError, match=message) as caught:
        resolve(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_first_choices_equal_the_loop(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 5))
    keys = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=rows * columns, max_size=rows * columns)), np.int64)
    keys = keys.reshape(rows, columns)
    blocked = keys % 4 == 0
    used: set[int] = set()
    expected = []
    for row in range(rows):
        free = [column for column in range(columns) if not blocked[row, column] and int(keys[row, column]) not in used]
        expected.append(free[0] if free else -1)
        used |= {int(keys[row, free[0]])} if free else set()
    assert first_choices(keys, blocked).tolist() == expected


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_nearest_with_room_equals_the_loop(seed: int, rows: int, groups: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    distances = generator.integers(0, 4, (rows, size)).astype(np.float32)
    groups_n = generator.integers(0, groups, rows)
    room = generator.integers(0, 3, (groups, size))
    room[:, 0] += np.maximum(np.bincount(groups_n, minlength=groups) - room.sum(axis=1), 0)
    left, expected = room.copy(), []
    for row, group in enumerate(groups_n.tolist()):
        code = int(np.where(left[group] > 0, distances[row], np.inf).argmin())
        left[group, code] -= 1
        expected.append(code)
    assert nearest_with_room(distances.copy(), groups_n, room).tolist() == expected


@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_min_cost_codes_equal_the_best_of_all_permutations(seed: int, counts: list[int], ties: bool) -> None:
    generator = np.random.default_rng(seed)
    size = 6
    distances = generator.random((sum(counts), size)).astype(np.float32)
    distances = np.round(distances * 3) if ties else distances
    free = generator.random((len(counts), size)) < 0.5
    free[:, :4] |= free.sum(axis=1, keepdims=True) < 4
    codes = min_cost_codes(distances, np.array(counts), free)
    start = 0
    for group, count in enumerate(counts):
        rows = np.arange(start, start + count)
        options = itertools.permutations(np.flatnonzero(free[group]).tolist(), count)
        best = min(float(distances[rows, list(option)].sum()) for option in options)
        assert free[group, codes[rows]].all()
        assert len(set(codes[rows].tolist())) == count
        assert float(distances[rows, codes[rows]].sum()) == pytest.approx(best)
        start += count


@pytest.mark.parametrize("epsilon", [1e-8, 0.003, 1.0, 1e8])
def test_sinkhorn_gives_no_code_twice_and_no_nan_for_any_epsilon(epsilon: float) -> None:
    generator = np.random.default_rng(0)
    distances = generator.random((5, 8, 16)) * 10.0 ** generator.integers(-20, 20, (5, 1, 1))
    counts, free = np.array([1, 2, 5, 8, 8]), generator.random((5, 16)) < 0.6
    with np.errstate(all="raise", under="ignore"):
        codes = sinkhorn_codes(distances, counts, free, epsilon=epsilon, steps=50)
    for group, count in enumerate(counts):
        chosen = [code for code in codes[group, :count].tolist() if code >= 0]
        assert len(set(chosen)) == len(chosen)
        assert free[group, chosen].all()
        assert epsilon != 0.003 or len(chosen) > count / 2
    assert codes[0, 0] == np.where(free[0], distances[0, 0], np.inf).argmin()


def test_sinkhorn_gives_equal_rows_no_code() -> None:
    codes = sinkhorn_codes(
        np.ones((1, 2, 1)) * np.arange(6.0), np.array([2]), np.ones((1, 6), bool), epsilon=0.003, steps=50
    )
    assert codes.tolist() == [[-1, -1]]


def test_nearest_codes_are_sorted_and_ties_go_to_the_lower_code() -> None:
    distances = np.array([[3.0, 0.0, -0.0, 3.0, -1.0, 2.0], [np.inf, 1e-30, 5, 5, 5, 5]], dtype=np.float32)
    codes, values = nearest_codes(distances, 5)
    assert codes.tolist() == [[4, 1, 2, 5, 0], [1, 2, 3, 4, 5]]
    assert values[0].tolist() == [-1, 0, 0, 2, 3]
    assert nearest_codes(distances, 99)[0].shape == (2, 6)


def test_room_is_what_is_free_below_a_code() -> None:
    used = np.array([[0, 0, 0], [0, 0, 1], [0, 2, 1], [1, 1, 1]])
    space = TupleSpace((2, 3, 2), used)
    rooms = space.rooms(1, space.keys(np.array([[0, 9, 9], [1, 9, 9]]), 1))
    assert rooms.free_G.tolist() == [3, 5]
    assert rooms.of(np.array([1, 0])).tolist() == [[2, 1, 2], [0, 2, 1]]
    assert space.contains(space.keys(np.array([[1, 1, 1], [1, 1, 0]]))).tolist() == [True, False]
