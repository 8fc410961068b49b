"""Triton form of counter-based dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import triton_runtime
from ops.random import drop_threshold
from ops.random.reference import seed_halves
from ops.tuning import Table

_TABLE = Table("dropout")

refuses = triton_runtime.refuses


def dropout(x_TD: Tensor, rate: float, seed: int, keys_T: Tensor) -> Tensor:
    from ops.dropout import kernels

    x_TD = x_TD.contiguous()
    tokens, width = x_TD.shape[0], x_TD.shape[1:].numel()
    out_TD = torch.empty_like(x_TD)
    triton_runtime.launch(
        kernels.dropout,
        lambda config: (-(-tokens // config["BLOCK_T"]), -(-width // config["BLOCK_D"])),
        x_TD,
        keys_T.contiguous(),
        out_TD,
        *seed_halves(seed),
        drop_threshold(rate),
        1.0 / (1.0 - rate),
        tokens,
        width,
        table=_TABLE,
        key={},
    )
    return out_TD
