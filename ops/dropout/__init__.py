"""Dropout whose mask is a pure function of (seed, key of the row, column).

    dropped[t, d] = bits(seed, keys[t], d) < floor(rate * 2^32)        y = 0 where dropped, else x / (1 - rate)

with `bits` of `ops.random`. A fixed seed gives equal masks on every backend, in any batch composition that keeps the
keys, and backward recomputes the mask instead of reading a saved one.
"""

from __future__ import annotations

from functools import partial

import torch

from ops.dispatch import Implementation, Op
from ops.dropout import cpu, gpu, operator, reference

__all__ = ["dropout"]

_dropout = Op(
    "dropout",
    reference.dropout,
    {
        "triton": Implementation(partial(operator.dropout, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.dropout, triton=False), cpu.refuses),
    },
)


def dropout(
    x_TD: torch.Tensor,
    rate: float,
    seed: int,
    keys_T: torch.Tensor,
    training: bool = True,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate); x itself when not training.

    x_TD: (T, ...) floats, trailing dimensions numbered row-major as one; keys_T: int64 (T,), what names a row, for
    instance its index in the batch. Elements are dropped, not multiplied by zero: NaN under the mask becomes 0.
    Raises ValueError for a rate outside [0, 1) or keys that do not fit.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate: got {rate}, expected 0 <= rate < 1")
    if not x_TD.is_floating_point():
        raise ValueError(f"dropout x: got {x_TD.dtype}, expected floats")
    if keys_T.dtype != torch.int64 or x_TD.dim() < 1 or keys_T.shape != x_TD.shape[:1]:
        got = f"{keys_T.dtype} {tuple(keys_T.shape)} for x {tuple(x_TD.shape)}"
        raise ValueError(f"dropout keys: got {got}, expected int64 (T,) and (T, ...)")
    if not training or rate == 0.0:
        return x_TD
    result: torch.Tensor = _dropout(x_TD, rate, seed, keys_T, backend=backend)
    return result
