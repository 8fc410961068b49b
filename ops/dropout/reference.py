"""Counter-based dropout in plain PyTorch."""

from __future__ import annotations

import torch

from ops.random import drop_threshold, lane_bits, token_hash


def dropout(x_TD: torch.Tensor, rate: float, seed: int, keys_T: torch.Tensor) -> torch.Tensor:
    lanes_D = torch.arange(x_TD.shape[1:].numel(), device=x_TD.device)
    dropped_TD = lane_bits(token_hash(seed, keys_T)[:, None], lanes_D) < drop_threshold(rate)
    return torch.where(dropped_TD.view(x_TD.shape), 0.0, x_TD * (1.0 / (1.0 - rate)))
