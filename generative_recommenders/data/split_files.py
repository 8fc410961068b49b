"""From divided events to the files of explicit splits: items numbered anew, `sequences_{train,valid,test}.parquet`.

Items count from 1 by the split that they first appear in: first those of train, then those that valid adds, then those
that test adds, then those that are in none; inside each in the order of their old ids. So an item is new to a split
where its id is above a number. An event counts for the split it lies in though no row may hold it, such as a user's
only one: what a model has not been trained on is `PreparedDataset.unseen_items`, which goes by the rows.
`items.parquet` keeps what joins other files to the items:

    first_split      0 train, 1 valid, 2 test, 3 in none
    source_item_id   the id that the item has in the dataset without splits; files of embeddings go by it

Rows are written in blocks, since held-out rows repeat their users' histories.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.temporal import NEVER, SPLITS, Division, OrderedEvents, Rows

FIRST_SPLIT = "first_split"
SOURCE_ITEM_ID = "source_item_id"
_LISTS = ("item_ids", "ratings", "timestamps")
_BLOCK_EVENTS = 4_000_000


def ordered_events(sequences: pa.Table) -> OrderedEvents:
    """The events of a table with one row a user."""
    lists = [sequences[name].combine_chunks() for name in _LISTS]
    items, ratings, timestamps = (column.flatten().to_numpy() for column in lists)
    users = np.repeat(sequences["user_id"].to_numpy(), pc.list_value_length(lists[0]).to_numpy())
    return OrderedEvents(users, items, ratings, timestamps)


@dataclass(frozen=True)
class DividedData:
    """A dataset with explicit splits, ready to be written.

    Attributes:
        sequences: a row a user, as without splits.
        items: catalogue in the new numbers.
        first_split_X: int8, of each item of `items`.
        new_ids: int64, the new number of each old id, 0 where there is none.
    """

    sequences: pa.Table
    events: OrderedEvents
    division: Division
    items: pa.Table
    first_split_X: np.ndarray
    new_ids: np.ndarray

    @classmethod
    def of(
        cls, name: str, sequences: pa.Table, items: pa.Table, events: OrderedEvents, division: Division
    ) -> "DividedData":
        """Raises DataError where a split has no row."""
        for split in SPLITS:
            if not len(division.rows[split]):
                raise DataError(
                    f"{name}: got no {split} row with a history and a target, expected one or more; "
                    "try other --cutoffs, or more data"
                )
        old = items["item_id"].to_numpy()
        first = np.full(int(old[-1]) + 1, NEVER, dtype=np.int8)
        for number in reversed(range(NEVER)):
            first[events.items[division.appears_E == number]] = number
        order = np.lexsort((old, first[old]))
        new_ids = np.zeros(int(old[-1]) + 1, dtype=np.int64)
        new_ids[old[order]] = np.arange(1, len(old) + 1)
        first_split_X = first[old[order]]
        table = items.take(pa.array(order))
        table = table.set_column(0, "item_id", pa.array(np.arange(1, len(old) + 1)))
        table = table.append_column(FIRST_SPLIT, pa.array(first_split_X))
        table = table.append_column(SOURCE_ITEM_ID, pa.array(old[order]))
        return cls(sequences, events, division, table, first_split_X, new_ids)

    def facts(self) -> dict[str, Any]:
        """`split_rule` and `splits` of dataset.json. "First seen" and "unseen" go by `first_split`."""
        first_E = self._first_split_E()
        splits = {}
        for number, split in enumerate(SPLITS):
            rows, inside = self.division.rows[split], self.division.splits_E == number
            splits[split] = {
                "events": int(inside.sum()),
                "items": len(np.unique(self.events.items[inside])),
                "items_first_seen": int((self.first_split_X == number).sum()),
                "events_on_items_first_seen": int((inside & (first_E == number)).sum()),
                "items_unseen_in_train": len(np.unique(self.events.items[inside & (first_E > 0)])),
                "sequences": len(rows),
                "users": len(np.unique(self.events.users[rows.targets])),
                "sequences_ending_in_unseen_item": int((first_E[rows.targets] > 0).sum()),
                "events_without_row": int(inside.sum()) - self._told(number, rows),
            }
        return {"split_rule": self.division.facts, "splits": splits}

    def counts(self) -> dict[str, int]:
        """Further `counts` of dataset.json."""
        return {
            "sequences": sum(map(len, self.division.rows.values())),
            "items_in_train": int((self.first_split_X == 0).sum()),
            "items_through_valid": int((self.first_split_X <= 1).sum()),
        }

    def write(self, folder: Path) -> None:
        """Write the sequences of each split into `folder`."""
        for split, rows in self.division.rows.items():
            blocks = self._blocks(rows)
            first = next(blocks)
            with pq.ParquetWriter(folder / f"sequences_{split}.parquet", first.schema, compression="zstd") as writer:
                for block in itertools.chain([first], blocks):
                    writer.write_table(block)

    def _first_split_E(self) -> np.ndarray:
        return self.first_split_X[self.new_ids[self.events.items] - 1]

    @staticmethod
    def _told(number: int, rows: Rows) -> int:
        """Events of a split that its rows tell: all of them in train, the targets elsewhere."""
        return int(rows.lengths.sum()) + len(rows) if number == 0 else len(rows)

    def _blocks(self, rows: Rows) -> Iterator[pa.Table]:
        """The rows in order as tables of the prepared format."""
        columns: Mapping[str, np.ndarray] = {
            "item_ids": self.new_ids[self.events.items],
            "ratings": self.events.ratings,
            "timestamps": self.events.timestamps,
        }
        user_places_E = np.repeat(
            np.arange(self.sequences.num_rows), np.diff(np.append(self.events.firsts, len(self.events.users)))
        )
        numbers = np.cumsum(rows.lengths + 1) // _BLOCK_EVENTS
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
        for low, high in itertools.pairwise(edges):
            lengths, targets = rows.lengths[low:high], rows.targets[low:high]
            offsets = np.concatenate(([0], np.cumsum(lengths + 1)))
            place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths + 1)
            places = np.repeat(rows.starts[low:high], lengths + 1) + place
            # The last place of a row is its target's, wherever that is.
            places[offsets[1:] - 1] = 0
            events = self.division.history_H[places]
            events[offsets[1:] - 1] = targets
            owners = self.sequences.drop_columns(list(_LISTS)).take(pa.array(user_places_E[targets]))
            lists = {
                name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(column[events]))
                for name, column in columns.items()
            }
            others = {name: owners[name] for name in owners.column_names if name != "user_id"}
            yield pa.table({"user_id": owners["user_id"], **lists, **others})
