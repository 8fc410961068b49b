"""Sums of source rows by sorted id in Triton: every output row written once, by one program.

The order of the sums depends on the arguments alone. Sorted places come in chunks of CHUNK; a chunk that lies inside
one output row is summed by a program of its own, so that the work of an output row is bounded by two chunks of entries
and one row for each chunk inside it, however often its id occurs.
"""

import triton
import triton.language as tl


@triton.jit
def add_rows(
    total, begin, end, hole, hole_size, d, order, rows, weights, source, sources, stride, width, BLOCK_N: tl.constexpr
):
    """total[v, j, d] += weights * source rows at the sorted places of [begin[v], end[v]) outside [hole, hole + size).

    Each output row's places are dealt in turn to its BLOCK_N slots j, to be summed by the caller once at the end.
    """
    last = tl.max(end - hole_size - begin, 0)
    for step in range(0, last, BLOCK_N):
        place = begin[:, None] + step + tl.arange(0, BLOCK_N)[None, :]
        place = tl.where(place < hole[:, None], place, place + hole_size[:, None])
        inside = place < end[:, None]
        entry = place if order is None else tl.load(order + place, mask=inside, other=0)
        row = entry if rows is None else tl.load(rows + entry, mask=inside, other=0)
        known = inside & (row >= 0) & (row < sources)
        wanted = known[:, :, None] & (d[None, None, :] < width)
        values = tl.load(source + row[:, :, None] * stride + d[None, None, :], mask=wanted, other=0.0).to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + entry, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        total += tl.where((inside & (known == 0))[:, :, None], float("nan"), values)
    return total


@triton.jit
def chunk_sums(
    sorted_ids,
    order,
    rows,
    weights,
    source,
    out,
    sources,
    stride,
    width,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[c] = sum over the places of chunk c, written only where they all have one id: no one reads the others."""
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = chunk * CHUNK + tl.zeros([1], dtype=tl.int64)
    end = begin + CHUNK
    if tl.load(sorted_ids + chunk * CHUNK) == tl.load(sorted_ids + chunk * CHUNK + CHUNK - 1):
        total = tl.zeros([1, BLOCK_N, BLOCK_D], dtype=tl.float32)
        total = add_rows(
            total, begin, end, end, end - end, d, order, rows, weights, source, sources, stride, width, BLOCK_N
        )
        tl.store(out + chunk * width + d[None, :], tl.sum(total, 1), mask=d[None, :] < width)


@triton.jit
def row_sums(
    starts,
    order,
    rows,
    weights,
    source,
    sums_of_chunks,
    out,
    num_rows,
    sources,
    stride,
    width,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[v] = sum over the sorted places [starts[v], starts[v + 1]), whole chunks taken from `sums_of_chunks`."""
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(starts + v, mask=v < num_rows, other=0)
    end = tl.load(starts + v + 1, mask=v < num_rows, other=0)
    first = (begin + CHUNK - 1) // CHUNK
    last = tl.maximum(end // CHUNK, first)
    total = tl.zeros([BLOCK_V, BLOCK_N, BLOCK_D], dtype=tl.float32)
    total = add_rows(
        total,
        begin,
        end,
        first * CHUNK,
        (last - first) * CHUNK,
        d,
        order,
        rows,
        weights,
        source,
        sources,
        stride,
        width,
        BLOCK_N,
    )
    total = add_rows(
        total, first, last, last, last - last, d, None, None, None, sums_of_chunks, last.max(0), width, width, BLOCK_N
    )
    place = v[:, None] * width + d[None, :]
    tl.store(out + place, tl.sum(total, 1), mask=(v < num_rows)[:, None] & (d[None, :] < width))
