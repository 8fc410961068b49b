"""Scores by shared prefixes equal teacher forcing, and every prefix is decoded once."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.errors import UserError
from generative_recommenders.generative.item_paths import ItemPaths
from generative_recommenders.generative.prefix_scoring import code_log_probs, rank_items
from generative_recommenders.generative.specgr import SpecGR
from generative_recommenders.generative.trie import Trie
from tests.generative.beam_cases import TableModel, batch_of, random_ids, trie_of
from tests.generative.specgr_cases import case, large_ids
from tests.generative.test_beam_heads import HEADS, far_from_the_start, histories_of


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60))
def test_paths_and_scores_are_those_of_the_items(seed: int, count: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(generator, levels=1 + seed % 4, size=5, items=40)
    trie, model = trie_of(ids), TableModel(ids.sizes, 3, generator)
    paths, batch = ItemPaths.of(trie), batch_of([2, 0, 1])
    places_BK = torch.randint(len(paths), (3, count), generator=generator)
    assert torch.equal(paths.places_of(paths.item_ids_N), torch.arange(len(paths)))
    codes_BKL = ids.codes_of(paths.item_ids_N[places_BK].flatten()).view(3, count, -1)
    assert torch.equal(paths.all_codes(places_BK), codes_BKL)
    leaves_BK = trie.find(codes_BKL)
    assert torch.equal(paths.nodes(len(ids.sizes) - 1, places_BK), leaves_BK)
    found = code_log_probs(model, model.begin(batch), paths, places_BK, chunk=chunk)
    torch.testing.assert_close(found, model.teacher_forced(batch, codes_BKL), atol=1e-5, rtol=0)
    lengths_BK = torch.randint(len(ids.sizes) + 1, (3, count), generator=generator)
    part = code_log_probs(model, model.begin(batch), paths, places_BK, lengths_BK, chunk=chunk)
    wanted = torch.arange(len(ids.sizes)) < lengths_BK[..., None]
    torch.testing.assert_close(part, found.masked_fill(~wanted, 0.0))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_scores_as_teacher_forcing_does(head: str) -> None:
    generator = torch.Generator().manual_seed(4)
    ids = large_ids()
    torch.manual_seed(4)
    model, trie = far_from_the_start(HEADS[head](ids), generator), trie_of(ids)
    batch, paths = batch_of(range(4), histories_of(ids, generator, [2, 0, 6, 1])), ItemPaths.of(trie)
    places_BK = torch.randint(len(paths), (4, 25), generator=generator)
    with torch.no_grad():
        expected = model.teacher_forced(batch, paths.all_codes(places_BK)).float()
    for chunk in (1000, 28):
        found = code_log_probs(model, model.begin(batch), paths, places_BK, chunk=chunk)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ranked = rank_items(model, batch, trie, paths.item_ids_N[places_BK])
    torch.testing.assert_close(ranked, expected.mean(-1), atol=1e-5, rtol=1e-5)
    same = rank_items(model, batch, trie, paths.item_ids_N[places_BK[0]])
    torch.testing.assert_close(same[0], ranked[0], atol=1e-5, rtol=1e-5)


def test_each_node_is_decoded_once_and_prefixes_that_are_not_wanted_never() -> None:
    ids = large_ids(1)
    trie, model = trie_of(ids), TableModel(ids.sizes, 2, torch.Generator().manual_seed(0))
    some = ids.item_ids_N[7:47]
    nodes = [len({tuple(row[:depth]) for row in ids.codes_of(some).tolist()}) for depth in range(3)]
    twice = torch.cat([some.flip(0), some])
    rank_items(model, batch_of([1]), trie, twice)
    assert model.calls == nodes
    model.calls.clear()
    rank_items(model, batch_of([1]), trie, some, lengths_N=torch.full((60,), 2))
    assert model.calls == nodes[:2]
    model.calls.clear()
    rank_items(model, batch_of([1, 0]), trie, some)
    assert model.calls == [2 * count for count in nodes]


def test_ranking_ten_thousand_items_of_a_catalogue() -> None:
    generator = torch.Generator().manual_seed(2)
    codes_NL = torch.tensor(list(itertools.product(range(24), repeat=3)))[torch.randperm(24**3, generator=generator)]
    trie = Trie.build(codes_NL[:12_000], (24, 24, 24))
    model, wanted = TableModel((24, 24, 24), 1, generator), torch.randperm(12_000, generator=generator)[:10_000]
    found = rank_items(model, batch_of([0]), trie, wanted)
    expected = model.teacher_forced(batch_of([0]), codes_NL[wanted][None]).mean(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert model.calls == [1, 24, 24 * 24]


def test_items_that_are_not_there_have_no_score_and_what_does_not_fit_is_said() -> None:
    ids = large_ids(3)
    trie, model = trie_of(ids), TableModel(ids.sizes, 2, torch.Generator().manual_seed(0))
    found = rank_items(model, batch_of([0, 1]), trie.remove([3]), torch.tensor([1, 2, 3, 999, 5]))
    assert found.isneginf().tolist() == [[False, True, True, True, False]] * 2
    assert rank_items(model, batch_of([0]), trie, torch.empty(0, dtype=torch.int64)).shape == (1, 0)
    with pytest.raises(UserError, match="expected"):
        rank_items(model, batch_of([0, 1]), trie, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="item ranking: got a trie"):
        rank_items(model, batch_of([0]), Trie.build(torch.zeros(1, 1, dtype=torch.int64), (2,)), torch.tensor([0]))


def test_scored_lengths() -> None:
    codes_NL = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    trie = Trie.build(codes_NL, (2, 2, 2))
    paths, seen = ItemPaths.of(trie), trie.allow(torch.tensor([True, False, False, False, False]))
    # In the trie's order: items 0 and 4, which share their codes, then 1, 2, 3.
    assert paths.item_ids_N.tolist() == [0, 4, 1, 2, 3]
    assert paths.scored_lengths(seen, "drop_last", 3).tolist() == [3, 2, 2, 2, 2]
    assert paths.scored_lengths(seen, "drop_last_of_all", 3).tolist() == [2] * 5
    assert paths.scored_lengths(seen, "in_sample_prefix", 1).tolist() == [3, 3, 2, 1, 1]
    assert paths.scored_lengths(seen, "in_sample_prefix", 2).tolist() == [3, 3, 2, 2, 2]
    assert paths.scored_lengths(seen, "in_sample_prefix", 9).tolist() == [3] * 5


def test_an_item_that_cannot_reach_the_floor_is_not_decoded_further() -> None:
    c = case(8, large_ids(), draft_size=20, num_beams=4, threshold=-3.3)
    specgr, batch = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample), batch_of([0])
    frontier = specgr._begin(batch, None).decoded(c.model)
    places = frontier.draft(specgr.paths, 20)
    c.model.calls.clear()
    whole = frontier.verify(c.model, specgr.paths, specgr.lengths_N, places, -math.inf)
    every = sum(c.model.calls)
    c.model.calls.clear()
    found = frontier.verify(c.model, specgr.paths, specgr.lengths_N, places, -3.3)
    assert sum(c.model.calls) < every and not found.complete_BK.all()
    assert torch.equal(found.accepted_BK, whole.scores_BK > -3.3) and found.accepted_BK.any()
    assert (found.scores_BK >= whole.scores_BK).all()
    torch.testing.assert_close(found.scores_BK[found.complete_BK], whole.scores_BK[found.complete_BK])
