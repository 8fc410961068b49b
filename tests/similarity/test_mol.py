"""Mixture of Logits as a similarity: against the public code's numbers, and what its parameters promise."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.mol import UNKNOWN_USER, GatedLinear, MoL, MoLConfig, SimilarityOptions

SMALL: dict[str, Any] = {
    "query_embedding_dim": 10,
    "item_embedding_dim": 10,
    "dot_product_dimension": 6,
    "query_dot_product_groups": 3,
    "item_dot_product_groups": 2,
    "temperature": 0.5,
    "query_dropout_rate": 0.0,
    "query_hidden_dim": 8,
    "item_dropout_rate": 0.0,
    "item_hidden_dim": -1,
    "gating_query_hidden_dim": 7,
    "gating_qi_hidden_dim": 9,
    "gating_item_hidden_dim": 5,
    "softmax_dropout_rate": 0.0,
}


def small(**given: Any) -> MoL:
    torch.manual_seed(0)
    return MoL(MoLConfig(**{**SMALL, **given}), SimilarityOptions())


def sides(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, their users, items and the items' ids."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(4, 10, generator=g),
        torch.tensor([3, 8, 3, 11]),
        torch.randn(5, 10, generator=g),
        torch.arange(5),
    )


def public_names(model: MoL) -> dict[str, str]:
    """Our parameter names to the public code's."""
    own = {
        "query_gate.0": "_gating_fn._query_only_partial_module.0",
        "query_gate.2": "_gating_fn._query_only_partial_module.2",
        "item_gate.0": "_gating_fn._item_only_partial_module.1",
        "item_gate.2": "_gating_fn._item_only_partial_module.3",
        "pair_gate_in": "_gating_fn._qi_partial_module.1",
        "pair_gate_out": f"_gating_fn._qi_partial_module.{1 if model.pair_gate_in is None else 3}",
    }
    for side in ("query", "item"):
        for place in (0, 1):
            own[f"{side}_components.{place}"] = f"_{side}_embeddings_fn._{side}_emb_proj_module.{place + 1}"
    names = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module == "user_components":
            names[name] = f"_query_embeddings_fn._uid_embeddings_{leaf}.weight"
        else:
            gated = isinstance(model.get_submodule(module), GatedLinear)
            names[name] = f"{own[module]}.{'_' + leaf[0] if gated else leaf}"
    return names


@pytest.mark.parametrize("name", ["mol_ml1m", "mol_books", "mol_item_geglu"])
def test_scores_gradients_and_auxiliary_losses_of_the_public_code(name: str, golden_dir: Path) -> None:
    arguments = json.loads((golden_dir / "index.json").read_text())[name]
    data = {key: torch.from_numpy(x) for key, x in np.load(golden_dir / f"{name}.npz").items()}
    config = MoLConfig(**arguments)
    model = MoL(config)
    names = public_names(model)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            parameter.copy_(data[f"param/{names[own]}"])
    assert {f"param/{n}" for n in names.values()} == {key for key in data if key.startswith("param/")}
    leaves = {"query": data["query"].requires_grad_(), "items": data["items"][0].clone().requires_grad_()}
    queries, auxiliary = model.project_queries(leaves["query"], data.get("user_ids", torch.zeros(5).long()), None)
    items = model.project_items(leaves["items"], torch.arange(33), None)
    scores = model.score(queries, items, None)
    torch.testing.assert_close(scores, data["scores"], rtol=1e-5, atol=1e-5)
    auxiliary |= model.pair_losses(queries, tuple(f[None].expand(5, *f.shape) for f in items), None)
    wanted = {key.removeprefix("train_aux/"): value for key, value in data.items() if key.startswith("train_aux/")}
    assert auxiliary.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(auxiliary[key], value, rtol=1e-5, atol=1e-5)
    (scores * data["probe"]).sum().backward()
    for own, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, data[f"grad/{names[own]}"], rtol=1e-4, atol=1e-4, msg=own)
    torch.testing.assert_close(leaves["query"].grad, data["grad/query"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaves["items"].grad, data["grad/items"][0], rtol=1e-4, atol=1e-4)


def test_users_share_rows_by_their_hash_and_unknown_ones_have_no_component() -> None:
    model = small(uid_embedding_hash_sizes=[5])
    queries, users, _, _ = sides()
    components = model.project_queries(queries, users, None)[0][0]
    own = components[:, -1]
    torch.testing.assert_close(own[0], own[1])  # 3 and 8 are the same modulo 5.
    assert not torch.allclose(own[0], own[3])
    strangers, auxiliary = model.project_queries(queries, torch.full((4,), UNKNOWN_USER), None)
    assert not strangers[0][:, -1].any()
    assert auxiliary["uid_embedding_l2_norm"].item() == 0.0
    torch.testing.assert_close(strangers[0][:, :-1], components[:, :-1])


def test_user_rows_of_several_tables_and_their_norm() -> None:
    model = small(uid_embedding_hash_sizes=[5, 7])
    queries, users, _, _ = sides()
    features, auxiliary = model.project_queries(queries, users, None)
    assert features[0].shape == (4, 3, 6)
    tables = [(model.user_components[n][users % size + 1] ** 2).sum(-1).mean() for n, size in enumerate((5, 7))]
    torch.testing.assert_close(auxiliary["uid_embedding_l2_norm"], torch.stack(tables).sum())


@pytest.mark.parametrize("level", [False, True])
def test_user_dropout_by_feature_or_by_component(level: bool) -> None:
    model = small(uid_embedding_hash_sizes=[5], uid_dropout_rate=0.5, uid_embedding_level_dropout=level)
    users = torch.zeros(400, dtype=torch.int64)
    features = model.project_queries(torch.randn(400, 10), users, Draws(3, torch.arange(400)))[0][0][:, -1]
    dropped = features == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert bool((dropped.all(1) | ~dropped.any(1)).all()) == level
    model.eval()
    assert not (model.project_queries(torch.randn(400, 10), users, None)[0][0][:, -1] == 0).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query_dropout_rate", 0.5),
        ("item_dropout_rate", 0.5),
        ("softmax_dropout_rate", 0.5),
        ("gating_item_dropout_rate", 0.5),
        ("gating_qi_dropout_rate", 0.5),
    ],
)
def test_a_dropout_acts_in_training_only_and_is_keyed(name: str, value: float) -> None:
    model = small(**{name: value})
    queries, users, items, ids = sides()

    def scores(seed: int | None) -> Tensor:
        draws = None if seed is None else Draws(seed, torch.arange(4))
        features = model.project_queries(queries, users, draws)[0]
        return model.score(features, model.project_items(items, ids, draws), draws)

    torch.testing.assert_close(scores(1), scores(1), rtol=0, atol=0)
    assert not torch.allclose(scores(1), scores(2))
    model.eval()
    torch.testing.assert_close(scores(1), small().eval().score(*_features(small().eval()), None))


