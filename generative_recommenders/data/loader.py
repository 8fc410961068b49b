"""Batches of a split in a seeded order that can be taken up at any position.

The order of an epoch depends on (seed, epoch) alone. A step's global batch is `world_size * batch_size` users in that
order, of which each rank takes a contiguous share: the last one may be smaller, on some ranks empty, and nobody is
dropped or seen twice. Collating is index arithmetic, so it runs in the loop itself; `num_workers` threads, one per
`CORES_A_WORKER` cores at most, can run ahead (`prefetch_factor` batches each, `_MOST_AHEAD` in all) and change nothing
but the timing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.collate import Split
from ops.random import fold

# Collating takes a millisecond. Public configs ask for eight workers with 128 batches each, which take cores from
# the model (6 % of an evaluation on two cores) and on ML-20M would hold a gigabyte.
_MOST_AHEAD = 16
CORES_A_WORKER = 4


@dataclass(frozen=True)
class Loader:
    """Iterates a split rank by rank; `shuffle=False` keeps the order of the file."""

    split: Split
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    prefetch_factor: int | None = None
    drop_last: bool = False

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps an epoch; the same on every rank."""
        whole, rest = divmod(len(self.split), self.global_batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.split))
        generator = torch.Generator().manual_seed(fold(self.seed, epoch))
        return torch.randperm(len(self.split), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[SequenceBatch]:
        """Batches `start`, `start + 1`, … of one epoch, as this rank sees them."""
        order = self.order(epoch)
        workers = min(self.num_workers, (os.cpu_count() or 1) // CORES_A_WORKER)
        if workers == 0:
            for step in range(start, len(self)):
                yield self._collate(order, epoch, step)
            return
        ahead = min(self.num_workers * (self.prefetch_factor or 2), _MOST_AHEAD)
        with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
            pending: deque[Future[SequenceBatch]] = deque()
            steps = iter(range(start, len(self)))
            try:
                for step in steps:
                    pending.append(pool.submit(self._collate, order, epoch, step))
                    if len(pending) > ahead:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _collate(self, order: Tensor, epoch: int, step: int) -> SequenceBatch:
        members = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        numbers = torch.arange(members.numel())
        # Equal shares up to one user, so that a short last batch is spread over the ranks.
        mine = torch.tensor_split(numbers, self.world_size)[self.rank]
        return self.split.batch(members[mine], mine, epoch)
