"""Synthetic users with drifting interests, and how well anybody could predict them.

Items belong to categories and have a Zipf popularity within theirs; every item has a few follow-ups (the next volume,
the fitting accessory). The next item of a user depends on nothing but the items seen so far, h = (i_1 .. i_t):

    q(j | h)  =  p_follow * follow(j | i_t)  +  (1 - p_follow) * g_h(cat(j)) * popularity(j | cat(j))
    g_h       =  (1 - explore) * (z_h / sum z_h) @ drift  +  explore / C        z_h = sum_s decay^(t-s) onehot(cat(i_s))
    p(j | h)  =  q(j | h) / sum of q over unseen items      for items not in h, else 0

`drift` keeps most of an interest and moves the rest to two related categories. No hidden variable is left out of p, so
ranking unseen items by q is the best that any model can do, and its hit rate on the last events is the ceiling for
models that are trained on the others. Everything is a function of the configuration, `seed` included.
"""

from dataclasses import dataclass

import numpy as np

from generative_recommenders.data.errors import DataError

TOP_K = 10
_FOLLOW_WEIGHTS = np.array([0.5, 0.3, 0.2])
_USERS_PER_CHUNK = 1024
_FIRST_SECOND = 1_500_000_000
_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Sizes and habits.

    Attributes:
        min_length, mean_length, max_length: events a user; lengths are exponential between the limits.
        follow: share of events drawn from the follow-ups of the last item.
        decay: weight of an event in the interest, per later event.
        stay: share of an interest that `drift` keeps in its category.
        explore: share of interest spread over all categories.
        zipf: exponent of the popularity within a category.
    Raises:
        DataError: a value that cannot work, named with its bound.
    """

    num_users: int = 2_000
    num_items: int = 1_000
    num_categories: int = 20
    min_length: int = 10
    mean_length: int = 30
    max_length: int = 50
    follow: float = 0.5
    decay: float = 0.8
    stay: float = 0.8
    explore: float = 0.05
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise DataError(f"synthetic seed: got {self.seed}, expected 0 or more")
        if self.num_users < 1:
            raise DataError(f"synthetic num_users: got {self.num_users}, expected 1 or more")
        # Nobody sees an item twice, and a user who has seen nearly everything leaves little to draw from.
        if self.num_items < 2 * self.max_length:
            raise DataError(
                f"synthetic num_items: got {self.num_items}, expected at least {2 * self.max_length} (twice max_length)"
            )
        if not 1 <= self.num_categories <= self.num_items:
            raise DataError(
                f"synthetic num_categories: got {self.num_categories}, expected 1 to {self.num_items} (items)"
            )
        if not 3 <= self.min_length <= self.mean_length <= self.max_length:
            raise DataError(
                f"synthetic lengths: got {self.min_length}, {self.mean_length}, {self.max_length}, "
                "expected 3 <= min_length <= mean_length <= max_length"
            )
        for name in ("follow", "decay", "stay", "explore"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"synthetic {name}: got {getattr(self, name)}, expected 0 to 1")
        if self.explore == 0 or self.follow == 1:
            raise DataError("synthetic explore, follow: got 0, 1, expected explore > 0 and follow < 1")


@dataclass(frozen=True)
class SyntheticData:
    """Events of all users, user by user, oldest first.

    Attributes:
        user_ids, item_ids, timestamps: int64 (E,); ids from 1, strictly increasing seconds within a user.
        ratings: float32 (E,), 1 to 5.
        categories: int64 (X,), category of item 1, 2, ...
        ranks: int64 (X,), popularity rank of the item in its category, from 1.
        best_hr, best_ndcg: hit rate and NDCG at 10 of the true model on every user's last event.
        expected_hr: the hit rate that the true model expects of itself there; differs by sampling noise only.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    categories: np.ndarray
    ranks: np.ndarray
    best_hr: float
    best_ndcg: float
    expected_hr: float


