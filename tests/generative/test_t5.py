"""T5 on jagged rows: the same numbers as the transformers package, and nothing of a row depends on its neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.transformers_t5 import load_into
from generative_recommenders.generative.t5 import Decoder, Encoder, T5Shape
from generative_recommenders.generative.t5_attention import PositionBias, RelativePositionBias
from generative_recommenders.nn.dropout import Draws

HEADS = 3


def shape(activation: Literal["relu", "gated-gelu"] = "relu", *, rate: float = 0.1, recompute: bool = False) -> T5Shape:
    return T5Shape(16, HEADS, 8, 24, rate, activation, recompute)


def stacks(of: T5Shape, *, buckets: int = 32, distance: int = 128, seed: int = 0) -> tuple[Encoder, Decoder]:
    torch.manual_seed(seed)
    bias = [
        RelativePositionBias(HEADS, bidirectional=both, num_buckets=buckets, max_distance=distance)
        for both in (True, False)
    ]
    encoder, decoder = Encoder(of, 2, bias[0]), Decoder(of, 2, bias[1])
    with torch.no_grad():
        for name, weight in [*encoder.named_parameters(), *decoder.named_parameters()]:
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return encoder, decoder


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20)])
def test_states_are_those_of_the_transformers_package(activation: Any, buckets: int, distance: int) -> None:
    transformers = pytest.importorskip("transformers")
    encoder, decoder = stacks(shape(activation), buckets=buckets, distance=distance)
    config = transformers.T5Config(
        vocab_size=4,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=HEADS,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        feed_forward_proj=activation,
    )
    theirs = transformers.T5Model(config).eval()
    load_into(theirs, encoder, decoder)
    # Long enough for the last bucket of both kinds.
    lengths = [150, 1, 40]
    x_SD, y_RQD = tokens(sum(lengths)), tokens(3 * 5, seed=2).view(3, 5, 16)
    padded, mask = torch.full((3, 150, 16), 7.0), torch.zeros(3, 150)
    for row, part in enumerate(x_SD.split(lengths)):
        padded[row, : len(part)], mask[row, : len(part)] = part, 1.0
    with torch.no_grad():
        expected = theirs(inputs_embeds=padded, attention_mask=mask, decoder_inputs_embeds=y_RQD)
        memory = encoder(x_SD, offsets_of(lengths))
        states = decoder(y_RQD, memory)
    of_encoder = torch.cat([row[:n] for row, n in zip(expected.encoder_last_hidden_state, lengths, strict=True)])
    torch.testing.assert_close(memory.states_SD, of_encoder, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(states, expected.last_hidden_state, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_formula(bidirectional: bool) -> None:
    bias = RelativePositionBias(1, bidirectional=bidirectional, num_buckets=32, max_distance=128)
    with torch.no_grad():
        bias.table.copy_(torch.arange(32.0)[:, None])
    found = bias(torch.tensor([200]), torch.tensor([200, 199, 193, 192, 184, 136, 73, 0, 201, 209, 400]))[0, 0].tolist()
    # Distances 0, 1, 7, 8, 16, 64, 127 and 200 before the query, then 1, 9 and 200 after it.
    before = [0, 1, 7, 8, 10, 14, 15, 15] if bidirectional else [0, 1, 7, 8, 16, 26, 31, 31]
    assert found == before + ([17, 24, 31] if bidirectional else [0, 0, 0])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_a_row_does_not_depend_on_its_neighbors(lengths: list[int], seed: int, data: st.DataObject) -> None:
    encoder, decoder = stacks(shape(), buckets=8, distance=6, seed=seed)
    x_SD, y_RQD = tokens(sum(lengths), seed), tokens(len(lengths) * 3, seed + 1).view(-1, 3, 16)
    row = data.draw(st.integers(0, len(lengths) - 1))
    with torch.no_grad():
        memory = encoder(x_SD, offsets_of(lengths))
        states = decoder(y_RQD, memory)
        part = x_SD.split(lengths)[row]
        alone = encoder(part, offsets_of(lengths[row : row + 1]))
        torch.testing.assert_close(memory.states_SD.split(lengths)[row], alone.states_SD, rtol=0, atol=1e-5)
        torch.testing.assert_close(states[row : row + 1], decoder(y_RQD[row : row + 1], alone), rtol=0, atol=1e-5)


class Distances(PositionBias):
    """A bias of distance, other for each head, not symmetric, and not the same for all keys of a query."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slopes = nn.Parameter(slope * torch.arange(1.0, HEADS + 1))

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return self.slopes[:, None, None] * (key_positions - query_positions[:, None] + 0.5).square()


