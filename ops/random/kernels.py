"""The generator of `ops.random` for Triton kernels: 32-bit unsigned arithmetic that wraps, equal to the reference."""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """lowbias32 of uint32 values."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def token_hash(low_seed, high_seed, keys):
    """Hash of int64 keys under a seed given as two int32 halves, the higher one already times 0x9e3779b9."""
    low = mix(keys.to(tl.uint32) ^ low_seed.to(tl.uint32))
    return mix(low ^ (keys >> 32).to(tl.uint32) ^ high_seed.to(tl.uint32))


@triton.jit
def lane_bits(tokens, lanes):
    """32 random bits for each (token, lane) of uint32, broadcast like addition."""
    return mix(tokens + lanes * 0x9E3779B9)


@triton.jit(do_not_specialize=["low_seed", "high_seed", "high"])
def uniform_ints(
    keys,
    out,
    low_seed,
    high_seed,
    tokens,
    count,
    high,
    ONE_LANE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[t, r]: a uniform integer in [0, high) for key t and lane r."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = token_hash(low_seed, high_seed, tl.load(keys + t, mask=t < tokens, other=0))[:, None]
    lanes = r[None, :].to(tl.uint32)
    high64 = high.to(tl.uint64)
    if ONE_LANE:
        drawn = (lane_bits(token, lanes).to(tl.uint64) * high64) >> 32
    else:
        upper = lane_bits(token, 2 * lanes).to(tl.uint64)
        lower = lane_bits(token, 2 * lanes + 1).to(tl.uint64)
        drawn = (upper * high64 + ((lower * high64) >> 32)) >> 32
    place = t[:, None].to(tl.int64) * count + r[None, :]
    tl.store(out + place, drawn.to(tl.int64), mask=(t[:, None] < tokens) & (r[None, :] < count))
