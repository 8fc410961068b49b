"""Input features against their formulas, and the two-token form against an encoder's own causality."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.encoders.hstu import HSTUConfig
from generative_recommenders.encoders.sasrec import SASRecConfig
from generative_recommenders.nn.embeddings import ItemEmbedding
from generative_recommenders.nn.inputs import PositionalInput, build_features, interleaved
from generative_recommenders.retrieval.config import RetrievalConfig

DIM, RATING_DIM, RATINGS, ITEMS = 8, 3, 6, 20
LENGTHS = [4, 1, 3]


def batch_of(seed: int = 0) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    total, users = sum(LENGTHS), len(LENGTHS)
    ids = torch.randint(1, ITEMS + 1, (total,), generator=generator)
    times = torch.arange(total) * 100
    return SequenceBatch(
        item_ids_T=ids,
        ratings_T=torch.randint(0, RATINGS, (total,), generator=generator).float() + 0.5,
        timestamps_T=times,
        next_item_ids_T=ids.roll(-1),
        next_timestamps_T=times + 60,
        offsets=torch.tensor([0, *LENGTHS]).cumsum(0),
        user_ids_B=torch.arange(users),
        target_ids_B=torch.ones(users, dtype=torch.int64),
        target_ratings_B=torch.zeros(users),
        target_timestamps_B=times[:users],
        row_numbers_B=torch.arange(users),
    )


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def input_of(kind: str, num_positions: int = 12) -> tuple[PositionalInput, ItemEmbedding]:
    torch.manual_seed(1)
    features = build_features(kind, RATINGS, RATING_DIM, DIM)  # type: ignore[arg-type]
    return PositionalInput(num_positions, DIM, 0.0, 0, features), ItemEmbedding(ITEMS, DIM)


def test_rated_input_is_a_mix_of_item_and_rating() -> None:
    layer, items = input_of("rated")
    batch = batch_of()
    pair = torch.cat([items.table[batch.item_ids_T], layer.features.rating_embedding.weight[batch.ratings_T.int()]], 1)
    mixed = pair @ layer.features.mix.weight.T + layer.features.mix.bias
    expected = mixed * math.sqrt(DIM) + layer.position_embedding[positions(LENGTHS)]
    torch.testing.assert_close(layer(batch, items, None), expected)
    assert layer.tokens(batch) is batch


def test_interleaved_input_alternates() -> None:
    layer, items = input_of("interleaved")
    batch = batch_of()
    tokens = layer.tokens(batch)
    x = layer(tokens, items, None) - layer.position_embedding[positions([2 * n for n in LENGTHS])]
    ratings = layer.features.rating_embedding.weight[batch.ratings_T.int()]
    torch.testing.assert_close(x[::2], items.table[batch.item_ids_T] * math.sqrt(DIM))
    torch.testing.assert_close(x[1::2], ratings * math.sqrt(DIM))
    torch.testing.assert_close(layer.of_events(x), x[1::2])


def test_interleaved_tokens_carry_the_times_of_what_they_ask_for() -> None:
    batch = batch_of()
    tokens = interleaved(batch)
    assert tokens.lengths_B.tolist() == [2 * n for n in LENGTHS]
    assert torch.equal(tokens.timestamps_T[::2], batch.timestamps_T)
    assert torch.equal(tokens.next_timestamps_T[::2], batch.timestamps_T)
    assert torch.equal(tokens.next_timestamps_T[1::2], batch.next_timestamps_T)


@pytest.mark.parametrize("config", [HSTUConfig(dqk=4, dv=4), SASRecConfig(ffn_hidden_dim=8)])
@pytest.mark.parametrize("kind", ["rated", "interleaved"])
def test_states_see_the_rating_of_their_own_event_and_none_later(config: HSTUConfig | SASRecConfig, kind: str) -> None:
    torch.manual_seed(0)
    features = build_features(kind, RATINGS, RATING_DIM, DIM)  # type: ignore[arg-type]
    encoder = config.build(DIM, 12, 0.0, False, features).eval()
    items = ItemEmbedding(ITEMS, DIM)

    def states(batch: SequenceBatch) -> Tensor:
        tokens = encoder.input.tokens(batch)
        return encoder.input.of_events(encoder(encoder.input(tokens, items, None), tokens))

    batch = batch_of()
    changed = batch.ratings_T.clone()
    changed[2] = (changed[2] + 1) % RATINGS
    before, after = states(batch), states(dataclasses.replace(batch, ratings_T=changed))
    differs = ((before - after).abs().amax(dim=1) > 1e-7).tolist()
    assert differs == [False, False, True, True, *[False] * 4]
    tokens = encoder.input.tokens(batch)
    with torch.no_grad():
        last = encoder.last_states(encoder.input(tokens, items, None), tokens)
    torch.testing.assert_close(last, before[batch.offsets[1:] - 1], atol=1e-5, rtol=1e-5)


def test_positions_double_with_two_tokens_an_event() -> None:
    plain = RetrievalConfig(max_sequence_length=20, gr_output_length=0)
    assert plain.num_positions == 21
    assert dataclasses.replace(plain, use_rated_input_preproc=True).num_positions == 21
    assert dataclasses.replace(plain, input_features_preproc="interleaved").num_positions == 42


def test_the_two_bindings_may_not_disagree() -> None:
    assert RetrievalConfig(use_rated_input_preproc=True).input_features == "rated"
    with pytest.raises(ValueError, match=r"train_fn\.input_features_preproc: got 'interleaved', expected 'rated'"):
        RetrievalConfig(use_rated_input_preproc=True, input_features_preproc="interleaved")
    for name in ("num_ratings", "rating_embedding_dim"):
        with pytest.raises(ValueError, match=rf"train_fn\.{name}: got 0, expected at least 1"):
            RetrievalConfig(**{name: 0})
