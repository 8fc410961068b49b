"""From row numbers of a split to a jagged batch: index arithmetic on the flat event arrays, no loop over users.

A split says whose sequences it is about and where a sequence ends. `leave_one_out` with `ignore_last_n = n` drops the
last n events; of what is left the last event is the target and at most `max_sequence_length` events before it are the
history.

Training sequences can be thinned: `positional_sampling_ratio` keeps each event with that probability, and
`stochastic_length_alpha` shortens a history of length l > N^(a/2) to its N^(a/2) most recent events with probability
1 - N^a / l^2 (Actions Speak Louder than Words, section 3.2; N is `max_sequence_length`). The paper samples the kept
events; ours are the most recent, so that the window stays contiguous. Draws are keyed by (seed, epoch, user).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.dataset import PreparedDataset
from ops import jagged
from ops.random import fold, lane_bits, token_hash


@dataclass(frozen=True)
class Thinning:
    """Random shortening of training sequences; the defaults leave them whole."""

    positional_sampling_ratio: float = 1.0
    stochastic_length_alpha: float | None = None
    seed: int = 0

    @property
    def active(self) -> bool:
        return self.positional_sampling_ratio < 1.0 or self.stochastic_length_alpha is not None


@dataclass(frozen=True)
class Split:
    """The users of a dataset who have a history and a target once the last `ignore_last_n` events are dropped.

    `of_rows` restricts them to the rows of an explicit split: the first row and the one after the last.
    """

    dataset: PreparedDataset
    max_sequence_length: int
    ignore_last_n: int
    thinning: Thinning = Thinning()
    of_rows: tuple[int, int] | None = None
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        first, last = self.of_rows or (0, self.dataset.num_users)
        enough = self.dataset.lengths_U[first:last] >= self.ignore_last_n + 2
        object.__setattr__(self, "rows", enough.nonzero().flatten() + first)

    @property
    def num_rows(self) -> int:
        """Users it was made of, those with too few events included."""
        first, last = self.of_rows or (0, self.dataset.num_users)
        return last - first

    def __len__(self) -> int:
        return self.rows.numel()

    @property
    def num_skipped(self) -> int:
        """Users with too few events to have a history and a target here."""
        return self.num_rows - len(self)

    def with_targets(self, wanted_V: Tensor) -> Split:
        """The users whose target is an item that `wanted_V`, bool by item id, has."""
        last_E = self.dataset.offsets[self.rows + 1] - self.ignore_last_n - 1
        chosen = copy.copy(self)
        object.__setattr__(chosen, "rows", self.rows[wanted_V[self.dataset.item_ids_E[last_E]]])
        return chosen

    def spans(self, members: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the dataset, and of each the first event and the one after the target, (B,) each."""
        rows = self.rows[members]
        return rows, self.dataset.offsets[rows], self.dataset.offsets[rows + 1] - self.ignore_last_n

    def batch(self, members: Tensor, row_numbers: Tensor, epoch: int = 0) -> SequenceBatch:
        """Collate the split's users `members` (int64, (B,), numbers within the split).

        `row_numbers` (B,) is each row's place in the global batch, the key of everything random about it.
        """
        data = self.dataset
        rows, start, stop = self.spans(members, epoch)
        if self.thinning.active:
            events, offsets, targets = self._thinned_events(rows, start, stop, epoch)
        else:
            first = torch.maximum(start, stop - 1 - self.max_sequence_length)
            events, offsets = _ranges(first, stop - 1)
            targets = stop - 1
        following = torch.cat([events[1:], events[:1]])
        following[offsets[1:][offsets.diff() > 0] - 1] = targets[offsets.diff() > 0]
        return SequenceBatch(
            item_ids_T=data.item_ids_E[events],
            ratings_T=data.ratings_E[events],
            timestamps_T=data.timestamps_E[events],
            next_item_ids_T=data.item_ids_E[following],
            next_timestamps_T=data.timestamps_E[following],
            offsets=offsets,
            user_ids_B=data.user_ids_U[rows],
            target_ids_B=data.item_ids_E[targets],
            target_ratings_B=data.ratings_E[targets],
            target_timestamps_B=data.timestamps_E[targets],
            row_numbers_B=row_numbers,
            events={name: column[events] for name, column in data.events.items()},
        )

    def _thinned_events(self, rows: Tensor, start: Tensor, stop: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flat event numbers of the kept histories, their offsets, and the event number of each target."""
        seed = fold(self.thinning.seed, epoch)
        tokens_B = token_hash(seed, rows)
        events, offsets = _ranges(start, stop)
        owner = jagged.rows(offsets, events.numel())
        # Lane 0 belongs to the row itself (stochastic length), lane 1 + position to its events.
        bits = lane_bits(tokens_B[owner], events - start[owner] + 1)
        keep = bits < int(self.thinning.positional_sampling_ratio * 2**32)
        kept = torch.zeros(rows.numel(), dtype=torch.int64).index_add_(0, owner, keep.long())
        # A user all of whose events were dropped keeps the last two: a history of one and a target.
        lost = (kept < 2)[owner] & (events >= stop[owner] - 2)
        keep = (keep & (kept >= 2)[owner]) | lost
        events, owner = events[keep], owner[keep]
        kept = torch.bincount(owner, minlength=rows.numel())
        ends = kept.cumsum(0)
        from_end = ends[owner] - 1 - torch.arange(events.numel())
        limit = self._length_limits(tokens_B, kept - 1)
        history = (from_end >= 1) & (from_end <= limit[owner])
        lengths = torch.bincount(owner[history], minlength=rows.numel())
        return events[history], jagged.lengths_to_offsets(lengths), events[ends - 1]

    def _length_limits(self, tokens_B: Tensor, lengths: Tensor) -> Tensor:
        longest = torch.full_like(lengths, self.max_sequence_length)
        alpha = self.thinning.stochastic_length_alpha
        if alpha is None:
            return longest
        lengths = lengths.clamp(max=self.max_sequence_length)
        threshold = int(self.max_sequence_length ** (alpha / 2))
        keep_whole = float(self.max_sequence_length) ** alpha / lengths.double().clamp(min=1) ** 2
        draw = lane_bits(tokens_B, torch.zeros_like(tokens_B)).double() / 2**32
        return torch.where((lengths > threshold) & (draw >= keep_whole), threshold, longest)


def _ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of all half-open ranges laid end to end, and their offsets."""
    offsets = jagged.lengths_to_offsets(stop - start)
    flat = torch.arange(int(offsets[-1])) + (start - offsets[:-1]).repeat_interleave(stop - start)
    return flat, offsets
