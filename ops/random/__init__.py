"""Counter-based random numbers that every backend computes alike.

A value is a pure function of (seed, key, lane): the key names a row (a token, a user), the lane a position in the row.
No state is kept, so a mask can be recomputed in backward instead of saved, and a shard draws exactly what the whole
would:

    mix(x)            = lowbias32: x ^= x>>16; x *= 0x7feb352d; x ^= x>>15; x *= 0x846ca68b; x ^= x>>16   (mod 2^32)
    token(seed, key)  = mix(mix(lo(key) ^ lo(seed)) ^ hi(key) ^ (hi(seed) * 0x9e3779b9))      lo, hi: 32-bit halves
    bits(token, lane) = mix(token + lane * 0x9e3779b9)

The finalizer is C. Wellons' lowbias32 ("Prospecting for Hash Functions", 2018); the lane step is the golden ratio of a
Weyl sequence. The generator is for sampling and dropout, not for cryptography. Keys and the low half of the seed meet
in an xor, so seeds 0, 1, 2 over keys 0..n permute one another's rows: derive seeds with `fold`, which spreads them over
63 bits.
"""

from __future__ import annotations

from functools import partial

import torch

from ops.dispatch import Implementation, Op
from ops.random import cpu, gpu, operator, reference
from ops.random.reference import MAX_HIGH, drop_threshold, fold, lane_bits, token_hash

__all__ = ["MAX_HIGH", "drop_threshold", "fold", "lane_bits", "token_hash", "uniform_ints"]

_uniform_ints = Op(
    "uniform_ints",
    reference.uniform_ints,
    {
        "triton": Implementation(partial(operator.uniform_ints, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.uniform_ints, triton=False), cpu.refuses),
    },
)


def uniform_ints(seed: int, keys_T: torch.Tensor, count: int, high: int, *, backend: str | None = None) -> torch.Tensor:
    """Independent uniform integers in [0, high), `count` for each key: int64 (T, count) on the device of `keys_T`.

    Multiply-shift on integers, never a float: `(bits(r) * high) >> 32` for high <= 2^24, whose bias is at most high /
    2^32; above it each draw uses two lanes, `((bits(2r) << 32 | bits(2r + 1)) * high) >> 64`, so a catalogue of
    hundreds of millions keeps every id reachable and unbiased.

    keys_T: int64 (T,), any values. Raises ValueError for high outside [1, 2^31], a negative count or other key types.
    """
    reference.check_uniform_ints(keys_T, count, high)
    result: torch.Tensor = _uniform_ints(seed, keys_T, count, high, backend=backend)
    return result
