"""Parallel TIGER: losses by hand, biases by a naive lookup, its conditionals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from generative_recommenders.errors import UserError, one_line
from generative_recommenders.generative.parallel_biases import (
    CodebookBias,
    HistoryItemBias,
    RecencyBias,
    SummedBias,
)
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_exact import CodeSums
from generative_recommenders.generative.t5 import EncoderLayer
from generative_recommenders.generative.t5_attention import RelativePositionBias
from tests import batches
from tests.generative.parallel_cases import (
    ITEMS,
    MASKED,
    ids_of,
    model_of,
)


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
