"""Parallel TIGER: losses by hand, biases by a naive lookup, its decodings against brute force and each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.errors import DataError
from generative_recommenders.errors import UserError, one_line
from generative_recommenders.generative import parallel_exact, parallel_merging
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.parallel_biases import (
    CodebookBias,
    HistoryItemBias,
    RecencyBias,
    SummedBias,
)
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_decoding import LeftToRight, ParallelSearch, joint_ids
from generative_recommenders.generative.parallel_exact import CodeSums, best_places
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.scoring import exhaustive
from generative_recommenders.generative.t5 import EncoderLayer
from generative_recommenders.generative.t5_attention import RelativePositionBias
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.generative.trie import Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests import batches

ITEMS = 30
SMALL: dict[str, Any] = {
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "dim": 16,
    "num_heads": 2,
    "dkv": 8,
    "ffn_hidden_dim": 32,
    "dropout_rate": 0.0,
}
MASKED: dict[str, Any] = {"training_mode": "masked"}
COVERING = BeamSearchConfig(widths=4096)


def ids_of(seed: int = 0, sizes: tuple[int, ...] = (4, 5, 3), items: int = ITEMS, **facts: Any) -> SemanticIds:
    """Random codes of the items 1 to `items`; with the small sizes several items share a tuple."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (items,), generator=generator) for size in sizes], 1)
    return SemanticIds.of(torch.arange(1, items + 1), codes, sizes, **facts)


def trie_of(ids: SemanticIds) -> Trie:
    return Trie.build(ids.codes_NL, ids.sizes, ids.item_ids_N, ids.active_N)


def model_of(*tables: SemanticIds, seed: int = 0, **settings: Any) -> ParallelTiger:
    torch.manual_seed(seed)
    config = ParallelTigerConfig(**(SMALL | settings))
    model = ParallelTiger(config, IdTable(*(tables or (ids_of(),)))).eval()
    # Wide enough that lists differ from request to request.
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.mul_(50.0)
    return model


def rows_of(result: BeamResult, row: int) -> list[tuple[int, float]]:
    count = int(result.valid_count_B[row])
    return list(zip(result.items_BK[row, :count].tolist(), result.scores_BK[row, :count].tolist(), strict=True))


def assert_same(found: BeamResult, expected: BeamResult) -> None:
    assert torch.equal(found.valid_count_B, expected.valid_count_B)
    torch.testing.assert_close(found.scores_BK, expected.scores_BK, atol=1e-5, rtol=0)
    assert torch.equal(found.items_BK, expected.items_BK)
    assert torch.equal(found.codes_BKL, expected.codes_BKL)


def log_probs_of(model: ParallelTiger, batch: SequenceBatch, temperature: float = 1.0) -> list[Tensor]:
    with torch.no_grad():
        return [(logits / temperature).log_softmax(-1) for logits in model.level_logits(batch)]


def brute_force(
    ids: SemanticIds, log_probs: list[Tensor], row: int, k: int, without: frozenset[int] = frozenset()
) -> list[tuple[int, float]]:
    """Items in Python: by score, then by codes, then by id."""
    scored = []
    for item, codes, active in zip(ids.item_ids_N.tolist(), ids.codes_NL.tolist(), ids.active_N.tolist(), strict=True):
        score = sum(float(level[row, code]) for level, code in zip(log_probs, codes, strict=True))
        if active and item not in without:
            scored.append((-round(score, 4), codes, item, score))
    return [(item, score) for _, _, item, score in sorted(scored)[:k]]


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


def test_prefixes_are_summed_once_where_many_leaves_share_them() -> None:
    codes = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(16))
    sums = CodeSums(codes, (5, 4, 16))
    assert sums.depth == 2 and sums.bags_NX.shape[1] == 2
    log_probs = [torch.randn(3, size).log_softmax(-1) for size in (5, 4, 16)]
    scores = sums.under(log_probs)
    expected = (log_probs[0][:, codes[:, 0]] + log_probs[1][:, codes[:, 1]]) + log_probs[2][:, codes[:, 2]]
    # Bit for bit: a prefix is added up in the order in which a search adds.
    assert torch.equal(scores.over(0, 320).T, expected)
    leaves = torch.tensor([[7, 319], [0, 3], [100, 100]])
    assert torch.equal(scores.at(leaves), expected.gather(1, leaves))
    assert bool(scores.over(320, len(sums.bags_NX)).isneginf().all())


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


