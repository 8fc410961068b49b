"""The one batch type, and the legend of shape suffixes used throughout.

B users in a batch, T events of all of them laid end to end (jagged), N longest window, D model width, H heads,
K top-k, L code levels, C codebook size, R negatives a token, X candidate items, V table rows (max item id + 1).
`x_TD` is a tensor of T rows and D columns. Offsets are int64 (B + 1): row b owns `[offsets[b], offsets[b + 1])`.
Item ids are int64 and 0 is padding everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ops import jagged


@dataclass(frozen=True)
class SequenceBatch:
    """Histories of B users, oldest event first, and the event that followed each of them.

    `next_*_T` at a token is the event after it; at a row's last token it is the row's target. That pairing carries both
    the supervision of every position and the time a prediction is asked for (the time of the event to predict).
    `events` are further columns of the history's events by name, int64 (T,) each.
    """

    item_ids_T: Tensor
    ratings_T: Tensor
    timestamps_T: Tensor
    next_item_ids_T: Tensor
    next_timestamps_T: Tensor
    offsets: Tensor
    user_ids_B: Tensor
    target_ids_B: Tensor
    target_ratings_B: Tensor
    target_timestamps_B: Tensor
    # Number of each row in the global batch of the step: randomness is keyed by it, so it does not depend on the ranks.
    row_numbers_B: Tensor
    events: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.user_ids_B.numel()

    @property
    def lengths_B(self) -> Tensor:
        return self.offsets.diff()

    def rows_T(self) -> Tensor:
        """Row of each token, (T,)."""
        return jagged.rows(self.offsets, self.item_ids_T.numel())

    def positions_T(self) -> Tensor:
        """Place of each token in its row, oldest 0, (T,)."""
        return jagged.positions(self.offsets, self.item_ids_T.numel())

    def split(self, parts: int) -> list[SequenceBatch]:
        """The rows in `parts` runs of nearly equal numbers of rows, some of them empty where there are fewer rows."""
        bounds = [self.size * part // parts for part in range(parts + 1)]
        places = self.offsets[bounds].tolist()
        return [
            self._run(first, last, start, stop)
            for first, last, start, stop in zip(bounds, bounds[1:], places, places[1:], strict=False)
        ]

    def _run(self, first: int, last: int, start: int, stop: int) -> SequenceBatch:
        """Rows first to last - 1, which own the tokens start to stop - 1."""
        tensors = [f.name for f in fields(self) if f.name not in ("events", "offsets")]
        cut = {n: getattr(self, n)[start:stop] if n.endswith("_T") else getattr(self, n)[first:last] for n in tensors}
        events = {name: column[start:stop] for name, column in self.events.items()}
        return SequenceBatch(**cut, offsets=self.offsets[first : last + 1] - start, events=events)

    def to(self, device: torch.device | str) -> SequenceBatch:
        tensors = (f.name for f in fields(self) if f.name != "events")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        events = {name: column.to(device, non_blocking=True) for name, column in self.events.items()}
        return SequenceBatch(**moved, events=events)
