"""Sampled softmax in Triton: a program a token, which gathers each of its negatives' rows once.

Logits are taken relative to the positive's, so that loss = log(1 + sum exp(logit)) and nothing cancels. Every slot of a
block of negatives keeps a maximum and sums of its own; the loop has no reduction over the slots, one merges them at the
end.
"""

import triton
import triton.language as tl


@triton.jit
def inverse_norm(squares, eps):
    """1 / max(norm, eps) of rows whose squares sum to `squares`."""
    return 1.0 / tl.maximum(tl.sqrt(squares), eps)


@triton.jit
def normalized_backward(grad, rows, eps):
    """The gradient of rows from that of rows / max(|row|, eps), all (V, D) in float32."""
    squares = tl.sum(rows * rows, 1)
    inverse = inverse_norm(squares, eps)
    # Below eps the divisor is the constant eps and nothing is projected out.
    along = tl.where(tl.sqrt(squares) > eps, tl.sum(rows * grad, 1) * inverse * inverse, 0.0)
    return inverse[:, None] * (grad - along[:, None] * rows)


@triton.jit(do_not_specialize=["negatives", "inverse_temperature", "eps", "same_as_positive"])
def sampled_softmax(
    queries,
    table,
    positive_ids,
    negative_ids,
    log_q,
    losses,
    slopes,
    logits,
    query_stride,
    table_stride,
    negatives,
    width,
    num_rows,
    inverse_temperature,
    eps,
    same_as_positive,
    L2_NORM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """losses[t]; with KEEP also slopes[t], its gradient by the query, and the logits, -inf where they are constant."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    query = tl.load(queries + t * query_stride + d, mask=d < width, other=0.0).to(tl.float32) * inverse_temperature
    positive = tl.load(positive_ids + t)
    exists = (positive >= 0) & (positive < num_rows)
    own_row = tl.load(table + positive * table_stride + d, mask=exists & (d < width), other=0.0).to(tl.float32)
    if L2_NORM:
        own_row *= inverse_norm(tl.sum(own_row * own_row, 0), eps)
    own = tl.sum(query * own_row, 0)
    if log_q is not None:
        own -= tl.load(log_q + positive, mask=exists, other=0.0)
    own = tl.where(exists, own, float("nan"))

    largest = tl.zeros([BLOCK_R], dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    slope = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, negatives, BLOCK_R):
        inside = start + r < negatives
        ids = tl.load(negative_ids + t * negatives + start + r, mask=inside, other=0)
        exist = inside & (ids >= 0) & (ids < num_rows)
        place = ids[:, None] * table_stride + d[None, :]
        rows = tl.load(table + place, mask=exist[:, None] & (d[None, :] < width), other=0.0).to(tl.float32)
        logit = tl.sum(query[None, :] * rows, 1)
        scale = tl.full([BLOCK_R], 1.0, dtype=tl.float32)
        if L2_NORM:
            scale = inverse_norm(tl.sum(rows * rows, 1), eps)
            logit *= scale
        if log_q is not None:
            logit -= tl.load(log_q + ids, mask=exist, other=0.0)
        same = ids == positive
        logit = tl.where(same, same_as_positive, logit) - own
        logit = tl.where(exist, logit, tl.where(inside, float("nan"), float("-inf")))
        larger = tl.maximum(largest, logit)
        shrink = tl.exp(largest - larger)
        term = tl.exp(logit - larger)
        total = total * shrink + term
        if KEEP:
            tl.store(logits + t * negatives + start + r, tl.where(same, float("-inf"), logit), mask=inside)
            slope = slope * shrink[:, None] + (tl.where(same, 0.0, term) * scale)[:, None] * rows
        largest = larger

    highest = tl.max(largest, 0)
    merge = tl.exp(largest - highest)
    others = tl.sum(total * merge, 0)
    whole = others + tl.exp(-highest)
    # The NaN of a positive outside the table is in every term, if there is any.
    tl.store(losses + t, tl.where(own == own, tl.log(whole) + highest, float("nan")))
    if KEEP:
        mean = (tl.sum(slope * merge[:, None], 0) - others * own_row) / whole
        tl.store(slopes + t * width + d, mean * inverse_temperature, mask=d < width)


@triton.jit(do_not_specialize=["eps"])
def finish_rows(
    grad,
    rows,
    out,
    row_stride,
    num_rows,
    width,
    eps,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out = gradient of the rows from that of rows / max(|row|, eps)."""
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (v < num_rows) & (d < width)
    row = tl.load(rows + v * row_stride + d, mask=inside, other=0.0).to(tl.float32)
    value = normalized_backward(tl.load(grad + v * width + d, mask=inside, other=0.0), row, eps)
    tl.store(out + v * width + d, value.to(out.dtype.element_ty), mask=inside)
