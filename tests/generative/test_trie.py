"""The trie against the catalogue it stands for: every answer equals that of a search through all rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.generative.trie import ItemFilter, Trie
from generative_recommenders.generative.trie_build import sorted_rows
from ops.trie_step import NORMALIZATIONS

NOTHING = -math.inf


@dataclass(frozen=True)
class Catalogue:
    """Rows of a trie as lists; `left[b]` are the item ids that request b may get."""

    codes: list[tuple[int, ...]]
    ids: list[int]
    sizes: tuple[int, ...]
    left: list[set[int]]

    def items_of(self, prefix: tuple[int, ...], b: int) -> list[int]:
        """Item ids under a prefix, ascending."""
        pairs = zip(self.codes, self.ids, strict=True)
        return sorted(item for codes, item in pairs if codes[: len(prefix)] == prefix and item in self.left[b])

    def codes_after(self, prefix: tuple[int, ...], b: int) -> list[int]:
        return [c for c in range(self.sizes[len(prefix)]) if self.items_of((*prefix, c), b)]


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Trie, Catalogue, ItemFilter | None]:
    """Unsorted rows, shared tuples, inactive rows, removed items, and a filter of three requests or of all or none."""
    sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = draw(st.lists(row, min_size=1, max_size=12))
    count = len(codes)
    start = draw(st.integers(0, 5))
    plain = draw(st.booleans())
    ids = list(range(start, start + count)) if plain else draw(st.permutations(range(2 * count)))[:count]
    active = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    active[draw(st.integers(0, count - 1))] = True
    trie = Trie.build(torch.tensor(codes), sizes, torch.tensor(ids), torch.tensor(active))
    left = {item for item, on in zip(ids, active, strict=True) if on}
    for removed in draw(st.lists(st.sets(st.sampled_from(sorted(left)), max_size=3), max_size=2)):
        trie, left = trie.remove(sorted(removed)), left - removed
    allowed, kept = None, [set(left)] * 3
    kind = draw(st.sampled_from(["none", "shared", "each", "excluded", "shared then excluded"]))
    if kind.startswith("shared") or kind == "each":
        number = 1 if kind.startswith("shared") else 3
        masks = [draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(number)]
        allowed = trie.allow(torch.tensor(masks if kind == "each" else masks[0]))
        kept = [left & {item for item, on in zip(ids, mask, strict=True) if on} for mask in masks] * (3 // number)
    if kind.endswith("excluded"):
        pairs = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2 * count)), max_size=15))
        rows, items = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
        allowed = trie.exclude(rows, items, 3, allowed=allowed)
        kept = [own - {item for b, item in pairs if b == row} for row, own in enumerate(kept)]
    return trie, Catalogue(codes, ids, sizes, kept), allowed


@given(drawn=catalogues())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_a_search_through_all_rows(drawn: tuple[Trie, Catalogue, ItemFilter | None]) -> None:
    trie, catalogue, allowed = drawn
    prefixes: list[tuple[int, ...]] = [()]
    for level, size in enumerate(catalogue.sizes):
        states = torch.stack([walked(trie, prefixes)] * 3)
        mask = trie.mask(states, level, allowed=allowed)
        offsets, tokens, after = trie.children(states, level, allowed=allowed)
        reached = trie.advance(states[..., None], torch.arange(-1, size + 1), level, allowed=allowed)
        for place, (b, (m, prefix)) in enumerate(itertools.product(range(3), enumerate(prefixes))):
            wanted = catalogue.codes_after(prefix, b)
            own = slice(int(offsets[place]), int(offsets[place + 1]))
            assert mask[b, m].nonzero()[:, 0].tolist() == tokens[own].tolist() == wanted
            legal = reached[b, m] >= 0
            assert (legal.nonzero()[:, 0] - 1).tolist() == wanted
            assert reached[b, m][legal].tolist() == after[own].tolist()
        prefixes = [(*prefix, code) for prefix in prefixes for code in range(size)]
    leaves = torch.stack([walked(trie, prefixes)] * 3)
    counts = trie.item_counts(leaves, allowed=allowed)
    offsets, items = trie.items(leaves, allowed=allowed)
    for place, (b, (m, prefix)) in enumerate(itertools.product(range(3), enumerate(prefixes))):
        wanted = catalogue.items_of(prefix, b)
        assert int(counts[b, m]) == len(wanted)
        assert items[offsets[place] : offsets[place + 1]].tolist() == wanted
    for at in range(-1, 4):
        found = trie.item_at(leaves, torch.full_like(leaves, at), allowed=allowed).tolist()
        for b, (m, prefix) in itertools.product(range(3), enumerate(prefixes)):
            wanted = catalogue.items_of(prefix, b)
            assert found[b][m] == (wanted[at] if 0 <= at < len(wanted) else 0)
    held = torch.tensor([prefixes] * 3)[:, :, None]
    asked = torch.arange(-1, 2 * len(catalogue.ids) + 6)
    holds = trie.holds(held.expand(-1, -1, len(asked), -1), asked.expand(3, len(prefixes), -1), allowed=allowed)
    for b, (m, prefix) in itertools.product(range(3), enumerate(prefixes)):
        assert asked[holds[b, m]].tolist() == catalogue.items_of(prefix, b)


def walked(trie: Trie, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
    """State after each prefix, of all items that are there."""
    states = torch.zeros(len(prefixes), dtype=torch.int64)
    for level, tokens in enumerate(zip(*prefixes, strict=True)):
        states = trie.advance(states, torch.tensor(tokens), level)
    return states


@given(drawn=catalogues())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_states_count_the_distinct_prefixes_in_order(drawn: tuple[Trie, Catalogue, ItemFilter | None]) -> None:
    trie, catalogue, _ = drawn
    codes = trie.leaf_codes().tolist()
    assert codes == sorted(list(code) for code in set(map(tuple, codes)))
    assert [x.dtype for x in (*trie.tokens, *trie.offsets, trie.rows)] == [torch.int32] * (2 * trie.levels + 2)
    for level, tokens in enumerate(trie.tokens):
        prefixes = sorted({tuple(code[: level + 1]) for code in codes})
        assert tokens.tolist() == [prefix[-1] for prefix in prefixes]
        above = [prefix[:-1] for prefix in prefixes]
        assert trie.widest[level] == max(map(above.count, above))
    present = [list(code) in codes for code in catalogue.codes]
    leaves = trie.find(torch.tensor(catalogue.codes))
    for code, leaf, there in zip(catalogue.codes, leaves.tolist(), present, strict=True):
        assert leaf == -1 or (there and codes[leaf] == list(code))
    odd = torch.tensor([[-1] * trie.levels, list(catalogue.sizes), [2**40] * trie.levels])
    assert trie.find(odd).tolist() == [-1, -1, -1]


@dataclass(frozen=True)
class Case:
    """A random trie, and one step on it."""

    trie: Trie
    codes_NL: Tensor
    left_BN: Tensor
    allowed: ItemFilter | None
    level: int
    prefixes_BMl: Tensor
    logits_BMC: Tensor
    scores_BM: Tensor
    k: int
    normalization: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Case:
        levels, count, batch, beams = (int(rng.integers(1, high)) for high in (5, 30, 4, 8))
        sizes = tuple(int(size) for size in rng.integers(1, 8, levels))
        codes_NL = torch.from_numpy(rng.integers(0, sizes, (count, levels)))
        trie = Trie.build(codes_NL, sizes)
        left_BN = torch.ones(batch, count, dtype=torch.bool)
        if rng.random() < 0.3:
            removed = rng.choice(count, rng.integers(0, count), replace=False)
            trie, left_BN[:, removed] = trie.remove(removed), False
        kind = rng.integers(0, 4)
        mask_BN = torch.from_numpy(rng.random((1 if kind == 1 else batch, count)) < rng.random())
        allowed = None
        if kind == 1:
            allowed, left_BN = trie.allow(mask_BN[0]), left_BN & mask_BN
        elif kind == 2:
            allowed, left_BN = trie.allow(mask_BN), left_BN & mask_BN
        elif kind == 3:
            rows, items = mask_BN.nonzero().T
            allowed, left_BN = trie.exclude(rows, items, batch), left_BN & ~mask_BN
        level = int(rng.integers(0, levels))
        beams = beams if level else 1
        # Prefixes of items, and a few of none.
        prefixes_BMl = codes_NL[torch.from_numpy(rng.integers(0, count, (batch, beams)))][..., :level].clone()
        prefixes_BMl[torch.from_numpy(rng.random((batch, beams)) < 0.1)] = 0
        normalization = NORMALIZATIONS[rng.integers(0, 3)]
        shapes = (batch, beams, sizes[level]), (batch, beams)
        # Where sums are exact also equal scores are compared.
        numbers = (rng.normal(0, 2, shape) for shape in shapes)
        if normalization == "none":
            numbers = (rng.integers(-2, 3, shape).astype(float) for shape in shapes)
        logits_BMC, scores_BM = map(torch.from_numpy, numbers)
        scores_BM[torch.from_numpy(rng.random((batch, beams)) < 0.05)] = NOTHING
        k = int(rng.integers(1, 2 * beams * sizes[level] + 2))
        return cls(trie, codes_NL, left_BN, allowed, level, prefixes_BMl, logits_BMC, scores_BM, k, normalization)

    def by_brute_force(self) -> tuple[Tensor, ...]:
        """Scores, parents, tokens, counts and the best score left out, from all rows of the catalogue."""
        under_BMN = (self.codes_NL[:, : self.level] == self.prefixes_BMl[:, :, None]).all(-1) & self.left_BN[:, None]
        under_BMN &= (self.scores_BM > NOTHING)[..., None]
        batch, beams, size = self.logits_BMC.shape
        legal_BMC = torch.zeros(batch, beams, size, dtype=torch.int64)
        own_BMN = self.codes_NL[:, self.level].expand_as(under_BMN)
        legal_BMC = legal_BMC.scatter_add_(2, own_BMN, under_BMN.long()) > 0
        logits_BMC = self.logits_BMC
        if self.normalization == "vocabulary":
            logits_BMC = logits_BMC - logits_BMC.logsumexp(2, keepdim=True)
        elif self.normalization == "legal":
            logits_BMC = logits_BMC - logits_BMC.masked_fill(~legal_BMC, NOTHING).logsumexp(2, keepdim=True)
        total_BX = torch.where(legal_BMC, logits_BMC + self.scores_BM[..., None], NOTHING).flatten(1)
        total_BX = torch.cat([total_BX, total_BX.new_full((batch, self.k + 1), NOTHING)], 1)
        best_BX, place_BX = total_BX.sort(dim=1, descending=True, stable=True)
        best_BK, place_BK = best_BX[:, : self.k], place_BX[:, : self.k]
        valid_BK = best_BK > NOTHING
        parents_BK, tokens_BK = (torch.where(valid_BK, x, -1) for x in (place_BK // size, place_BK % size))
        return best_BK, parents_BK, tokens_BK, valid_BK.sum(1), best_BX[:, self.k]


@pytest.mark.parametrize("part", range(10))
def test_steps_equal_brute_force_over_the_catalogue(part: int) -> None:
    """10,000 random tries, filters and scores; also that what is odd came up often."""
    rng = np.random.default_rng(part)
    seen = np.zeros(4, dtype=int)
    for number in range(1000):
        case = Case.draw(rng)
        states_BM = case.trie.root(len(case.scores_BM)).expand_as(case.scores_BM)
        for level in range(case.level):
            states_BM = case.trie.advance(states_BM, case.prefixes_BMl[..., level], level)
        found = case.trie.step(
            *(case.logits_BMC, states_BM, case.scores_BM, case.level, case.k),
            normalization=case.normalization,
            allowed=case.allowed,
        )
        scores_BK, parents_BK, tokens_BK, count_B, pruned_B = case.by_brute_force()
        assert torch.equal(found.parents_BK, parents_BK), number
        assert torch.equal(found.tokens_BK, tokens_BK), number
        assert torch.equal(found.count_B, count_B), number
        for got, wanted in ((found.scores_BK, scores_BK), (found.pruned_B, pruned_B)):
            apart = torch.where(got == wanted, 0.0, (got - wanted).abs())
            assert float(apart.max()) < 1e-12, number
        reached_BK = case.trie.advance(states_BM.gather(1, parents_BK.clamp_min(0)), tokens_BK, case.level)
        assert torch.equal(found.states_BK, torch.where(tokens_BK >= 0, reached_BK, -1)), number
        seen += [
            bool((count_B < case.k).any()),
            bool((count_B == 0).any()),
            case.k > case.trie.sizes[case.level],
            bool((pruned_B > NOTHING).any()),
        ]
    assert seen.min() > 50


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 1, 1), (3, 1, 2)])
def test_one_item_one_level_and_levels_of_one_code(sizes: tuple[int, ...]) -> None:
    codes = torch.tensor([[size - 1 for size in sizes]])
    trie = Trie.build(codes, sizes, torch.tensor([9]))
    states, scores = trie.root(2), torch.zeros(2, 1)
    for level, size in enumerate(sizes):
        found = trie.step(torch.zeros(2, 1, size), states, scores, level, 3, normalization="legal")
        assert found.count_B.tolist() == [1, 1] and found.tokens_BK[:, 0].tolist() == [size - 1] * 2
        states, scores = found.states_BK[:, :1], found.scores_BK[:, :1]
    assert trie.items(states)[1].tolist() == [9, 9]
    assert scores.tolist() == [[0.0], [0.0]]
    gone = trie.remove([9])
    assert gone.step(torch.zeros(2, 1, sizes[0]), gone.root(2), torch.zeros(2, 1), 0, 3).count_B.tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [(2048,) * 8, (256,) * 4, (2**31 - 1,) * 3, (1, 5, 1, 2**20), (3,)])
def test_rows_are_sorted_whatever_the_sizes(sizes: tuple[int, ...]) -> None:
    """Keys of one pass and of several; few prefixes, so that later levels decide."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.choice(rng.integers(0, size, 3), 5000) for size in sizes], axis=1).astype(np.int32)
    values[:100] = values[100:200]
    order = sorted_rows(values, sizes)
    assert np.array_equal(order, np.lexsort(values.T[::-1]))


