"""The objectives under Mixture of Logits: against scores of single pairs, in blocks of any size, with both losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.losses import full_softmax, pairs
from generative_recommenders.losses.bce import BCELoss
from generative_recommenders.losses.full_softmax import FullSoftmaxLoss
from generative_recommenders.losses.negatives import LocalNegativesSampler
from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.losses.sampled_softmax import SampledSoftmaxLoss
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.mol import MoL, MoLConfig

CATALOG = torch.tensor([2, 3, 5, 6, 9, 10, 11, 17])
SAMPLER = LocalNegativesSampler(CATALOG)
DIM, TOKENS, NEGATIVES = 6, 13, 4
DRAWS = Draws(11, torch.arange(TOKENS) * 7919)
OBJECTIVES: dict[str, Objective] = {
    "sampled": SampledSoftmaxLoss(SAMPLER, NEGATIVES, 0.7, False, 1e-6, False),
    "sampled-norm": SampledSoftmaxLoss(SAMPLER, NEGATIVES, 0.7, True, 1e-6, False),
    "full": FullSoftmaxLoss(CATALOG, 0.7, False, 1e-6),
    "full-norm": FullSoftmaxLoss(CATALOG, 0.7, True, 1e-6),
    "bce": BCELoss(SAMPLER, False, 1e-6),
}


def mol(dropout: float = 0.0) -> MoL:
    torch.manual_seed(3)
    users = {"uid_embedding_hash_sizes": [4], "uid_dropout_rate": dropout}
    config = MoLConfig(
        DIM, DIM, 5, 3, 2, 0.5, dropout, 8, dropout, -1, 7, 9, 7, dropout, gating_qi_dropout_rate=dropout, **users
    )
    return MoL(config)


def inputs(rows: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(TOKENS, DIM, generator=g).requires_grad_()
    table = torch.randn(rows, DIM, generator=g).requires_grad_()
    positives = CATALOG[torch.randint(0, len(CATALOG), (TOKENS,), generator=g)]
    return queries, positives, table, torch.arange(TOKENS) % 7


def run(objective: Objective, model: MoL, rows: int = 20) -> tuple[TokenLosses, list[Tensor]]:
    """Losses, and the gradients of their mean and the auxiliary losses with respect to inputs and weights."""
    queries, positives, table, users = inputs(rows)
    features, auxiliary = model.project_queries(queries, users, DRAWS)
    result = objective(features, positives, table, model, DRAWS)
    total = (result.losses_T * result.weights_T).mean() + 0.3 * sum((auxiliary | result.auxiliary).values())
    total.backward()
    gradients = [queries.grad, table.grad[:18], *(p.grad for p in model.parameters())]
    model.zero_grad()
    return result, gradients


def naive(name: str, model: MoL) -> Tensor:
    """Per-token losses from the score of one pair at a time."""
    queries, positives, table, users = inputs()
    negatives = SAMPLER.sample(positives, 1 if name == "bce" else NEGATIVES, DRAWS)
    losses = []
    for t in range(TOKENS):
        features = model.project_queries(queries[t : t + 1], users[t : t + 1], None)[0]

        def score(item: int, features: tuple[Tensor, ...] = features) -> Tensor:
            row = table[item : item + 1]
            row = F.normalize(row, eps=1e-6) if name.endswith("norm") else row
            return model.score(features, model.project_items(row, torch.tensor([item]), None), None)[0, 0]

        positive = int(positives[t])
        if name == "bce":
            losses.append(0.5 * (F.softplus(-score(positive)) + F.softplus(score(int(negatives[t, 0])))))
            continue
        drawn = [n for n in negatives[t].tolist() if n != positive]
        others = CATALOG.tolist() if name.startswith("full") else [positive, *drawn]
        logits = torch.stack([score(item) for item in others]) / 0.7
        losses.append(logits.logsumexp(0) - logits[others.index(positive)])
    return torch.stack(losses)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_single_pairs(name: str) -> None:
    model = mol()
    result, _ = run(OBJECTIVES[name], model)
    torch.testing.assert_close(result.losses_T, naive(name, model), rtol=1e-5, atol=1e-5)
    assert set(result.auxiliary) == {"mi_loss"}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_change_nothing(name: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, gradients = run(OBJECTIVES[name], mol(dropout))
    monkeypatch.setattr(pairs, "_BLOCK_NUMBERS", 1)
    monkeypatch.setattr(full_softmax, "_BLOCK_LOGITS", 3 * len(CATALOG))
    found, again = run(OBJECTIVES[name], mol(dropout))
    torch.testing.assert_close(found.losses_T, wanted.losses_T)
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["sampled", "bce"])
def test_a_catalogue_larger_than_the_draws_is_projected_where_it_is_drawn(name: str) -> None:
    small, gradients = run(OBJECTIVES[name], mol(0.3))
    large, again = run(OBJECTIVES[name], mol(0.3), rows=500)
    assert large.losses_T.shape == small.losses_T.shape
    # The first rows of both tables differ, so that only finiteness and sparsity can be compared.
    assert all(bool(torch.isfinite(g).all()) for g in (*gradients, *again))
    assert not again[1][[0, 1, 4, 7, 8]].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tokens_give_no_losses_but_a_graph(name: str) -> None:
    model, (queries, _, table, _) = mol(), inputs()
    nobody = torch.empty(0, dtype=torch.int64)
    draws = Draws(0, nobody)
    features, auxiliary = model.project_queries(queries[:0], nobody, draws)
    result = OBJECTIVES[name](features, nobody, table, model, draws)
    (result.losses_T.sum() + sum((auxiliary | result.auxiliary).values())).backward()
    assert result.losses_T.numel() == 0 and bool(torch.isfinite(table.grad).all())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_auxiliary_loss_is_that_of_the_positives(name: str) -> None:
    model = mol()
    result, _ = run(OBJECTIVES[name], model)
    queries, positives, table, users = inputs()
    features = model.project_queries(queries, users, DRAWS)[0]
    rows = F.normalize(table[positives], eps=1e-6) if name.endswith("norm") else table[positives]
    items = model.project_items(rows, positives, DRAWS)
    wanted = model.pair_losses(features, tuple(f[:, None] for f in items), DRAWS)
    torch.testing.assert_close(result.auxiliary["mi_loss"], wanted["mi_loss"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_has_no_auxiliary_losses(name: str) -> None:
    model = mol().eval()
    queries, positives, table, users = inputs()
    features, auxiliary = model.project_queries(queries, users, None)
    assert auxiliary == OBJECTIVES[name](features, positives, table, model, DRAWS).auxiliary == {}
