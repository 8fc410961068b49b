"""`norm_mul_dropout` in Triton: a program holds whole slices of one group, (BLOCK_T, BLOCK_W), in registers.

Backward recomputes statistics and mask. A program of it walks `span` tokens and writes its own row of partial sums for
the gradients of weight and bias, so that these need no atomics.
"""

import triton
import triton.language as tl

from ops.dropout.kernels import is_dropped
from ops.random.kernels import token_hash


@triton.jit
def load_tile(x, stride, t, columns, inside):
    """x[t, columns] in float32, zero outside."""
    return tl.load(x + t[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(to, stride, t, columns, inside, values):
    place = t[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(to + place, values.to(to.dtype.element_ty), mask=inside)


@triton.jit
def standardize(y, inside, width, eps):
    """(y - mean) / deviation of each row, zero outside, and 1 / deviation."""
    mean = tl.sum(y, axis=1) / width
    centered = tl.where(inside, y - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered, axis=1) / width + eps)
    return tl.where(inside, centered * inverse[:, None], 0.0), inverse


@triton.jit
def affine(standardized, weight, bias, columns, inside):
    """standardized * weight + bias, either of which may be None."""
    normed = standardized
    if weight is not None:
        normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        normed += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return normed


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """act(u) and its derivative."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(u)
        return u * gate, gate * (1.0 + u * (1.0 - gate))
    elif ACTIVATION == "sigmoid":
        gate = tl.sigmoid(u)
        return gate, gate * (1.0 - gate)
    else:
        return u, tl.full(u.shape, 1.0, tl.float32)


@triton.jit
def drop(x, keys, t, lanes, tokens, low_seed, high_seed, threshold, scale):
    """x where kept, scaled, else 0: dropout and its own gradient; x itself where keys is None."""
    if keys is not None:
        token = token_hash(low_seed, high_seed, tl.load(keys + t, mask=t < tokens, other=0))
        dropped = is_dropped(token[:, None], lanes[None, :].to(tl.uint32), threshold)
        x = tl.where(dropped, 0.0, x * scale)
    return x


@triton.jit(do_not_specialize=["low_seed", "high_seed", "threshold", "scale", "eps"])
def norm_mul_dropout(
    y,
    u,
    weight,
    bias,
    keys,
    out,
    y_stride,
    u_stride,
    low_seed,
    high_seed,
    threshold,
    scale,
    eps,
    tokens,
    group_width,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes out, (tokens, width) or (tokens, 3 * width) without gaps, for one group of BLOCK_T tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.arange(0, BLOCK_W)
    columns = tl.program_id(1) * group_width + w
    width = tl.num_programs(1) * group_width
    inside = (t[:, None] < tokens) & (w[None, :] < group_width)
    y_tile = load_tile(y, y_stride, t, columns, inside)
    u_tile = load_tile(u, u_stride, t, columns, inside)
    standardized, _ = standardize(y_tile, inside, group_width, eps)
    normed = affine(standardized, weight, bias, columns, w < group_width)
    activated, _ = activate(u_tile, ACTIVATION)
    product = activated * normed
    if OUTPUT == "product":
        product = drop(product, keys, t, columns, tokens, low_seed, high_seed, threshold, scale)
        store_tile(out, width, t, columns, inside, product)
    else:
        middle = normed if OUTPUT == "concat_normed" else y_tile
        for segment in tl.static_range(3):
            lanes = segment * width + columns
            values = u_tile if segment == 0 else (middle if segment == 1 else product)
            values = drop(values, keys, t, lanes, tokens, low_seed, high_seed, threshold, scale)
            store_tile(out, 3 * width, t, lanes, inside, values)


@triton.jit(do_not_specialize=["low_seed", "high_seed", "threshold", "scale", "eps"])
def norm_mul_dropout_backward(
    grad,
    y,
    u,
    weight,
    bias,
    keys,
    grad_y,
    grad_u,
    weight_sums,
    bias_sums,
    grad_stride,
    y_stride,
    u_stride,
    low_seed,
    high_seed,
    threshold,
    scale,
    eps,
    tokens,
    span,
    group_width,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes grad_y and grad_u, (tokens, width), and row program_id(0) of the float32 sums that are not None."""
    w = tl.arange(0, BLOCK_W)
    columns = tl.program_id(1) * group_width + w
    width = tl.num_programs(1) * group_width
    weight_sum = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    bias_sum = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    first = tl.program_id(0) * span
    for start in range(first, first + span, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < tokens) & (w[None, :] < group_width)
        y_tile = load_tile(y, y_stride, t, columns, inside)
        u_tile = load_tile(u, u_stride, t, columns, inside)
        standardized, inverse = standardize(y_tile, inside, group_width, eps)
        activated, slope = activate(u_tile, ACTIVATION)

        # Of the product.
        lanes = columns if OUTPUT == "product" else 2 * width + columns
        upstream = load_tile(grad, grad_stride, t, lanes, inside)
        upstream = drop(upstream, keys, t, lanes, tokens, low_seed, high_seed, threshold, scale)
        grad_u_tile = upstream * slope * affine(standardized, weight, bias, columns, w < group_width)
        grad_normed = upstream * activated
        if OUTPUT != "product":
            upstream = load_tile(grad, grad_stride, t, columns, inside)
            grad_u_tile += drop(upstream, keys, t, columns, tokens, low_seed, high_seed, threshold, scale)
        store_tile(grad_u, width, t, columns, inside, grad_u_tile)

        if OUTPUT == "concat_normed":
            upstream = load_tile(grad, grad_stride, t, width + columns, inside)
            grad_normed += drop(upstream, keys, t, width + columns, tokens, low_seed, high_seed, threshold, scale)
        if weight_sums is not None:
            weight_sum += grad_normed * standardized
        if bias_sums is not None:
            bias_sum += grad_normed
        grad_standardized = affine(grad_normed, weight, None, columns, w < group_width)
        mean = tl.sum(grad_standardized, axis=1) / group_width
        along = tl.sum(grad_standardized * standardized, axis=1) / group_width
        grad_y_tile = inverse[:, None] * (grad_standardized - mean[:, None] - standardized * along[:, None])
        if OUTPUT == "concat_raw":
            upstream = load_tile(grad, grad_stride, t, width + columns, inside)
            grad_y_tile += drop(upstream, keys, t, width + columns, tokens, low_seed, high_seed, threshold, scale)
        store_tile(grad_y, width, t, columns, inside, grad_y_tile)

    place = tl.program_id(0).to(tl.int64) * width + columns
    if weight_sums is not None:
        tl.store(weight_sums + place, tl.sum(weight_sum, axis=0), mask=w < group_width)
    if bias_sums is not None:
        tl.store(bias_sums + place, tl.sum(bias_sum, axis=0), mask=w < group_width)
