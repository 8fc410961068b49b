"""How an expansion compares with its source: user-activity and item-popularity curves, as a table and as a plot.

The paper (arXiv 1901.08910) compares such curves on logarithmic axes. Here ranks are fractions of the number of users
or items and counts are multiples of their mean, so that the curves of two sizes lie on one another where shapes agree.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from generative_recommenders.data.fractal import Expansion, Ratings

USER_CURVE, ITEM_CURVE = "user_activity", "item_popularity"
_POINTS = 200


class Activity:
    """Counts of users and items of a data set that streams by.

    Memory is 4 bytes an item and 8 bytes for every number up to the longest history.

    Args:
        num_items: item index is 0..num_items-1.
    """

    def __init__(self, num_items: int) -> None:
        self.item_counts = np.zeros(num_items, dtype=np.uint32)
        self.length_histogram = np.zeros(1, dtype=np.int64)

    @property
    def users(self) -> int:
        """Users with at least one event."""
        return int(self.length_histogram[1:].sum())

    @property
    def items(self) -> int:
        """Items with at least one event."""
        return int(np.count_nonzero(self.item_counts))

    @property
    def events(self) -> int:
        return int(self.length_histogram @ np.arange(len(self.length_histogram)))

    def users_shorter_than(self, length: int) -> int:
        """Users with at least one and fewer than `length` events."""
        return int(self.length_histogram[1:length].sum())

    def add_users(self, lengths: np.ndarray) -> None:
        """Count users by their number of events; each user comes once."""
        size = max(len(self.length_histogram), int(lengths.max(initial=0)) + 1)
        self.length_histogram = np.pad(self.length_histogram, (0, size - len(self.length_histogram)))
        self.length_histogram += np.bincount(lengths, minlength=size)

    def add_items(self, items: np.ndarray) -> None:
        """Count events by item index."""
        self.item_counts += np.bincount(items, minlength=len(self.item_counts)).astype(self.item_counts.dtype)

    def curves(self) -> dict[str, np.ndarray]:
        """Histograms: entry c of a curve is the number of users or items with c events."""
        return {USER_CURVE: self.length_histogram, ITEM_CURVE: np.bincount(self.item_counts)}


def source_activity(ratings: Ratings) -> Activity:
    """Counts of the matrix that is expanded."""
    activity = Activity(ratings.num_items)
    activity.add_users(np.diff(ratings.starts_U1))
    activity.add_items(ratings.items_E)
    return activity


def sampled_activity(expansion: Expansion, num_rows: int = 0) -> Activity:
    """Counts of an expansion that is not written: its blocks are made, counted and dropped.

    Args:
        num_rows: take this many rows of blocks, drawn from the seed; 0 or too many takes all. Every user taken is
            complete, because a user lies in one row of blocks.
    """
    rows = len(expansion.block_events)
    chosen = np.arange(rows)
    if 0 < num_rows < rows:
        generator = np.random.default_rng(expansion.settings.random_seed)
        chosen = np.sort(generator.choice(rows, num_rows, replace=False))
    num_items = expansion.ratings.num_items
    activity = Activity(expansion.num_items)
    for i in chosen.tolist():
        lengths = np.zeros(expansion.ratings.num_users, dtype=np.int64)
        for j in np.flatnonzero(expansion.block_events[i]).tolist():
            block = expansion.block(i, j)
            lengths += block.counts()
            activity.item_counts[j * num_items : (j + 1) * num_items] += block.item_counts().astype(np.uint32)
        activity.add_users(lengths)
    return activity


def statistics_table(data: Mapping[str, Activity]) -> pa.Table:
    """Curves of several data sets at logarithmically spaced ranks.

    Returns:
        Columns `curve`, `data`, `rank` from 1, `rank_fraction` (rank over the number of users or items that have
        events), `count` (events of that user or item), `relative_count` (count over its mean).
    """
    parts = []
    for name, activity in data.items():
        for curve, histogram in activity.curves().items():
            ranks, counts = _by_rank(histogram)
            number = int(histogram[1:].sum())
            mean = float(histogram @ np.arange(len(histogram))) / number
            columns: dict[str, Any] = {
                "curve": pa.array([curve] * len(ranks)),
                "data": pa.array([name] * len(ranks)),
                "rank": ranks,
                "rank_fraction": ranks / number,
                "count": counts,
                "relative_count": counts / mean,
            }
            parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _by_rank(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 for the largest, and the count at each, of the entries with a count of 1 or more."""
    at_least = np.cumsum(histogram[:0:-1])
    number = int(at_least[-1])
    ranks = np.unique(np.rint(np.geomspace(1, number, _POINTS)).astype(np.int64))
    counts = len(histogram) - 1 - np.searchsorted(at_least, ranks)
    return ranks, counts


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_statistics(statistics: Path, title: str, image: Path) -> None:
    """Draw the curves of a `statistics_table` written as CSV. Needs matplotlib."""
    table = pacsv.read_csv(statistics).to_pandas()
    # The figure alone, without pyplot, needs no display and no choice of one.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 4.2), layout="constrained")
    panels = ((USER_CURVE, "users by activity"), (ITEM_CURVE, "items by popularity"))
    for axes, (curve, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, style in (("source", "-"), ("expansion", "--")):
            points = table[(table["curve"] == curve) & (table["data"] == name)]
            axes.loglog(points["rank_fraction"], points["relative_count"], style, label=name)
        axes.set_title(label)
        axes.set_xlabel("rank, as a fraction of all")
        axes.set_ylabel("ratings, as a multiple of the mean")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(image, dpi=120, format="png")
