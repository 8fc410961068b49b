"""Beam search is held against a reference in plain Python at equal widths, and against scoring the whole catalogue."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from generative_recommenders.errors import UserError, one_line
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.beam_verification import InternalError, verify
from generative_recommenders.generative.scoring import exhaustive
from generative_recommenders.generative.trie import Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests.generative.beam_cases import (
    Expected,
    Reference,
    TableModel,
    batch_of,
    filter_of,
    leaves_of,
    random_ids,
    trie_of,
)

USERS = 4


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def case(seed: int) -> tuple[SemanticIds, Trie, TableModel, torch.Generator]:
    """One catalogue and a model for each of the users."""
    generator = generator_of(seed)
    ids = random_ids(generator, levels=drawn(generator, 1, 4), size=drawn(generator, 1, 6), items=40)
    return ids, trie_of(ids), TableModel(ids.sizes, USERS, generator), generator


def rows_of(result: BeamResult, row: int) -> list[tuple[int, tuple[int, ...], float]]:
    count = int(result.valid_count_B[row])
    assert result.items_BK[row, count:].eq(0).all() and result.codes_BKL[row, count:].eq(-1).all()
    assert result.scores_BK[row, count:].isneginf().all()
    codes = [tuple(x) for x in result.codes_BKL[row, :count].tolist()]
    return list(zip(result.items_BK[row, :count].tolist(), codes, result.scores_BK[row, :count].tolist(), strict=True))


def assert_same(found: list, expected: list) -> None:
    assert [x[:2] for x in found] == [x[:2] for x in expected]
    assert all(math.isclose(x[2], y[2], abs_tol=1e-5) for x, y in zip(found, expected, strict=True))


def assert_certificate(result: BeamResult, row: int, expected: Expected, best: list, k: int) -> None:
    """The proof is there exactly where the reference has it, and what is proven is so."""
    kth = expected.results[k - 1][2] if len(expected.results) == k else -math.inf
    gap = -math.inf if expected.pruned == -math.inf else expected.pruned - kth
    assert bool(result.exact_B[row]) == (gap < 0) == bool(result.gap_B[row] < 0)
    assert math.isclose(float(result.gap_B[row]), gap, abs_tol=2e-5)
    if result.exact_B[row]:
        assert_same(rows_of(result, row), best)
    elif len(expected.results) == k:
        # What was missed is no better than the gap says.
        assert best[k - 1][2] <= kth + gap + 1e-5


@pytest.mark.parametrize("part", range(10))
def test_equals_the_reference_beam_and_where_proven_the_whole_catalogue(part: int) -> None:
    """50 catalogues a part and four models each, 2,000 in all, with and without trie, filters, temperature."""
    proven = 0
    for number in range(50):
        ids, trie, model, generator = case(1000 * part + number)
        levels, k = len(ids.sizes), drawn(generator, 1, 12)
        widths = tuple(drawn(generator, 1, 9) for _ in range(levels))
        filtered, constrained = number % 3, bool(number % 4)
        legal = constrained and number % 5 > 2
        temperature = (1.0,) * levels if number % 7 else tuple(0.5 + drawn(generator, 0, 3) for _ in range(levels))
        config = BeamSearchConfig(
            widths=widths,
            constrained=constrained,
            normalization="legal" if legal else "vocabulary",
            temperature=temperature,
            verify=True,
        )
        users = torch.randperm(USERS, generator=generator).tolist()
        everything = set(ids.item_ids_N.tolist())
        kept = [{i for i in sorted(everything) if drawn(generator, 0, 2)} for _ in range((1, 1, USERS)[filtered])]
        allowed = filter_of(trie, ids, kept) if filtered else None
        result = beam_search(model, batch_of(users), trie, k, config, allowed=allowed)
        whole = exhaustive(model, batch_of(users), trie, k, config, allowed=allowed, chunk=7)
        for row, user in enumerate(users):
            leaves = leaves_of(ids, kept[row % len(kept)] if filtered else None)
            reference = Reference(model, leaves, constrained, legal, temperature)
            expected, best = reference.beam(user, widths, k), reference.exhaustive(user, k)
            assert_same(rows_of(result, row), expected.results)
            assert_same(rows_of(whole, row), best)
            assert_certificate(result, row, expected, best, k)
            assert bool(whole.exact_B[row])
            proven += bool(result.exact_B[row])
    assert 20 < proven < 180


def test_widths_that_cover_all_prefixes_are_exhaustive() -> None:
    for seed in range(30):
        ids, trie, model, _ = case(seed)
        batch = batch_of(range(USERS))
        for constrained in (True, False):
            config = BeamSearchConfig(widths=2000, constrained=constrained)
            result, whole = beam_search(model, batch, trie, 50, config), exhaustive(model, batch, trie, 50)
            assert result.exact_B.all() and result.gap_B.isneginf().all()
            assert torch.equal(result.items_BK, whole.items_BK) and torch.equal(result.codes_BKL, whole.codes_BKL)
            torch.testing.assert_close(result.scores_BK, whole.scores_BK)
            assert result.valid_count_B.eq(int(ids.active_N.sum())).all()


def test_a_request_does_not_depend_on_its_batch() -> None:
    for seed in range(20):
        _, trie, model, generator = case(seed)
        for config in (BeamSearchConfig(widths=3), BeamSearchConfig(widths=3, stochastic=True, seed=5)):
            whole = beam_search(model, batch_of(range(USERS)), trie, 6, config)
            order = torch.randperm(USERS, generator=generator)
            permuted = beam_search(model, batch_of(order.tolist()), trie, 6, config)
            alone = beam_search(model, batch_of([2]), trie, 6, config)
            for name in ("items_BK", "codes_BKL", "scores_BK", "valid_count_B", "exact_B"):
                assert torch.equal(getattr(whole, name)[order], getattr(permuted, name))
                assert torch.equal(getattr(whole, name)[2:3], getattr(alone, name))


def certified_case() -> tuple[SemanticIds, Trie, TableModel]:
    generator = generator_of(7)
    sizes = (8, 8, 8)
    codes = torch.stack([torch.randint(8, (300,), generator=generator) for _ in sizes], 1)
    ids = SemanticIds.of(torch.arange(1, 301), codes, sizes)
    return ids, trie_of(ids), TableModel(sizes, 32, generator, scale=4.0)


def test_certify_widens_until_the_list_is_proven() -> None:
    _, trie, model = certified_case()
    batch = batch_of(range(32))
    narrow = beam_search(model, batch, trie, 5, BeamSearchConfig(widths=(2, 4, 5)))
    assert 0 < int(narrow.exact_B.sum()) < 32
    result = beam_search(model, batch, trie, 5, BeamSearchConfig(widths=(2, 4, 5), certify=True, verify=True))
    whole = exhaustive(model, batch, trie, 5)
    assert result.exact_B.all() and torch.equal(result.items_BK, whole.items_BK)
    proven = narrow.exact_B
    assert torch.equal(result.scores_BK[proven], narrow.scores_BK[proven])
    assert not torch.equal(narrow.items_BK, whole.items_BK)


def test_certify_asks_again_for_open_requests_alone_and_within_its_budget() -> None:
    _, trie, model = certified_case()
    batch = batch_of(range(32))
    config = BeamSearchConfig(widths=(2, 4, 5), certify=True)
    narrow = beam_search(model, batch, trie, 5, replace(config, certify=False))
    left = 32 - int(narrow.exact_B.sum())
    model.calls.clear()
    # The second round keeps 8 and 16 prefixes.
    once = beam_search(model, batch, trie, 5, replace(config, budget=24))
    assert model.calls == [32, 64, 128, left, 8 * left, 16 * left]
    model.calls.clear()
    none = beam_search(model, batch, trie, 5, replace(config, budget=23))
    assert model.calls == [32, 64, 128]
    assert torch.equal(none.exact_B, narrow.exact_B) and int(once.exact_B.sum()) > int(narrow.exact_B.sum())


def test_certify_keeps_to_each_requests_own_filter() -> None:
    ids, trie, model = certified_case()
    kept = [set(range(1 + row, 301, 2 + row % 3)) for row in range(32)]
    allowed = filter_of(trie, ids, kept)
    config = BeamSearchConfig(widths=(2, 4, 5), certify=True, verify=True)
    result = beam_search(model, batch_of(range(32)), trie, 5, config, allowed=allowed)
    whole = exhaustive(model, batch_of(range(32)), trie, 5, allowed=allowed)
    assert result.exact_B.all() and torch.equal(result.items_BK, whole.items_BK)
    for row in range(32):
        assert set(result.items_BK[row].tolist()) <= kept[row]


def test_equal_scores_are_ordered_by_codes_whatever_the_beams_order() -> None:
    codes = torch.tensor([[2, 1], [2, 0], [1, 0], [0, 0]])
    ids = SemanticIds.of([1, 2, 3, 4], codes, (3, 2))
    model = TableModel(ids.sizes, 1, generator_of(0))
    # 1/4, 1/4 and 1/2, of which the last is halved once more.
    model.tables[0][0, 0] = torch.tensor([0.0, 0.0, math.log(2.0)])
    model.tables[1][0] = torch.tensor([[0.0, -math.inf], [0.0, -math.inf], [0.0, 0.0]])
    result = beam_search(model, batch_of([0]), trie_of(ids), 4, BeamSearchConfig())
    assert len(set(result.scores_BK[0].tolist())) == 1
    assert result.items_BK.tolist() == exhaustive(model, batch_of([0]), trie_of(ids), 4).items_BK.tolist()
    assert result.items_BK.tolist() == [[4, 3, 2, 1]]


def test_a_context_of_the_callers_is_not_used_up() -> None:
    _, trie, model = certified_case()
    batch, config = batch_of(range(8)), BeamSearchConfig(widths=(2, 4, 5), certify=True)
    context = model.begin(batch)
    first, second = (beam_search(model, batch, trie, 5, config, context=context) for _ in range(2))
    assert context.tokens == [] and torch.equal(first.items_BK, second.items_BK)


def test_a_tie_with_what_was_given_up_is_no_proof() -> None:
    ids = SemanticIds.of([1, 2], torch.tensor([[0, 0], [1, 0]]), (2, 1))
    model = TableModel(ids.sizes, 1, generator_of(0), scale=0.0)
    result = beam_search(model, batch_of([0]), trie_of(ids), 1, BeamSearchConfig(widths=(1, 1)))
    assert float(result.gap_B[0]) == 0.0 and not result.exact_B[0]
    assert beam_search(model, batch_of([0]), trie_of(ids), 1, BeamSearchConfig(widths=2)).exact_B[0]


def test_items_of_one_leaf_share_its_score_in_order_and_count_one_by_one() -> None:
    codes = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0]])
    ids = SemanticIds.of([9, 4, 6, 2], codes, (2, 1))
    model = TableModel(ids.sizes, 1, generator_of(0))
    model.tables[0][0, 0] = torch.tensor([3.0, 0.0])
    found = {k: beam_search(model, batch_of([0]), trie_of(ids), k, BeamSearchConfig(widths=3)) for k in (2, 4, 6)}
    assert found[2].items_BK.tolist() == [[4, 6]] and found[2].exact_B.all()
    assert found[4].items_BK.tolist() == [[4, 6, 9, 2]]
    assert found[6].items_BK.tolist() == [[4, 6, 9, 2, 0, 0]] and found[6].valid_count_B.tolist() == [4]
    assert len(set(found[4].scores_BK[0, :3].tolist())) == 1


def test_length_normalized_scores_are_divided_by_the_levels() -> None:
    _, trie, model = certified_case()
    batch = batch_of(range(8))
    plain, divided = (
        beam_search(model, batch, trie, 5, BeamSearchConfig(widths=4, length_normalize=x, verify=True))
        for x in (False, True)
    )
    assert torch.equal(plain.items_BK, divided.items_BK) and torch.equal(plain.exact_B, divided.exact_B)
    torch.testing.assert_close(plain.scores_BK / 3, divided.scores_BK)
    torch.testing.assert_close(plain.gap_B / 3, divided.gap_B)


@pytest.mark.parametrize("constrained", [True, False])
def test_history_is_excluded(constrained: bool) -> None:
    ids, trie, model = certified_case()
    config = BeamSearchConfig(widths=2000, constrained=constrained, verify=True)
    top = beam_search(model, batch_of(range(4)), trie, 6, config).items_BK
    # Items that are not in the catalogue are no obstacle.
    histories = [[int(top[0, 0]), 100_000], [], top[2].tolist(), [int(top[3, 5]), int(top[3, 1]), int(top[3, 1])]]
    batch = batch_of(range(4), histories)
    result = beam_search(model, batch, trie, 4, config, exclude_history=True)
    assert result.items_BK[0].tolist() == top[0, 1:5].tolist()
    assert result.items_BK[1].tolist() == top[1, :4].tolist()
    assert not set(result.items_BK[2].tolist()) & set(top[2].tolist())
    assert result.items_BK[3].tolist() == top[3, [0, 2, 3, 4]].tolist()
    # Together with a filter: both hold.
    odd = {item for item in range(1, 301) if item % 2}
    both = beam_search(model, batch, trie, 300, config, allowed=filter_of(trie, ids, [odd]), exclude_history=True)
    for row, history in enumerate(histories):
        assert set(both.items_BK[row, : int(both.valid_count_B[row])].tolist()) == odd - set(history)


@pytest.mark.parametrize(
    "config",
    [
        BeamSearchConfig(),
        BeamSearchConfig(constrained=False),
        BeamSearchConfig(normalization="legal"),
        BeamSearchConfig(stochastic=True),
        BeamSearchConfig(certify=True),
    ],
)
def test_no_allowed_item_gives_no_result(config: BeamSearchConfig) -> None:
    ids, trie, model = certified_case()
    allowed = filter_of(trie, ids, [set(), {17}, set(range(1, 301))])
    result = beam_search(model, batch_of([0, 1, 2]), trie, 5, replace(config, widths=600, verify=True), allowed=allowed)
    assert result.valid_count_B.tolist() == [0, 1, 5]
    assert result.items_BK[:2].tolist() == [[0] * 5, [17, 0, 0, 0, 0]]
    assert config.stochastic or result.exact_B.all()


def test_a_batch_without_requests() -> None:
    _, trie, model = certified_case()
    result = beam_search(model, batch_of([]), trie, 5, BeamSearchConfig(certify=True, verify=True))
    assert result.items_BK.shape == (0, 5) and result.codes_BKL.shape == (0, 5, 3)


def test_codes_of_probability_zero_are_never_returned() -> None:
    _, trie, model = certified_case()
    model.tables[0][:, :, 1:] = -math.inf
    for config in (BeamSearchConfig(), BeamSearchConfig(constrained=False, widths=600)):
        result = beam_search(model, batch_of([0]), trie, 300, replace(config, widths=600))
        assert 0 < int(result.valid_count_B) < 300 and result.exact_B.all()
        assert result.codes_BKL[result.valid_BK][:, 0].eq(0).all()


class WrongModel(TableModel):
    """Teacher forcing that disagrees with the logits."""

    def teacher_forced(self, batch, codes_BKL: Tensor) -> Tensor:
        return super().teacher_forced(batch, codes_BKL) - 0.01


def test_verify_finds_a_wrong_score() -> None:
    _, trie, model = certified_case()
    model.__class__ = WrongModel
    with pytest.raises(InternalError, match="request 0, result 0: score that teacher forcing does not give"):
        beam_search(model, batch_of([3]), trie, 5, BeamSearchConfig(verify=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: replace(r, items_BK=r.items_BK[:, [0, 0, 2, 3, 4]]), "request 0, result 1: item returned twice"),
        (lambda r: replace(r, items_BK=r.items_BK[:, [1, 0, 2, 3, 4]]), "result 0: item that is not allowed"),
        (lambda r: replace(r, codes_BKL=r.codes_BKL[:, [0, 1, 2, 3, 3]]), "result 4: item that is not allowed"),
        (lambda r: replace(r, scores_BK=r.scores_BK.flip(1)), "result 1: score above the one before"),
        (lambda r: replace(r, valid_count_B=r.valid_count_B - 1), "result 4: valid_count"),
    ],
)
def test_verify_finds_a_wrong_result(change, complaint: str) -> None:
    _, trie, model = certified_case()
    config = BeamSearchConfig()
    result = beam_search(model, batch_of([3]), trie, 5, config)
    verify(result, model, batch_of([3]), trie, config)
    with pytest.raises(InternalError, match=complaint):
        verify(change(result), model, batch_of([3]), trie, config)


def test_a_sample_is_drawn_without_replacement_by_the_models_probabilities() -> None:
    ids = SemanticIds.of([1, 2, 3, 4], torch.tensor([[0, 0], [0, 1], [1, 0], [2, 1]]), (3, 2))
    trie, users = trie_of(ids), 4000
    model = TableModel(ids.sizes, 1, generator_of(1), scale=1.0)
    model.tables = [table.expand(users, -1, -1) for table in model.tables]
    reference = Reference(model, leaves_of(ids), legal=True, temperature=(1.5, 0.5))
    chances = torch.tensor([math.exp(reference.score(0, tuple(codes))) for codes in ids.codes_NL.tolist()])
    assert math.isclose(float(chances.sum()), 1.0, abs_tol=1e-6)
    config = BeamSearchConfig(widths=2, stochastic=True, temperature=(1.5, 0.5), normalization="legal")
    one = beam_search(model, batch_of(range(users)), trie, 1, replace(config, widths=1))
    shares = torch.bincount(one.items_BK[:, 0], minlength=5)[1:] / users
    torch.testing.assert_close(shares, chances, atol=0.03, rtol=0)
    # Of two without replacement, item i is among them with p_i + sum_j p_j p_i / (1 - p_j).
    two = beam_search(model, batch_of(range(users)), trie, 2, config)
    assert two.valid_count_B.eq(2).all() and not two.exact_B.any()
    assert two.items_BK[:, 0].ne(two.items_BK[:, 1]).all()
    either = chances * (1 + (chances / (1 - chances)).sum() - chances / (1 - chances))
    torch.testing.assert_close(
        torch.bincount(two.items_BK.flatten(), minlength=5)[1:] / users, either, atol=0.03, rtol=0
    )
    # A wider search extends the sample: the first is one of the two.
    assert (two.items_BK == one.items_BK).any(1).all()


def test_a_sample_is_drawn_among_allowed_items() -> None:
    ids, trie, model = certified_case()
    kept = [set(range(1 + 20 * row, 8 + 20 * row)) for row in range(8)]
    config = BeamSearchConfig(widths=7, stochastic=True, verify=True)
    result = beam_search(model, batch_of(range(8)), trie, 7, config, allowed=filter_of(trie, ids, kept))
    assert [set(row) for row in result.items_BK.tolist()] == kept


def test_samples_depend_on_the_seed_and_keep_the_scores_of_the_normalization() -> None:
    _, trie, model = certified_case()
    batch, config = batch_of(range(16)), BeamSearchConfig(widths=5, stochastic=True, verify=True)
    first, same, other = (beam_search(model, batch, trie, 5, replace(config, seed=seed)).items_BK for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    free = beam_search(model, batch, trie, 5, replace(config, constrained=False, widths=5))
    assert 0 < int(free.valid_count_B.sum()) < 80


def test_shapes_do_not_depend_on_values() -> None:
    _, trie, model = certified_case()
    model.calls.clear()
    beam_search(model, batch_of([0, 1]), trie, 10, BeamSearchConfig(widths=(20, 300, 5)))
    # Eight prefixes exist after the first level and 64 after the second.
    assert model.calls == [2, 16, 128]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeamSearchConfig(widths=0), "beam_search.widths: got 0, expected at least 1 beam at every level"),
        (lambda: BeamSearchConfig(widths=(4, 0, 4)), "beam_search.widths: got (4, 0, 4), expected at least 1"),
        (lambda: BeamSearchConfig(widths=()), "beam_search.widths: got ()"),
        (lambda: BeamSearchConfig(temperature=0.0), "beam_search.temperature: got 0.0, expected more than 0"),
        (lambda: BeamSearchConfig(temperature=(1.0, math.nan)), "beam_search.temperature: got (1.0, nan)"),
        (lambda: BeamSearchConfig(constrained=False, normalization="legal"), "beam_search.normalization: got 'legal'"),
        (lambda: BeamSearchConfig(certify=True, stochastic=True), "beam_search.certify: got True"),
        (lambda: BeamSearchConfig(budget=-1), "beam_search.budget: got -1"),
        (
            lambda: search(BeamSearchConfig(widths=(4, 4))),
            "beam_search.widths: got (4, 4), expected one number",
        ),
        (lambda: search(BeamSearchConfig(temperature=(1.0,))), "beam_search.temperature: got (1.0,)"),
        (lambda: search(BeamSearchConfig(), k=0), "beam search: got k 0, expected at least 1"),
        (lambda: search(BeamSearchConfig(), sizes=(8, 8, 9)), "beam search: got a trie of codes (8, 8, 8)"),
    ],
)
def test_mistakes_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value).startswith(message) and one_line(caught.value) == str(caught.value)


def search(config: BeamSearchConfig, k: int = 5, sizes: tuple[int, ...] = (8, 8, 8)) -> BeamResult:
    _, trie, _ = certified_case()
    return beam_search(TableModel(sizes, 1, generator_of(0)), batch_of([0]), trie, k, config)
