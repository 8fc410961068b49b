"""Time buckets of HSTU's relative attention bias, defined by integers.

The published formula is `clamp(trunc(ln(max(|d|, 1)) / 0.301), 0, num_buckets)` in float32, whose value near a bucket's
edge depends on the device's logarithm. Here bucket b starts at the integer ceil(exp(0.301 b)), so that every device
agrees exactly. The two differ only within about 2e-6 of an edge, relatively: at six integers below 2^22.
"""

from __future__ import annotations

import decimal
import functools

import torch

from ops.tracing import tracing

_BASE = decimal.Decimal("0.301")
_LARGEST = 2**63 - 1


@torch.compiler.assume_constant_result
@functools.cache
def _threshold_values(num_buckets: int) -> tuple[int, ...]:
    # 60 digits hold exp(0.301 b) far past 2^63, so that the ceiling is exact where a double would round.
    with decimal.localcontext(prec=60):
        values = []
        for b in range(1, num_buckets + 1):
            # exp overflows no Decimal but takes long for huge arguments; everything past b = 146 is capped anyway.
            power = (_BASE * min(b, 200)).exp()
            values.append(min(int(power.to_integral_value(rounding=decimal.ROUND_CEILING)), _LARGEST))
    return tuple(values)


@functools.lru_cache(maxsize=64)
def _thresholds(num_buckets: int, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(_threshold_values(num_buckets), dtype=torch.int64, device=device)


def time_bucket_thresholds(num_buckets: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """First |time difference| of buckets 1..num_buckets: int64 (num_buckets,), cached; do not write into it."""
    if num_buckets < 0:
        raise ValueError(f"num_buckets: got {num_buckets}, expected at least 0")
    # What a tracer makes is of use to it alone, and must not stay in the cache.
    return (_thresholds.__wrapped__ if tracing() else _thresholds)(num_buckets, device)


def time_bucket(delta: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """Bucket of each int64 time difference: the number of thresholds at or below |delta|, int64 in [0, num_buckets]."""
    thresholds = time_bucket_thresholds(num_buckets, delta.device)
    return torch.bucketize(delta.abs(), thresholds, right=True)
