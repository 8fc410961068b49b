"""HSTU attention in Triton: scores, bias, mask and dropout of a tile live in registers only.

Positions count within a jagged row. What a query sees is one span of positions [low, high), as ids do not decrease
along a row, and itself: every rule of the mask is in `_spans`. A program owns a block of queries of one (row, head); in
backward_kernels.py also a block of keys, or a diagonal of blocks. Every sum so has one owner and a fixed order: there
are no atomics.

Optional arguments are None where they are off, which Triton resolves while compiling. `rows`, `bias`, `mask`, `drop`
and `strides` are named tuples of arguments.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ops.dropout.kernels import is_dropped
from ops.hstu_attention.arguments import Drop
from ops.random.kernels import token_hash

# Buckets of time differences per doubling: ln 2 / 0.301.
_BUCKETS_PER_OCTAVE = tl.constexpr(2.3028145533219436)
FAR = tl.constexpr(2147483647)
# Triton's interpreter knows no assembly.
ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """Constants of a kernel: widths of a head, block sizes (queries M, keys N, padded widths K and V), arithmetic."""

    key_dim: Any
    value_dim: Any
    M: Any
    N: Any
    K: Any
    V: Any
    FAST: Any
    EXACT: Any


class Queries(NamedTuple):
    """A block of queries: rows of q; positions, spans, times and dropout tokens, which broadcast against its keys."""

    q: Any
    p: Any
    low: Any
    high: Any
    times: Any
    tokens: Any


class Keys(NamedTuple):
    """The keys and values of one (row, head), the first of them at position `origin`."""

    k: Any
    v: Any
    times: Any
    k_stride: Any
    v_stride: Any
    origin: Any


@triton.jit
def product(a, b, tile):
    precision: tl.constexpr = "ieee" if tile.EXACT else "tf32"
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def add_product(acc, a, b, tile):
    precision: tl.constexpr = "ieee" if tile.EXACT else "tf32"
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def _keys_below(ids, max_id, length, shift, mask):
    """How many keys of a row have a smaller id."""
    below = tl.where(ids <= 0, 0, tl.minimum(ids + shift, length))
    if mask.num_targets is not None:
        below = tl.where(max_id < ids, length, below)
    return below


@triton.jit
def _spans(p, row, length, mask):
    """[low, high) of the positions that queries at positions p see; beside it each sees itself."""
    shift = 0
    if mask.context is not None:
        shift = mask.context - 1
    max_id = length - shift
    ids = tl.maximum(p - shift, 0)
    if mask.num_targets is not None:
        max_id -= tl.load(mask.num_targets + row).to(tl.int32)
        ids = tl.minimum(ids, max_id)
    low = tl.zeros_like(p)
    high = _keys_below(ids, max_id, length, shift, mask)
    if mask.window is not None:
        low = _keys_below(ids - mask.window, max_id, length, shift, mask)
        if mask.full_tail is not None:
            low = tl.where(ids >= max_id - mask.full_tail, 0, low)
    if mask.context is not None:
        low = tl.where(ids == 0, 0, low)
        high = tl.where(ids == 0, _keys_below(max_id, max_id, length, shift, mask), high)
    return low, tl.where(high == p, p + 1, high)


@triton.jit
def _places(base, rows, stride, BLOCK: tl.constexpr):
    return base + rows[:, None].to(tl.int64) * stride + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_rows(base, rows, stride, count, dim, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """Rows [len(rows), BLOCK] of a head, zeros past row `count` (unless ALL are there) and past `dim`."""
    places = _places(base, rows, stride, BLOCK)
    columns = (tl.arange(0, BLOCK) < dim)[None, :]
    if ALL and dim == BLOCK:
        return tl.load(places)
    elif ALL:
        return tl.load(places, mask=columns, other=0.0)
    elif dim == BLOCK:
        return tl.load(places, mask=(rows < count)[:, None], other=0.0)
    else:
        return tl.load(places, mask=columns & (rows < count)[:, None], other=0.0)


@triton.jit
def store_rows(base, rows, stride, count, dim, values, BLOCK: tl.constexpr):
    inside = (rows < count)[:, None] & (tl.arange(0, BLOCK) < dim)[None, :]
    tl.store(_places(base, rows, stride, BLOCK), values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _look_up(places):
    """Entries of a small table, float32 or int64, straight into registers.

    To the compiler they are a stream like keys and values, which it would queue through shared memory.
    """
    if not ASSEMBLY:
        return tl.load(places)
    elif places.dtype.element_ty == tl.int64:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b64 $0, [$1];", "=l,l", [places], dtype=tl.int64, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [places], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _buckets(query_times, key_times, bias):
    """Bucket of each time difference: a logarithm that errs downwards by at most one, then one exact comparison."""
    gaps = tl.abs(query_times - key_times)
    octaves = tl.log2(tl.maximum(gaps, 1).to(tl.float32))
    low = tl.maximum(octaves * _BUCKETS_PER_OCTAVE - 1e-3, 0.0).to(tl.int32)
    low = tl.minimum(low, bias.num_buckets)
    following = _look_up(bias.thresholds + tl.minimum(low, bias.num_buckets - 1))
    return low + ((low < bias.num_buckets) & (gaps >= following)).to(tl.int32)


@triton.jit
def scores(products, p, j, query_times, key_times, head, alpha, bias):
    """alpha * products + bias for queries at p and keys at j, which broadcast; also the time buckets, or 0."""
    z = products * alpha
    buckets = 0
    if bias.position is not None:
        last = bias.max_seq_len - 1
        places = last + tl.minimum(j, last) - tl.minimum(p, last)
        z += _look_up(bias.position + head * bias.position_stride + places)
    if bias.time is not None:
        buckets = _buckets(query_times, key_times, bias)
        z += _look_up(bias.time + head * bias.time_stride + buckets)
    return z, buckets


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    if FAST:
        # One instruction of the special function unit instead of two; its error of 2^-11 is below half precision's.
        halves = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * halves + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def kept(values, tokens, j, head, bias, drop):
    """Values of dropped (query, key) pairs become zero; what is kept is scaled elsewhere, once a row."""
    if drop.threshold is not None:
        lanes = (head * bias.max_seq_len + j).to(tl.uint32)
        values = tl.where(is_dropped(tokens, lanes, drop.threshold), 0.0, values)
    return values


@triton.jit
def _directed(x, DOWN: tl.constexpr):
    """A vector down the rows of a tile, or along its columns."""
    if DOWN:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def load_queries(q, stride, first, places, before, row, count, head, bias, mask, drop, tile, DOWN: tl.constexpr):
    """Queries `places` of the `count` that start at flat row `first`, `before` positions of their row ahead of them."""
    inside = places < count
    times = 0
    if bias.time is not None:
        times = _directed(tl.load(bias.query_times + first + places, mask=inside, other=0), DOWN)
    tokens = 0
    if drop.threshold is not None:
        keys = (first + places).to(tl.int64)
        if drop.row_keys is not None:
            keys = tl.load(drop.row_keys + first + places, mask=inside, other=0)
        tokens = _directed(token_hash(drop.low_seed, drop.high_seed, keys), DOWN)
    low, high = _spans(before + places, row, before + count, mask)
    values = load_rows(q + first * stride + head * tile.key_dim, places, stride, count, tile.key_dim, tile.K, False)
    p, low, high = _directed(before + places, DOWN), _directed(low, DOWN), _directed(high, DOWN)
    return Queries(values, p, low, high, times, tokens)


@triton.jit
def row_factor(row, scale, scales, drop):
    """What the weights of a row are multiplied by."""
    factor = scale
    if scales is not None:
        factor = tl.load(scales + row).to(tl.float32)
    if drop.threshold is not None:
        factor *= drop.factor
    return factor


@triton.jit
def key_ranges(x, length, tile):
    """Positions a block of queries needs: [lo, hi), of which all queries see all of [full_lo, full_hi), and [own, end).

    The first range starts at a multiple of N and is walked in steps of N; [own, end) holds the queries' own positions
    that lie past it. Queries past the row's length count for nothing.
    """
    inside = x.p < length
    lo = tl.min(tl.where(inside, x.low, FAR)) // tile.N * tile.N
    hi = tl.maximum(tl.max(tl.where(inside, x.high, 0)), lo)
    full_lo = tl.cdiv(tl.max(tl.where(inside, x.low, 0)), tile.N) * tile.N
    full_hi = tl.min(tl.where(inside, x.high, FAR)) // tile.N * tile.N
    none = full_hi <= full_lo
    full_lo = tl.where(none, lo, full_lo)
    full_hi = tl.where(none, lo, full_hi)
    own = tl.maximum(hi, tl.min(tl.where(inside, x.p, FAR)))
    return lo, full_lo, full_hi, hi, own, tl.max(tl.where(inside, x.p, -1)) + 1


@triton.jit
def is_seen(x, j, last):
    """Which queries see which keys; keys from position `last` on are another range's."""
    return (((j >= x.low) & (j < x.high)) | (j == x.p)) & (j < last)