@pytest.mark.parametrize("pluggable", [False, True])
def test_decoder_rows_of_one_request_share_its_context(pluggable: bool) -> None:
    encoder, decoder = stacks(shape())
    if pluggable:
        decoder = Decoder(shape(), 2, Distances(0.1), Distances(-0.2), causal=False)
    lengths = [4, 0, 2]
    memory = encoder(tokens(6), offsets_of(lengths))
    y_RQD = tokens(6 * 3, 3).view(6, 3, 16)
    found = decoder(y_RQD, memory).view(3, 2, 3, 16)
    for candidate in range(2):
        torch.testing.assert_close(found[:, candidate], decoder(y_RQD[candidate::2], memory), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pluggable", [False, True])
def test_steps_over_beams_equal_whole_rows(pluggable: bool) -> None:
    of = shape()
    encoder, decoder = stacks(of)
    if pluggable:
        decoder = Decoder(of, 2, Distances(0.1), Distances(-0.2))
    memory = encoder(tokens(8), offsets_of([5, 0, 3]))
    state = decoder.begin(memory)
    draw = torch.Generator().manual_seed(5)
    widths, steps, chosen = [1, 4, 3, 5], [], []
    # Tokens each beam has seen, (B, M, steps, D), kept by hand.
    paths = torch.zeros(3, 1, 0, 16)
    for step, width in enumerate(widths):
        parents = torch.randint(widths[step - 1] if step else 1, (3, width), generator=draw)
        index = parents[..., None, None].expand(-1, -1, *paths.shape[2:])
        x_BMD = torch.randn(3, width, 16, generator=draw)
        paths = torch.cat([paths.gather(1, index), x_BMD[:, :, None]], 2)
        chosen = [rows.gather(1, parents) for rows in chosen] + [torch.arange(width).expand(3, -1)]
        steps.append(decoder.step(x_BMD, state, chosen))
        whole = decoder(paths.flatten(0, 1), memory).view(3, width, step + 1, 16)
        torch.testing.assert_close(steps[-1], whole[:, :, -1], rtol=0, atol=1e-5)


def test_a_selected_state_starts_anew_in_the_order_asked_for() -> None:
    encoder, decoder = stacks(shape())
    state = decoder.begin(encoder(tokens(8), offsets_of([5, 0, 3])))
    x_BMD, own = tokens(3, 4)[:, None], [torch.zeros(3, 1, dtype=torch.int64)]
    first = decoder.step(x_BMD, state, own)
    rows = torch.tensor([2, 0, 1])
    torch.testing.assert_close(decoder.step(x_BMD[rows], state.select(rows), own), first[rows], rtol=0, atol=1e-6)
    twice = torch.tensor([0, 0])
    torch.testing.assert_close(
        decoder.step(x_BMD[twice], state.select(twice), [row[:2] for row in own]), first[twice], rtol=0, atol=1e-6
    )
    assert state.size == 3 and state.select(twice).size == 2


@pytest.mark.parametrize("lengths", [[3, 0, 6], [0, 0]])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_reach_every_parameter(lengths: list[int], rate: float) -> None:
    encoder, decoder = stacks(shape("gated-gelu", rate=rate), buckets=4, distance=3)
    rows, count = len(lengths), sum(lengths)
    memory = encoder(tokens(count), offsets_of(lengths), Draws(3, torch.arange(count)))
    states = decoder(tokens(rows * 4, 2).view(rows, 4, 16), memory, Draws(3, torch.arange(rows * 4)))
    states.square().sum().backward()
    for name, weight in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert weight.grad is not None, name
        assert not count or bool((weight.grad != 0).any()), name


def test_recomputed_layers_give_the_same_gradients_and_dropout_is_keyed() -> None:
    lengths, found = [3, 0, 6], []
    x_SD, y_RQD = tokens(9), tokens(12, 2).view(3, 4, 16)
    draws = Draws(3, torch.arange(9)), Draws(3, torch.arange(12))
    for recompute in (False, True):
        encoder, decoder = stacks(shape(rate=0.3, recompute=recompute))
        states = decoder(y_RQD, encoder(x_SD, offsets_of(lengths), draws[0]), draws[1])
        states.square().sum().backward()
        gradients = [weight.grad for stack in (encoder, decoder) for weight in stack.parameters()]
        found.append([states.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    other_draws = Draws(4, draws[1].keys_T)
    assert not torch.allclose(decoder(y_RQD, encoder(x_SD, offsets_of(lengths), draws[0]), other_draws), found[0][0])
    encoder.eval()
    memories = [encoder(x_SD, offsets_of(lengths), draw).states_SD for draw in (None, draws[0])]
    assert torch.equal(*memories)


def test_dropout_leaves_rows_alone_that_are_computed_with_others() -> None:
    encoder, _ = stacks(shape(rate=0.3))
    x_SD, keys = tokens(9), torch.arange(9) * 11
    together = encoder(x_SD, offsets_of([3, 6]), Draws(3, keys)).states_SD
    alone = encoder(x_SD[3:], offsets_of([6]), Draws(3, keys[3:])).states_SD
    torch.testing.assert_close(together[3:], alone, rtol=0, atol=1e-5)


def test_attention_weights_drop_at_the_rate_and_keep_their_mean() -> None:
    # Equal weights over keys of equal values: each head's output is the share kept / (1 - rate).
    bias = RelativePositionBias(HEADS, bidirectional=True)
    encoder = Encoder(shape(rate=0.5), 1, bias)
    dropout = encoder.layers[0].attention.weight_dropout
    weights = torch.full((50, HEADS, 20, 20), 0.05)
    out = dropout(weights, torch.arange(1000).view(50, 20), Draws(9, torch.empty(0)))
    assert out.unique().tolist() == pytest.approx([0.0, 0.1])
    assert out.sum(-1).mean().item() == pytest.approx(1.0, abs=0.02)
    # Heads, queries and rows draw on their own.
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[0, 0], out[0, 1])
    assert not torch.equal(out[0, 1, 0], out[0, 0, 1])


def test_buckets_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 buckets"):
        RelativePositionBias(1, bidirectional=True, num_buckets=2)
    with pytest.raises(ValueError, match="up to distance 16"):
        RelativePositionBias(1, bidirectional=False, max_distance=16)
