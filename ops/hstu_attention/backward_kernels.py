"""Gradients of HSTU attention in Triton; kernels.py has the pieces that they share with forward.

A score's gradient dz is computed where it is summed: once for the queries, once for the keys, and once for the bias
tables where they are trained. That is three times the scores, for sums that need no atomics and no scratch memory of
the size of the scores, and that come out the same in every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ops.hstu_attention.arguments import Drop
from ops.hstu_attention.kernels import (
    FAR,
    Tile,
    add_product,
    is_seen,
    kept,
    key_ranges,
    load_queries,
    load_rows,
    own_keys,
    product,
    program,
    row_factor,
    scores,
    sigmoid,
    store_rows,
)


class Place(NamedTuple):
    """One (row, head): its first flat row and its length."""

    row: Any
    head: Any
    first: Any
    length: Any


class KeyBlock(NamedTuple):
    """A block of keys and values, their positions and times, which run down a tile."""

    k: Any
    v: Any
    j: Any
    times: Any


@triton.jit
def _weights_and_slopes(z, FAST: tl.constexpr):
    """SiLU of z and its derivative."""
    gate = sigmoid(z, FAST)
    return z * gate, gate * (1.0 + z * (1.0 - gate))


@triton.jit
def _query_gradients(acc, x, grads, keys, first, last, head, alpha, bias, drop, tile, MASKED: tl.constexpr):
    """Adds sum_j dz[i, j] k[j] over the keys at positions [first, last); the row's factor and alpha are left out."""
    for start in tl.range(first, last, tile.N):
        j = start + tl.arange(0, tile.N)
        k = load_rows(keys.k, j, keys.k_stride, last, tile.key_dim, tile.K, not MASKED)
        v = load_rows(keys.v, j, keys.v_stride, last, tile.value_dim, tile.V, not MASKED)
        times = 0
        if bias.time is not None:
            times = tl.load(keys.times + j, mask=j < last, other=0)[None, :]
        products = product(x.q, tl.trans(k), tile)
        z, _ = scores(products, x.p, j[None, :], x.times, times, head, alpha, bias)
        _, slopes = _weights_and_slopes(z, tile.FAST)
        dz = kept(product(grads, tl.trans(v), tile) * slopes, x.tokens, j[None, :], head, bias, drop)
        if MASKED:
            dz = tl.where(is_seen(x, j[None, :], last), dz, 0.0)
        acc = add_product(acc, dz.to(k.dtype), k, tile)
    return acc