@triton.jit
def _attend(acc, x, keys, first, last, head, alpha, bias, drop, tile, MASKED: tl.constexpr):
    """Adds what the keys at positions [first, last) contribute to the outputs of a block of queries."""
    for start in tl.range(first, last, tile.N):
        j = start + tl.arange(0, tile.N)
        k = load_rows(keys.k, j - keys.origin, keys.k_stride, last - keys.origin, tile.key_dim, tile.K, not MASKED)
        products = product(x.q, tl.trans(k), tile)
        times = 0
        if bias.time is not None:
            times = tl.load(keys.times + (j - keys.origin), mask=j < last, other=0)[None, :]
        z, _ = scores(products, x.p, j[None, :], x.times, times, head, alpha, bias)
        weights = kept(z * sigmoid(z, tile.FAST), x.tokens, j[None, :], head, bias, drop)
        if MASKED:
            weights = tl.where(is_seen(x, j[None, :], last), weights, 0.0)
        v = load_rows(keys.v, j - keys.origin, keys.v_stride, last - keys.origin, tile.value_dim, tile.V, not MASKED)
        acc = add_product(acc, weights.to(v.dtype), v, tile)
    return acc


@triton.jit
def program(rows, heads, blocks):
    """Row, head and block of this program: a row's blocks side by side, the longest rows first if there is an order."""
    place = tl.program_id(0) // blocks
    row = place // heads
    if rows.order is not None:
        row = tl.load(rows.order + row)
    return row, place % heads, tl.program_id(0) % blocks