def test_conditionals_of_any_order() -> None:
    """Without a given position they are the one pass; a given code matters to others; a hidden one does not."""
    model = model_of(**MASKED)
    batch = batches.batch([4, 2], ITEMS)
    codes, none = torch.tensor([[1, 2, 0], [3, 0, 2]]), torch.zeros(2, 3, dtype=torch.bool)
    last = torch.tensor([False, False, True]).expand(2, 3)
    with torch.no_grad():
        one_pass = model.level_logits(batch)
        for level, logits in enumerate(model.conditional_logits(batch, codes, none)):
            torch.testing.assert_close(logits, one_pass[level])
        first = model.conditional_logits(batch, codes, last)[0]
        changed = model.conditional_logits(batch, (codes + 1) % 3, last)[0]
        hidden = model.conditional_logits(batch, torch.tensor([[0, 0, 0], [0, 0, 2]]), last)[0]
    assert not torch.allclose(first, one_pass[0], atol=1e-3)
    assert not torch.allclose(first, changed, atol=1e-3)
    torch.testing.assert_close(first, hidden)


def test_hidden_positions_are_drawn_by_row_alone_and_alike() -> None:
    model = model_of(**MASKED)
    batch = batches.batch([1] * 6000, ITEMS)
    hidden = model.hidden_positions(batch, 5)
    counts = hidden.sum(1).bincount(minlength=4)
    assert counts[0] == 0 and bool(((counts[1:] - 2000).abs() < 200).all())
    # Each position is as likely as any: 2 of 3 on average.
    assert bool(((hidden.float().mean(0) - 2 / 3).abs() < 0.03).all())
    order = list(range(5999, -1, -1))
    assert torch.equal(model.hidden_positions(batches.rows_of(batch, order), 5), hidden[order])
    assert not torch.equal(model.hidden_positions(batch, 6), hidden)
    assert bool(model_of().hidden_positions(batch, 5).all())


@pytest.mark.parametrize("normalization", ["per_sample", "per_batch", "unnormalized"])
def test_masked_loss_by_hand(normalization: str) -> None:
    model = model_of(level_weights=(1.0, 0.5, 0.25), loss_normalization=normalization, **MASKED)
    batch = batches.batch([3, 5, 2, 0, 7], ITEMS)
    batch = replace(batch, target_ids_B=batch.target_ids_B.index_fill(0, torch.tensor([2]), ITEMS + 5))
    hidden = model.hidden_positions(batch, 11)
    codes = model.table.codes_of_items(batch.target_ids_B)
    with torch.no_grad():
        loss, scalars = model(batch, 11)
        logits = model.conditional_logits(batch, codes.clamp(min=0), ~hidden)
    sums, count, rows = 0.0, 0, 0
    for row in (0, 1, 3, 4):
        entropies = [
            -w * float(logits[level][row].log_softmax(-1)[codes[row, level]])
            for level, w in enumerate((1.0, 0.5, 0.25))
            if hidden[row, level]
        ]
        sums += sum(entropies) / (len(entropies) if normalization == "per_sample" else 1)
        count += len(entropies)
        rows += 1
    assert count < 12
    assert float(loss) == pytest.approx(sums / (count if normalization == "per_batch" else rows), rel=1e-5)
    assert float(scalars["tokens"]) == count
    assert float(scalars["main_loss"]) == pytest.approx(float(loss))


def test_standard_loss_is_the_mean_over_positions() -> None:
    model = model_of()
    batch = batches.batch([3, 5, 2], ITEMS)
    codes = model.table.codes_of_items(batch.target_ids_B)
    with torch.no_grad():
        loss, scalars = model(batch, 0)
        forced = model.teacher_forced(batch, codes[:, None])[:, 0]
    assert float(loss) == pytest.approx(-float(forced.mean()), rel=1e-5)
    for level in range(3):
        assert float(scalars[f"level_{level + 1}_loss"]) == pytest.approx(-float(forced[:, level].mean()), rel=1e-5)


