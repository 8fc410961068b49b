"""Position and time embeddings in Triton: one pass over the tokens, indices computed in registers."""

import triton
import triton.language as tl

from ops.jagged.kernels import row_of


@triton.jit(do_not_specialize=["alpha", "total", "rows", "steps", "context", "buckets", "bucket_steps"])
def position_embedding(
    x,
    offsets,
    position_table,
    time_table,
    timestamps,
    num_targets,
    bucket_offsets,
    out,
    index_out,
    bucket_out,
    alpha,
    total,
    rows,
    steps,
    num_positions,
    context,
    buckets,
    bucket_steps,
    x_stride,
    width,
    NEWEST: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = alpha * x + position_table[index] + time_table[bucket], rounded once; backward needs both indices."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = row_of(t, offsets, rows, steps)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    index = t - start
    if NEWEST:
        highest = end - start
        if num_targets is not None:
            highest -= STRIDE * tl.load(num_targets + row)
        index = tl.where(index < context, index, highest - tl.minimum(index, highest) + context)
    index = tl.minimum(index, num_positions - 1)
    tl.store(index_out + t, index, mask=t < total)
    bucket = index
    if time_table is not None:
        asked = tl.load(timestamps + end - 1, mask=t < total, other=0)
        bucket = row_of(asked - tl.load(timestamps + t, mask=t < total, other=0), bucket_offsets, buckets, bucket_steps)
        tl.store(bucket_out + t, bucket, mask=t < total)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        inside = (t < total)[:, None] & (d < width)
        y = tl.load(x + t[:, None] * x_stride + d, mask=inside, other=0.0).to(tl.float32) * alpha
        y += tl.load(position_table + index[:, None] * width + d, mask=inside, other=0.0).to(tl.float32)
        if time_table is not None:
            y += tl.load(time_table + bucket[:, None] * width + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + t[:, None] * width + d, y.to(out.dtype.element_ty), mask=inside)
