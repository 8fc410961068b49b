"""Explicit splits whose held-out events hold items that training never shows: by time, and by the newest items.

`TimeSplit` cuts all events at two points of time, as the published benchmarks of unseen items do (Hou et al., "Bridging
Language and Items for Retrieval and Recommendation", 2024; SpecGR, Ding et al., 2024, section 4). `ColdSplit` holds the
newest items out of a dataset that is otherwise left one out, which is the protocol of constrained decoding on cold
items (STATIC). `PublishedSplit` takes the splits that come with the files.

A training row is a user's sequence. A held-out row is one event with the user's events before it: unlike leave-one-out,
a user may own many. Rows are places in the ordered events, nothing is copied until they are written (`split_files`).
"""

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from generative_recommenders.data.errors import DataError

SPLITS = ("train", "valid", "test")
NEVER = 3
"""Stands for a split where an item is in none."""
MAX_HISTORY = 200
CUTOFFS = ("0.85", "0.9")
COLD_SHARE = 0.02


@dataclass(frozen=True)
class OrderedEvents:
    """E events by user, oldest first within one: `users`, `items`, `timestamps` int64 (E,), `ratings` float32 (E,)."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray

    @property
    def firsts(self) -> np.ndarray:
        """int64 (U,): place of the first event of each user."""
        return _firsts(self.users)


@dataclass(frozen=True)
class Rows:
    """R rows: row r is the events `history[starts[r]]` and on, `lengths[r]` of them, then the event `targets[r]`."""

    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class Division:
    """How events are divided.

    Attributes:
        splits_E: int8, the split of each event, a place in `SPLITS`.
        appears_E: int8, the split in which an event makes its item appear, `NEVER` where it does not.
        history_H: int64, places of the events that histories are made of, ascending.
        rows: of each split, by name.
        facts: what dataset.json says of the rule.
    """

    splits_E: np.ndarray
    appears_E: np.ndarray
    history_H: np.ndarray
    rows: dict[str, Rows]
    facts: dict[str, Any]


class SplitRule(ABC):
    """A way to divide the events of a dataset."""

    @property
    @abstractmethod
    def suffix(self) -> str:
        """What the name of the dataset gets."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Settings by name, as JSON holds them."""

    @abstractmethod
    def divide(self, events: OrderedEvents) -> Division:
        """Raises DataError where the rule does not fit the events."""


@dataclass(frozen=True)
class TimeSplit(SplitRule):
    """Events by their time: train, valid and test follow one another.

    Attributes:
        cutoffs: shares of all events, 0 to 1, or days as `YYYY-MM-DD`; two of a kind, the earlier one first. Of a share
            q the cut-off is the q-quantile of all times ("lower": a time that occurs), and what is later than it
            belongs to the next split. A day begins at midnight UTC, and its events belong to the next split.
        max_history: events of a held-out row before its target, the newest of them.
    Raises:
        DataError: cut-offs of another kind, order or number, or no history.
    """

    cutoffs: tuple[str, str] = CUTOFFS
    max_history: int = MAX_HISTORY

    def __post_init__(self) -> None:
        _check_history(self.max_history)
        self._points()

    @property
    def suffix(self) -> str:
        return "-temporal"

    @property
    def options(self) -> dict[str, Any]:
        return {"temporal": {"cutoffs": list(self.cutoffs), "max_history": self.max_history}}

    def divide(self, events: OrderedEvents) -> Division:
        firsts = self.first_times(events.timestamps)
        splits_E = np.searchsorted(np.array(firsts), events.timestamps, side="right").astype(np.int8)
        valid_from, test_from = map(_day, firsts)
        facts = self.options["temporal"] | {"valid_from": valid_from, "test_from": test_from}
        return chronological(events, splits_E, self.max_history, {"temporal": facts})

    def first_times(self, timestamps: np.ndarray) -> list[int]:
        """The earliest second of valid and of test."""
        return [
            int(np.quantile(timestamps, point, method="lower")) + 1 if isinstance(point, float) else point
            for point in self._points()
        ]

    def _points(self) -> list[float] | list[int]:
        """Shares, or the first second of days."""
        text = ",".join(self.cutoffs)
        expected = "two shares of the events such as 0.85,0.9 or two days such as 2014-05-13,2014-06-01"
        shares, days = _parsed(self.cutoffs, float), _parsed(self.cutoffs, _midnight)
        points = shares if shares is not None else days
        if points is None or len(points) != len(SPLITS) - 1:
            raise DataError(f"--cutoffs: got {text!r}, expected {expected}")
        if shares is not None and not all(0 < share < 1 for share in shares):
            raise DataError(f"--cutoffs: got {text!r}, expected shares between 0 and 1; give {expected}")
        if not points[0] < points[1]:
            raise DataError(f"--cutoffs: got {text!r}, expected the earlier one first, then a later one")
        return points