def test_memory_is_what_was_planned() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 60_000
    for sizes, most in (((2048,) * 8, 100), ((256,) * 4, 26), ((40, 40, 40), 14)):
        codes = torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], 1)
        if math.prod(sizes) < 10 * count:
            every = torch.cartesian_prod(*map(torch.arange, sizes))
            codes = every[torch.randperm(len(every), generator=generator)[:count]]
        trie, plan = Trie.build(codes, sizes), Trie.plan(count, sizes)
        for tokens, nodes in zip(trie.tokens, plan.nodes, strict=True):
            assert len(tokens) == pytest.approx(nodes, rel=0.01)
        assert trie.nbytes == pytest.approx(plan.nbytes, rel=0.01)
        assert plan.nbytes / count < most
        assert f"{plan.nbytes / count:.1f} bytes an item" in str(plan)


def test_plans_of_full_and_of_overfull_tries_are_exact() -> None:
    assert Trie.plan(6, (2, 3)).nodes == (2.0, 6.0)
    assert Trie.plan(100, (2, 3)).nodes == (2.0, 6.0)
    assert Trie.plan(1, (7, 9, 2)).nodes == pytest.approx((1.0, 1.0, 1.0))
    # 2 of 4 tuples under 2 prefixes: both in one of them has chance 1/3.
    assert Trie.plan(2, (2, 2)).nodes[0] == pytest.approx(5 / 3, rel=1e-3)
    with pytest.raises(DataError, match="trie plan: got 0 items"):
        Trie.plan(0, (2,))


