"""Random jagged batches and small in-memory datasets for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.dataset import Catalog, PreparedDataset


def dataset(lengths: list[int], num_items: int = 30, seed: int = 0, first_item: int = 1) -> PreparedDataset:
    """Users with the given numbers of events over items first_item, first_item + 2, …, in ascending time."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.arange(num_items) * 2 + first_item
    picks = torch.randint(0, num_items, (total,), generator=generator)
    times = torch.randint(0, 100_000, (total,), generator=generator).cumsum(0) + 1_000_000_000
    return PreparedDataset(
        name="toy",
        folder=Path("toy"),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        item_ids_E=ids[picks],
        ratings_E=torch.randint(1, 6, (total,), generator=generator).float(),
        timestamps_E=times,
        user_ids_U=torch.arange(1, len(lengths) + 1),
        catalog=Catalog(ids, [str(i) for i in ids.tolist()], [None] * num_items),
        metadata={},
    )


def batch(lengths: list[int], num_items: int = 30, seed: int = 0) -> SequenceBatch:
    """Histories of the given lengths (0 allowed) over items 1..num_items."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(1, num_items + 1, (total,), generator=generator)
    times = torch.randint(0, 1_000_000, (total,), generator=generator).cumsum(0)
    targets = torch.randint(1, num_items + 1, (len(lengths),), generator=generator)
    after = torch.randint(1, 1_000_000, (len(lengths),), generator=generator)
    next_ids, next_times = torch.roll(ids, -1), torch.roll(times, -1)
    filled = offsets.diff() > 0
    ends = offsets[1:][filled] - 1
    target_times = torch.zeros(len(lengths), dtype=torch.int64)
    target_times[filled] = times[ends] + after[filled]
    next_ids[ends], next_times[ends] = targets[filled], target_times[filled]
    return SequenceBatch(
        item_ids_T=ids,
        ratings_T=torch.ones(total),
        timestamps_T=times,
        next_item_ids_T=next_ids,
        next_timestamps_T=next_times,
        offsets=offsets,
        user_ids_B=torch.arange(len(lengths)),
        target_ids_B=targets,
        target_ratings_B=torch.full((len(lengths),), 4.0),
        target_timestamps_B=target_times,
        row_numbers_B=torch.arange(len(lengths)),
    )


def rows_of(source: SequenceBatch, rows: list[int]) -> SequenceBatch:
    """The given rows of a batch, in the given order."""
    tokens = torch.cat([torch.arange(int(source.offsets[r]), int(source.offsets[r + 1])) for r in rows])
    pick = torch.tensor(rows)
    return SequenceBatch(
        item_ids_T=source.item_ids_T[tokens],
        ratings_T=source.ratings_T[tokens],
        timestamps_T=source.timestamps_T[tokens],
        next_item_ids_T=source.next_item_ids_T[tokens],
        next_timestamps_T=source.next_timestamps_T[tokens],
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), source.lengths_B[pick].cumsum(0)]),
        user_ids_B=source.user_ids_B[pick],
        target_ids_B=source.target_ids_B[pick],
        target_ratings_B=source.target_ratings_B[pick],
        target_timestamps_B=source.target_timestamps_B[pick],
        row_numbers_B=source.row_numbers_B[pick],
    )
