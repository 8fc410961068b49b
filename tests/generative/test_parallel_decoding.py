"""The decodings of Parallel TIGER against brute force and each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from generative_recommenders.data.errors import DataError
from generative_recommenders.errors import UserError
from generative_recommenders.generative import parallel_exact, parallel_merging
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.parallel_decoding import LeftToRight, ParallelSearch, joint_ids
from generative_recommenders.generative.parallel_exact import best_places
from generative_recommenders.generative.scoring import exhaustive
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests import batches
from tests.generative.parallel_cases import (
    COVERING,
    ITEMS,
    MASKED,
    assert_same,
    brute_force,
    ids_of,
    log_probs_of,
    modalities,
    modality_scores,
    model_of,
    rows_of,
    trie_of,
)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_exact_is_brute_force(k: int, temperature: float) -> None:
    ids = ids_of(active_N=torch.arange(ITEMS) % 7 != 0)
    model = model_of(ids)
    batch = batches.batch([3, 0, 6], ITEMS)
    config = BeamSearchConfig(temperature=temperature, verify=True)
    result = ParallelSearch(model, trie_of(ids))(batch, k, config)
    assert bool(result.exact_B.all()) and bool(result.gap_B.isneginf().all())
    for row in range(3):
        expected = brute_force(ids, log_probs_of(model, batch, temperature), row, k)
        assert [item for item, _ in rows_of(result, row)] == [item for item, _ in expected]
        assert [score for _, score in rows_of(result, row)] == pytest.approx([s for _, s in expected], abs=1e-5)


@pytest.mark.parametrize("k", [1, 4, 300])
@pytest.mark.parametrize("per_request", [False, True])
def test_exact_excludes_history_and_what_a_filter_has_not(k: int, per_request: bool) -> None:
    ids = ids_of(4, (7, 7, 7), items=250)
    model, trie = model_of(ids), trie_of(ids)
    batch = batches.batch([4, 9], 250)
    kept = torch.stack([torch.arange(250) % 5 == 0, torch.arange(250) % 7 < 2])
    kept = kept if per_request else kept[:1].expand(2, -1)
    allowed = trie.allow(kept if per_request else kept[0])
    result = ParallelSearch(model, trie)(batch, k, BeamSearchConfig(), allowed=allowed, exclude_history=True)
    for row in range(2):
        out = set(batch.item_ids_T[batch.offsets[row] : batch.offsets[row + 1]].tolist())
        out |= set(ids.item_ids_N[~kept[row]].tolist())
        expected = brute_force(ids, log_probs_of(model, batch), row, k, frozenset(out))
        assert [item for item, _ in rows_of(result, row)] == [item for item, _ in expected]


def test_a_filter_that_leaves_nothing_gives_no_results() -> None:
    ids = ids_of()
    trie = trie_of(ids)
    nothing = trie.allow(torch.zeros(ITEMS, dtype=torch.bool))
    result = ParallelSearch(model_of(ids), trie)(batches.batch([2, 3], ITEMS), 5, BeamSearchConfig(), allowed=nothing)
    assert result.valid_count_B.tolist() == [0, 0]


def test_removed_items_are_not_returned_and_foreign_filters_are_refused() -> None:
    ids = ids_of()
    model, whole = model_of(ids), trie_of(ids)
    trie, batch = whole.remove([3, 4, 5]), batches.batch([2, 5], ITEMS)
    result = ParallelSearch(model, trie)(batch, 50, replace(COVERING, verify=True))
    assert result.valid_count_B.tolist() == [27, 27]
    assert_same(result, ParallelSearch(model, trie)(batch, 50, COVERING, decoding="beam"))
    everything = whole.allow(torch.ones(ITEMS, dtype=torch.bool))
    with pytest.raises(DataError, match="another trie"):
        ParallelSearch(model, trie)(batch, 3, BeamSearchConfig(), allowed=everything)


@pytest.mark.parametrize("stochastic", [False, True])
def test_history_is_excluded_from_lists_and_samples(stochastic: bool) -> None:
    ids = ids_of()
    search, batch = ParallelSearch(model_of(ids), trie_of(ids)), batches.batch([12, 0, 25], ITEMS)
    result = search(batch, 30, BeamSearchConfig(stochastic=stochastic), exclude_history=True)
    for row in range(3):
        seen = set(batch.item_ids_T[batch.offsets[row] : batch.offsets[row + 1]].tolist())
        assert {item for item, _ in rows_of(result, row)} == set(range(1, ITEMS + 1)) - seen


@pytest.mark.parametrize("seed", range(12))
def test_exact_equals_the_beam_where_it_covers_everything(seed: int) -> None:
    sizes = [(3, 4, 5), (6,), (2, 2, 2, 2), (7, 3)][seed % 4]
    ids = ids_of(seed, sizes, items=25)
    model, trie = model_of(ids, seed=seed), trie_of(ids)
    batch = batches.batch([5, 1, 0, 8], 25, seed=seed)
    config = replace(
        COVERING, length_normalize=seed % 2 == 0, temperature=tuple(1.0 + i / 2 for i in range(len(sizes)))
    )
    search = ParallelSearch(model, trie)
    exact = search(batch, 6, config, exclude_history=seed % 3 == 0)
    beam = search(batch, 6, config, decoding="beam", exclude_history=seed % 3 == 0)
    assert bool(beam.exact_B.all())
    assert_same(exact, beam)


def test_a_certified_beam_has_the_exact_list() -> None:
    ids = ids_of(1, (16, 16, 16), items=400)
    model, search = model_of(ids), ParallelSearch(model_of(ids), trie_of(ids))
    batch = batches.batch([3] * 8, 400)
    assert model.sizes == (16, 16, 16)
    exact = search(batch, 5, BeamSearchConfig())
    beam = search(batch, 5, BeamSearchConfig(widths=20), decoding="beam")
    proven = beam.exact_B
    assert 0 < int(proven.sum()) < 8
    assert torch.equal(beam.items_BK[proven], exact.items_BK[proven])
    certified = search(batch, 5, BeamSearchConfig(widths=2, certify=True), decoding="beam")
    assert bool(certified.exact_B.all())
    assert_same(certified, exact)


def test_chunks_and_blocks_do_not_change_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(2, (8, 8, 8, 8), items=3000)
    model, trie = model_of(ids), trie_of(ids)
    batch = batches.batch([4, 2, 7], 3000)
    whole = ParallelSearch(model, trie)(batch, 9, BeamSearchConfig())
    monkeypatch.setattr(parallel_exact, "_CHUNK_SCORES", 1)
    monkeypatch.setattr(parallel_exact, "_LEAVES_A_PREFIX", 1 << 30)
    monkeypatch.setattr(parallel_merging, "_REQUESTS_AT_A_TIME", 2)
    search = ParallelSearch(model, trie)
    assert_same(search(batch, 9, BeamSearchConfig()), whole)
    assert search.ranking is not None and search.ranking.sums[0].depth == 1
    for row in range(3):
        assert [x for x, _ in rows_of(whole, row)] == [
            x for x, _ in brute_force(ids, log_probs_of(model, batch), row, 9)
        ]


def test_equal_scores_go_to_the_lower_leaf() -> None:
    values = torch.tensor([[-0.0, -1.0, 0.0, -math.inf, -1.0, 3.0], [-math.inf] * 6])
    assert best_places(values, 5).tolist() == [[5, 0, 2, 1, 4], [0, 1, 2, 3, 4]]
    ids = ids_of(3, (6, 6), items=600)
    model = model_of(ids)
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.zero_()
    result = ParallelSearch(model, trie_of(ids))(batches.batch([2], 600), 40, BeamSearchConfig())
    expected = brute_force(ids, log_probs_of(model, batches.batch([2], 600)), 0, 40)
    assert [item for item, _ in rows_of(result, 0)] == [item for item, _ in expected]


@pytest.mark.parametrize("settings", [{}, MASKED, {"encoder_aggregation": "flatten"}])
def test_a_request_does_not_depend_on_its_batch(settings: dict[str, Any]) -> None:
    ids = ids_of()
    search = ParallelSearch(model_of(ids, **settings), trie_of(ids))
    batch, order = batches.batch([5, 0, 3, 11], ITEMS), [2, 0, 3, 1]
    moved = batches.rows_of(batch, order)
    for decoding in ("exact", "beam", *(["autoregressive"] if settings == MASKED else [])):
        here, there = (search(b, 5, COVERING, decoding=decoding) for b in (batch, moved))  # type: ignore[arg-type]
        assert torch.equal(here.items_BK[order], there.items_BK)
        torch.testing.assert_close(here.scores_BK[order], there.scores_BK, atol=1e-5, rtol=0)


def test_autoregressive_decoding_is_exhaustive_search_under_the_conditionals() -> None:
    ids = ids_of()
    model, trie = model_of(ids, **MASKED), trie_of(ids)
    batch = batches.batch([4, 0, 7], ITEMS)
    found = ParallelSearch(model, trie)(batch, 6, replace(COVERING, verify=True), decoding="autoregressive")
    assert bool(found.exact_B.all())
    assert_same(found, exhaustive(LeftToRight(model), batch, trie, 6))
    # The conditionals differ from the one pass, or nothing was tested.
    assert not torch.allclose(found.scores_BK, ParallelSearch(model, trie)(batch, 6, COVERING).scores_BK, atol=1e-3)


def test_teacher_forced_conditionals_are_those_of_the_decoder() -> None:
    model = model_of(**MASKED)
    batch = batches.batch([4, 2], ITEMS)
    codes = torch.tensor([[[1, 2, 0], [3, 4, 2]], [[0, 0, 1], [1, 2, 0]]])
    with torch.no_grad():
        forced = LeftToRight(model).teacher_forced(batch, codes)
        for level in range(3):
            given = (torch.arange(3) < level).expand(2, 3)
            for place in range(2):
                rows = model.conditional_logits(batch, codes[:, place], given)[level].log_softmax(-1)
                expected = rows.gather(1, codes[:, place, level, None])[:, 0]
                torch.testing.assert_close(forced[:, place, level], expected, atol=1e-5, rtol=0)


def test_joint_ids_have_the_items_of_all_tables() -> None:
    first, second = modalities()
    joint = joint_ids(first, second)
    assert joint.item_ids_N.tolist() == list(range(5, 31)) and joint.sizes == (4, 5, 3, 6, 2)
    assert torch.equal(joint.codes_NL[:, :3], first.codes_NL[4:])
    assert torch.equal(joint.codes_NL[:, 3:], second.codes_NL[:26])
    with pytest.raises(UserError, match="in common"):
        joint_ids(first, SemanticIds.of(torch.tensor([99]), torch.zeros(1, 2, dtype=torch.int64), (6, 2)))


@pytest.mark.parametrize("decoding", ["exact", "beam"])
def test_joint_modalities_add_up(decoding: Any) -> None:
    tables = modalities()
    joint = joint_ids(*tables)
    model, batch = model_of(*tables), batches.batch([6, 0, 3], ITEMS)
    assert model.sizes == joint.sizes
    result = ParallelSearch(model, trie_of(joint))(batch, 8, replace(COVERING, verify=True), decoding=decoding)
    for row in range(3):
        expected = brute_force(joint, log_probs_of(model, batch), row, 8)
        assert [item for item, _ in rows_of(result, row)] == [item for item, _ in expected]


def test_a_mixture_of_modalities_is_calibrated_over_the_catalogue() -> None:
    tables = modalities()
    joint = joint_ids(*tables)
    model, batch = model_of(*tables, modality_merge="mixture"), batches.batch([6, 0, 3], ITEMS)
    search = ParallelSearch(model, trie_of(joint))
    result, every = search(batch, 8, BeamSearchConfig()), search(batch, 50, BeamSearchConfig())
    # All items together have probability 1.
    torch.testing.assert_close(every.scores_BK.exp().sum(1), torch.ones(3))
    assert bool(result.exact_B.all())
    for row in range(3):
        parts = modality_scores(joint, log_probs_of(model, batch), row)
        masses = [sum(math.exp(s) for s in part.values()) for part in parts]
        mixed = {
            item: math.log(sum(math.exp(part[item]) / mass for part, mass in zip(parts, masses, strict=True)) / 2)
            for item in parts[0]
        }
        best = sorted(mixed.items(), key=lambda pair: -pair[1])[:8]
        assert [score for _, score in rows_of(result, row)] == pytest.approx([s for _, s in best], abs=1e-4)
        assert all(mixed[item] == pytest.approx(score, abs=1e-4) for item, score in rows_of(result, row))


def test_published_merge_adds_one_to_items_of_both_lists() -> None:
    # Distinct IDs in both tables, so that lists of leaves are lists of items.
    first = SemanticIds.of(torch.arange(1, 13), torch.cartesian_prod(torch.arange(3), torch.arange(4)), (3, 4))
    second = SemanticIds.of(torch.arange(1, 13), torch.randperm(12, generator=torch.Generator())[:, None], (12,))
    joint = joint_ids(first, second)
    model, batch = model_of(first, second, modality_merge="published"), batches.batch([6, 0, 3], 12)
    result = ParallelSearch(model, trie_of(joint))(batch, 5, BeamSearchConfig())
    assert not bool(result.exact_B.any())
    log_probs = log_probs_of(model, batch)
    both = 0
    for row in range(3):
        scores = []
        for levels in (slice(0, 2), slice(2, 3)):
            every = brute_force(
                SemanticIds(joint.codes_NL[:, levels], joint.item_ids_N, joint.sizes[levels]),
                log_probs[levels],
                row,
                5,
            )
            scores.append({item: score / (levels.stop - levels.start) for item, score in every})
        merged = {
            item: (scores[0][item] + scores[1][item]) / 2 + 1
            if item in scores[0] and item in scores[1]
            else scores[0].get(item, scores[1].get(item, 0.0))
            for item in scores[0] | scores[1]
        }
        both += sum(item in scores[0] and item in scores[1] for item in merged)
        expected = sorted(merged.items(), key=lambda pair: -pair[1])[:5]
        assert [item for item, _ in rows_of(result, row)] == [item for item, _ in expected]
        assert [s for _, s in rows_of(result, row)] == pytest.approx([s for _, s in expected], abs=1e-5)
    assert both > 0


def test_stochastic_decoding_samples_items_by_their_probability() -> None:
    ids = SemanticIds.of(torch.arange(1, 7), torch.cartesian_prod(torch.arange(2), torch.arange(3)), (2, 3))
    model = model_of(ids)
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.mul_(0.2)
    search, one = ParallelSearch(model, trie_of(ids)), batches.batch([3], 6)
    # The same history of many users, whose draws are independent.
    count = 4000
    many = replace(batches.rows_of(one, [0] * count), user_ids_B=torch.arange(count))
    result = search(many, 1, BeamSearchConfig(stochastic=True, seed=7))
    assert not bool(result.exact_B.any())
    shares = result.items_BK[:, 0].bincount(minlength=7)[1:] / count
    log_probs = log_probs_of(model, one)
    expected = (log_probs[0][0][:, None] + log_probs[1][0]).exp().flatten()
    assert float(expected.max() - expected.min()) > 0.1
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    config = BeamSearchConfig(stochastic=True, seed=4)
    several = search(batches.batch([3, 4, 2], 6), 4, config)
    assert torch.equal(search(batches.batch([3, 4, 2], 6), 4, config).items_BK, several.items_BK)
    assert all(len(set(row)) == 4 for row in several.items_BK.tolist())
    assert bool((several.scores_BK.diff() <= 0).all())


def test_temperature_can_be_one_a_level() -> None:
    ids = ids_of()
    model, trie, batch = model_of(ids), trie_of(ids), batches.batch([3, 5], ITEMS)
    config = replace(COVERING, temperature=(1.0, 3.0, 0.5))
    found = ParallelSearch(model, trie)(batch, 6, config)
    assert_same(found, exhaustive(model, batch, trie, 6, config))
    assert not torch.allclose(found.scores_BK, ParallelSearch(model, trie)(batch, 6, COVERING).scores_BK)


@pytest.mark.parametrize("settings", [{}, MASKED])
def test_a_deterministic_walk_is_learned(settings: dict[str, Any]) -> None:
    """Items follow a ring: the next is the one after the newest, so order must be read and codes put together."""
    items = 12
    ids = SemanticIds.of(torch.arange(1, items + 1), torch.cartesian_prod(torch.arange(3), torch.arange(4)), (3, 4))
    model = model_of(ids, use_multi_head=False, **({"dim": 32} | settings)).train()
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.div_(50.0)
    lengths = [1 + row % 5 for row in range(24)]
    batch = batches.batch(lengths, items)
    starts = torch.arange(24) % items
    walk = (starts[batch.rows_T()] + batch.positions_T()) % items + 1
    batch = replace(batch, item_ids_T=walk, target_ids_B=(starts + torch.tensor(lengths)) % items + 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        optimizer.zero_grad()
        loss, _ = model(batch, step)
        loss.backward()
        optimizer.step()
    search = ParallelSearch(model.eval(), trie_of(ids))
    for decoding in ("exact", *(["autoregressive"] if settings else [])):
        result = search(batch, 1, BeamSearchConfig(), decoding=decoding)  # type: ignore[arg-type]
        assert result.items_BK[:, 0].tolist() == batch.target_ids_B.tolist()


def test_searches_that_cannot_be() -> None:
    ids, batch = ids_of(), batches.batch([2], ITEMS)
    search = ParallelSearch(model_of(ids), trie_of(ids))
    with pytest.raises(UserError, match="k 0, expected at least 1"):
        search(batch, 0, BeamSearchConfig())
    with pytest.raises(UserError, match="'legal', expected 'vocabulary'"):
        search(batch, 1, BeamSearchConfig(normalization="legal"))
    with pytest.raises(UserError, match="training_mode 'standard'"):
        search(batch, 1, BeamSearchConfig(), decoding="autoregressive")
    with pytest.raises(UserError, match="for a model of"):
        ParallelSearch(model_of(), trie_of(ids_of(sizes=(3, 3))))
    with pytest.raises(UserError, match="got 2 weights, expected 3"):
        model_of(level_weights=(1.0, 1.0))
    tables = modalities()
    mixed = ParallelSearch(model_of(*tables, modality_merge="mixture"), trie_of(joint_ids(*tables)))
    with pytest.raises(UserError, match="expected 'joint' with decoding 'beam'"):
        mixed(batch, 1, BeamSearchConfig(), decoding="beam")
    with pytest.raises(UserError, match="length_normalize"):
        mixed(batch, 1, BeamSearchConfig(length_normalize=True))


def test_a_search_with_the_model_itself_is_the_beam() -> None:
    ids = ids_of()
    model, trie, batch = model_of(ids), trie_of(ids), batches.batch([2, 4], ITEMS)
    config = BeamSearchConfig(widths=3, verify=True)
    assert_same(
        ParallelSearch(model, trie)(batch, 3, config, decoding="beam"), beam_search(model, batch, trie, 3, config)
    )
