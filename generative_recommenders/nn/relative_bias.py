"""Relative attention bias of HSTU: a learned value per relative position plus one per bucket of elapsed time.

The attention op reads both vectors itself, so `dense` serves only the softmax variant and
tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.hstu_attention.buckets import time_bucket

NUM_TIME_BUCKETS = 128


class RelativeBias(nn.Module):
    """`position_weights` (2n - 1,), index n - 1 + j - i; `time_weights` (129,), index bucket(t_{i+1} - t_j)."""

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.position_weights = nn.Parameter(torch.empty(2 * num_positions - 1).normal_(std=0.02))
        self.time_weights = nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1).normal_(std=0.02))

    def dense(self, query_times: Tensor, key_times: Tensor) -> Tensor:
        """Bias of rectangles of rows: times (G, N) and (G, N) -> (G, N, N)."""
        place = torch.arange(query_times.shape[-1], device=query_times.device)
        positions = self.position_weights[self.num_positions - 1 + place[None, :] - place[:, None]]
        buckets = time_bucket(query_times[..., :, None] - key_times[..., None, :], NUM_TIME_BUCKETS)
        return positions + self.time_weights[buckets]