def test_a_removal_shares_tensors_and_refuses_earlier_filters() -> None:
    codes = torch.tensor([[0, 1], [0, 1], [1, 0]])
    trie = Trie.build(codes, (2, 2), torch.tensor([5, 3, 8]))
    before = trie.allow(torch.ones(3, dtype=torch.bool))
    less = trie.remove(torch.tensor([3]))
    assert less.tokens is trie.tokens and less.offsets is trie.offsets and less.rows is trie.rows
    leaves = trie.find(codes)
    assert trie.items(leaves)[1].tolist() == [3, 5, 3, 5, 8]
    assert less.items(leaves)[1].tolist() == [5, 5, 8]
    assert less.remove([5]).find(codes).tolist() == [-1, -1, 1]
    assert less.nbytes > trie.nbytes
    with pytest.raises(DataError, match="item filter: got one of another trie, or from before"):
        less.mask(less.root(1), 0, allowed=before)
    with pytest.raises(DataError, match="remove: got item 4, expected items of the trie"):
        trie.remove([3, 4])


def test_a_filter_of_chosen_requests_and_on_another_device() -> None:
    trie = Trie.build(torch.tensor([[0], [1], [2]]), (3,))
    each = trie.allow(torch.eye(3).bool())
    rows = torch.tensor([2, 0])
    assert trie.mask(trie.root(2), 0, allowed=each.select(rows))[:, 0].tolist() == torch.eye(3).bool()[rows].tolist()
    shared = trie.allow(torch.tensor([True, False, True]))
    assert shared.select(rows) is shared
    moved = trie.remove([1]).to("cpu")
    assert moved.mask(moved.root(1), 0).tolist() == [[[True, False, True]]]
    there = trie.to("meta")
    assert {x.device.type for x in (*there.tokens, *there.offsets, there.rows)} == {"meta"}


