"""Items made of texts against their formula, what is random about them, and what is kept between uses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.text_items import TextItems
from generative_recommenders.retrieval.text_items import whitened

V, E, D, EXPERTS = 9, 5, 4, 3
NOBODY = torch.empty(0, dtype=torch.int64)


def items(rows: int = V, *, rate: float = 0.0, noisy: bool = True, seed: int = 1) -> TextItems:
    """With weights away from their initial values, most of which are 0."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(V, E, generator=generator)[:rows] if rows <= V else torch.randn(rows, E, generator=generator)
    made = TextItems(text, D, num_experts=EXPERTS, dropout_rate=rate, noisy_gate=noisy)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def mixture(made: TextItems, read: Tensor, gates: Tensor) -> Tensor:
    """Expert by expert, as published."""
    total = torch.zeros(len(read), D)
    for g in range(EXPERTS):
        weight = made.experts_EP[:, g * D : (g + 1) * D]
        total = total + gates[:, g : g + 1] * ((read - made.shift_GE[g]) @ weight)
    return total


def test_vectors_are_the_published_mixture() -> None:
    made = items().eval()
    expected = mixture(made, made.text_VE, (made.text_VE @ made.gate_EG).softmax(1))
    torch.testing.assert_close(made.table, expected)
    weights = [p for name, p in made.named_parameters() if name != "noise_EG"]
    upstream = torch.randn(V, D)
    ours = torch.autograd.grad((made.table * upstream).sum(), weights)
    for a, b in zip(ours, torch.autograd.grad((expected * upstream).sum(), weights), strict=True):
        torch.testing.assert_close(a, b)
    ids = torch.tensor([[3, 1], [8, 8]])
    torch.testing.assert_close(made.lookup(ids), expected[ids])
    assert made.dim == D


def test_without_a_gradient_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = items().eval()
    whole = made.table.detach()
    monkeypatch.setattr("generative_recommenders.nn.text_items._BLOCK_NUMBERS", 4 * EXPERTS * D)
    with torch.no_grad():
        torch.testing.assert_close(made.table, whole)


def test_training_without_draws_is_not_random() -> None:
    made = items(rate=0.5)
    assert made.training
    torch.testing.assert_close(made.at(None).table, items().eval().at(None).table)


def test_dropout_is_of_the_texts_and_one_for_all_experts() -> None:
    made = items(rate=0.5, noisy=False)
    with torch.no_grad():
        made.shift_GE.zero_()
        made.experts_EP.copy_(torch.eye(E, D).repeat(1, EXPERTS))
    # Every expert hands the first D numbers of a text on, so the mixture shows what was dropped.
    shown = made.at(Draws(7, NOBODY)).table
    kept = shown != 0
    torch.testing.assert_close(shown[kept], 2 * made.text_VE[:, :D][kept])
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(made.at(Draws(7, NOBODY)).table, shown)
    assert not torch.equal(made.at(Draws(8, NOBODY)).table, shown)


def test_what_is_random_about_an_item_is_its_own() -> None:
    few, all_ = items(4, rate=0.3), items(rate=0.3)
    all_.load_state_dict(few.state_dict() | {"text_VE": all_.text_VE})
    draws = Draws(5, NOBODY)
    torch.testing.assert_close(few.at(draws).table, all_.at(draws).table[:4])


def test_noise_of_the_gate_is_normal_of_the_stated_scale() -> None:
    made = items(20_000)
    with torch.no_grad():
        made.gate_EG.zero_()
        made.noise_EG.zero_()  # type: ignore[union-attr]
        made.shift_GE.zero_()
        # Expert g turns every text into the unit vector g, times the text's first number.
        made.text_VE[:, 0] = 1
        made.experts_EP.zero_()
        made.experts_EP[0] = torch.eye(EXPERTS, D).flatten()
    gates = made.at(Draws(3, NOBODY)).table[:, :EXPERTS].detach()
    torch.testing.assert_close(gates.sum(1), torch.ones(len(gates)))
    differences = (gates[:, 0] / gates[:, 1]).log()
    scale = 2**0.5 * (float(F.softplus(torch.zeros(()))) + 0.01)
    assert abs(float(differences.mean())) < 4 * scale / len(gates) ** 0.5
    assert float(differences.std()) == pytest.approx(scale, rel=0.02)
    assert float((differences.abs() < scale).float().mean()) == pytest.approx(0.6827, abs=0.015)
    made.eval()
    torch.testing.assert_close(made.at(Draws(3, NOBODY)).table[:, :EXPERTS], torch.full_like(gates, 1 / EXPERTS))