class TrueModel:
    """The process itself: its parameters, drawn from the seed, and its next-item probabilities. Items count from 0."""

    def __init__(self, config: SyntheticConfig, rng: np.random.Generator) -> None:
        items, categories = config.num_items, config.num_categories
        self.config = config
        # Item numbers say nothing about categories or popularity.
        self.by_category = rng.permutation(items)
        sizes = np.full(categories, items // categories)
        sizes[: items % categories] += 1
        self.starts = np.concatenate(([0], np.cumsum(sizes)))
        self.category = np.empty(items, dtype=np.int64)
        self.category[self.by_category] = np.repeat(np.arange(categories), sizes)
        self.rank = np.empty(items, dtype=np.int64)
        self.rank[self.by_category] = np.arange(items) - np.repeat(self.starts[:-1], sizes) + 1
        weight = self.rank.astype(np.float64) ** -config.zipf
        self.popularity = weight / np.bincount(self.category, weight)[self.category]
        self._cumulative = np.concatenate(([0.0], np.cumsum(self.popularity[self.by_category])))
        self.follow_ups = self._draw_follow_ups(rng)
        ring = rng.permutation(categories)
        self.drift = np.eye(categories) * config.stay
        for step in (1, -1):
            self.drift[ring, np.roll(ring, step)] += (1 - config.stay) / 2

    def _draw_follow_ups(self, rng: np.random.Generator) -> np.ndarray:
        """int64 (X, 3): three other items for each, the next ones of a random circle through all items."""
        circle = rng.permutation(self.config.num_items)
        follow_ups = np.empty((self.config.num_items, len(_FOLLOW_WEIGHTS)), dtype=np.int64)
        for place in range(len(_FOLLOW_WEIGHTS)):
            follow_ups[circle, place] = np.roll(circle, -1 - place)
        return follow_ups

    def category_probabilities(self, interest: np.ndarray) -> np.ndarray:
        """g_h of interests z_h, both (B, C); no interest yet is every interest alike."""
        total = interest.sum(axis=1, keepdims=True)
        share = np.where(total > 0, interest / np.maximum(total, 1e-300), 1 / interest.shape[1])
        return (1 - self.config.explore) * share @ self.drift + self.config.explore / interest.shape[1]

    def draw(self, last: np.ndarray | None, interest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One item for each of B users from q, seen or not: int64 (B,)."""
        cumulative = np.cumsum(self.category_probabilities(interest), axis=1)
        cumulative[:, -1] = 1.0
        category = (rng.random((len(interest), 1)) >= cumulative).sum(axis=1)
        low, high = self._cumulative[self.starts[category]], self._cumulative[self.starts[category + 1]]
        place = np.searchsorted(self._cumulative, low + rng.random(len(interest)) * (high - low), side="right") - 1
        # Rounding at a category's edge must not leave the category.
        item = self.by_category[np.clip(place, self.starts[category], self.starts[category + 1] - 1)]
        if last is None:
            return item
        place = rng.choice(len(_FOLLOW_WEIGHTS), size=len(item), p=_FOLLOW_WEIGHTS)
        return np.where(rng.random(len(item)) < self.config.follow, self.follow_ups[last, place], item)

    def scores(self, last: np.ndarray, interest: np.ndarray) -> np.ndarray:
        """q(j | h) for all items: (B, X)."""
        scores = self.category_probabilities(interest)[:, self.category] * self.popularity * (1 - self.config.follow)
        rows = np.arange(len(last))
        for place, weight in enumerate(_FOLLOW_WEIGHTS):
            scores[rows, self.follow_ups[last, place]] += self.config.follow * weight
        return scores


def generate(config: SyntheticConfig) -> SyntheticData:
    """Draw all users, and rate the true model on their last events."""
    rng = np.random.default_rng(config.seed)
    model = TrueModel(config, rng)
    spread = rng.exponential(max(config.mean_length - config.min_length, 0), config.num_users)
    lengths = np.minimum(config.min_length + spread.astype(np.int64), config.max_length)
    items_UN = _walk(model, lengths, rng)
    valid_UN = np.arange(config.max_length) < lengths[:, None]
    gaps_UN = 1 + rng.exponential(_DAY / 4, items_UN.shape).astype(np.int64)
    times_UN = _FIRST_SECOND + rng.integers(0, 90 * _DAY, (config.num_users, 1)) + np.cumsum(gaps_UN, axis=1)
    quality = rng.normal(3.5, 0.8, config.num_items)
    ratings_UN = np.clip(np.rint(quality[items_UN] + rng.normal(0, 0.7, items_UN.shape)), 1, 5)
    rank, probability = rate_last_events(model, items_UN, lengths)
    hits = rank <= TOP_K
    return SyntheticData(
        user_ids=np.repeat(np.arange(1, config.num_users + 1), lengths),
        item_ids=items_UN[valid_UN] + 1,
        ratings=ratings_UN[valid_UN].astype(np.float32),
        timestamps=times_UN[valid_UN],
        categories=model.category,
        ranks=model.rank,
        best_hr=float(hits.mean()),
        best_ndcg=float(np.where(hits, 1 / np.log2(rank + 1), 0.0).mean()),
        expected_hr=float(probability.mean()),
    )


def _walk(model: TrueModel, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 (U, max_length): items from 0, 0 past a user's length.

    An item drawn from q that the user has seen is drawn again: what is accepted follows p exactly.
    """
    config = model.config
    items_UN = np.zeros((len(lengths), config.max_length), dtype=np.int64)
    interest = np.zeros((len(lengths), config.num_categories))
    for step in range(config.max_length):
        active = np.flatnonzero(lengths > step)
        pending = active
        while pending.size:
            last = items_UN[pending, step - 1] if step else None
            drawn = model.draw(last, interest[pending], rng)
            seen = (items_UN[pending, :step] == drawn[:, None]).any(axis=1)
            items_UN[pending[~seen], step] = drawn[~seen]
            pending = pending[seen]
        interest[active] *= config.decay
        interest[active, model.category[items_UN[active, step]]] += 1
    return items_UN


def rate_last_events(model: TrueModel, items_UN: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank of every user's last item under the true model, and the probability that it is among the first 10.

    Args:
        items_UN: int64 (U, N), items from 0; the first `lengths[u]` of row u count.
    Returns:
        int64 (U,) from 1, and float64 (U,). Seen items are left out; of equal scores the smaller item comes first.
    """
    ranks = np.empty(len(lengths), dtype=np.int64)
    chances = np.empty(len(lengths))
    config = model.config
    for start in range(0, len(lengths), _USERS_PER_CHUNK):
        items = items_UN[start : start + _USERS_PER_CHUNK]
        history = lengths[start : start + _USERS_PER_CHUNK] - 1
        rows = np.arange(len(items))
        age = history[:, None] - 1 - np.arange(items.shape[1])
        weight = np.where(age >= 0, config.decay ** np.maximum(age, 0), 0.0)
        row, column = np.nonzero(age >= 0)
        interest = np.zeros((len(items), config.num_categories))
        np.add.at(interest, (row, model.category[items[row, column]]), weight[row, column])
        scores = model.scores(items[rows, history - 1], interest)
        scores[row, items[row, column]] = 0.0
        target = items[rows, history]
        own = scores[rows, target][:, None]
        before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < target[:, None]))
        ranks[start : start + len(items)] = 1 + before.sum(axis=1)
        best = np.partition(scores, -TOP_K, axis=1)[:, -TOP_K:]
        chances[start : start + len(items)] = best.sum(axis=1) / scores.sum(axis=1)
    return ranks, chances
