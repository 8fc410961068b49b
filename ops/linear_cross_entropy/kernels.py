"""Full softmax in Triton: matrix products with the softmax between them, as in attention.

A query's gradient per unit of loss is the mean of the candidates' rows under its softmax, less its target's row:
attention whose keys and values are both the table. Forward computes it beside the log-sum-exp, for one product more;
backward is left with the items' gradient, which computes the logits a second time.

Candidates (in backward: tokens) are cut into splits of `walk`, so that few tokens (items) still fill the device; what
the splits found is merged in their order by a second kernel.

What would cancel is never added. The target is left out of the sums, and the second kernels give its row the weight
-(1 - p) as minus the sum of the others' p: near p = 1 a difference would leave rounding errors only. A log-sum-exp is
kept as the largest logit and the log of the sum of exponentials below it, which is small.

Queries and items are contiguous and padded with zeros to BLOCK_D columns: addresses then cost next to nothing.
"""

import triton
import triton.language as tl

from ops.sampled_softmax.kernels import inverse_norm, normalized_backward


@triton.jit
def load_rows(rows, places, count, BLOCK_D: tl.constexpr):
    """Padded rows at int places below count, zeros beyond."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(
        rows + places.to(tl.int64)[:, None] * BLOCK_D + d[None, :], mask=(places < count)[:, None], other=0.0
    )


@triton.jit
def add_product(weights, rows, total, PRECISION: tl.constexpr):
    """total + weights @ rows, for float32 weights that may be smaller than the numbers of float16."""
    if rows.dtype == tl.float16:
        return tl.dot(weights, rows.to(tl.float32), total, input_precision="tf32")
    return tl.dot(weights.to(rows.dtype), rows, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["eps"])
def prepare_rows(
    table,
    ids,
    out,
    norms,
    count,
    width,
    stride,
    eps,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """out[x] = table[ids[x]], padded; with NORMALIZE also norms[x] = 1 / max(|out[x]|, eps). No ids: x itself."""
    x = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.arange(0, BLOCK_D)
    item = x if ids is None else tl.load(ids + x, mask=x < count, other=0)
    inside = (x < count)[:, None] & (d < width)[None, :]
    rows = tl.load(table + item[:, None] * stride + d[None, :], mask=inside, other=0.0)
    if out is not None:
        tl.store(out + x[:, None] * BLOCK_D + d[None, :], rows.to(out.dtype.element_ty), mask=(x < count)[:, None])
    if NORMALIZE:
        wide = rows.to(tl.float32)
        tl.store(norms + x, inverse_norm(tl.sum(wide * wide, 1), eps), mask=x < count)


@triton.jit(do_not_specialize=["inverse_temperature"])
def softmax_splits(
    queries,
    items,
    norms,
    positions,
    target_logits,
    sums,
    means,
    tokens,
    candidates,
    walk,
    inverse_temperature,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """sums[split, :, t]: the largest logit of the split's candidates, and the exponentials below it but the target's.

    With KEEP also means[split, t, :], the sum of their rows so weighted. The split that holds the target writes its
    logit.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    query = load_rows(queries, t, tokens, BLOCK_D)
    position = tl.load(positions + t, mask=t < tokens, other=-1)
    target = tl.zeros([BLOCK_T], dtype=tl.float32)
    largest = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    mean = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    end = tl.minimum((split + 1) * walk, candidates)
    for start in range(split * walk, end, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        rows = load_rows(items, x, end, BLOCK_D)
        scale = tl.full([BLOCK_X], 1.0, dtype=tl.float32)
        if norms is not None:
            scale = tl.load(norms + x, mask=x < end, other=0.0)
        logits = tl.dot(query, tl.trans(rows), input_precision=PRECISION) * (scale * inverse_temperature)[None, :]
        own = x[None, :] == position[:, None]
        target += tl.sum(tl.where(own, logits, 0.0), 1)
        logits = tl.where((x < end)[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.where(own, 0.0, tl.exp(logits - larger[:, None]))
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        if KEEP:
            mean = add_product(weights * scale[None, :], rows, mean * shrink[:, None], PRECISION)
        largest = larger
    place = split.to(tl.int64) * tokens + t
    first = place + split.to(tl.int64) * tokens
    tl.store(sums + first, largest, mask=t < tokens)
    tl.store(sums + first + tokens, total, mask=t < tokens)
    tl.store(target_logits + t, target, mask=(position >= split * walk) & (position < end))
    if KEEP:
        d = tl.arange(0, BLOCK_D)
        tl.store(means + place[:, None] * BLOCK_D + d[None, :], mean, mask=(t < tokens)[:, None])


@triton.jit(do_not_specialize=["splits", "inverse_temperature"])
def finish_tokens(
    items,
    norms,
    positions,
    target_logits,
    sums,
    means,
    losses,
    stats,
    slopes,
    tokens,
    candidates,
    splits,
    width,
    inverse_temperature,
    KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merges the splits: losses and, with KEEP, the queries' gradients at weight one. NaN where no position is.

    stats[:, t]: the two parts of the log-sum-exp, and 1 - p of the target.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    position = tl.load(positions + t, mask=t < tokens, other=-1)
    known = position >= 0
    row = load_rows(items, tl.where(known, position, candidates), candidates, BLOCK_D).to(tl.float32)
    if norms is not None:
        row *= tl.load(norms + position, mask=known, other=0.0)[:, None]
    largest = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    place = t
    for _ in range(splits):
        largest = tl.maximum(largest, tl.load(sums + place, mask=t < tokens, other=0.0))
        place += 2 * tokens
    others = tl.zeros([BLOCK_T], dtype=tl.float32)
    mean = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    place = t
    first = t
    for _ in range(splits):
        weight = tl.exp(tl.load(sums + first, mask=t < tokens, other=0.0) - largest)
        others += weight * tl.load(sums + first + tokens, mask=t < tokens, other=1.0)
        if KEEP:
            part = tl.load(means + place[:, None] * BLOCK_D + d[None, :], mask=(t < tokens)[:, None], other=0.0)
            mean += weight[:, None] * part
        place += tokens
        first += 2 * tokens
    largest = tl.where(known, largest, float("nan"))
    below = largest - tl.load(target_logits + t, mask=known, other=0.0)
    total = others + tl.exp(-below)
    missing = others / total
    tl.store(losses + t, below + tl.log(total), mask=t < tokens)
    tl.store(stats + t, largest, mask=t < tokens)
    tl.store(stats + tokens + t, tl.log(total), mask=t < tokens)
    tl.store(stats + 2 * tokens + t, missing, mask=t < tokens)
    if KEEP:
        slope = (mean / total[:, None] - missing[:, None] * row) * inverse_temperature
        tl.store(slopes + t[:, None] * width + d[None, :], slope, mask=(t < tokens)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["inverse_temperature"])
def item_splits(
    queries,
    items,
    norms,
    positions,
    stats,
    weights,
    out,
    tokens,
    candidates,
    walk,
    inverse_temperature,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """out[split, x, :] = sum of weights[t] * p[t, x] * queries[t] over the split's tokens, but those that want x."""
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    split = tl.program_id(1)
    rows = load_rows(items, x, candidates, BLOCK_D)
    scale = tl.full([BLOCK_X], 1.0, dtype=tl.float32)
    if norms is not None:
        scale = tl.load(norms + x, mask=x < candidates, other=0.0)
    scale *= inverse_temperature
    total = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    end = tl.minimum((split + 1) * walk, tokens)
    for start in range(split * walk, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        query = load_rows(queries, t, end, BLOCK_D)
        logits = tl.dot(rows, tl.trans(query), input_precision=PRECISION) * scale[:, None]
        below = logits - tl.load(stats + t, mask=t < end, other=float("inf"))[None, :]
        probability = tl.exp(below - tl.load(stats + tokens + t, mask=t < end, other=0.0)[None, :])
        position = tl.load(positions + t, mask=t < end, other=-1)
        probability = tl.where(x[:, None] == position[None, :], 0.0, probability)
        weight = tl.load(weights + t, mask=t < end, other=0.0)
        total = add_product(probability * weight[None, :], query, total, PRECISION)
    d = tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * candidates + x
    tl.store(out + place[:, None] * BLOCK_D + d[None, :], total, mask=(x < candidates)[:, None])


@triton.jit(do_not_specialize=["splits", "eps"])
def finish_items(
    items,
    ids,
    sums_of_splits,
    target_sums,
    out,
    candidates,
    splits,
    width,
    eps,
    L2_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Merges the splits and the targets' own terms, undoes the normalization, and writes out[ids[x]]."""
    x = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.arange(0, BLOCK_D)
    inside = (x < candidates)[:, None] & (d < width)[None, :]
    total = tl.zeros([BLOCK_X, BLOCK_D], dtype=tl.float32)
    place = x
    for _ in range(splits):
        total += tl.load(sums_of_splits + place[:, None] * BLOCK_D + d[None, :], mask=inside, other=0.0)
        place += candidates
    total += tl.load(target_sums + x[:, None] * width + d[None, :], mask=inside, other=0.0)
    if L2_NORM:
        total = normalized_backward(total, load_rows(items, x, candidates, BLOCK_D).to(tl.float32), eps)
    item = tl.load(ids + x, mask=x < candidates, other=0)
    tl.store(out + item[:, None] * width + d[None, :], total.to(out.dtype.element_ty), mask=inside)
