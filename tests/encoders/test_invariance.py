"""A user's output depends on that user alone: not on the order, size or rest of the batch, nor on the future."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from generative_recommenders.encoders.hstu import HSTU
from generative_recommenders.nn.dropout import Draws
from tests.batches import batch, rows_of
from tests.encoders.test_against_dense import ITEMS, NAMES, build

LENGTHS = [9, 0, 3, 17, 1, 17, 5]


@pytest.mark.parametrize("name", NAMES)
def test_users_do_not_see_each_other(name: str) -> None:
    model, items = build(name)
    model.eval()
    data = batch(LENGTHS, ITEMS, seed=5)
    whole = model(model.input(data, items, None), data)
    for rows in ([6, 0, 5, 2, 1, 3, 4], [3], [1, 4], [0, 2]):
        part = rows_of(data, rows)
        states = model(model.input(part, items, None), part)
        expected = torch.cat([whole[int(data.offsets[r]) : int(data.offsets[r + 1])] for r in rows])
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_future_does_not_change_the_past(name: str) -> None:
    model, items = build(name)
    model.eval()
    data = batch([11], ITEMS, seed=6)
    whole = model(model.input(data, items, None), data)
    cut = dataclasses.replace(
        data,
        item_ids_T=torch.cat([data.item_ids_T[:6], data.item_ids_T[6:] % ITEMS + 1]),
        timestamps_T=torch.cat([data.timestamps_T[:6], data.timestamps_T[6:] + 12345]),
    )
    changed = model(model.input(cut, items, None), cut)
    torch.testing.assert_close(changed[:6], whole[:6], atol=1e-6, rtol=0)
    assert not torch.allclose(changed[6:], whole[6:], atol=1e-3)


@pytest.mark.parametrize("name", ["hstu:heads", "hstu:softmax", "sasrec:gelu"])
def test_dropout_masks_follow_the_user(name: str) -> None:
    model, items = build(name)
    if isinstance(model, HSTU):
        config = dataclasses.replace(model.config, linear_dropout_rate=0.3, attn_dropout_rate=0.3)
        dropping = config.build(12, 19, 0.3, False)
    else:
        dropping = dataclasses.replace(model.layers[0].config, ffn_dropout_rate=0.3).build(12, 19, 0.3, False)
    dropping.load_state_dict(model.state_dict())
    dropping.train()
    data = batch(LENGTHS, ITEMS, seed=7)

    def states(rows: list[int], seed: int) -> torch.Tensor:
        part = rows_of(data, rows)
        draws = Draws.of(part, seed)
        return dropping(dropping.input(part, items, draws), part, draws)

    whole = states(list(range(len(LENGTHS))), 1)
    part = states([5, 2], 1)
    expected = torch.cat([whole[int(data.offsets[r]) : int(data.offsets[r + 1])] for r in (5, 2)])
    torch.testing.assert_close(part, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(states([5, 2], 2), part, atol=1e-3)
    assert not torch.allclose(part, model(model.input(p := rows_of(data, [5, 2]), items, None), p), atol=1e-3)


def test_activation_checkpointing_changes_nothing() -> None:
    for name in ("hstu:heads", "sasrec:gelu"):
        model, items = build(name)
        data = batch(LENGTHS, ITEMS, seed=8)
        gradients = []
        for activation_checkpoint in (False, True):
            model.activation_checkpoint = activation_checkpoint
            model.zero_grad()
            model(model.input(data, items, None), data).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, recomputed)