@pytest.mark.parametrize(
    ("codes", "sizes", "options", "message"),
    [
        (
            [[0, 1], [2, 0]],
            (2, 2),
            {},
            "trie: got code 2 at level 0 of row 1, expected 0 to 1; check the",
        ),
        ([[0, -1]], (2, 2), {}, "trie: got code -1 at level 1 of row 0"),
        ([[0, 2**33]], (2, 2), {}, "trie: got code 8589934592 at level 1 of row 0"),
        ([[0, 1]], (2,), {}, r"trie: got codes of shape \(1, 2\) for 1 levels"),
        ([[0.5]], (2,), {}, "trie: got torch.float32 codes"),
        ([[0]], (0,), {}, r"trie: got torch.int64 codes of sizes \(0,\)"),
        (torch.zeros(0, 2), (2, 2), {}, r"trie: got codes of shape \(0, 2\)"),
        ([[0], [1]], (2,), {"item_ids_N": [4, 4]}, "trie: got item 4 twice"),
        ([[0], [1]], (2,), {"item_ids_N": [4]}, r"trie: got item ids as torch.int64 \(1,\)"),
        ([[0], [1]], (2,), {"active_N": [True]}, r"trie: got active rows as torch.bool \(1,\)"),
        ([[0], [1]], (2,), {"active_N": [False, False]}, "trie: got 2 items of which none is active"),
    ],
)
def test_bad_input_is_one_line(
    codes: list[list[int]], sizes: tuple[int, ...], options: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Trie.build(torch.as_tensor(codes), sizes, **{name: torch.tensor(value) for name, value in options.items()})
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_one_line() -> None:
    trie = Trie.build(torch.tensor([[0], [1]]), (3,))
    with pytest.raises(DataError, match=r"logits: got shape \(1, 1, 4\), expected \(B, M, 3\)"):
        trie.step(torch.zeros(1, 1, 4), trie.root(1), torch.zeros(1, 1), 0, 2)
    with pytest.raises(DataError, match=r"item filter: got torch.bool \(3,\), expected bool \(2,\) or \(B, 2\)"):
        trie.allow(torch.ones(3).bool())
    with pytest.raises(DataError, match=r"codes: got shape \(1, 2\)"):
        trie.find(torch.zeros(1, 2).long())


def test_large_item_ids_are_kept_whole() -> None:
    ids = torch.tensor([2**40 + 7, 5, 2**40])
    trie = Trie.build(torch.tensor([[1], [0], [1]]), (2,), ids)
    assert trie.items(torch.tensor([0, 1]))[1].tolist() == [5, 2**40, 2**40 + 7]
    assert trie.holds(torch.tensor([[1], [1], [0]]), ids).tolist() == [True, False, False]
