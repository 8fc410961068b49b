"""Jagged rows in Triton: every value finds its row by binary search in the offsets, and is moved as plain bits.

Nothing is accumulated and no two programs write one place, so results do not depend on scheduling.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(places, offsets, rows, steps):
    """Row of each int64 place: the b with offsets[b] <= place < offsets[b + 1]; steps: (rows - 1).bit_length().

    A place past the end belongs to the last row, so that masked lanes read nothing outside the offsets.
    """
    low = tl.zeros_like(places)
    high = low + (rows - 1)
    for _ in range(steps):
        middle = (low + high) // 2
        after = tl.load(offsets + middle + 1) <= places
        low = tl.where(after, tl.minimum(middle + 1, rows - 1), low)
        high = tl.where(after, high, middle)
    return low


@triton.jit(do_not_specialize=["rows"])
def offsets_of_lengths(lengths, out, rows, BLOCK_B: tl.constexpr):
    """out[0] = 0, out[b + 1] = out[b] + lengths[b], by one program."""
    total = tl.full([], 0, tl.int64)
    tl.store(out, total)
    for first in range(0, rows, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        block = tl.load(lengths + b, mask=b < rows, other=0).to(tl.int64)
        tl.store(out + 1 + b, total + tl.cumsum(block, 0), mask=b < rows)
        total += tl.sum(block, 0)


@triton.jit(do_not_specialize=["total", "rows", "steps"])
def rows_or_positions(offsets, out, total, rows, steps, POSITIONS: tl.constexpr, BLOCK_T: tl.constexpr):
    """out[t]: the row of value t, or its place in the row."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = row_of(t, offsets, rows, steps)
    tl.store(out + t, t - tl.load(offsets + row) if POSITIONS else row, mask=t < total)


@triton.jit(do_not_specialize=["padding", "places"])
def to_padded(
    values, offsets, out, padding, places, max_len, stride, width, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr
):
    """out[b * max_len + p] = values[offsets[b] + p] while p is inside row b, else the bits of the padding."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    row = place // max_len
    start = tl.load(offsets + row, mask=place < places, other=0)
    end = tl.load(offsets + row + 1, mask=place < places, other=0)
    source = start + place - row * max_len
    inside = (place < places)[:, None] & (w < width)[None, :]
    filled = (source < end)[:, None]
    x = tl.load(values + source[:, None] * stride + w[None, :], mask=inside & filled, other=0)
    x = tl.where(filled, x, tl.cast(padding, x.dtype))
    tl.store(out + place[:, None] * width + w[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["total", "rows", "steps", "max_len"])
def to_jagged(
    dense, offsets, out, total, rows, steps, max_len, stride, width, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr
):
    """out[offsets[b] + p] = dense[b * max_len + p], 0 from p = max_len on."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    row = row_of(t, offsets, rows, steps)
    position = t - tl.load(offsets + row)
    source = row * max_len + position
    inside = (t < total)[:, None] & (w < width)[None, :]
    kept = (position < max_len)[:, None]
    x = tl.load(dense + source[:, None] * stride + w[None, :], mask=inside & kept, other=0)
    tl.store(out + t[:, None] * width + w[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["total", "whole_total", "rows", "steps"])
def move_part(
    source,
    target,
    offsets,
    shifts,
    total,
    whole_total,
    rows,
    steps,
    source_stride,
    width,
    TO_WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Between one part of concatenated rows and the whole: value t of the part, in row b, is at t + shifts[b].

    TO_WHOLE: target[t + shifts[b]] = source[t], else target[t] = source[t + shifts[b]]; a place that is none in the
    whole, because the offsets contradict each other, is neither read nor written.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    whole = t + tl.load(shifts + row_of(t, offsets, rows, steps))
    inside = ((t < total) & (whole >= 0) & (whole < whole_total))[:, None] & (w < width)[None, :]
    if TO_WHOLE:
        x = tl.load(source + t[:, None] * source_stride + w[None, :], mask=inside)
        tl.store(target + whole[:, None] * width + w[None, :], x, mask=inside)
    else:
        x = tl.load(source + whole[:, None] * source_stride + w[None, :], mask=inside)
        tl.store(target + t[:, None] * width + w[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def dense_bmm(
    values,
    offsets,
    weight,
    bias,
    out,
    rows,
    steps,
    inner,
    outer,
    values_stride,
    weight_stride_b,
    weight_stride_k,
    weight_stride_n,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t] = values[t] @ weight[b] + bias[b] for a tile of one row b's values.

    Row b owns the tiles from offsets[b] // BLOCK_T + b on: enough of them, no two rows the same, and found without
    knowing the rows' lengths on the host. Those it has no values for end at once.
    """
    tile = tl.program_id(0)
    low = tile * 0
    high = low + (rows - 1)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        reached = tl.load(offsets + middle) // BLOCK_T + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    row = low.to(tl.int64)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    begin += (tile - begin // BLOCK_T - row) * BLOCK_T
    if begin < end:
        t = begin + tl.arange(0, BLOCK_T)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
        for first in range(0, inner, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(
                values + t[:, None] * values_stride + k[None, :],
                mask=(t < end)[:, None] & (k < inner)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + row * weight_stride_b + k[:, None] * weight_stride_k + n[None, :] * weight_stride_n,
                mask=(k < inner)[:, None] & (n < outer)[None, :],
                other=0.0,
            )
            total = tl.dot(x, w, total, input_precision=PRECISION)
        if bias is not None:
            total += tl.load(bias + row * outer + n, mask=n < outer, other=0.0).to(tl.float32)[None, :]
        inside = (t < end)[:, None] & (n < outer)[None, :]
        tl.store(out + t[:, None] * outer + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dense_bmm_weight_grad(
    values,
    grad,
    offsets,
    grad_weight,
    grad_bias,
    inner,
    outer,
    values_stride,
    grad_stride,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_weight[b] = values_b^T @ grad_b and grad_bias[b] = sum of grad_b: a block of one row's matrix a program."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    bias_total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        x = tl.load(
            values + t[None, :] * values_stride + k[:, None], mask=(t < end)[None, :] & (k < inner)[:, None], other=0.0
        )
        g = tl.load(
            grad + t[:, None] * grad_stride + n[None, :], mask=(t < end)[:, None] & (n < outer)[None, :], other=0.0
        )
        total = tl.dot(x, g, total, input_precision=PRECISION)
        if grad_bias is not None:
            bias_total += tl.sum(g.to(tl.float32), 0)
    place = row * inner * outer + k[:, None] * outer + n[None, :]
    inside = (k < inner)[:, None] & (n < outer)[None, :]
    tl.store(grad_weight + place, total.to(grad_weight.dtype.element_ty), mask=inside)
    if grad_bias is not None and tl.program_id(1) == 0:
        tl.store(grad_bias + row * outer + n, bias_total.to(grad_bias.dtype.element_ty), mask=n < outer)
