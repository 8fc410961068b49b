"""Rank and top-k in Triton: a program walks a share of the candidates for a block of queries, a tile at a time.

A tile of scores, [BLOCK_B, BLOCK_X], is a matrix product of queries and gathered table rows or, where scores are given,
a piece of them. Tiles stay in registers: rank keeps one counter a query, top-k the K best as packed integers.

`source` and `seen` are the named tuples of gpu.py; what is None there is known to be while compiling.
"""

import triton
import triton.language as tl

# Below the packed key of any score: what a candidate that does not count is.
HIDDEN = tl.constexpr(-(1 << 63))
# Behind any candidate: where a query stands that has no further seen one.
NO_POSITION = tl.constexpr((1 << 31) - 1)


@triton.jit
def load_rows(matrix, rows, stride, inside, start, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of the columns from `start`, zeros outside."""
    d = start + tl.arange(0, BLOCK_D)
    place = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(matrix + place, mask=inside[:, None] & (d[None, :] < WIDTH), other=0.0)


@triton.jit
def first_columns(source, b, inside_b, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """What of the queries stays in registers through the walk."""
    held = None
    if source.given is None:
        held = load_rows(source.queries, b, source.query_stride, inside_b, 0, WIDTH, BLOCK_D)
    return held


@triton.jit
def add_product(scores, queries, items, PRECISION: tl.constexpr):
    """scores + queries @ items^T in float32; operands of unlike dtypes are widened first."""
    if queries.dtype != items.dtype:
        queries = queries.to(tl.float32)
        items = items.to(tl.float32)
    return tl.dot(queries, tl.trans(items), scores, input_precision=PRECISION)


@triton.jit
def score_tile(
    source,
    held,
    b,
    x,
    inside_b,
    inside_x,
    candidates,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[b, x]: scores of queries b and the candidates at positions x, anything outside."""
    if source.given is None:
        rows = tl.load(source.candidate_ids + x, mask=inside_x, other=0)
        items = load_rows(source.table, rows, source.table_stride, inside_x, 0, WIDTH, BLOCK_D)
        tile = add_product(tl.zeros([b.shape[0], x.shape[0]], tl.float32), held, items, PRECISION)
        for start in range(BLOCK_D, WIDTH, BLOCK_D):
            part = load_rows(source.queries, b, source.query_stride, inside_b, start, WIDTH, BLOCK_D)
            items = load_rows(source.table, rows, source.table_stride, inside_x, start, WIDTH, BLOCK_D)
            tile = add_product(tile, part, items, PRECISION)
    else:
        place = b.to(tl.int64)[:, None] * candidates + x[None, :]
        tile = tl.load(source.given + place, mask=inside_b[:, None] & inside_x[None, :], other=0.0)
    return tile


@triton.jit
def first_seen(seen, b, inside_b, batch):
    """Where each query stands in its seen list as the split begins: place, position there, end of the list."""
    place = tl.zeros_like(b).to(tl.int64)
    last = place
    position = tl.zeros_like(b) + NO_POSITION
    if seen.positions is not None:
        last = tl.load(seen.offsets + b + 1, mask=inside_b, other=0)
        place = tl.load(seen.places + tl.program_id(1).to(tl.int64) * batch + b, mask=inside_b, other=0)
        position = tl.load(seen.positions + place, mask=place < last, other=NO_POSITION)
    return place, position, last


@triton.jit
def hide_seen(scores, x, end, seen, place, position, last):
    """Puts -inf at the seen positions before `end` and moves each query past them in its ascending list."""
    if seen.positions is not None:
        while tl.min(position) < end:
            scores = tl.where(x[None, :] == position[:, None], float("-inf"), scores)
            place += (position < end).to(tl.int64)
            position = tl.load(seen.positions + place, mask=place < last, other=NO_POSITION)
    return scores, place, position


@triton.jit(do_not_specialize=["batch", "candidates", "walk"])
def rank_of_target(
    source,
    seen,
    target_positions,
    ahead,
    batch,
    candidates,
    walk,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ahead[split, b]: how many of the split's unseen candidates pass b's target; -1 where its score is no number.

    The targets are scored in a tile of the same shape as their rivals, so that equal rows score equally.
    """
    tl.static_assert(BLOCK_B <= BLOCK_X)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside_b = b < batch
    column = tl.arange(0, BLOCK_X)
    owner = tl.program_id(0) * BLOCK_B + column
    owned = (column < BLOCK_B) & (owner < batch)
    held = first_columns(source, b, inside_b, WIDTH, BLOCK_D)
    target_x = tl.load(target_positions + owner, mask=owned, other=0)
    tile = score_tile(source, held, b, target_x, inside_b, owned, candidates, WIDTH, PRECISION, BLOCK_D)
    target = tl.sum(tl.where(owner[None, :] == b[:, None], tile, 0.0), axis=1)
    target_position = tl.load(target_positions + b, mask=inside_b, other=0)
    place, position, last = first_seen(seen, b, inside_b, batch)
    count = tl.zeros([BLOCK_B], tl.int32)
    first = tl.program_id(1) * walk
    stop = tl.minimum(first + walk, candidates)
    for start in range(first, stop, BLOCK_X):
        x = start + column
        tile = score_tile(source, held, b, x, inside_b, x < stop, candidates, WIDTH, PRECISION, BLOCK_D)
        tile, place, position = hide_seen(tile, x, start + BLOCK_X, seen, place, position, last)
        earlier = x[None, :] < target_position[:, None]
        passes = (tile > target[:, None]) | ((tile == target[:, None]) & earlier)
        rival = (x < stop)[None, :] & (x[None, :] != target_position[:, None])
        count += tl.sum((passes & rival).to(tl.int32), axis=1)
    counted = tl.where(target > float("-inf"), count, -1)
    tl.store(ahead + tl.program_id(1).to(tl.int64) * batch + b, counted, mask=inside_b)


@triton.jit
def packed(score, position, counts):
    """int64 keys that order by score, equal ones by position, the earlier being the larger; HIDDEN where not `counts`.

    The high word is the score's bits, those below the sign flipped where it is negative; the low word is the position
    inverted. Scores that are -inf or NaN do not count.
    """
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - position.to(tl.int64))
    return tl.where(counts & (score > float("-inf")), key, HIDDEN)


@triton.jit
def keep_best(kept, worst, keys, K: tl.constexpr, FEW: tl.constexpr):
    """The K largest of `kept` and `keys` in any order, and the smallest of them.

    Keys that beat the worst kept one replace it one by one while they are few. Else both sides are sorted: the larger
    of the i-th worst of one and the i-th best of the other, over all i, are the K best of both.
    """
    if tl.max(tl.sum((keys > worst[:, None]).to(tl.int32), axis=1)) > FEW:
        kept = tl.maximum(tl.sort(kept), tl.topk(keys, K))
        worst = tl.min(kept, axis=1)
    else:
        best = tl.max(keys, axis=1)
        while tl.max((best > worst).to(tl.int32)) > 0:
            replaced = (best > worst)[:, None] & (kept == worst[:, None])
            kept = tl.where(replaced, best[:, None], kept)
            worst = tl.min(kept, axis=1)
            keys = tl.where(keys == best[:, None], HIDDEN, keys)
            best = tl.max(keys, axis=1)
    return kept, worst


@triton.jit(do_not_specialize=["batch", "candidates", "walk"])
def topk(
    source,
    seen,
    best,
    batch,
    candidates,
    walk,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEW: tl.constexpr,
):
    """best[b, split, :]: packed keys of the split's K best unseen candidates, in any order."""
    TILE: tl.constexpr = max(BLOCK_X, K)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside_b = b < batch
    held = first_columns(source, b, inside_b, WIDTH, BLOCK_D)
    place, position, last = first_seen(seen, b, inside_b, batch)
    slot = tl.arange(0, K)
    # Unlike one another, so that replacing the worst replaces one.
    kept = tl.zeros([BLOCK_B, K], tl.int64) + (HIDDEN + 1) + slot[None, :]
    worst = tl.min(kept, axis=1)
    first = tl.program_id(1) * walk
    stop = tl.minimum(first + walk, candidates)
    for start in range(first, stop, TILE):
        x = start + tl.arange(0, TILE)
        tile = score_tile(source, held, b, x, inside_b, x < stop, candidates, WIDTH, PRECISION, BLOCK_D)
        tile, place, position = hide_seen(tile, x, start + TILE, seen, place, position, last)
        keys = packed(tile, x[None, :], inside_b[:, None] & (x < stop)[None, :])
        kept, worst = keep_best(kept, worst, keys, K, FEW)
    row = best + (b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * K
    tl.store(row[:, None] + slot[None, :], kept, mask=inside_b[:, None])
