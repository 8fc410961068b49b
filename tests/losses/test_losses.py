"""Every objective with every sampler against its formula, token by token, and what makes each of them learn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.losses.bce import BCELoss
from generative_recommenders.losses.full_softmax import FullSoftmaxLoss
from generative_recommenders.losses.negatives import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
    PopularitySampler,
)
from generative_recommenders.losses.objective import Objective
from generative_recommenders.losses.sampled_softmax import SampledSoftmaxLoss
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.dot import DotProduct, Features, Similarity

CATALOG = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19])
COUNTS = torch.tensor([50, 0, 5, 20, 1, 3, 9, 12])
TOKENS, DIM, NEGATIVES = 23, 6, 7
SAMPLERS = {
    "local": LocalNegativesSampler(CATALOG),
    "popularity": PopularitySampler(CATALOG, COUNTS),
    "in-batch": InBatchNegativesSampler(CATALOG, COUNTS),
}


class OpaqueDot(Similarity):
    """A dot product the objectives do not recognize, so they take the path of a general similarity."""

    def pair_losses(self, queries: Features, positives: Features, draws: Draws | None) -> dict[str, Tensor]:
        return {"mean_score": self.score(queries, positives, draws).mean()}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Draws]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(TOKENS, DIM, generator=generator).requires_grad_()
    table = torch.randn(20, DIM, generator=generator).requires_grad_()
    positives = CATALOG[torch.randint(0, len(CATALOG), (TOKENS,), generator=generator)]
    return queries, positives, table, Draws(11, torch.arange(TOKENS) * 7919)


def scores(query: Tensor, table: Tensor, ids: list[int], norm: bool) -> Tensor:
    rows = [table[i] / table[i].norm().clamp(min=1e-6) if norm else table[i] for i in ids]
    return torch.stack([query @ row for row in rows])


def expected_log_q(sampler: str, tokens: int) -> Tensor | None:
    log_q = torch.zeros(20)
    for item, count in zip(CATALOG.tolist(), COUNTS.tolist(), strict=True):
        if sampler == "popularity":
            log_q[item] = math.log((count + 1) / (COUNTS.sum().item() + len(CATALOG)))
        elif sampler == "in-batch":
            log_q[item] = math.log(max(1e-12, 1 - (1 - count / COUNTS.sum().item()) ** tokens))
    return None if sampler == "local" else log_q


@pytest.mark.parametrize("similarity", [DotProduct(), OpaqueDot()], ids=["fused", "general"])
@pytest.mark.parametrize(("sampler", "norm", "logq"), list(itertools.product(SAMPLERS, [False, True], [False, True])))
def test_sampled_softmax(similarity: Similarity, sampler: str, norm: bool, logq: bool) -> None:
    queries, positives, table, draws = inputs()
    objective = SampledSoftmaxLoss(SAMPLERS[sampler], NEGATIVES, 0.3, norm, 1e-6, logq)
    result = objective((queries,), positives, table, similarity, draws)
    negatives = SAMPLERS[sampler].sample(positives, NEGATIVES, draws)
    log_q = expected_log_q(sampler, TOKENS) if logq else None
    losses = []
    for t in range(TOKENS):
        ids = [int(positives[t]), *negatives[t].tolist()]
        logits = scores(queries[t], table, ids, norm) / 0.3
        if log_q is not None:
            logits = logits - log_q[ids]
        logits = torch.stack(
            [logits[0], *(torch.tensor(-5e4) if i == ids[0] else x for i, x in zip(ids[1:], logits[1:], strict=True))]
        )
        losses.append(-logits.log_softmax(0)[0])
    torch.testing.assert_close(result.losses_T, torch.stack(losses), atol=2e-5, rtol=1e-4)
    assert bool((result.weights_T == 1).all())
    assert set(result.auxiliary) == ({"mean_score"} if isinstance(similarity, OpaqueDot) else set())


@pytest.mark.parametrize("similarity", [DotProduct(), OpaqueDot()], ids=["fused", "general"])
@pytest.mark.parametrize("norm", [False, True])
def test_full_softmax(similarity: Similarity, norm: bool) -> None:
    queries, positives, table, draws = inputs()
    result = FullSoftmaxLoss(CATALOG, 0.4, norm, 1e-6)((queries,), positives, table, similarity, draws)
    losses = []
    for t in range(TOKENS):
        logits = scores(queries[t], table, CATALOG.tolist(), norm) / 0.4
        losses.append(-logits.log_softmax(0)[CATALOG.tolist().index(int(positives[t]))])
    expected = torch.stack(losses)
    torch.testing.assert_close(result.losses_T, expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(result.losses_T.mean(), [queries, table], retain_graph=True)
    for name, a, b in zip(
        ("queries", "table"), ours, torch.autograd.grad(expected.mean(), [queries, table]), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("sampler", "norm"), list(itertools.product(SAMPLERS, [False, True])))
def test_bce(sampler: str, norm: bool) -> None:
    queries, positives, table, draws = inputs()
    result = BCELoss(SAMPLERS[sampler], norm, 1e-6)((queries,), positives, table, DotProduct(), draws)
    negatives = SAMPLERS[sampler].sample(positives, 1, draws)[:, 0]
    for t in range(TOKENS):
        ids = [int(positives[t]), int(negatives[t])]
        logits = scores(queries[t], table, ids, norm)
        expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(result.losses_T[t], expected, atol=1e-5, rtol=1e-5)
        assert result.weights_T[t].item() == float(ids[0] != ids[1])
    assert 0 < result.weights_T.sum() < TOKENS


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_keyed_by_token_and_stay_in_the_catalog(name: str) -> None:
    _, positives, _, draws = inputs()
    sampler = SAMPLERS[name]
    whole = sampler.sample(positives, 50, draws)
    assert whole.dtype == torch.int64 and set(whole.flatten().tolist()) <= set(CATALOG.tolist())
    again = sampler.sample(positives, 50, draws)
    assert torch.equal(whole, again)
    other = sampler.sample(positives, 50, Draws(12, draws.keys_T))
    assert not torch.equal(whole, other)
    if name != "in-batch":
        part = sampler.sample(positives[5:9], 50, Draws(draws.seed, draws.keys_T[5:9]))
        assert torch.equal(part, whole[5:9])


def test_frequencies_of_samplers() -> None:
    draws = Draws(3, torch.arange(4000))
    positives = CATALOG[torch.arange(4000) % 3]
    for name, weights in (
        ("local", torch.ones(8)),
        ("popularity", COUNTS + 1.0),
        ("in-batch", torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])),
    ):
        ids = SAMPLERS[name].sample(positives, 25, draws)
        share = torch.stack([(ids == i).double().mean() for i in CATALOG])
        torch.testing.assert_close(share, (weights / weights.sum()).double(), atol=0.01, rtol=0)


def test_ids_above_2_to_the_24_stay_exact() -> None:
    catalog = torch.tensor([16_777_217, 440_000_001])
    ids = LocalNegativesSampler(catalog).sample(catalog[:1], 64, Draws(0, torch.tensor([5])))
    assert set(ids.flatten().tolist()) == {16_777_217, 440_000_001}


@pytest.mark.parametrize(
    "objective",
    [
        SampledSoftmaxLoss(SAMPLERS["local"], 16, 1.0, False, 1e-6, False),
        FullSoftmaxLoss(CATALOG, 1.0, False, 1e-6),
        BCELoss(SAMPLERS["local"], False, 1e-6),
    ],
    ids=lambda o: type(o).__name__,
)
def test_gradient_steps_raise_the_positives(objective: Objective) -> None:
    queries, positives, table, _ = inputs()
    optimizer = torch.optim.Adam([queries, table], lr=0.1)
    places = torch.searchsorted(CATALOG, positives)
    for step in range(60):
        result = objective((queries,), positives, table, DotProduct(), Draws(step, torch.arange(TOKENS)))
        optimizer.zero_grad()
        ((result.losses_T * result.weights_T).sum() / result.weights_T.sum()).backward()
        optimizer.step()
    best = (queries @ table[CATALOG].T).argmax(1)
    assert (best == places).double().mean() > 0.95


def test_no_tokens_give_no_losses_but_a_graph() -> None:
    for objective in (
        SampledSoftmaxLoss(SAMPLERS["in-batch"], 4, 1.0, True, 1e-6, False),
        FullSoftmaxLoss(CATALOG, 1.0, True, 1e-6),
        BCELoss(SAMPLERS["local"], True, 1e-6),
    ):
        queries, _, table, _ = inputs()
        nobody = torch.empty(0, dtype=torch.int64)
        result = objective((queries[:0],), nobody, table, DotProduct(), Draws(0, nobody))
        result.losses_T.sum().backward()
        assert result.losses_T.numel() == 0 and table.grad is not None and bool((table.grad == 0).all())


@pytest.mark.parametrize("similarity", [DotProduct(), OpaqueDot()], ids=["fused", "general"])
def test_full_softmax_over_candidates_in_training_alone(similarity: Similarity) -> None:
    queries, _, table, draws = inputs()
    trained = CATALOG[COUNTS > 0]
    positives = trained[torch.arange(TOKENS) % len(trained)]
    objective = FullSoftmaxLoss(CATALOG, 0.4, True, 1e-6, trained)
    asked = ((queries,), positives, table, similarity, draws)
    for training, ids in ((True, trained), (False, CATALOG)):
        expected = FullSoftmaxLoss(ids, 0.4, True, 1e-6)(*asked).losses_T
        torch.testing.assert_close(objective.train(training)(*asked).losses_T, expected)
    # A target of evaluation may be any item.
    never = torch.full_like(positives, int(CATALOG[1]))
    assert bool(objective.eval()((queries,), never, table, similarity, draws).losses_T.isfinite().all())


def test_popularity_of_trained_items_alone() -> None:
    sampler = PopularitySampler(CATALOG, COUNTS, trained_only=True)
    ids = sampler.sample(CATALOG[:1].expand(4000), 25, Draws(3, torch.arange(4000)))
    share = torch.stack([(ids == i).double().mean() for i in CATALOG])
    weights = torch.where(COUNTS > 0, COUNTS + 1.0, 0.0).double()
    torch.testing.assert_close(share, weights / weights.sum(), atol=0.01, rtol=0)
    assert share[1] == 0
    log_q = sampler.log_q(10, 20)[CATALOG]
    torch.testing.assert_close(log_q, (weights.clamp(min=1) / weights.sum()).log().float())


@pytest.mark.parametrize("similarity", [DotProduct(), OpaqueDot()], ids=["fused", "general"])
@pytest.mark.parametrize("logq", [False, True])
def test_learned_temperature(similarity: Similarity, logq: bool) -> None:
    """It begins as the constant one, and its gradient is the finite difference of losses at constant ones."""
    queries, positives, table, draws = inputs()
    asked = ((queries,), positives, table, similarity, draws)

    def objectives(temperature: float, learned: bool) -> list[Objective]:
        sampled = SampledSoftmaxLoss(SAMPLERS["popularity"], NEGATIVES, temperature, True, 1e-6, logq, learned)
        return [sampled, FullSoftmaxLoss(CATALOG, temperature, True, 1e-6, learned_temperature=learned)]

    step = 1e-3
    around = (math.exp(-step), 1.0, math.exp(step))
    for objective, *fixed in zip(objectives(0.4, True), *(objectives(0.4 * f, False) for f in around), strict=True):
        result = objective(*asked)
        below, same, above = (o(*asked).losses_T.double() for o in fixed)
        torch.testing.assert_close(result.losses_T.double(), same)
        result.losses_T.mean().backward()
        change = objective.temperature.log_change
        assert change is not None and change.grad is not None
        torch.testing.assert_close(change.grad.double(), (above - below).mean() / (2 * step), atol=2e-4, rtol=2e-3)
        assert result.auxiliary["temperature"] == pytest.approx(0.4)
        with torch.no_grad():
            change.fill_(math.log(2.0))
        assert objective(*asked).auxiliary["temperature"] == pytest.approx(0.8)
        assert not list(fixed[1].parameters())
