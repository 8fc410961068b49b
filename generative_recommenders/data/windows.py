"""Every prefix of a history as a training sample of its own, by index arithmetic: nothing is stored a sample.

A user with events e_0 .. e_{n-1}, the last `ignore_last_n` of the sequence dropped, gives the n - 1 samples
(e_0 .. e_{i-1}) -> e_i, of whose history the most recent `max_sequence_length` events are kept. Encoder-decoder models
are trained this way ("sliding window", TIGER and its reimplementations), since they learn from one target a sample.
"all_prefixes" goes through all samples in an epoch; "random_end" through one of each user, another every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from generative_recommenders.data.collate import Split
from ops.random import fold, lane_bits, token_hash

WindowMode = Literal["all_prefixes", "random_end", "last"]


@dataclass(frozen=True)
class Windows(Split):
    """The samples of a split's users; `len` counts samples. `mode` "last" is the split itself."""

    mode: WindowMode = "all_prefixes"
    seed: int = 0
    # Samples of the users before each user, and of all of them at the end.
    starts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thinning.active:
            raise ValueError("windows: got thinned sequences, expected whole ones; try mode 'last' or no thinning")
        counts = self._events()[1] - 1
        object.__setattr__(self, "starts", torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def _events(self) -> tuple[Tensor, Tensor]:
        """First event of each user, and how many of them count."""
        starts = self.dataset.offsets[self.rows]
        return starts, self.dataset.lengths_U[self.rows] - self.ignore_last_n

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.mode == "all_prefixes" else self.rows.numel()

    @property
    def num_skipped(self) -> int:
        return self.num_rows - self.rows.numel()

    def spans(self, members: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.mode == "last":
            return super().spans(members, epoch)
        if self.mode == "all_prefixes":
            users = torch.searchsorted(self.starts, members, right=True) - 1
            ends = members - self.starts[users] + 1
        else:
            users = members
            counts = (self.starts[1:] - self.starts[:-1])[users]
            bits = lane_bits(token_hash(fold(self.seed, epoch), self.rows[users]), torch.zeros_like(users))
            # 32 random bits scaled to 0 .. count - 1.
            ends = (bits * counts >> 32) + 1
        rows = self.rows[users]
        start = self.dataset.offsets[rows]
        return rows, start, start + ends + 1