def test_biases_are_naive_lookups() -> None:
    torch.manual_seed(0)
    levels, both = 3, RelativePositionBias(2, bidirectional=True, num_buckets=8, max_distance=6)
    one_side = RelativePositionBias(2, bidirectional=False, num_buckets=8, max_distance=6)
    items, recency = HistoryItemBias(both, levels), RecencyBias(one_side, levels)
    codes = CodebookBias(2, levels, std=1.0)
    places, queries = torch.arange(15), torch.arange(levels)
    found, ago, within = items(places, places), recency(queries, places), codes(queries, places)
    for key in range(15):
        for query in range(15):
            by_item = both(torch.tensor([query // levels]), torch.tensor([key // levels]))[:, 0, 0]
            assert torch.equal(found[:, query, key], by_item)
        for query in range(levels):
            # Item 0 of a history is the newest, one step before the next.
            distance = one_side(torch.tensor([key // levels + 1]), torch.tensor([0]))[:, 0, 0]
            assert torch.equal(ago[:, query, key], distance)
            assert torch.equal(within[:, query, key], codes.table[levels - 1 + key % levels - query])
    assert torch.equal(ago[:, 0], ago[:, 2]) and not torch.equal(ago[:, 0, 0], ago[:, 0, 3])


def test_switches_build_the_tables_they_name() -> None:
    def tables(**settings: Any) -> set[str]:
        everything = {name: True for name in vars(ParallelTigerConfig()) if name.startswith("has_relative")}
        return {n for n, _ in model_of(**(everything | settings)).named_parameters() if "bias" in n}

    flat = tables(encoder_aggregation="flatten")
    assert len(flat) == 5
    # One token an item has no places within the ID to tell apart.
    assert len(tables()) == 3
    assert len(tables(has_relative_encoder_item_bias=False)) == 2
    assert len(tables(has_relative_decoder_item_bias_ca=False)) == 2
    assert len(tables(has_relative_decoder_codebook_bias_sa=False)) == 2
    assert tables(has_relative_decoder_item_bias_sa=False) == tables()
    assert len(tables(encoder_aggregation="flatten", has_relative_encoder_codebook_bias=False)) == 4
    assert len(tables(encoder_aggregation="flatten", has_relative_decoder_codebook_bias_ca=False)) == 4


def test_aggregation() -> None:
    batch = batches.batch([3, 0, 2], ITEMS)
    lengths = {}
    for how in ("flatten", "sum", "mean", "concat"):
        model = model_of(encoder_aggregation=how)
        x = torch.randn(5, 3, 16)
        found = model._aggregated(x)
        by_hand = {"flatten": x.reshape(15, 16), "sum": x[:, 0] + x[:, 1] + x[:, 2], "mean": x.mean(1)}
        if model.concat is not None:
            by_hand["concat"] = x.reshape(5, 48) @ model.concat.weight.T + model.concat.bias
        torch.testing.assert_close(found, by_hand[how])
        lengths[how] = model.encode(batch).rectangles.offsets.tolist()
    assert lengths == {"flatten": [0, 9, 9, 15], "sum": [0, 3, 3, 5], "mean": [0, 3, 3, 5], "concat": [0, 3, 3, 5]}


def test_the_order_of_a_history_matters_through_the_biases_alone() -> None:
    batch = batches.batch([4], ITEMS)
    turned = replace(batch, item_ids_T=batch.item_ids_T.flip(0))
    assert not torch.equal(batch.item_ids_T, turned.item_ids_T)
    with torch.no_grad():
        model = model_of()
        assert not torch.allclose(model.level_logits(batch)[0], model.level_logits(turned)[0], atol=1e-3)
        model = model_of(has_relative_encoder_item_bias=False)
        torch.testing.assert_close(model.level_logits(batch)[0], model.level_logits(turned)[0], atol=1e-4, rtol=0)


def test_recency_is_counted_from_the_newest_item() -> None:
    """With all else silenced, a history is what its newest item is, however many came before."""
    model = model_of(has_relative_decoder_item_bias_ca=True)
    assert isinstance(model.decoder.cross_bias, SummedBias)
    recency = model.decoder.cross_bias.parts[0]
    assert isinstance(recency, RecencyBias)
    batch = batches.batch([2, 5, 7], ITEMS)
    ends = batch.offsets[1:] - 1
    with torch.no_grad():
        recency.buckets.table[1] = 100.0
        for layer in model.encoder.layers:
            assert isinstance(layer, EncoderLayer)
            layer.attention.output.weight.zero_()
        same = replace(batch, item_ids_T=batch.item_ids_T.index_fill(0, ends, 3))
        for logits in model.level_logits(same):
            torch.testing.assert_close(logits[1:], logits[:1].expand(2, -1))
        first, second, _ = model.level_logits(batch)[0]
        assert not torch.allclose(first, second, atol=1e-3)


def test_events_without_an_id_are_left_out() -> None:
    model, batch = model_of(), batches.batch([4, 3], ITEMS)
    unknown = torch.tensor([False, True, False, False, False, False, True])
    shorter = replace(batch, item_ids_T=batch.item_ids_T[~unknown], offsets=torch.tensor([0, 3, 5]))
    longer = replace(batch, item_ids_T=batch.item_ids_T.masked_fill(unknown, ITEMS + 9))
    columns = {n: getattr(batch, n)[~unknown] for n in ("ratings_T", "timestamps_T", "next_item_ids_T")}
    shorter = replace(shorter, **columns, next_timestamps_T=batch.next_timestamps_T[~unknown])
    with torch.no_grad():
        for found, expected in zip(model.level_logits(longer), model.level_logits(shorter), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [{}, {"use_multi_head": True, "encoder_aggregation": "concat"}, MASKED])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_all_parameters(settings: dict[str, Any], recompute: bool) -> None:
    every = {"has_relative_decoder_item_bias_ca": True, "has_relative_decoder_codebook_bias_ca": True}
    flat = {"encoder_aggregation": "flatten"} | every | settings | {"dropout_rate": 0.1}
    model = model_of(ids_of(items=20), activation_checkpoint=recompute, **flat).train()
    loss, _ = model(batches.batch([9, 4, 6, 8] * 4, 20), 3)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


def test_recomputation_and_bf16_change_nothing_but_rounding() -> None:
    batch = batches.batch([9, 4, 6, 0], ITEMS)
    losses = {}
    for name, settings in {"plain": {}, "again": {"activation_checkpoint": True}, "bf16": {"bf16": True}}.items():
        model = model_of(dropout_rate=0.2, **(MASKED | settings)).train()
        loss, _ = model(batch, 3)
        loss.backward()
        losses[name] = (loss.item(), model.tokens.table.grad)
    assert losses["again"][0] == losses["plain"][0]
    torch.testing.assert_close(losses["again"][1], losses["plain"][1])
    assert losses["bf16"][0] == pytest.approx(losses["plain"][0], rel=0.05)
    assert losses["bf16"][0] != losses["plain"][0]


def modalities(seed: int = 0) -> tuple[SemanticIds, SemanticIds]:
    """Two tables of which the second lacks some items and has others."""
    second = ids_of(seed + 50, (6, 2))
    return ids_of(seed), SemanticIds.of(second.item_ids_N + 4, second.codes_NL, second.sizes)


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


def modality_scores(joint: SemanticIds, log_probs: list[Tensor], row: int) -> list[dict[int, float]]:
    """Sum of log-probabilities of each modality's own ID, by item."""
    codes = dict(zip(joint.item_ids_N.tolist(), joint.codes_NL.tolist(), strict=True))
    return [
        {item: sum(float(log_probs[level][row, own[level]]) for level in levels) for item, own in codes.items()}
        for levels in (range(3), range(3, 5))
    ]


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dim": 0}, "parallel_tiger.dim: got 0, expected at least 1"),
        ({"dropout_rate": 1.0}, "parallel_tiger.dropout_rate: got 1.0, expected 0 <= dropout_rate < 1"),
        ({"encoder_aggregation": "max"}, "got 'max', expected 'flatten' or 'sum' or 'mean' or 'concat'"),
        ({"loss_normalization": "per_batch"}, "got 'per_batch', expected 'per_sample' with"),
        ({"decoding": "autoregressive"}, "got 'autoregressive', expected 'exact' or 'beam' with"),
        ({"decoding": "beam", "modality_merge": "mixture"}, "got 'mixture', expected 'joint' with"),
        ({"level_weights": (0.0, 0.0)}, "parallel_tiger.level_weights: got (0.0, 0.0), expected"),
        ({"relative_attention_num_buckets": 5}, "got 5, expected an even number from 4 on"),
        ({"relative_attention_max_distance": 16}, "got 16, expected more than half of the buckets"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        ParallelTigerConfig(**settings)
    assert expected in one_line(caught.value)


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
