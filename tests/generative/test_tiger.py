"""TIGER: its logits are those of a T5 with the same weights, its search steps are its teacher forcing, and its loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.transformers_t5 import load_into
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.generative.tiger import Tiger, TigerConfig
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests import batches

SIZES = (4, 6, 3)
ITEMS = 20


def ids(items: int = ITEMS, sizes: tuple[int, ...] = SIZES) -> SemanticIds:
    """Different codes for items 1 to `items`."""
    draw = torch.Generator().manual_seed(3)
    picks = torch.randperm(math.prod(sizes), generator=draw)[:items]
    codes = torch.stack([picks // math.prod(sizes[level + 1 :]) % size for level, size in enumerate(sizes)], 1)
    return SemanticIds.of(torch.arange(1, items + 1), codes, sizes)


def tiger(table: IdTable | None = None, seed: int = 0, **bindings: Any) -> Tiger:
    torch.manual_seed(seed)
    small = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim": 16, "num_heads": 3, "dkv": 8}
    config = TigerConfig(**small | {"ffn_hidden_dim": 24, "user_tokens": 7} | bindings)
    model = Tiger(config, IdTable(ids()) if table is None else table)
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.normal_()
    return model


def any_codes(*shape: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, shape, generator=draw) for size in SIZES], -1)


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "grid": {"user_tokens": 0, "separator": True},
    "shared": {"shared_heads": True, "ffn_activation_fn": "gated-gelu"},
    "tied": {"shared_heads": True, "tie_embeddings": True},
    "mlp": {"head_hidden_dim": 9, "separator": True},
}


@pytest.mark.parametrize("kind", ["paper", "grid", "shared", "tied"])
def test_logits_are_those_of_a_t5_with_the_same_weights(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiger(**VARIANTS[kind]).eval()
    users, codes = model.config.user_tokens, sum(SIZES)
    # Their one vocabulary: codes of all levels, users, separator, BOS, padding.
    separator, bos, pad = codes + users, codes + users + 1, codes + users + 2
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=pad + 1,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=3,
            feed_forward_proj=model.config.ffn_activation_fn,
            tie_word_embeddings=kind == "tied",
        )
    ).eval()
    load_into(theirs, model.encoder, model.decoder)
    with torch.no_grad():
        rows = theirs.shared.weight
        rows[:codes] = model.tokens.table
        if model.tokens.users is not None:
            rows[codes:separator] = model.tokens.users
        if model.tokens.separator is not None:
            rows[separator] = model.tokens.separator
        rows[bos] = model.tokens.bos
        if kind != "tied":
            # Some versions tie the output to the input whatever they are told.
            theirs.lm_head.weight = nn.Parameter(torch.zeros_like(rows))
            theirs.lm_head.weight[:codes] = torch.cat(list(model.heads.matrices))
    batch = batches.batch([6, 1, 3], num_items=ITEMS)
    starts = torch.tensor([0, *SIZES[:-1]]).cumsum(0)
    rows_of_tokens = []
    for row in range(3):
        items = batch.item_ids_T[batch.offsets[row] : batch.offsets[row + 1]]
        tokens = [] if model.tokens.users is None else [codes + user_row(model, batch, row)]
        for item in items:
            tokens += (ids().codes_of(item[None])[0] + starts).tolist() + [separator] * model.config.separator
        rows_of_tokens.append(torch.tensor(tokens))
    padded = torch.nn.utils.rnn.pad_sequence(rows_of_tokens, batch_first=True, padding_value=pad)
    targets = any_codes(3)
    inputs = torch.cat([torch.full((3, 1), bos), (targets + starts)[:, :-1]], 1)
    with torch.no_grad():
        logits = theirs(input_ids=padded, attention_mask=padded != pad, decoder_input_ids=inputs).logits
        found = model.teacher_forced(batch, targets[:, None])[:, 0]
    for level, (start, size) in enumerate(zip(starts.tolist(), SIZES, strict=True)):
        expected = logits[:, level, start : start + size].log_softmax(-1).gather(-1, targets[:, level, None])[:, 0]
        torch.testing.assert_close(found[:, level], expected, rtol=1e-5, atol=1e-5)


def user_row(model: Tiger, batch: SequenceBatch, row: int) -> int:
    assert model.tokens.users is not None
    same = (model.tokens.users == model.tokens.of_users(batch.user_ids_B[row])).all(-1)
    return int(same.nonzero()[0, 0])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kind=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 999),
)
def test_steps_along_ancestors_are_teacher_forcing(
    lengths: list[int], widths: tuple[int, int], kind: str, seed: int
) -> None:
    model = tiger(seed=seed, **VARIANTS[kind])
    batch = batches.batch(lengths, num_items=ITEMS, seed=seed)
    draw, rows = torch.Generator().manual_seed(seed), len(lengths)
    with torch.no_grad():
        context = model.begin(batch).select(torch.arange(rows))
        steps = [model.logits(context, 0, None, []).log_softmax(-1)]
        paths, chosen = torch.empty(rows, 1, 0, dtype=torch.int64), []
        scores = torch.zeros(rows, 1, 0)
        for level, width in enumerate((*widths, 8)):
            parents = torch.randint(paths.shape[1], (rows, width), generator=draw)
            codes = torch.randint(SIZES[level], (rows, width), generator=draw)
            own = steps[-1].gather(1, parents[..., None].expand(-1, -1, SIZES[level])).gather(-1, codes[..., None])
            index = parents[..., None].expand(-1, -1, level)
            paths = torch.cat([paths.gather(1, index), codes[..., None]], -1)
            scores = torch.cat([scores.gather(1, index), own], -1)
            if level + 1 < len(SIZES):
                chosen = [step.gather(1, parents) for step in chosen] + [torch.arange(width).expand(rows, -1)]
                steps.append(model.logits(context, level + 1, codes, chosen).log_softmax(-1))
        torch.testing.assert_close(scores, model.teacher_forced(batch, paths), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=5), seed=st.integers(0, 99), data=st.data())
def test_requests_do_not_depend_on_batch_or_order(lengths: list[int], seed: int, data: st.DataObject) -> None:
    model, batch = tiger(seed=seed), batches.batch(lengths, num_items=ITEMS, seed=seed)
    order = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, len(lengths)))]
    codes = any_codes(len(lengths), 3, seed=seed)
    with torch.no_grad():
        whole = model.teacher_forced(batch, codes)
        part = model.teacher_forced(batches.rows_of(batch, list(order)), codes[list(order)])
    torch.testing.assert_close(part, whole[list(order)], rtol=0, atol=1e-5)


def test_dropout_and_loss_do_not_depend_on_how_rows_are_shared_out() -> None:
    model, batch = tiger(dropout_rate=0.3), batches.batch([3, 0, 5, 2], num_items=ITEMS)
    whole, _ = model(batch, 11)
    parts = []
    for rows in ([2, 1], [0, 3]):
        loss, _ = model(batches.rows_of(batch, rows), 11)
        parts.append(loss)
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=0, atol=1e-5)
    assert not torch.allclose(whole, model(batch, 12)[0])
    assert torch.equal(model.eval()(batch, 11)[0], model(batch, 12)[0])


def test_rows_that_read_the_same_drop_on_their_own() -> None:
    model = tiger(dropout_rate=0.3, user_tokens=0)
    batch = dataclasses.replace(batches.batch([0, 0], num_items=ITEMS), target_ids_B=torch.tensor([5, 5]))
    first, second = (model(batches.rows_of(batch, [row]), 11)[0] for row in (0, 1))
    assert not torch.allclose(first, second)
    assert torch.equal(*(model.eval()(batches.rows_of(batch, [row]), 11)[0] for row in (0, 1)))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 0.0)])
def test_loss_is_the_weighted_cross_entropy_of_known_targets(reduction: Any, weights: tuple[float, ...]) -> None:
    batch = batches.batch([3, 0, 5, 2], num_items=ITEMS)
    # The third target has no ID.
    batch = dataclasses.replace(batch, target_ids_B=torch.tensor([5, 1, ITEMS + 4, 2]))
    model = tiger(dropout_rate=0.0, loss_reduction=reduction, level_weights=weights)
    loss, scalars = model(batch, 0)
    known = batches.rows_of(batch, [0, 1, 3])
    codes = ids().codes_of(known.target_ids_B)
    levels = -model.teacher_forced(known, codes[:, None])[:, 0].mean(0)
    of_level = torch.tensor(weights or (1.0, 1.0, 1.0))
    expected = (levels * of_level).sum() / (of_level.sum() if reduction == "mean" else 1.0)
    torch.testing.assert_close(loss, expected)
    assert scalars["tokens"] == 3 and not scalars["main_loss"].requires_grad
    torch.testing.assert_close(scalars["main_loss"], expected.detach())
    for level in range(3):
        torch.testing.assert_close(scalars[f"level_{level + 1}_loss"], levels[level].detach())


@pytest.mark.parametrize("kind", sorted(VARIANTS))
@pytest.mark.parametrize("lengths", [[3, 0, 6], [1], [0, 0]])
def test_gradients_reach_every_parameter(kind: str, lengths: list[int]) -> None:
    model = tiger(**VARIANTS[kind])
    loss, _ = model(batches.batch(lengths, num_items=ITEMS), 5)
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool(weight.grad.isfinite().all()), name
        # Distances that no row has, and all of the encoder where there is nothing to read, are left.
        assert sum(lengths) == 0 or bool((weight.grad != 0).any()) or "bias" in name, name


def test_a_target_without_id_gives_no_loss_but_a_gradient_of_zero() -> None:
    model = tiger()
    batch = dataclasses.replace(batches.batch([2], num_items=ITEMS), target_ids_B=torch.tensor([0]))
    loss, scalars = model(batch, 5)
    loss.backward()
    assert loss == 0.0 and scalars["tokens"] == 0.0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_unknown_events_are_as_if_they_had_not_been() -> None:
    model, batch = tiger(), batches.batch([5, 3, 1], num_items=ITEMS)
    unknown = batch.item_ids_T.clone()
    unknown[[0, 3, 8]] = torch.tensor([ITEMS + 1, 0, ITEMS + 500])
    found = model.teacher_forced(dataclasses.replace(batch, item_ids_T=unknown), codes := any_codes(3, 2))
    left = torch.tensor([1, 2, 4, 5, 6, 7])
    columns = ("item_ids_T", "ratings_T", "timestamps_T", "next_item_ids_T", "next_timestamps_T")
    changes = {name: getattr(batch, name)[left] for name in columns}
    short = dataclasses.replace(batch, **changes, offsets=torch.tensor([0, 3, 6, 6]))
    torch.testing.assert_close(found, model.teacher_forced(short, codes), rtol=0, atol=1e-6)


def test_a_context_of_a_fixed_length_gives_the_same_logits() -> None:
    model, codes = tiger(), any_codes(3, 4)
    batch = batches.batch([3, 0, 5], num_items=ITEMS)
    chosen = [torch.arange(4).expand(3, -1)]
    found = []
    for length in (None, 16, 40):
        context = model.begin(batch, length).select(torch.tensor([2, 0, 1]))
        model.logits(context, 0, None, [])
        found.append(model.logits(context, 1, codes[..., 0], chosen))
    assert [group.valid_bS.shape[1] for group in context.contexts[0].groups] == [40]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="got a row of 16 tokens, expected at most 15"):
        model.begin(batch, 15)


def test_users_matter_where_they_have_tokens() -> None:
    batch = batches.batch([3, 2], num_items=ITEMS)
    others = dataclasses.replace(batch, user_ids_B=batch.user_ids_B + 100)
    codes = any_codes(2, 2)
    named, nameless = tiger(), tiger(user_tokens=0)
    assert not torch.allclose(named.teacher_forced(batch, codes), named.teacher_forced(others, codes))
    assert torch.equal(nameless.teacher_forced(batch, codes), nameless.teacher_forced(others, codes))


@pytest.mark.parametrize("kind", ["paper", "tied"])
def test_many_candidates_are_scored_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiger(**VARIANTS[kind]), batches.batch([3, 0, 2], num_items=ITEMS)
    codes = any_codes(3, 11)
    whole = model.teacher_forced(batch, codes)
    monkeypatch.setattr("generative_recommenders.generative.tiger._CHUNK_TOKENS", 40)
    torch.testing.assert_close(model.teacher_forced(batch, codes), whole, rtol=0, atol=1e-5)


def test_it_learns_what_follows_what() -> None:
    model = tiger(user_tokens=0, dropout_rate=0.1)
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.mul_(0.1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        batch = batches.batch([3] * 32, num_items=ITEMS, seed=step)
        last = batch.item_ids_T[batch.offsets[1:] - 1]
        batch = dataclasses.replace(batch, target_ids_B=last % ITEMS + 1)
        loss, _ = model(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Without a look at the history the loss is at best that of a guess among all items.
    assert loss.item() < 0.85 * math.log(ITEMS)


def test_bfloat16_stays_near() -> None:
    batch, codes = batches.batch([4, 0, 2], num_items=ITEMS), any_codes(3, 4)
    exact, rounded = tiger(), tiger(bf16=True)
    with torch.no_grad():
        found = rounded.teacher_forced(batch, codes)
        torch.testing.assert_close(found, exact.teacher_forced(batch, codes), rtol=0.05, atol=0.1)
        logits = rounded.logits(rounded.begin(batch), 0, None, [])
    assert found.dtype == logits.dtype == torch.float32
    loss, _ = rounded(batch, 1)
    loss.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in rounded.parameters())


def test_the_table_can_start_from_codebooks() -> None:
    model = tiger()
    model.tokens.from_codebooks([torch.randn(size, 5) for size in SIZES[:2]])
    rows = model.tokens.table.detach()[: sum(SIZES[:2])]
    assert torch.linalg.matrix_rank(rows) == 5
    loss, _ = model(batches.batch([3], num_items=ITEMS), 0)
    assert loss.isfinite()


def test_checkpoints_hold_every_weight_once_and_no_table() -> None:
    model = tiger(**VARIANTS["tied"])
    names = set(model.state_dict())
    assert "tokens.table" in names and not any(name.startswith(("heads", "table", "weights")) for name in names)
    other = tiger(seed=9, **VARIANTS["tied"])
    other.load_state_dict(model.state_dict())
    batch, codes = batches.batch([3], num_items=ITEMS), any_codes(1, 2)
    assert torch.equal(other.teacher_forced(batch, codes), model.teacher_forced(batch, codes))


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        ({"dim": 0}, r"tiger\.dim: got 0"),
        ({"user_tokens": -1}, r"tiger\.user_tokens: got -1"),
        ({"dropout_rate": 1.0}, r"tiger\.dropout_rate: got 1\.0"),
        ({"tie_embeddings": True}, r"try tiger\.shared_heads = True"),
        ({"level_weights": (0.0, 0.0)}, r"tiger\.level_weights"),
        ({"relative_attention_max_distance": 16}, r"tiger\.relative_attention_max_distance: got 16"),
    ],
)
def test_bad_bindings_are_refused(bindings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TigerConfig(**bindings)


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="got 2 weights, expected 3"):
        tiger(level_weights=(1.0, 1.0))
    with pytest.raises(UserError, match="got 2 tables"):
        tiger(IdTable(ids(), ids()))


def test_descriptions_tell_configurations_apart() -> None:
    texts = {TigerConfig(**bindings).describe() for bindings in VARIANTS.values()}
    assert len(texts) == len(VARIANTS)
    assert TigerConfig().describe() == "TIGER-e4-d4-dim128-h6x64-ffn1024-relu-do0.1-u2000-level-sum"
