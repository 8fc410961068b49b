"""SpecGR is held against the published loop in plain Python, against exhaustive scoring, and against itself alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.errors import DataError
from generative_recommenders.errors import UserError
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.draft_head import DraftConfig, DraftHead, EncoderDrafter
from generative_recommenders.generative.drafters import MixedDrafter, SemanticKNN
from generative_recommenders.generative.scoring import exhaustive
from generative_recommenders.generative.specgr import SpecGR, threshold_for
from generative_recommenders.generative.specgr_config import SpecGRConfig
from generative_recommenders.generative.tiger import Tiger
from generative_recommenders.generative.trie import Trie
from tests.generative.beam_cases import batch_of, filter_of, random_ids, trie_of
from tests.generative.specgr_cases import SCORES, USERS, NaiveSpecGR, TableDrafter, assert_same, case, large_ids, listed
from tests.generative.test_beam_heads import HEADS, far_from_the_start, histories_of, table_of, tiger

FIELDS = ("items_BK", "codes_BKL", "valid_count_B", "accepted_B", "rounds_B", "drafted_B", "exact_B")


@pytest.mark.parametrize("part", range(10))
def test_equals_the_published_loop(part: int) -> None:
    """100 catalogues a part, each with a model and a drafter for four users: with filters, subsets, unknown items."""
    rounds, enough, exact = 0, 0, 0
    for number in range(100):
        c = case(1000 * part + number)
        specgr = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample)
        users, k = torch.randperm(USERS, generator=c.generator).tolist(), c.drawn(1, 12)
        everything, filtered, subset = set(c.codes), number % 3, number % 5 == 0
        kept = [{i for i in sorted(everything) if c.drawn(0, 2)} for _ in range((1, 1, USERS)[filtered])]
        allowed = filter_of(c.trie, c.ids, kept) if filtered else None
        result = specgr(batch_of(users), k, allowed=allowed, subset=subset)
        for row, user in enumerate(users):
            own = kept[row % len(kept)] if filtered else everything
            expected = c.naive()(user, c.drafter.scores_UV[user].tolist(), k, own, subset)
            assert_same(listed(result, row), expected)
            for item, codes in zip(result.items_BK[row].tolist(), result.codes_BKL[row].tolist(), strict=True):
                assert item == 0 or c.codes[item] == tuple(codes)
            rounds += expected.rounds > 1
            enough += expected.accepted >= k
            exact += expected.exact
    assert rounds > 100 and 40 < enough < 360 and 10 < exact < 360


def test_a_draft_of_the_whole_catalogue_is_exhaustive() -> None:
    config = BeamSearchConfig(length_normalize=True)
    for seed in range(30):
        c = case(seed, draft_size=1000, threshold=-math.inf, score="drop_last", drafter_weight=0.0)
        everything = c.trie.allow(torch.ones(len(c.ids), dtype=torch.bool))
        scores_UV = torch.randn(USERS, int(c.ids.item_ids_N[-1]) + 1, generator=c.generator)
        specgr = SpecGR(c.model, c.trie, TableDrafter(scores_UV), c.config, everything)
        result, whole = (
            specgr(batch_of(range(USERS)), 50),
            exhaustive(c.model, batch_of(range(USERS)), c.trie, 50, config),
        )
        assert torch.equal(result.items_BK, whole.items_BK) and torch.equal(result.codes_BKL, whole.codes_BKL)
        torch.testing.assert_close(result.scores_BK, whole.scores_BK, atol=1e-5, rtol=0)
        assert result.exact_B.all() and result.gap_B.isneginf().all() and result.rounds_B.eq(1).all()


def test_a_request_does_not_depend_on_its_batch() -> None:
    for seed in range(30):
        c = case(seed)
        specgr = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample)
        whole = specgr(batch_of(range(USERS)), 6)
        for users in ([3, 1, 0, 2], [2], [1, 3]):
            part = specgr(batch_of(users), 6)
            for name in FIELDS:
                assert torch.equal(getattr(whole, name)[users], getattr(part, name))
            torch.testing.assert_close(whole.scores_BK[users], part.scores_BK, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_verified_by_its_own_probabilities(head: str) -> None:
    left = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ids = random_ids(generator, levels=3, size=5, items=50)
        torch.manual_seed(seed)
        model, trie = far_from_the_start(HEADS[head](ids), generator), trie_of(ids)
        histories = histories_of(ids, generator, [3, 0, 6, 1])
        batch, size = batch_of(range(4), histories), int(ids.item_ids_N[-1]) + 1
        drafter = TableDrafter(torch.randn(4, size, generator=generator))
        seen_N = torch.rand(len(ids), generator=generator) < 0.6
        tables = [table.log_softmax(-1) for table in table_of(model, batch).tables]

        def row(user: int, prefix: tuple[int, ...], sizes: Any = ids.sizes, tables: Any = tables) -> list[float]:
            place = 0
            for count, code in zip(sizes, prefix, strict=False):
                place = place * count + code
            return tables[len(prefix)][user, place].tolist()

        score = SCORES[seed % 3]
        config = SpecGRConfig(drafter="semantic_knn", draft_size=6, num_beams=4, score=score, min_prefix=1)
        codes = {
            item: tuple(own)
            for item, own, on in zip(*(x.tolist() for x in (ids.item_ids_N, ids.codes_NL, ids.active_N)), strict=True)
            if on
        }
        seen = set(codes) & set(ids.item_ids_N[seen_N].tolist())
        first = SpecGR(model, trie, drafter, config, trie.allow(seen_N)).first_scores(batch)
        # About half of the drafts are accepted.
        specgr = SpecGR(model, trie, drafter, config, trie.allow(seen_N)).with_threshold(threshold_for(first, 0.5))
        result = specgr(batch, 5, exclude_history=True)
        naive = NaiveSpecGR(row, codes, seen, specgr.config)
        for user in range(4):
            allowed = set(codes) - set(histories[user])
            assert_same(listed(result, user), naive(user, drafter.scores_UV[user].tolist(), 5, allowed, False))
        left += int(result.rounds_B.min() < result.rounds_B.max())
        part = specgr(batch_of([2, 0], [histories[2], histories[0]]), 5, exclude_history=True)
        for name in FIELDS:
            assert torch.equal(getattr(result, name)[[2, 0]], getattr(part, name))
    assert left


def test_removed_items_are_neither_drafted_nor_listed_and_new_ones_are_at_once() -> None:
    generator = torch.Generator().manual_seed(3)
    c = case(40, large_ids(), draft_size=3, num_beams=3)
    gone = sorted(c.codes)[:2]
    trie = c.trie.remove(gone)
    specgr = SpecGR(c.model, trie, c.drafter, c.config, trie.allow(torch.ones(len(c.ids), dtype=torch.bool)))
    result = specgr(batch_of(range(USERS)), 50)
    assert not set(result.items_BK.flatten().tolist()) & set(gone)
    with pytest.raises(DataError, match="another trie"):
        SpecGR(c.model, trie, c.drafter, c.config, c.in_sample)
    new = int(c.ids.item_ids_N[-1]) + 1
    codes_NL = torch.cat([c.ids.codes_NL, c.ids.codes_NL[:1]])
    grown = Trie.build(codes_NL, c.ids.sizes, torch.cat([c.ids.item_ids_N, torch.tensor([new])]))
    scores_UV = torch.randn(USERS, new + 1, generator=generator)
    scores_UV[:, new] = 99.0
    seen_N = torch.arange(len(codes_NL)) < len(c.ids)
    config = replace(c.config, threshold=-math.inf)
    result = SpecGR(c.model, grown, TableDrafter(scores_UV), config, grown.allow(seen_N))(batch_of(range(USERS)), 1)
    assert result.drafted_B.eq(3).all() and result.accepted_B.eq(3).all()
    only = grown.allow(torch.arange(len(codes_NL)) == len(c.ids))
    result = SpecGR(c.model, grown, TableDrafter(scores_UV), config, grown.allow(seen_N))(
        batch_of(range(USERS)), 5, allowed=only
    )
    assert result.items_BK[:, 0].eq(new).all() and result.valid_count_B.eq(1).all() and result.exact_B.all()


def test_first_step_of_the_beam_is_not_decoded_twice_and_one_round_decodes_no_beam() -> None:
    c = case(11, large_ids(), draft_size=5, threshold=-math.inf)
    specgr = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample)
    c.model.calls.clear()
    result = specgr(batch_of([0]), 1)
    assert int(result.rounds_B) == 1
    assert len(c.model.calls) <= len(c.ids.sizes) and c.model.calls[0] == 1 and max(c.model.calls) <= 5


def test_requests_that_are_done_are_not_decoded_any_more() -> None:
    """Of two users one accepts everything in the first round; the other's later rounds cost what they cost alone."""
    c = case(21, large_ids(), draft_size=4, num_beams=4)
    c.model.tables = [table.clone() for table in c.model.tables]
    for table in c.model.tables:
        table[0], table[1] = 0.0, table[1] * 5
    c = replace(c, config=replace(c.config, threshold=-max(map(math.log, c.ids.sizes)) - 0.01))
    specgr = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample)
    c.model.calls.clear()
    alone = specgr(batch_of([1]), 4)
    calls_alone = list(c.model.calls)
    c.model.calls.clear()
    both = specgr(batch_of([0, 1]), 4)
    assert both.rounds_B.tolist()[0] == 1 < both.rounds_B.tolist()[1] == int(alone.rounds_B)
    assert sum(c.model.calls) < 2 * sum(calls_alone)
    assert torch.equal(both.items_BK[1:], alone.items_BK)