@triton.jit
def own_keys(k, v, first, head, strides, bias, tile):
    """The keys of a row that attends to itself."""
    times = 0
    if bias.time is not None:
        times = bias.key_times + first
    k += first * strides.k + head * tile.key_dim
    v += first * strides.v + head * tile.value_dim
    return Keys(k, v, times, strides.k, strides.v, 0)


@triton.jit(do_not_specialize=["low_seed", "high_seed"])
def forward(
    q,
    k,
    v,
    out,
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
    """out[i] = factor * sum_j kept(SiLU(z[i, j])) v[j] for one block of queries of one (row, head), the last first."""
    drop = Drop(drop.threshold, drop.factor, drop.row_keys, low_seed, high_seed)
    tile: tl.constexpr = Tile(KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, FAST, EXACT)
    blocks = tl.cdiv(bias.max_seq_len, BLOCK_M)
    row, head, block = program(rows, heads, blocks)
    block = blocks - 1 - block
    first = tl.load(rows.offsets + row)
    length = (tl.load(rows.offsets + row + 1) - first).to(tl.int32)
    out += (first * heads + head) * VALUE_DIM
    if block == 0:
        # Past max_seq_len nothing is computed: a row that long must show.
        for start in tl.range(bias.max_seq_len, length, BLOCK_M):
            lost = tl.full([BLOCK_M, BLOCK_V], float("nan"), tl.float32)
            store_rows(out, start + tl.arange(0, BLOCK_M), heads * VALUE_DIM, length, VALUE_DIM, lost, BLOCK_V)
    length = tl.minimum(length, bias.max_seq_len)
    if block * BLOCK_M >= length:
        return
    p = block * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_queries(q, strides.q, first, p, 0, row, length, head, bias, mask, drop, tile, True)
    keys = own_keys(k, v, first, head, strides, bias, tile)
    lo, full_lo, full_hi, hi, own, end = key_ranges(x, length, tile)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if mask.window is not None:
        # Without a window every span starts at 0.
        acc = _attend(acc, x, keys, lo, full_lo, head, alpha, bias, drop, tile, True)
    acc = _attend(acc, x, keys, full_lo, full_hi, head, alpha, bias, drop, tile, False)
    acc = _attend(acc, x, keys, full_hi, hi, head, alpha, bias, drop, tile, True)
    if mask.num_targets is not None:
        # Without targets every query lies in its own span.
        acc = _attend(acc, x, keys, own, end, head, alpha, bias, drop, tile, True)
    acc *= row_factor(row, scale, scales, drop)
    store_rows(out, p, heads * VALUE_DIM, length, VALUE_DIM, acc, BLOCK_V)


@triton.jit(do_not_specialize=["queries", "max_queries"])
def cached(
    q,
    k,
    v,
    new_k,
    new_v,
    out,
    strides,
    new_strides,
    rows,
    bias,
    mask,
    scales,
    new_times,
    alpha,
    scale,
    heads,
    queries,
    max_queries,
    SPLITS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[split, i]: what one part of the cached keys, and in the last part the new ones, gives a block of queries."""
    drop = Drop(None, 1.0, None)
    tile: tl.constexpr = Tile(KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, FAST, EXACT)
    row, head, block = program(rows, heads, tl.cdiv(max_queries, BLOCK_M))
    first = tl.load(rows.q_offsets + row)
    count = (tl.load(rows.q_offsets + row + 1) - first).to(tl.int32)
    start = tl.load(rows.offsets + row)
    if rows.lengths is not None:
        known = tl.load(rows.lengths + row).to(tl.int32)
    else:
        known = (tl.load(rows.offsets + row + 1) - start).to(tl.int32)
    before = known
    if new_k is None:
        # More queries than keys are an error that a GPU is not asked about, but must not read past a table.
        before = tl.maximum(known - count, 0)
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if block * BLOCK_M >= count:
        return
    split = tl.program_id(1)
    x = load_queries(q, strides.q, first, places, before, row, count, head, bias, mask, drop, tile, True)
    keys = own_keys(k, v, start, head, strides, bias, tile)
    lo, _, _, hi, own, end = key_ranges(x, before + count, tile)
    hi_known = tl.minimum(hi, known)
    share = tl.cdiv(tl.cdiv(tl.maximum(hi_known - lo, 0), BLOCK_N), SPLITS) * BLOCK_N
    lo_part = lo + split * share
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    hi_part = tl.minimum(lo_part + share, hi_known)
    acc = _attend(acc, x, keys, lo_part, hi_part, head, alpha, bias, drop, tile, True)
    if split == SPLITS - 1:
        if new_k is not None:
            times = 0
            if bias.time is not None:
                times = new_times + first
            new_k += first * new_strides.k + head * KEY_DIM
            new_v += first * new_strides.v + head * VALUE_DIM
            keys = Keys(new_k, new_v, times, new_strides.k, new_strides.v, known)
            acc = _attend(acc, x, keys, tl.maximum(lo, known), hi, head, alpha, bias, drop, tile, True)
        if mask.num_targets is not None:
            acc = _attend(acc, x, keys, own, end, head, alpha, bias, drop, tile, True)
    acc *= row_factor(row, scale, scales, drop)
    out += ((split * queries + first) * heads + head) * VALUE_DIM
    store_rows(out, places, heads * VALUE_DIM, count, VALUE_DIM, acc, BLOCK_V)
