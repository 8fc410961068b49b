"""Triton form of `uniform_ints`; equal to the reference bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import triton_runtime
from ops.random.reference import ONE_LANE_HIGH, seed_halves
from ops.tuning import Table

_TABLE = Table("random")

refuses = triton_runtime.refuses


def uniform_ints(seed: int, keys_T: Tensor, count: int, high: int) -> Tensor:
    from ops.random import kernels

    tokens = keys_T.shape[0]
    out_TR = torch.empty(tokens, count, dtype=torch.int64, device=keys_T.device)
    triton_runtime.launch(
        kernels.uniform_ints,
        lambda config: (-(-tokens // config["BLOCK_T"]), -(-count // config["BLOCK_R"])),
        keys_T.contiguous(),
        out_TR,
        *seed_halves(seed),
        tokens,
        count,
        high,
        table=_TABLE,
        key={},
        ONE_LANE=high <= ONE_LANE_HIGH,
    )
    return out_TR
