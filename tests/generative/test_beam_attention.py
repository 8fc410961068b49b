"""Attention of beams over a shared context and their ancestors equals dense attention over each beam's own sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from generative_recommenders.generative.beam_attention import BeamKV, ContextKV, beam_attention

HEADS, WIDTH = 3, 8


def random_case(seed: int, lengths: list[int], beams: list[int]) -> tuple[Tensor, ...]:
    """Query of the last step, padded context keys and values, per-step beam keys and values, ancestors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size, longest = len(lengths), max(lengths)
    key, value = normal(size, longest, HEADS, WIDTH), normal(size, longest, HEADS, WIDTH)
    steps = [(normal(size, m, HEADS, WIDTH), normal(size, m, HEADS, WIDTH)) for m in beams]
    last = beams[-1] if beams else 1
    ancestors = [torch.randint(m, (size, last), generator=generator) for m in beams[:-1]]
    if beams:
        ancestors.append(torch.arange(last).expand(size, last))
    return normal(size, last, HEADS, WIDTH), key, value, steps, ancestors


def dense(query, key, value, lengths, steps, ancestors, context_bias=None, ancestor_bias=None, dtype=torch.float64):
    """One beam at a time, its whole sequence laid out."""
    out = torch.zeros(query.shape, dtype=dtype)
    for b in range(query.shape[0]):
        for m in range(query.shape[1]):
            rows = [(k[b, index[b, m]], v[b, index[b, m]]) for (k, v), index in zip(steps, ancestors, strict=True)]
            keys = torch.stack([*key[b, : lengths[b]], *(k for k, _ in rows)]).to(dtype) if rows or lengths[b] else None
            if keys is None:
                continue
            values = torch.stack([*value[b, : lengths[b]], *(v for _, v in rows)]).to(dtype)
            logits = torch.einsum("hk,shk->hs", query[b, m].to(dtype), keys) / math.sqrt(WIDTH)
            if context_bias is not None:
                logits = logits + torch.cat([context_bias[:, : lengths[b]], ancestor_bias], dim=1)
            out[b, m] = torch.einsum("hs,shk->hk", logits.softmax(-1), values)
    return out


@pytest.mark.parametrize("beams", [[], [4], [4, 7], [3, 3, 9]])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 0], [3], [0, 0], [2, 40, 3, 17, 4]])
@pytest.mark.parametrize("layout", ["padded", "jagged"])
def test_equals_attention_over_the_gathered_sequence(layout: str, lengths: list[int], beams: list[int]) -> None:
    query, key, value, steps, ancestors = random_case(len(beams), lengths, beams)
    context = make_context(layout, key, value, lengths)
    store = BeamKV()
    for step in steps:
        store.append(*step)
    out = beam_attention(query, context, store, ancestors)
    assert out.shape == query.shape and out.dtype == query.dtype
    torch.testing.assert_close(out.double(), dense(query, key, value, lengths, steps, ancestors), atol=2e-6, rtol=1e-5)


def make_context(layout: str, key: Tensor, value: Tensor, lengths: list[int]) -> ContextKV:
    lengths_B = torch.tensor(lengths)
    if layout == "padded":
        # What lies in the padding must not matter.
        padding = torch.arange(key.shape[1]) >= lengths_B[:, None]
        return ContextKV.padded(
            key.masked_fill(padding[..., None, None], 1e4), value.masked_fill(padding[..., None, None], 1e4), lengths_B
        )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
    flat = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in (key, value)]
    return ContextKV.jagged(*flat, offsets)


@pytest.mark.parametrize("layout", ["padded", "jagged"])
def test_a_selection_is_the_context_of_its_requests(layout: str) -> None:
    lengths = [5, 1, 9, 0, 30]
    query, key, value, _, _ = random_case(3, lengths, [6])
    context = make_context(layout, key, value, lengths)
    whole = beam_attention(query, context, BeamKV(), [])
    rows = torch.tensor([4, 0, 3, 0])
    torch.testing.assert_close(beam_attention(query[rows], context.select(rows), BeamKV(), []), whole[rows])
    none = torch.empty(0, dtype=torch.int64)
    assert beam_attention(query[none], context.select(none), BeamKV(), []).shape == (0, 6, HEADS, WIDTH)


def test_biases_of_context_and_ancestors_are_added_to_the_logits() -> None:
    lengths = [4, 4]
    query, key, value, steps, ancestors = random_case(5, lengths, [3, 3])
    context_bias, ancestor_bias = torch.randn(HEADS, 4), torch.randn(HEADS, 2)
    store = BeamKV([k for k, _ in steps], [v for _, v in steps])
    out = beam_attention(
        query,
        make_context("padded", key, value, lengths),
        store,
        ancestors,
        context_bias=[context_bias[:, None]],
        ancestor_bias=ancestor_bias[:, None],
    )
    expected = dense(query, key, value, lengths, steps, ancestors, context_bias, ancestor_bias)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_large_logits_in_one_part_alone_do_not_overflow() -> None:
    query, key, value, steps, ancestors = random_case(7, [6, 6], [2, 2])
    key = key * 1000
    store = BeamKV([k for k, _ in steps], [v for _, v in steps])
    out = beam_attention(query, make_context("padded", key, value, [6, 6]), store, ancestors)
    torch.testing.assert_close(out.double(), dense(query, key, value, [6, 6], steps, ancestors), atol=1e-4, rtol=1e-4)


def test_bfloat16_errs_at_most_twice_as_much_as_dense_bfloat16() -> None:
    lengths = [30, 11]
    low = torch.bfloat16
    query, key, value, steps, ancestors = random_case(9, lengths, [5, 8])
    query, key, value = (x.to(low) for x in (query, key, value))
    steps = [(k.to(low), v.to(low)) for k, v in steps]
    exact = dense(query, key, value, lengths, steps, ancestors)
    naive = dense(query, key, value, lengths, steps, ancestors, dtype=low)
    store = BeamKV([k for k, _ in steps], [v for _, v in steps])
    out = beam_attention(query, make_context("padded", key, value, lengths), store, ancestors)
    assert out.dtype == low
    error, allowed = ((x.double() - exact).abs().max() for x in (out, naive))
    assert 0 < float(error) <= 2 * float(allowed)


def test_ancestors_of_other_steps_than_were_appended_are_refused() -> None:
    query, key, value, steps, ancestors = random_case(1, [2], [3, 3])
    with pytest.raises(ValueError, match="ancestors: got 2 steps, expected 1"):
        beam_attention(query, make_context("padded", key, value, [2]), BeamKV([steps[0][0]], [steps[0][1]]), ancestors)