@triton.jit(do_not_specialize=["low_seed", "high_seed"])
def backward_queries(
    q,
    k,
    v,
    grad_out,
    grad_q,
    strides,
    rows,
    bias,
    mask,
    drop,
    scales,
    low_seed,
    high_seed,
    alpha,
    scale,
    heads,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_q of one block of queries of one (row, head), the last first."""
    drop = Drop(drop.threshold, drop.factor, drop.row_keys, low_seed, high_seed)
    tile: tl.constexpr = Tile(KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, FAST, EXACT)
    blocks = tl.cdiv(bias.max_seq_len, BLOCK_M)
    row, head, block = program(rows, heads, blocks)
    block = blocks - 1 - block
    first = tl.load(rows.offsets + row)
    length = tl.minimum((tl.load(rows.offsets + row + 1) - first).to(tl.int32), bias.max_seq_len)
    if block * BLOCK_M >= length:
        return
    p = block * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_queries(q, strides.q, first, p, 0, row, length, head, bias, mask, drop, tile, True)
    keys = own_keys(k, v, first, head, strides, bias, tile)
    grad_out += first * strides.grad_out + head * VALUE_DIM
    grads = load_rows(grad_out, p, strides.grad_out, length, VALUE_DIM, BLOCK_V, False)
    lo, full_lo, full_hi, hi, own, end = key_ranges(x, length, tile)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if mask.window is not None:
        acc = _query_gradients(acc, x, grads, keys, lo, full_lo, head, alpha, bias, drop, tile, True)
    acc = _query_gradients(acc, x, grads, keys, full_lo, full_hi, head, alpha, bias, drop, tile, False)
    acc = _query_gradients(acc, x, grads, keys, full_hi, hi, head, alpha, bias, drop, tile, True)
    if mask.num_targets is not None:
        acc = _query_gradients(acc, x, grads, keys, own, end, head, alpha, bias, drop, tile, True)
    acc *= row_factor(row, scale, scales, drop) * alpha
    grad_q += (first * heads + head) * KEY_DIM
    store_rows(grad_q, p, heads * KEY_DIM, length, KEY_DIM, acc, BLOCK_K)


@triton.jit
def _query_blocks(start, row, length, mask, tile):
    """Blocks of queries that may see the keys at [start, start + N): [0, context), [lo, hi) and [tail, blocks)."""
    blocks = tl.cdiv(length, tile.M)
    targets = 0
    if mask.num_targets is not None:
        targets = tl.load(mask.num_targets + row).to(tl.int32)
    context = 0
    shift = 0
    if mask.context is not None:
        context = tl.minimum(tl.cdiv(mask.context, tile.M), blocks)
        shift = mask.context - 1
    reach = length
    tail = blocks
    if mask.window is not None:
        # All targets stand at the id that follows the history, so that they are near or far together.
        reach = tl.maximum(start + tile.N - 1, shift) + mask.window + 1
        reach = tl.where(length - targets < reach, length, reach)
        if mask.full_tail is not None:
            tail = tl.maximum(length - targets - mask.full_tail, 0) // tile.M
    if mask.num_targets is not None:
        # Nobody but a target itself sees it.
        reach = tl.where(start >= length - targets, start + tile.N, reach)
    lo = tl.maximum(start // tile.M, context)
    hi = tl.maximum(tl.minimum(tl.cdiv(reach, tile.M), blocks), lo)
    return context, lo, hi, tl.maximum(tl.minimum(tail, blocks), hi), blocks


@triton.jit
def _key_gradients(sums, own, block, at, q, grad_out, strides, alpha, bias, mask, drop, tile, MASKED: tl.constexpr):
    """Adds to (grad_k, grad_v) of a block of keys what one block of queries gives; factor and alpha are left out."""
    p = block * tile.M + tl.arange(0, tile.M)
    x = load_queries(q, strides.q, at.first, p, 0, at.row, at.length, at.head, bias, mask, drop, tile, False)
    upstream = load_rows(grad_out, p, strides.grad_out, at.length, tile.value_dim, tile.V, False)
    products = product(own.k, tl.trans(x.q), tile)
    z, _ = scores(products, x.p, own.j, x.times, own.times, at.head, alpha, bias)
    weights, slopes = _weights_and_slopes(z, tile.FAST)
    weights = kept(weights, x.tokens, own.j, at.head, bias, drop)
    dz = kept(product(own.v, tl.trans(upstream), tile) * slopes, x.tokens, own.j, at.head, bias, drop)
    if MASKED:
        seen = is_seen(x, own.j, at.length)
        weights = tl.where(seen, weights, 0.0)
        dz = tl.where(seen, dz, 0.0)
    grad_k = add_product(sums[0], dz.to(x.q.dtype), x.q, tile)
    grad_v = add_product(sums[1], weights.to(upstream.dtype), upstream, tile)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["low_seed", "high_seed"])
def backward_keys(
    q,
    k,
    v,
    grad_out,
    grad_k,
    grad_v,
    strides,
    rows,
    bias,
    mask,
    drop,
    scales,
    low_seed,
    high_seed,
    alpha,
    scale,
    heads,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_k and grad_v of one block of keys of one (row, head), the first, which most queries see, first."""
    drop = Drop(drop.threshold, drop.factor, drop.row_keys, low_seed, high_seed)
    tile: tl.constexpr = Tile(KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, FAST, EXACT)
    row, head, block = program(rows, heads, tl.cdiv(bias.max_seq_len, BLOCK_N))
    first = tl.load(rows.offsets + row)
    length = tl.minimum((tl.load(rows.offsets + row + 1) - first).to(tl.int32), bias.max_seq_len)
    start = block * BLOCK_N
    if start >= length:
        return
    j = start + tl.arange(0, BLOCK_N)
    keys = own_keys(k, v, first, head, strides, bias, tile)
    times = 0
    if bias.time is not None:
        times = tl.load(keys.times + j, mask=j < length, other=0)[:, None]
    own_k = load_rows(keys.k, j, strides.k, length, KEY_DIM, BLOCK_K, False)
    own_v = load_rows(keys.v, j, strides.v, length, VALUE_DIM, BLOCK_V, False)
    own, at = KeyBlock(own_k, own_v, j[:, None], times), Place(row, head, first, length)
    grad_out += first * strides.grad_out + head * VALUE_DIM
    sums = (tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32))
    context, lo, hi, tail, blocks = _query_blocks(start, row, length, mask, tile)
    masked_until = hi
    if mask.num_targets is None and mask.window is None and mask.context is None:
        # Queries past this block of keys see all of it.
        masked_until = tl.minimum(tl.cdiv(start + BLOCK_N, BLOCK_M), hi)
    middle = context + masked_until - lo
    for turn in tl.range(0, middle + blocks - tail):
        m = tl.where(turn < context, turn, lo + turn - context)
        m = tl.where(turn < middle, m, tail + turn - middle)
        sums = _key_gradients(sums, own, m, at, q, grad_out, strides, alpha, bias, mask, drop, tile, True)
    for m in tl.range(masked_until, hi):
        sums = _key_gradients(sums, own, m, at, q, grad_out, strides, alpha, bias, mask, drop, tile, False)
    factor = row_factor(row, scale, scales, drop)
    grad_k += (first * heads + head) * KEY_DIM
    grad_v += (first * heads + head) * VALUE_DIM
    store_rows(grad_k, j, heads * KEY_DIM, length, KEY_DIM, sums[0] * (factor * alpha), BLOCK_K)
    store_rows(grad_v, j, heads * VALUE_DIM, length, VALUE_DIM, sums[1] * factor, BLOCK_V)


