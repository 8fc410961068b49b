"""Recommendations from a checkpoint alone: the directory holds weights, configuration and the item map."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.data.dataset import Catalog, read_catalog
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.users import USERS_FILE, read_users
from generative_recommenders.indexing.exact import TopK
from generative_recommenders.retrieval.assemble import Plan, build_model, checked_top_k_method
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.serving.histories import Histories
from generative_recommenders.similarity.mol import UNKNOWN_USER
from generative_recommenders.training.checkpoint import Checkpoint

logger = logging.getLogger(__name__)
_BATCH = 256
_SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")


class _Row(NamedTuple):
    """What the model sees of one user, (N,) each, and the time of the request."""

    item_ids: Tensor
    timestamps: Tensor
    ratings: Tensor
    request: int
    events: dict[str, Tensor]


@dataclass(frozen=True)
class HistoryRecommender(ABC):
    """A trained model with its catalogue; `recommend` takes raw ids and returns raw ids.

    `filter_history` is the configuration's: whether what a user has already seen is left out. `num_ratings` is None
    where the model reads no ratings; else those of a history must be 0 to `num_ratings - 1`. `event_columns` are the
    further columns that the model reads and their numbers of values. `users` are the numbers of the users that a model
    with user features was trained on; anybody else is unknown to it.
    """

    model: nn.Module
    catalog: Catalog
    max_sequence_length: int
    device: torch.device
    filter_history: bool
    num_ratings: int | None = None
    users: Mapping[str, int] = field(default_factory=dict)
    event_columns: Mapping[str, int] = field(default_factory=dict)

    @torch.inference_mode()
    def recommend(self, histories: Histories, k: int, *, filter_history: bool | None = None) -> pd.DataFrame:
        """The k best items a user, best first: columns user_id, rank, item_id (raw), score, title.

        The model sees the last `max_sequence_length` events; `filter_history` leaves out all items of the whole
        history (None: as the checkpoint's configuration says). History items the model does not know are dropped and
        counted in the log; a user without any known item gets no rows, since there is nothing to condition on.

        Raises:
            DataError: no user has a known item, k < 1, or the model reads ratings or event columns and the
                histories have none that fit.
        """
        if k < 1:
            raise DataError(f"--top_k: got {k}, expected at least 1")
        ratings = self._ratings(histories)
        self._check_events(histories)
        number = {raw: int(i) for raw, i in zip(self.catalog.raw_ids, self.catalog.item_ids.tolist(), strict=True)}
        known = [[(n, i) for n, raw in enumerate(ids) if (i := number.get(raw))] for ids in histories.raw_item_ids]
        dropped = sum(len(ids) - len(kept) for ids, kept in zip(histories.raw_item_ids, known, strict=True))
        users = [u for u, kept in enumerate(known) if kept]
        if not users:
            example = next((ids[0] for ids in histories.raw_item_ids if ids), None)
            if example is None:
                raise DataError("histories: got no items in any row, expected at least one; fill the column item_ids")
            raise DataError(
                f"histories: none of the items is known to the model (first: {example!r}); expected raw ids such as "
                f"{self.catalog.raw_ids[0]!r}"
            )
        if dropped or len(users) < len(known):
            logger.warning(
                "%d unknown items were dropped; %d users without a known item get no recommendations",
                dropped,
                len(known) - len(users),
            )
        filtered = self.filter_history if filter_history is None else filter_history
        parts = []
        for first in range(0, len(users), _BATCH):
            chosen = users[first : first + _BATCH]
            rows = [
                self._row(
                    known[u],
                    histories.timestamps[u],
                    histories.request_timestamps[u],
                    ratings[u],
                    {name: histories.events[name][u] for name in self.event_columns},
                )
                for u in chosen
            ]
            seen = [torch.tensor([item for _, item in known[u]]) for u in chosen] if filtered else None
            names = [histories.user_ids[u] for u in chosen]
            numbers = [self.users.get(name, UNKNOWN_USER) if histories.named else UNKNOWN_USER for name in names]
            parts.append(self._frame(names, _batch(rows, numbers), seen, k))
        return pd.concat(parts, ignore_index=True)

    def _ratings(self, histories: Histories) -> list[list[float]] | list[None]:
        """The ratings of each history, None where the model reads none."""
        if self.num_ratings is None:
            return [None] * len(histories)
        expected = f"0 to {self.num_ratings - 1}"
        if histories.ratings is None:
            raise DataError(
                "histories: got no ratings, expected the rating or event type of every event, which this model reads; "
                f"try a column ratings with numbers from {expected}"
            )
        for user, ratings in zip(histories.user_ids, histories.ratings, strict=True):
            wrong = next((r for r in ratings if not 0 <= r < self.num_ratings), None)
            if wrong is not None:
                raise DataError(f"histories: user {user!r}: got rating {wrong:g}, expected {expected}")
        return histories.ratings

    def _check_events(self, histories: Histories) -> None:
        for name, number in self.event_columns.items():
            expected = f"0 to {number - 1}"
            if name not in histories.events:
                raise DataError(
                    f"histories: got no {name}, expected the {name} of every event, which this model reads; "
                    f"try a column {name} with integers from {expected}"
                )
            for user, codes in zip(histories.user_ids, histories.events[name], strict=True):
                wrong = next((code for code in codes if not 0 <= code < number), None)
                if wrong is not None:
                    raise DataError(f"histories: user {user!r}: got {name} {wrong}, expected {expected}")

    def _row(
        self,
        kept: list[tuple[int, int]],
        times: list[int] | None,
        request: int | None,
        ratings: list[float] | None,
        events: dict[str, list[int]],
    ) -> _Row:
        """The window of a user whose known items are `kept`, by place in the history and id."""
        window = kept[-self.max_sequence_length :]
        ids = torch.tensor([i for _, i in window])
        stamps = torch.tensor([times[n] for n, _ in window] if times is not None else [0] * len(window))
        marks = torch.tensor([ratings[n] for n, _ in window]) if ratings is not None else torch.zeros(len(window))
        columns = {name: torch.tensor([codes[n] for n, _ in window]) for name, codes in events.items()}
        return _Row(ids, stamps, marks, int(stamps[-1]) if request is None else request, columns)

    @abstractmethod
    def _frame(self, user_ids: list[str], batch: SequenceBatch, seen: list[Tensor] | None, k: int) -> pd.DataFrame:
        """The rows of these users; items of `seen` are left out, where it is given."""

    def _table(self, user_ids: list[str], ids_BK: Tensor, scores_BK: Tensor, found_BK: Tensor) -> pd.DataFrame:
        """Rows of the places that hold an item."""
        places = torch.searchsorted(self.catalog.item_ids, ids_BK[found_BK]).tolist()
        rows, ranks = found_BK.nonzero(as_tuple=True)
        return pd.DataFrame(
            {
                "user_id": [user_ids[r] for r in rows.tolist()],
                "rank": ranks + 1,
                "item_id": [self.catalog.raw_ids[p] for p in places],
                "score": scores_BK[found_BK],
                "title": [self.catalog.titles[p] for p in places],
            }
        )


@dataclass(frozen=True)
class Recommender(HistoryRecommender):
    """A trained retrieval model with its catalogue."""

    model: RetrievalModel

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device | str = "cpu", top_k_method: str | None = None
    ) -> Recommender:
        """`top_k_method` replaces the configuration's.

        Raises CheckpointError or ConfigError where the directory was not written by this project, and ConfigError for
        a method that cannot search the model's similarity.
        """
        plan = Plan.of(load([str(checkpoint.path / "config.gin")], []))
        catalog = read_catalog(checkpoint.path / "items.parquet")
        model = build_model(plan, catalog.item_ids).to(device)
        checkpoint.load_model(model, device)
        model.top_k_method = checked_top_k_method(plan.experiment, top_k_method)
        model.eval()
        window, filter_history = plan.experiment.max_sequence_length, plan.experiment.filter_history
        reads_ratings = plan.experiment.input_features != "item"
        num_ratings = plan.experiment.num_ratings if reads_ratings else None
        users = read_users(checkpoint.path / USERS_FILE)
        columns = plan.experiment.event_columns
        return cls(model, catalog, window, torch.device(device), filter_history, num_ratings, users, columns)

    @cached_property
    def _top_k(self) -> TopK[Any]:
        """The item side is projected, and indexed where the method has an index, once a recommender."""
        return self.model.top_k()

    def _frame(self, user_ids: list[str], batch: SequenceBatch, seen: list[Tensor] | None, k: int) -> pd.DataFrame:
        queries = self.model.search_queries(batch.to(self.device))
        filters = () if seen is None else (offsets_of(seen).to(self.device), torch.cat(seen).to(self.device))
        scores_BK, ids_BK = self._top_k(queries, min(k, len(self._top_k)), *filters)
        return self._table(user_ids, ids_BK.cpu(), scores_BK.cpu(), (ids_BK != 0).cpu())


def offsets_of(rows: list[Tensor]) -> Tensor:
    """Offsets of rows laid end to end."""
    return torch.tensor([0, *(row.numel() for row in rows)]).cumsum(0)


def _batch(rows: list[_Row], users: list[int]) -> SequenceBatch:
    """A batch without targets: what follows a row's last event is unknown, only its time is given."""
    ids = torch.cat([r.item_ids for r in rows])
    times = torch.cat([r.timestamps for r in rows])
    offsets = offsets_of([r.item_ids for r in rows])
    next_times = torch.cat([torch.cat([r.timestamps[1:], torch.tensor([r.request])]) for r in rows])
    next_ids = torch.cat([torch.cat([r.item_ids[1:], torch.zeros(1, dtype=torch.int64)]) for r in rows])
    nobody = torch.zeros(len(rows), dtype=torch.int64)
    return SequenceBatch(
        item_ids_T=ids,
        ratings_T=torch.cat([r.ratings for r in rows]).float(),
        timestamps_T=times,
        next_item_ids_T=next_ids,
        next_timestamps_T=next_times,
        offsets=offsets,
        user_ids_B=torch.tensor(users),
        target_ids_B=nobody,
        target_ratings_B=nobody.float(),
        target_timestamps_B=next_times[offsets[1:] - 1],
        row_numbers_B=torch.arange(len(rows)),
        events={name: torch.cat([r.events[name] for r in rows]) for name in rows[0].events},
    )


def check_output(path: Path) -> None:
    """Refuse a file that `write_recommendations` could not write, before there is anything to write.

    Raises:
        DataError: an unknown suffix, no such folder, or a folder in the file's place.
    """
    if path.suffix not in _SUFFIXES:
        raise DataError(f"--output: got {path}, expected a name that ends in .parquet, .csv, .json or .jsonl")
    if not path.parent.is_dir():
        raise DataError(f"--output: cannot write {path}: {path.parent} is no folder; try a folder that exists")
    if path.is_dir():
        raise DataError(f"--output: cannot write {path}: it is a folder; try another name")


def write_recommendations(table: pd.DataFrame, path: Path) -> None:
    """Write parquet, csv or json (one object a line) by the file's suffix, aside and renamed.

    Raises:
        DataError: another suffix, or the file cannot be written; then nothing is left of it.
    """
    check_output(path)
    aside = path.with_name(f".{path.name}")
    try:
        if path.suffix == ".parquet":
            table.to_parquet(aside, index=False)
        elif path.suffix == ".csv":
            table.to_csv(aside, index=False)
        else:
            table.to_json(aside, orient="records", lines=True)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        reason = str(error).splitlines()[0]
        raise DataError(f"--output: cannot write {path}: {reason}; try a folder that exists and has room") from error