def test_kept_until_a_weight_changes() -> None:
    made = items().eval()
    with torch.no_grad():
        first = made.at(None)
        assert made.at(None) is first
        made.shift_GE.add_(1)
        second = made.at(None)
        assert second is not first
        torch.testing.assert_close(second.table, items_like(made).table)
    made.load_state_dict(items(seed=2).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made.at(None).table, items(seed=2).eval().at(None).table)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_kept_over_a_step_of_training(fused: bool) -> None:
    made = items().eval()
    optimizer = torch.optim.AdamW(made.parameters(), fused=fused)
    for _ in range(2):
        with torch.no_grad():
            before = made.at(None).table
        made.train()
        made.at(Draws(3, NOBODY)).table.sum().backward()
        with torch.no_grad():
            # As a look at the batch in the middle of a step has it.
            made.eval().at(None)
        made.train()
        optimizer.step()
        made.eval()
        with torch.no_grad():
            torch.testing.assert_close(made.at(None).table, items_like(made).table)
            assert not torch.allclose(made.at(None).table, before)


def items_like(made: TextItems) -> TextItems:
    """A copy that has kept nothing."""
    copy = items().eval()
    copy.load_state_dict(made.state_dict())
    return copy


def test_gradients_flow_whatever_inference_has_kept() -> None:
    made = items().eval()
    with torch.inference_mode():
        kept = made.at(None).table
    made.table.sum().backward()
    assert made.experts_EP.grad is not None
    # Not a tensor of inference mode: it may take part in what has a gradient.
    (kept * torch.ones(D, requires_grad=True)).sum().backward()


def test_without_texts_takes_those_that_are_loaded() -> None:
    trained = items()
    hollow = TextItems(torch.empty(V, 0), D, num_experts=EXPERTS, dropout_rate=0.0, noisy_gate=True)
    assert hollow.dim == D
    assert hollow.shaped_by_checkpoint == set(trained.state_dict())
    assert trained.shaped_by_checkpoint == frozenset()
    hollow.load_state_dict(trained.state_dict())
    torch.testing.assert_close(hollow.eval().table, trained.eval().table)
    assert all(p.requires_grad for p in hollow.parameters())
    other_catalog = TextItems(torch.empty(V + 1, 0), D, num_experts=EXPERTS, dropout_rate=0.0, noisy_gate=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other_catalog.load_state_dict(trained.state_dict())


def test_whitened_over_the_fitted_rows_alone() -> None:
    vectors = torch.randn(300, 6) @ torch.randn(6, 6) + 3
    fitted = torch.arange(300) < 200
    result = whitened(vectors, fitted)
    own = result[fitted]
    torch.testing.assert_close(own.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(own.T @ own / 200, torch.eye(6), atol=1e-3, rtol=0)
    changed = vectors.clone()
    changed[200:] *= 5
    torch.testing.assert_close(whitened(changed, fitted)[:200], own)
    # Nobody is fitted on: everybody is.
    torch.testing.assert_close(whitened(vectors, torch.zeros(300, dtype=torch.bool)), whitened(vectors))


def test_rows_of_nothing_stay_nothing_and_do_not_count() -> None:
    vectors = torch.randn(40, 3) + 2
    holes = torch.cat([vectors, torch.zeros(5, 3)])
    fitted = torch.arange(45) >= 20
    torch.testing.assert_close(whitened(holes, fitted)[:40], whitened(vectors, fitted[:40]))
    assert bool((whitened(holes, fitted)[40:] == 0).all()) and bool((whitened(torch.zeros(4, 3)) == 0).all())


def test_whitening_leaves_what_does_not_vary_alone() -> None:
    vectors = torch.randn(50, 1) * torch.ones(50, 3)
    assert bool(whitened(vectors).isfinite().all())
    assert bool((whitened(torch.ones(5, 3)) == 0).all())