def _features(model: MoL) -> tuple[Any, Any]:
    queries, users, items, ids = sides()
    return model.project_queries(queries, users, None)[0], model.project_items(items, ids, None)


@pytest.mark.parametrize(
    "given",
    [
        {"gating_query_fn": False},
        {"gating_item_fn": False},
        {"gating_qi_hidden_dim": -1},
        {"dot_product_l2_norm": False},
        {"query_nonlinearity": "swiglu"},
        {"item_hidden_dim": 8},
        {"query_hidden_dim": -1},
        {"gating_combination_type": "glu_silu_ln"},
        {"gating_combination_type": "none"},
        {"temperature": 0.1},
    ],
    ids=lambda given: "-".join(f"{k}={v}" for k, v in given.items()),
)
def test_every_parameter_changes_the_scores(given: dict[str, Any]) -> None:
    plain, changed = small().eval(), small(**given).eval()
    scores = changed.score(*_features(changed), None)
    assert scores.shape == (4, 5) and bool(torch.isfinite(scores).all())
    assert not torch.allclose(scores, plain.score(*_features(plain), None))


def test_each_querys_own_items_score_as_shared_ones() -> None:
    model = small().eval()
    queries, items = _features(model)
    shared = model.score(queries, items, None)
    own = model.score(queries, tuple(f[None].expand(4, *f.shape) for f in items), None)
    torch.testing.assert_close(own, shared)


def test_bfloat16_is_near_float32_and_recomputed_projections_are_equal() -> None:
    plain = small().eval()
    half = MoL(plain.config, SimilarityOptions(bf16_training=True)).eval()
    again = MoL(plain.config, SimilarityOptions(activation_checkpoint=True)).eval()
    half.load_state_dict(plain.state_dict())
    again.load_state_dict(plain.state_dict())
    wanted = plain.score(*_features(plain), None)
    found = half.score(*_features(half), None)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.05
    torch.testing.assert_close(again.score(*_features(again), None), wanted)
    for model in (plain, again):
        model.score(*_features(model), None).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0, expected more than 0"),
        ({"item_hidden_dim": 0}, "item_hidden_dim: got 0, expected at least 1, or -1 for none"),
        ({"uid_embedding_hash_sizes": [3, 4, 5]}, "query_dot_product_groups: got 3, expected more than the 3 tables"),
        ({"softmax_dropout_rate": 1.0}, "softmax_dropout_rate: got 1.0, expected 0 <= rate < 1"),
        ({"gating_item_hidden_dim": -1}, "gating_item_hidden_dim: got -1, expected at least 1"),
    ],
)
def test_bad_parameters_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="create_mol_interaction_module") as refusal:
        MoLConfig(**{**SMALL, **given})
    assert message in str(refusal.value)


def test_the_short_name_tells_configurations_apart() -> None:
    config = MoLConfig(**SMALL)
    assert config.describe() == "3x2x6-t0.5-d0.0-l2-q8d0.0geglu-id0.0-gq7-gi5d0.0-gqi9d0.0-x-glu_silu"
    assert dataclasses.replace(config, uid_embedding_hash_sizes=[9]).describe().endswith("-uids9d0.5")


def test_items_and_user_tables_drop_features_of_their_own() -> None:
    model = small(item_dropout_rate=0.5, uid_embedding_hash_sizes=[5, 5], uid_dropout_rate=0.5)
    draws = Draws(3, torch.arange(50))
    ones = torch.ones(50, 10)
    dropped = model.item_dropout(ones, Draws(3, torch.arange(50)))
    assert len(dropped.unique(dim=0)) > 40
    parts = model.project_queries(ones, torch.zeros(50, dtype=torch.int64), draws)[0][0]
    first, second = parts[:, 1] == 0, parts[:, 2] == 0
    assert 0.3 < first.float().mean() < 0.7 and bool((first != second).any())
    # Items are projected with masks of their own as well: the same embedding gives different features.
    assert len(model.project_items(ones, torch.arange(50), draws)[0].flatten(1).unique(dim=0)) > 40