@triton.jit
def _histogram(sums, dz, buckets, seen, WIDTH: tl.constexpr):
    """Adds the dz of each bucket that occurs in the tile; distant keys share few, so that the range is short."""
    lowest = tl.min(tl.where(seen, buckets, FAR))
    highest = tl.max(tl.where(seen, buckets, -1))
    for bucket in tl.range(lowest, highest + 1):
        total = tl.sum(tl.where(buckets == bucket, dz, 0.0))
        sums += tl.where(tl.arange(0, WIDTH) == bucket, total, 0.0)
    return sums


@triton.jit(do_not_specialize=["low_seed", "high_seed", "batch", "chunks"])
def backward_bias(
    q,
    k,
    v,
    grad_out,
    position_parts,
    time_parts,
    strides,
    rows,
    bias,
    mask,
    drop,
    scales,
    low_seed,
    high_seed,
    alpha,
    scale,
    heads,
    batch,
    chunks,
    lower_bands,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums of dz over one diagonal of blocks, one head and every chunks-th row: by place in the block, and by bucket.

    All tiles of a diagonal hold the same relative position at the same place, so that a register tile collects them;
    band b < lower_bands pairs query block m with key block m - b, the others with key blocks after it (context rows).
    """
    drop = Drop(drop.threshold, drop.factor, drop.row_keys, low_seed, high_seed)
    tile: tl.constexpr = Tile(KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_M, BLOCK_K, BLOCK_V, FAST, EXACT)
    band, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    back = tl.where(band < lower_bands, band, lower_bands - 1 - band)
    places = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    times = tl.zeros([BUCKETS], tl.float32)
    for place in tl.range(chunk, batch, chunks):
        row = place
        if rows.order is not None:
            row = tl.load(rows.order + place).to(tl.int32)
        first = tl.load(rows.offsets + row)
        length = tl.minimum((tl.load(rows.offsets + row + 1) - first).to(tl.int32), bias.max_seq_len)
        blocks = tl.cdiv(length, BLOCK_M)
        last = tl.minimum(blocks, blocks + back)
        if mask.context is not None:
            last = tl.where(back < 0, tl.minimum(last, tl.cdiv(mask.context, BLOCK_M)), last)
        factor = row_factor(row, scale, scales, drop)
        keys = own_keys(k, v, first, head, strides, bias, tile)
        upstream = grad_out + first * strides.grad_out + head * VALUE_DIM
        for m in tl.range(tl.maximum(back, 0), last):
            p = m * BLOCK_M + tl.arange(0, BLOCK_M)
            j = p - back * BLOCK_M
            x = load_queries(q, strides.q, first, p, 0, row, length, head, bias, mask, drop, tile, True)
            key_times = 0
            if bias.time is not None:
                key_times = tl.load(keys.times + j, mask=j < length, other=0)[None, :]
            key_rows = load_rows(keys.k, j, keys.k_stride, length, KEY_DIM, BLOCK_K, False)
            products = product(x.q, tl.trans(key_rows), tile)
            z, buckets = scores(products, x.p, j[None, :], x.times, key_times, head, alpha, bias)
            # Only now, as wide heads do not fit the registers four tiles at a time.
            grads = load_rows(upstream, p, strides.grad_out, length, VALUE_DIM, BLOCK_V, False)
            value_rows = load_rows(keys.v, j, keys.v_stride, length, VALUE_DIM, BLOCK_V, False)
            _, slopes = _weights_and_slopes(z, FAST)
            dz = product(grads, tl.trans(value_rows), tile) * slopes * factor
            seen = is_seen(x, j[None, :], length) & (x.p < length)
            dz = tl.where(seen, kept(dz, x.tokens, j[None, :], head, bias, drop), 0.0)
            if position_parts is not None:
                places += dz
            if time_parts is not None:
                times = _histogram(times, dz, buckets, seen, BUCKETS)
    part = ((chunk * heads + head) * tl.num_programs(0) + band).to(tl.int64)
    if position_parts is not None:
        cells = tl.arange(0, BLOCK_M)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(position_parts + part * BLOCK_M * BLOCK_M + cells, places)
    if time_parts is not None:
        tl.store(time_parts + part * BUCKETS + tl.arange(0, BUCKETS), times)


@triton.jit
def reduce_positions(
    parts,
    out,
    max_seq_len,
    heads,
    lower_bands,
    bands,
    BLOCK_M: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[h, r]: the sum of all cells of relative position r - (max_seq_len - 1); one head's, or that of all."""
    relative = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = relative < 2 * max_seq_len - 1
    head = tl.program_id(1)
    last = head + 1
    if SHARED:
        last = heads
    total = tl.zeros([BLOCK], tl.float64)
    for h in tl.range(head, last):
        for a in tl.range(0, BLOCK_M):
            # Key minus query block, and the key's place in its block; whole blocks are added to divide upwards of zero.
            distance = relative - (max_seq_len - 1) + a + bands * BLOCK_M
            ahead = distance // BLOCK_M - bands
            band = tl.where(ahead <= 0, -ahead, lower_bands - 1 + ahead)
            known = inside & tl.where(ahead <= 0, band < lower_bands, band < bands)
            cell = ((h * bands + band).to(tl.int64) * BLOCK_M + a) * BLOCK_M + distance % BLOCK_M
            total += tl.load(parts + cell, mask=known, other=0.0)
    tl.store(out + head * (2 * max_seq_len - 1) + relative, total.to(out.dtype.element_ty), mask=inside)
