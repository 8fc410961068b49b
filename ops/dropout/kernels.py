"""Counter-based dropout in Triton: one pass, the mask computed in registers."""

import triton
import triton.language as tl

from ops.random.kernels import lane_bits, token_hash


@triton.jit
def is_dropped(tokens, lanes, threshold):
    """Which (token, lane) pairs fall below the threshold of `ops.random.drop_threshold`."""
    return lane_bits(tokens, lanes) < tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=["low_seed", "high_seed", "threshold", "scale"])
def dropout(
    x, keys, out, low_seed, high_seed, threshold, scale, tokens, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[t, d] = 0 where dropped, else x[t, d] * scale, rounded once from float32."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t[:, None] < tokens) & (d[None, :] < width)
    token = token_hash(low_seed, high_seed, tl.load(keys + t, mask=t < tokens, other=0))
    place = t[:, None].to(tl.int64) * width + d[None, :]
    kept = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    y = tl.where(is_dropped(token[:, None], d[None, :].to(tl.uint32), threshold), 0.0, kept)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
