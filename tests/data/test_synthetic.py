"""The generator follows the process it documents, and its optimum is the optimum."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.synthetic import SyntheticConfig, TrueModel, generate, rate_last_events

SMALL = SyntheticConfig(num_users=300, num_items=120, num_categories=6, mean_length=20, max_length=40)


@pytest.fixture(scope="module")
def data():
    return generate(SyntheticConfig())


def _histories(user_ids: np.ndarray, item_ids: np.ndarray) -> list[np.ndarray]:
    return np.split(item_ids, np.flatnonzero(np.diff(user_ids)) + 1)


def _documented_scores(model: TrueModel, history: list[int]) -> np.ndarray:
    """q(j | h) of the module's docstring, term by term."""
    config = model.config
    z = np.zeros(config.num_categories)
    for age, item in enumerate(reversed(history)):
        z[model.category[item]] += config.decay**age
    g = (1 - config.explore) * (z / z.sum()) @ model.drift + config.explore / config.num_categories
    scores = np.array(
        [(1 - config.follow) * g[model.category[j]] * model.popularity[j] for j in range(config.num_items)]
    )
    for follow_up, weight in zip(model.follow_ups[history[-1]], (0.5, 0.3, 0.2), strict=True):
        scores[follow_up] += config.follow * weight
    return scores


def test_same_seed_same_data_other_seed_other_data() -> None:
    first, second = generate(SMALL), generate(SMALL)
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
    other = generate(dataclasses.replace(SMALL, seed=1))
    assert other.item_ids.tolist() != first.item_ids.tolist()


def test_ids_times_and_repeats(data) -> None:
    assert data.item_ids.min() >= 1
    assert data.item_ids.max() <= 1_000
    assert set(data.ratings.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    same_user = np.diff(data.user_ids) == 0
    assert (np.diff(data.timestamps)[same_user] > 0).all()
    histories = _histories(data.user_ids, data.item_ids)
    assert len(histories) == 2_000
    assert {len(history) >= 10 and len(history) <= 50 for history in histories} == {True}
    assert all(len(np.unique(history)) == len(history) for history in histories)


def test_q_is_a_distribution_and_equals_the_docstring() -> None:
    model = TrueModel(SMALL, np.random.default_rng(5))
    history = [3, 17, 90, 4]
    interest = np.zeros((1, SMALL.num_categories))
    for age, item in enumerate(reversed(history)):
        interest[0, model.category[item]] += SMALL.decay**age
    scores = model.scores(np.array([4]), interest)[0]
    np.testing.assert_allclose(scores, _documented_scores(model, history), rtol=1e-12)
    assert scores.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(model.drift.sum(axis=1), 1.0)


def test_draws_follow_q() -> None:
    """Counts of 200,000 draws against q, by chi-square: 120 items, the 99.99% point is about 182."""
    model = TrueModel(SMALL, np.random.default_rng(5))
    interest = np.zeros((1, SMALL.num_categories))
    interest[0, [1, 2]] = [1.0, 0.4]
    draws = 200_000
    drawn = model.draw(np.full(draws, 7), np.repeat(interest, draws, axis=0), np.random.default_rng(6))
    expected = model.scores(np.array([7]), interest)[0] * draws
    assert expected.min() > 5
    assert ((np.bincount(drawn, minlength=120) - expected) ** 2 / expected).sum() < 182


def test_ranks_of_the_optimum_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(SMALL.seed)
    model = TrueModel(SMALL, rng)
    items = np.stack([rng.permutation(120)[:12] for _ in range(30)])
    lengths = rng.integers(3, 13, 30)
    ranks, chances = rate_last_events(model, items, lengths)
    for row, length in enumerate(lengths):
        history, target = items[row, : length - 1].tolist(), items[row, length - 1]
        scores = _documented_scores(model, history)
        scores[history] = 0
        probability = scores / scores.sum()
        assert ranks[row] == 1 + sorted(range(120), key=lambda j: (-scores[j], j)).index(target)
        assert chances[row] == pytest.approx(np.sort(probability)[-10:].sum())


def test_hit_rate_is_the_one_the_model_expects(data) -> None:
    """Events that did not follow p, or a wrong rank, would part the two; 4 standard errors of 2,000 users are 0.043."""
    assert abs(data.best_hr - data.expected_hr) < 0.043
    assert 0.5 < data.best_hr < 0.8
    assert 0.3 < data.best_ndcg < data.best_hr


def test_popularity_is_far_from_the_optimum(data) -> None:
    """There must be something to learn from the order of the items."""
    histories = _histories(data.user_ids, data.item_ids)
    counts = np.bincount(np.concatenate([history[:-1] for history in histories]), minlength=1_001).astype(float)
    hits = 0
    for history in histories:
        scores = counts.copy()
        scores[history[:-1]] = -1
        hits += history[-1] in np.argsort(-scores)[:10]
    assert hits / len(histories) < 0.3 * data.best_hr


def test_transitions_seen_in_training_already_predict_well(data) -> None:
    """The optimum depends on items alone: counting which item follows which comes most of the way."""
    histories = _histories(data.user_ids, data.item_ids)
    counts = np.zeros((1_001, 1_001))
    for history in histories:
        for last, following in pairwise(history[:-1]):
            counts[last, following] += 1
    category = np.concatenate(([0], data.categories))
    popular = np.bincount(np.concatenate([history[:-1] for history in histories]), minlength=1_001) / 1e4
    hits = 0
    for history in histories:
        scores = counts[history[-2]] + popular * (category == category[history[-2]])
        scores[history[:-1]] = -1
        hits += history[-1] in np.argsort(-scores)[:10]
    assert hits / len(histories) > 0.75 * data.best_hr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": 0}, "num_users: got 0"),
        ({"seed": -1}, "seed: got -1, expected 0 or more"),
        ({"num_items": 99}, "num_items: got 99, expected at least 100"),
        ({"num_categories": 1_001}, "num_categories: got 1001"),
        ({"min_length": 2}, "3 <= min_length"),
        ({"decay": 1.5}, "decay: got 1.5, expected 0 to 1"),
        ({"explore": 0.0}, "explore > 0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SyntheticConfig(**changes)