def test_threshold_accepts_the_target_share_of_first_drafts() -> None:
    c = case(5, large_ids(), draft_size=6, target_acceptance=0.4, score="in_sample_prefix", min_prefix=3)
    specgr = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample)
    batches = [batch_of([0, 1]), batch_of([]), batch_of([2, 3])]
    scores = torch.cat([specgr.first_scores(batch).flatten() for batch in batches if batch.size])
    tuned = specgr.calibrated(batches)
    scores = scores[scores > -math.inf]
    share = float((scores > tuned.config.threshold).float().mean())
    assert abs(share - 0.4) <= 1 / len(scores) and tuned.config.draft_size == 6
    assert SpecGR(c.model, c.trie, c.drafter, replace(c.config, target_acceptance=0.0), c.in_sample).calibrated([])
    assert threshold_for(torch.tensor([-1.0, -2.0, -3.0, -math.inf]), 1.0) < -3.0
    assert threshold_for(torch.tensor([-1.0, -2.0, -3.0]), 1 / 3) == -1.5
    # Equal scores are accepted together.
    assert threshold_for(torch.tensor([-1.0, -1.0, -3.0]), 1 / 3) == -2.0
    with pytest.raises(UserError, match="no drafts"):
        threshold_for(torch.tensor([-math.inf]), 0.5)


