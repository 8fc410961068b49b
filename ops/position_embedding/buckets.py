"""Buckets of elapsed time, defined by integers.

The published formula is `int(clamp(f(max(d, 1e-6) / unit), 0, num_buckets))` in float32, f the square root or the
natural logarithm, d = query time - event time. Its value near a bucket's edge depends on the device's division, root
and logarithm, and on how float32 rounds d. Here bucket b >= 1 starts at the first whole d with f(d / unit) >= b in
exact arithmetic, ceil(unit b^2) or ceil(unit e^b), so that every device agrees. In minutes the two differ from
d = 8,893,499 seconds on for the root and 486,185 for the logarithm, where float32 is correctly rounded, and only where
d is within float32's rounding of an edge: 4 roundings for the root; for the logarithm 2 and the unit in the last place
of f. Without elapsed time, or with less than none, the bucket is 0, as the clamp at 1e-6 makes it.
"""

from __future__ import annotations

import decimal
import fractions
import functools
from typing import Literal

import torch
from torch import Tensor

from ops.tracing import tracing

TimeScale = Literal["sqrt", "log"]
_LARGEST = 2**63 - 1


@functools.cache
def _starts(num_buckets: int, unit: float, scale: TimeScale) -> tuple[int, ...]:
    """First whole difference of buckets 1 to num_buckets, as far as 64 bits hold it."""
    starts: list[int] = []
    # 60 digits hold unit * e^b far past 2^63, so that the ceiling is exact where a double would round.
    with decimal.localcontext(prec=60):
        for b in range(1, num_buckets + 1):
            if scale == "sqrt":
                start = -(-fractions.Fraction(unit) * b * b // 1)
            else:
                power = decimal.Decimal(unit) * decimal.Decimal(b).exp()
                start = int(power.to_integral_value(rounding=decimal.ROUND_CEILING))
            if start >= _LARGEST:
                break
            starts.append(start)
    return tuple(starts)


@functools.lru_cache(maxsize=64)
def _offsets(num_buckets: int, unit: float, scale: TimeScale, device: torch.device | str) -> Tensor:
    return torch.tensor([0, *_starts(num_buckets, unit, scale), _LARGEST], dtype=torch.int64, device=device)


# `torch.compile` looks through a cache, and cannot trace what is behind it, so the constant is a function of its own.
@torch.compiler.assume_constant_result
def bucket_offsets(num_buckets: int, unit: float, scale: TimeScale, device: torch.device | str = "cpu") -> Tensor:
    """The buckets as rows of a line of whole differences: bucket b >= 1 holds [offsets[b], offsets[b + 1]).

    int64, cached; do not write into it. Shorter than num_buckets + 2 where 64 bits end before the buckets do.
    """
    # What a tracer makes is of use to it alone, and must not stay in the cache.
    return (_offsets.__wrapped__ if tracing() else _offsets)(num_buckets, unit, scale, device)


def time_bucket(delta: Tensor, num_buckets: int, unit: float, scale: TimeScale) -> Tensor:
    """Bucket of each int64 difference, int64 in [0, num_buckets]."""
    edges = bucket_offsets(num_buckets, unit, scale, delta.device)[1:-1]
    return torch.bucketize(delta, edges, right=True)