@dataclass(frozen=True)
class ColdSplit(SplitRule):
    """The newest items are held out: test is the events on them, after a history of other items.

    Everything else is left one out: the last other event of a user is the valid row's target, what is before it trains.

    Attributes:
        share: of the items with events, those whose first event is the latest, ties by item id; rounded, 1 at least.
        max_history: as of `TimeSplit`.
    """

    share: float = COLD_SHARE
    max_history: int = MAX_HISTORY

    def __post_init__(self) -> None:
        _check_history(self.max_history)
        if not 0 < self.share < 1:
            raise DataError(f"--cold_share: got {self.share}, expected a share of the items such as 0.02")

    @property
    def suffix(self) -> str:
        return f"-cold-{100 * self.share:g}"

    @property
    def options(self) -> dict[str, Any]:
        return {"cold": {"share": self.share, "max_history": self.max_history}}

    def divide(self, events: OrderedEvents) -> Division:
        cold_E = np.isin(events.items, self.newest(events))
        history_H = np.flatnonzero(~cold_E)
        if not len(history_H):
            raise DataError(f"--cold_share: got {self.share}, which holds out every item, expected less")
        firsts = _firsts(events.users[history_H])
        counts = np.diff(np.append(firsts, len(history_H)))
        lasts = firsts + counts - 1
        splits_E = np.where(cold_E, 2, 0).astype(np.int8)
        splits_E[history_H[lasts]] = 1
        long, longer = counts >= 2, counts >= 3
        valid_lengths = np.minimum(counts - 1, self.max_history)[long]
        # Of every event, how many of all users' warm events are before it.
        before_E: np.ndarray = np.cumsum(~cold_E) - ~cold_E
        own_E: np.ndarray = before_E - np.repeat(
            before_E[events.firsts], np.diff(np.append(events.firsts, len(before_E)))
        )
        targets = np.flatnonzero(cold_E & (own_E > 0))
        test_lengths = np.minimum(own_E[targets], self.max_history)
        rows = {
            "train": Rows(firsts[longer], counts[longer] - 2, history_H[lasts[longer] - 1]),
            "valid": Rows(lasts[long] - valid_lengths, valid_lengths, history_H[lasts[long]]),
            "test": Rows(before_E[targets] - test_lengths, test_lengths, targets),
        }
        facts = {"share": self.share, "items": len(np.unique(events.items[cold_E])), "max_history": self.max_history}
        return Division(splits_E, splits_E, history_H, rows, {"cold": facts})

    def newest(self, events: OrderedEvents) -> np.ndarray:
        """int64: ids of the items that are held out."""
        order = np.lexsort((events.timestamps, events.items))
        items, place = np.unique(events.items[order], return_index=True)
        by_age = items[np.lexsort((items, events.timestamps[order][place]))]
        return by_age[-max(1, round(self.share * len(items))) :]


@dataclass(frozen=True)
class PublishedSplit(SplitRule):
    """Splits that come with the events: `splits_E` int8, places in `SPLITS`, that never go back within a user.

    An item appears where a row holds it. So an event of a user who has nothing else in train, which makes no row of its
    own, appears in the split of the user's next event.
    """

    splits_E: np.ndarray
    max_history: int = MAX_HISTORY

    @property
    def suffix(self) -> str:
        return ""

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def divide(self, events: OrderedEvents) -> Division:
        same_user = events.users[1:] == events.users[:-1]
        back = same_user & (np.diff(self.splits_E) < 0)
        if back.any():
            later, earlier = (SPLITS[self.splits_E[int(np.argmax(back)) + step]] for step in (0, 1))
            raise DataError(
                f"splits: got an event of {earlier} after one of {later} for the same user, expected train, valid and "
                "test one after the other in time; get the files again"
            )
        division = chronological(events, self.splits_E, self.max_history, {"published": {}})
        firsts = events.firsts
        alone = firsts[np.add.reduceat(self.splits_E == 0, firsts) < 2]
        following = np.append(np.where(same_user, self.splits_E[1:], NEVER), NEVER).astype(np.int8)
        appears_E = self.splits_E.copy()
        appears_E[alone] = following[alone]
        return Division(self.splits_E, appears_E, division.history_H, division.rows, division.facts)


def chronological(events: OrderedEvents, splits_E: np.ndarray, max_history: int, facts: dict[str, Any]) -> Division:
    """Rows of splits that follow one another within every user.

    Train has a row for each user with two events in it. Valid and test have one for each event that has one before it.
    """
    firsts = events.firsts
    counts = np.add.reduceat(splits_E == 0, firsts)
    place_E = np.arange(len(splits_E)) - np.repeat(firsts, np.diff(np.append(firsts, len(splits_E))))
    enough = counts >= 2
    rows = {"train": Rows(firsts[enough], counts[enough] - 1, (firsts + counts - 1)[enough])}
    for number, name in enumerate(SPLITS[1:], start=1):
        targets = np.flatnonzero((splits_E == number) & (place_E > 0))
        lengths = np.minimum(place_E[targets], max_history)
        rows[name] = Rows(targets - lengths, lengths, targets)
    return Division(splits_E, splits_E, np.arange(len(splits_E)), rows, facts)


def _firsts(users: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))


def _check_history(max_history: int) -> None:
    if max_history < 1:
        raise DataError(f"--max_history: got {max_history}, expected at least 1 event before a target")


def _parsed(words: Sequence[str], parse: Any) -> list[Any] | None:
    """All words parsed; None if one cannot be."""
    try:
        return [parse(word.strip()) for word in words]
    except ValueError:
        return None


def _midnight(day: str) -> int:
    return int(dt.datetime.combine(dt.date.fromisoformat(day), dt.time(), dt.UTC).timestamp())


def _day(second: int) -> str:
    """ISO 8601 in UTC; the number where no calendar has it."""
    try:
        return dt.datetime.fromtimestamp(second, dt.UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return str(second)