class CountingTiger(Tiger):
    """Counts its passes over histories."""

    passes = 0

    def _encode(self, batch: SequenceBatch, seed: int | None) -> Any:
        self.passes += 1
        return super()._encode(batch, seed)


class Apart:
    """A drafter of whose states the search knows nothing."""

    def __init__(self, drafter: EncoderDrafter | MixedDrafter) -> None:
        self.scores = drafter.scores


def test_a_model_that_drafts_reads_histories_once() -> None:
    generator = torch.Generator().manual_seed(9)
    ids = random_ids(generator, levels=3, size=6, items=60)
    torch.manual_seed(9)
    plain: Any = tiger(ids)
    model = CountingTiger(plain.config, plain.table)
    model.draft = DraftHead(DraftConfig(width=8), 16)
    model = far_from_the_start(model, generator)
    trie, config = trie_of(ids), SpecGRConfig(draft_size=6, num_beams=4, threshold=-2.0)
    seen = trie.allow(torch.ones(len(ids), dtype=torch.bool))
    batch = batch_of(range(4), histories_of(ids, generator, [3, 1, 5, 2]))
    own, size = EncoderDrafter(model), int(ids.item_ids_N[-1]) + 1
    texts = SemanticKNN(torch.randn(size, 7, generator=generator), torch.ones(size, dtype=torch.bool))
    for drafter in (own, MixedDrafter(own, texts, 0.5)):
        expected = SpecGR(model, trie, Apart(drafter), config, seen)(batch, 5)
        model.passes = 0
        result = SpecGR(model, trie, drafter, config, seen)(batch, 5)
        assert model.passes == 1
        for name in FIELDS:
            assert torch.equal(getattr(result, name), getattr(expected, name))
        torch.testing.assert_close(result.scores_BK, expected.scores_BK)


def test_what_does_not_fit_is_said() -> None:
    c = case(2)
    specgr = SpecGR(c.model, c.trie, c.drafter, c.config, c.in_sample)
    with pytest.raises(UserError, match="got k 0"):
        specgr(batch_of([0]), 0)
    assert specgr(batch_of([]), 5).items_BK.shape == (0, 5)
    other = Trie.build(torch.zeros(1, 2, dtype=torch.int64), (7, 9))
    with pytest.raises(UserError, match="a trie of codes"):
        SpecGR(c.model, other, c.drafter, c.config, other.allow(torch.ones(1, dtype=torch.bool)))
    each = c.trie.allow(torch.ones(2, len(c.ids), dtype=torch.bool))
    with pytest.raises(DataError, match="one for all"):
        SpecGR(c.model, c.trie, c.drafter, c.config, each)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"draft_size": 0}, "draft_size"),
        ({"num_beams": 0}, "num_beams"),
        ({"threshold": math.nan}, "threshold"),
        ({"target_acceptance": 1.5}, "target_acceptance"),
        ({"score": "last"}, "score"),
        ({"min_prefix": 0}, "min_prefix"),
        ({"eval_mode": "cold"}, "eval_mode"),
        ({"max_eval_steps": -1}, "max_eval_steps"),
        ({"drafter": "knn"}, "drafter"),
        ({"drafter": "retrieval"}, "drafter_checkpoint"),
        ({"drafter_checkpoint": "a"}, "drafter_checkpoint"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"specgr.{name}: got "):
        SpecGRConfig(**settings)
