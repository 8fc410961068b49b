"""Mixture-of-Logits scores in Triton: all of a tile of pairs in one program, from components to score and back.

A tile is BLOCK_X items by BLOCK_B queries, its pairs running item first. One matrix product gives all its logits, rows
(item, component) by columns (query, component), which turn into [pairs, P]; two more are the gate's layers. P runs item
component first, both counts padded to powers of two, and every tensor over P is read in that order.

Backward computes a tile's forward again. Each sum over pairs has one owner and a fixed order: a program of `backward`
owns the gradients of a block of queries or of items and walks the other side; one of `backward_layers` owns a partial
sum of the layers' gradients over its share of the tiles.

`o`, `drop` and `m` are the named tuples of arguments.py and gpu.py; what is None there is known to be while compiling.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ops.mol_score.arguments import Drop
from ops.random.kernels import lane_bits, token_hash

_LAYER_NORM_EPS = tl.constexpr(1e-5)
_EPS = tl.constexpr(1e-6)


class Tile(NamedTuple):
    """Queries b and items x of a tile, the items' rows in memory; which there are; which logit each of P is."""

    b: Any
    x: Any
    item: Any
    in_b: Any
    in_x: Any
    p: Any
    in_p: Any


@triton.jit
def _repeated(values, COUNT: tl.constexpr):
    """Each value COUNT times in a row."""
    return tl.broadcast_to(values[:, None], [values.shape[0], COUNT]).reshape([values.shape[0] * COUNT])


@triton.jit
def _cycled(COUNT: tl.constexpr, TIMES: tl.constexpr):
    """0 to COUNT - 1, TIMES times over."""
    return tl.broadcast_to(tl.arange(0, COUNT)[None, :], [TIMES, COUNT]).reshape([TIMES * COUNT])


@triton.jit
def _component_places(rows, inside, PARTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Where the components of each row start, and which of them there are: [rows * PADDED]."""
    part = _cycled(PADDED, rows.shape[0])
    place = (_repeated(rows.to(tl.int64), PADDED) * PARTS + part) * WIDTH
    return place, _repeated(inside, PADDED) & (part < PARTS)


@triton.jit
def _load_columns(matrix, place, inside, start, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    d = start + tl.arange(0, BLOCK_D)
    return tl.load(matrix + place[:, None] + d[None, :], mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _alike(components, o):
    """Components as they are, but in float32 where those of queries and of items differ in dtype."""
    return components if o.q.dtype == o.x.dtype else components.to(tl.float32)


@triton.jit
def _products(o, t, m: tl.constexpr, BLOCK_D: tl.constexpr):
    """[item components, query components]: every product there is."""
    place_q, in_q = _component_places(t.b, t.in_b, m.query_parts, m.N, m.width)
    place_e, in_e = _component_places(t.item, t.in_x, m.item_parts, m.M, m.width)
    products = tl.zeros([place_e.shape[0], place_q.shape[0]], tl.float32)
    for start in tl.range(0, m.width, BLOCK_D, disable_licm=True):
        q = _alike(_load_columns(o.q, place_q, in_q, start, m.width, BLOCK_D), o)
        e = _alike(_load_columns(o.x, place_e, in_e, start, m.width, BLOCK_D), o)
        products = tl.dot(e, tl.trans(q), products, input_precision=m.precision)
    return products


@triton.jit
def _load_w1(o, t, start, m: tl.constexpr, BLOCK_H: tl.constexpr):
    h = start + tl.arange(0, BLOCK_H)
    inside = t.in_p[:, None] & (h < m.hidden)[None, :]
    return tl.load(o.w1 + t.p[:, None] * m.hidden + h[None, :], mask=inside, other=0.0)


@triton.jit
def _load_w2(o, t, start, m: tl.constexpr, BLOCK_H: tl.constexpr):
    h = start + tl.arange(0, BLOCK_H)
    inside = (h < m.hidden)[:, None] & t.in_p[None, :]
    return tl.load(o.w2 + h[:, None] * m.num_logits + t.p[None, :], mask=inside, other=0.0)


@triton.jit
def _load_square_w2(o, t, m: tl.constexpr):
    """w2 (P, P), where there is no hidden layer."""
    inside = t.in_p[:, None] & t.in_p[None, :]
    return tl.load(o.w2 + t.p[:, None] * m.num_logits + t.p[None, :], mask=inside, other=0.0)


@triton.jit
def _hidden(o, into, w1, start, m: tl.constexpr, BLOCK_H: tl.constexpr):
    """A piece of the hidden layer before its SiLU."""
    pre = tl.dot(into.to(w1.dtype), w1, input_precision=m.precision)
    if o.b1 is not None:
        h = start + tl.arange(0, BLOCK_H)
        pre += tl.load(o.b1 + h, mask=h < m.hidden, other=0.0).to(tl.float32)[None, :]
    return pre


@triton.jit
def _layers(o, into, t, m: tl.constexpr, BLOCK_H: tl.constexpr):
    """The pairs' part of the gate."""
    g = tl.zeros(into.shape, tl.float32)
    if o.w1 is not None:
        for start in tl.range(0, m.hidden, BLOCK_H, disable_licm=True):
            pre = _hidden(o, into, _load_w1(o, t, start, m, BLOCK_H), start, m, BLOCK_H)
            w2 = _load_w2(o, t, start, m, BLOCK_H)
            g = tl.dot((pre * tl.sigmoid(pre)).to(w2.dtype), w2, g, input_precision=m.precision)
    elif o.w2 is not None:
        w2 = _load_square_w2(o, t, m)
        g = tl.dot(into.to(w2.dtype), w2, g, input_precision=m.precision)
    if o.b2 is not None:
        g += tl.load(o.b2 + t.p, mask=t.in_p, other=0.0).to(tl.float32)[None, :]
    return g


@triton.jit
def _load_gate(gate, rows, inside, t, m: tl.constexpr):
    """One side's part of the gate, [rows, P]."""
    place = rows.to(tl.int64)[:, None] * m.num_logits + t.p[None, :]
    return tl.load(gate + place, mask=inside[:, None] & t.in_p[None, :], other=0.0).to(tl.float32)


@triton.jit
def _sides(o, t, m: tl.constexpr):
    """The queries' and the items' parts of the gate, [items, queries, P] or what broadcasts to it."""
    sides = tl.zeros([1, 1, t.p.shape[0]], tl.float32)
    if o.q_gate is not None:
        sides = _load_gate(o.q_gate, t.b, t.in_b, t, m)[None, :, :]
    if o.x_gate is not None:
        of_x = _load_gate(o.x_gate, t.item, t.in_x, t, m)[:, None, :]
        multiply: tl.constexpr = m.combination != "none" and o.q_gate is not None
        sides = sides * of_x if multiply else sides + of_x
    return sides


@triton.jit
def _normed(g, in_p, m: tl.constexpr):
    """Layer norm over P, and the inverse deviation."""
    centered = tl.where(in_p[None, :], g - (tl.sum(g, axis=1) / m.num_logits)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered, axis=1) / m.num_logits + _LAYER_NORM_EPS)[:, None]
    return centered * inverse, inverse


@triton.jit
def _softmax(g, in_p, m: tl.constexpr):
    """pi of the gate."""
    if m.combination == "glu_silu":
        g = g * tl.sigmoid(g)
    elif m.combination == "glu_silu_ln":
        normed, _ = _normed(g, in_p, m)
        g = g * tl.sigmoid(normed)
    g = tl.where(in_p[None, :], g, float("-inf"))
    pi = tl.exp(g - tl.max(g, axis=1)[:, None])
    return pi / tl.sum(pi, axis=1)[:, None]


@triton.jit
def _kept(drop, t, which, threshold, m: tl.constexpr):
    """Which logits survive dropout: [pairs, P]."""
    tokens = token_hash(drop.low_seed, drop.high_seed, tl.load(drop.row_keys + t.b, mask=t.in_b, other=0))
    lanes = (2 * t.x + which)[:, None] * m.num_logits + t.p[None, :]
    bits = lane_bits(tokens[None, :, None], lanes.to(tl.uint32)[:, None, :])
    return (bits.to(tl.int64) >= threshold).reshape([t.x.shape[0] * t.b.shape[0], t.p.shape[0]])


@triton.jit
def _seeded(drop, low_seed, high_seed):
    return Drop(
        drop.row_keys,
        drop.gate_threshold,
        drop.gate_scale,
        drop.mixture_threshold,
        drop.mixture_scale,
        low_seed,
        high_seed,
    )


@triton.jit
def _lanes(m: tl.constexpr):
    """Which logit each of P is, and which there are."""
    p = tl.arange(0, m.N * m.M)
    in_p = p < m.num_logits
    if m.item_parts != m.M:
        part_n = p // m.M
        part_m = p % m.M
        in_p = (part_n < m.query_parts) & (part_m < m.item_parts)
        p = part_n * m.item_parts + part_m
    return p, in_p


@triton.jit
def _tile(block_b, block_x, batch, items, m: tl.constexpr, ROWS: tl.constexpr, BLOCK_X: tl.constexpr):
    b = block_b * ROWS + tl.arange(0, ROWS)
    x = block_x * BLOCK_X + tl.arange(0, BLOCK_X)
    item = x.to(tl.int64)
    if not m.shared:
        tl.static_assert(ROWS == 1)
        item += block_b.to(tl.int64) * items
    p, in_p = _lanes(m)
    return Tile(b, x, item, b < batch, x < items, p, in_p)


@triton.jit
def _by_pair(products, t, m: tl.constexpr):
    """[item components, query components] as [pairs, P]."""
    ROWS: tl.constexpr = t.b.shape[0]
    BLOCK_X: tl.constexpr = t.x.shape[0]
    return products.reshape([BLOCK_X, m.M, ROWS, m.N]).permute([0, 2, 3, 1]).reshape([BLOCK_X * ROWS, m.N * m.M])


@triton.jit
def _by_component(logits, t, m: tl.constexpr):
    """[pairs, P] as [item components, query components]."""
    ROWS: tl.constexpr = t.b.shape[0]
    BLOCK_X: tl.constexpr = t.x.shape[0]
    return logits.reshape([BLOCK_X, ROWS, m.N, m.M]).permute([0, 3, 1, 2]).reshape([BLOCK_X * m.M, ROWS * m.N])


@triton.jit
def _inside(t):
    """Which pairs there are, [items, queries]."""
    return t.in_x[:, None] & t.in_b[None, :]


@triton.jit
def _forward(o, drop, inverse_temperature, t, m: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a tile, each [pairs, P]: logits, what of them enters the gate, the gate, and pi."""
    logits = _by_pair(_products(o, t, m, BLOCK_D) * inverse_temperature, t, m)
    into = logits
    if drop.gate_threshold is not None:
        into = tl.where(_kept(drop, t, 0, drop.gate_threshold, m), logits * drop.gate_scale, 0.0)
    g = _layers(o, into, t, m, BLOCK_H).reshape([t.x.shape[0], t.b.shape[0], t.p.shape[0]])
    g = (g + _sides(o, t, m)).reshape(logits.shape)
    return logits, into, g, _softmax(g, t.in_p, m)


@triton.jit
def _mixture(drop, pi, t, m: tl.constexpr):
    """pi after dropout; what it was divided by, and what it was multiplied by before, both 1 without dropout."""
    mixture = pi
    total = tl.full([pi.shape[0], 1], 1.0, tl.float32)
    factor = tl.full([1, 1], 1.0, tl.float32)
    if drop.mixture_threshold is not None:
        factor = tl.where(_kept(drop, t, 1, drop.mixture_threshold, m), drop.mixture_scale, 0.0)
        total = tl.sum(pi * factor, axis=1)[:, None]
        mixture = pi * factor / tl.maximum(total, _EPS)
    return mixture, total, factor


@triton.jit(do_not_specialize=["inverse_temperature", "low_seed", "high_seed", "batch", "items"])
def mol_score(
    o,
    drop,
    out,
    sums,
    inverse_temperature,
    low_seed,
    high_seed,
    batch,
    items,
    m: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[b, x]: scores; sums[program, :]: over its pairs, each mixture weight and, last, the entropy."""
    drop = _seeded(drop, low_seed, high_seed)
    # Queries that share no items come one at a time.
    ROWS: tl.constexpr = BLOCK_B if m.shared else 1
    # The longer side stands on the first axis: the second ends at 65,535 blocks.
    block_b = tl.program_id(1) if m.shared else tl.program_id(0)
    block_x = tl.program_id(0) if m.shared else tl.program_id(1)
    t = _tile(block_b, block_x, batch, items, m, ROWS, BLOCK_X)
    logits, _, _, pi = _forward(o, drop, inverse_temperature, t, m, BLOCK_D, BLOCK_H)
    mixture, _, _ = _mixture(drop, pi, t, m)
    scores = tl.sum(mixture * logits, axis=1).reshape([BLOCK_X, ROWS])
    place = t.b.to(tl.int64)[None, :] * items + t.x[:, None]
    tl.store(out + place, scores.to(out.dtype.element_ty), mask=_inside(t))
    if sums is not None:
        counted = tl.where(_inside(t).reshape([BLOCK_X * ROWS, 1]), mixture, 0.0)
        row = sums + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (m.num_logits + 1)
        tl.store(row + t.p, tl.sum(counted, axis=0), mask=t.in_p)
        tl.store(row + m.num_logits, -tl.sum(counted * tl.log(counted + _EPS)))


@triton.jit
def _through_weights(grad, g, in_p, m: tl.constexpr):
    """From what the softmax is taken of to the gate."""
    if m.combination == "glu_silu":
        sigmoid = tl.sigmoid(g)
        grad = grad * sigmoid * (1.0 + g * (1.0 - sigmoid))
    elif m.combination == "glu_silu_ln":
        normed, inverse = _normed(g, in_p, m)
        sigmoid = tl.sigmoid(normed)
        of_normed = grad * g * sigmoid * (1.0 - sigmoid)
        mean = tl.sum(of_normed, axis=1)[:, None] / m.num_logits
        along = tl.sum(of_normed * normed, axis=1)[:, None] / m.num_logits
        grad = tl.where(in_p[None, :], grad * sigmoid + inverse * (of_normed - mean - normed * along), 0.0)
    return grad


@triton.jit
def _backward(
    o,
    drop,
    grad_scores,
    grad_sums,
    inverse_temperature,
    items,
    t,
    m: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Of a tile, each [pairs, P]: what entered the gate, the gradient of the gate, and that of the logits but for what
    comes through the gate."""
    logits, into, g, pi = _forward(o, drop, inverse_temperature, t, m, BLOCK_D, BLOCK_H)
    mixture, total, factor = _mixture(drop, pi, t, m)
    place = t.b.to(tl.int64)[None, :] * items + t.x[:, None]
    upstream = tl.load(grad_scores + place, mask=_inside(t), other=0.0).to(tl.float32).reshape(total.shape)
    grad = upstream * logits
    if grad_sums is not None:
        of_weights = tl.load(grad_sums + t.p, mask=t.in_p, other=0.0)[None, :]
        of_entropy = tl.load(grad_sums + m.num_logits) * (tl.log(mixture + _EPS) + mixture / (mixture + _EPS))
        grad += tl.where(_inside(t).reshape(total.shape), of_weights - of_entropy, 0.0)
    if drop.mixture_threshold is not None:
        along = tl.where(total >= _EPS, tl.sum(grad * mixture, axis=1)[:, None], 0.0)
        grad = (grad - along) / tl.maximum(total, _EPS) * factor
    grad = pi * (grad - tl.sum(grad * pi, axis=1)[:, None])
    return into, _through_weights(grad, g, t.in_p, m), upstream * mixture


@triton.jit
def _through_silu(grad, pre):
    sigmoid = tl.sigmoid(pre)
    return grad * sigmoid * (1.0 + pre * (1.0 - sigmoid))


@triton.jit
def _through_layers(o, drop, into, grad_g, t, m: tl.constexpr, BLOCK_H: tl.constexpr):
    """From the gate to the logits."""
    grad = tl.zeros(into.shape, tl.float32)
    if o.w1 is not None:
        for start in tl.range(0, m.hidden, BLOCK_H, disable_licm=True):
            w1 = _load_w1(o, t, start, m, BLOCK_H)
            w2 = _load_w2(o, t, start, m, BLOCK_H)
            grad_hidden = tl.dot(grad_g.to(w2.dtype), tl.trans(w2), input_precision=m.precision)
            grad_pre = _through_silu(grad_hidden, _hidden(o, into, w1, start, m, BLOCK_H))
            grad = tl.dot(grad_pre.to(w1.dtype), tl.trans(w1), grad, input_precision=m.precision)
    elif o.w2 is not None:
        w2 = _load_square_w2(o, t, m)
        grad = tl.dot(grad_g.to(w2.dtype), tl.trans(w2), grad, input_precision=m.precision)
    if drop.gate_threshold is not None:
        grad = tl.where(_kept(drop, t, 0, drop.gate_threshold, m), grad * drop.gate_scale, 0.0)
    return grad


@triton.jit
def _store_columns(grad, place, inside, start, values, WIDTH: tl.constexpr):
    d = start + tl.arange(0, values.shape[1])
    mask = inside[:, None] & (d < WIDTH)[None, :]
    tl.store(grad + place[:, None] + d[None, :], values.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _store_gate(grad, rows, inside, values, t, m: tl.constexpr):
    place = rows.to(tl.int64)[:, None] * m.num_logits + t.p[None, :]
    tl.store(grad + place, values.to(grad.dtype.element_ty), mask=inside[:, None] & t.in_p[None, :])


@triton.jit
def _spread(grad_products, place, inside):
    """The columns of grad_products and the components they are of, with zeros between to make a product 16 deep."""
    COLUMNS: tl.constexpr = place.shape[0]
    if COLUMNS < 16:
        TIMES: tl.constexpr = 16 // COLUMNS
        first = (tl.arange(0, TIMES) == 0)[None, None, :]
        grad_products = tl.where(first, grad_products[:, :, None], 0.0).reshape([grad_products.shape[0], 16])
        place = _repeated(place, TIMES)
        inside = _repeated(inside, TIMES)
    return grad_products, place, inside


@triton.jit
def _gate_of_items(o, grad_g, t, m: tl.constexpr):
    """A tile's gradient of the items' part of the gate, [items, P]."""
    if m.combination != "none" and o.q_gate is not None:
        grad_g = grad_g * _load_gate(o.q_gate, t.b, t.in_b, t, m)[None, :, :]
    return tl.sum(grad_g, axis=1)


@triton.jit
def _add_to_items(acc, o, grad_products, t, m: tl.constexpr):
    """acc and a tile's gradients of the items' components, [item components, W]."""
    place, inside = _component_places(t.b, t.in_b, m.query_parts, m.N, m.width)
    grad_products, place, inside = _spread(grad_products, place, inside)
    q = _alike(_load_columns(o.q, place, inside, 0, m.width, m.W), o)
    return tl.dot(grad_products.to(q.dtype), q, acc, input_precision=m.precision)


@triton.jit
def _store_own_items(grads, o, grad_products, grad_g, t, m: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile's gradients of items that are one query's own."""
    place_e, in_e = _component_places(t.item, t.in_x, m.item_parts, m.M, m.width)
    place, inside = _component_places(t.b, t.in_b, m.query_parts, m.N, m.width)
    grad_products, place, inside = _spread(grad_products, place, inside)
    for start in tl.range(0, m.width, BLOCK_D, disable_licm=True):
        q = _alike(_load_columns(o.q, place, inside, start, m.width, BLOCK_D), o)
        values = tl.dot(grad_products.to(q.dtype), q, input_precision=m.precision)
        _store_columns(grads.x, place_e, in_e, start, values, m.width)
    if grads.x_gate is not None:
        _store_gate(grads.x_gate, t.item, t.in_x, _gate_of_items(o, grad_g, t, m), t, m)


@triton.jit
def _add_to_queries(acc, o, grad_products, t, m: tl.constexpr):
    """acc and a tile's gradients of the queries' components, [query components, W]."""
    place, inside = _component_places(t.item, t.in_x, m.item_parts, m.M, m.width)
    e = _alike(_load_columns(o.x, place, inside, 0, m.width, m.W), o)
    return tl.dot(tl.trans(grad_products).to(e.dtype), e, acc, input_precision=m.precision)


@triton.jit
def _gate_of_queries(o, grad_g, t, m: tl.constexpr):
    """A tile's gradient of the queries' part of the gate, [queries, P]."""
    if m.combination != "none" and o.x_gate is not None:
        grad_g = grad_g * _load_gate(o.x_gate, t.item, t.in_x, t, m)[:, None, :]
    return tl.sum(grad_g, axis=0)


@triton.jit(do_not_specialize=["inverse_temperature", "low_seed", "high_seed", "batch", "items", "walk"])
def backward(
    o,
    drop,
    grads,
    grad_scores,
    grad_sums,
    inverse_temperature,
    low_seed,
    high_seed,
    batch,
    items,
    walk,
    m: tl.constexpr,
    OF_ITEMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grads[split, ...] of one side's components and part of the gate, summed over a split of the other side.

    A program owns a block of the side and walks `walk` blocks of the other. Items that belong to one query meet no
    other: where queries are walked for, theirs are written on the way.
    """
    drop = _seeded(drop, low_seed, high_seed)
    ROWS: tl.constexpr = BLOCK_B if m.shared else 1
    P: tl.constexpr = m.N * m.M
    W: tl.constexpr = m.W
    split = tl.program_id(1)
    owned = tl.program_id(0)
    if OF_ITEMS:
        blocks = tl.cdiv(batch, ROWS)
        acc = tl.zeros([BLOCK_X * m.M, W], tl.float32)
        gate_acc = tl.zeros([BLOCK_X, P], tl.float32)
    else:
        blocks = tl.cdiv(items, BLOCK_X)
        acc = tl.zeros([ROWS * m.N, W], tl.float32)
        gate_acc = tl.zeros([ROWS, P], tl.float32)
    for other in tl.range(split * walk, tl.minimum((split + 1) * walk, blocks), disable_licm=True):
        t = _tile(other if OF_ITEMS else owned, owned if OF_ITEMS else other, batch, items, m, ROWS, BLOCK_X)
        into, grad_g, grad_logits = _backward(
            o, drop, grad_scores, grad_sums, inverse_temperature, items, t, m, BLOCK_D, BLOCK_H
        )
        grad_logits += _through_layers(o, drop, into, grad_g, t, m, BLOCK_H)
        grad_products = _by_component(grad_logits * inverse_temperature, t, m)
        grad_g = grad_g.reshape([BLOCK_X, ROWS, P])
        if OF_ITEMS:
            acc = _add_to_items(acc, o, grad_products, t, m)
            gate_acc += _gate_of_items(o, grad_g, t, m)
        else:
            acc = _add_to_queries(acc, o, grad_products, t, m)
            gate_acc += _gate_of_queries(o, grad_g, t, m)
            if not m.shared:
                _store_own_items(grads, o, grad_products, grad_g, t, m, BLOCK_D)
    if OF_ITEMS:
        t = _tile(0, owned, batch, items, m, ROWS, BLOCK_X)
        row = t.item + split.to(tl.int64) * items
        place, inside = _component_places(row, t.in_x, m.item_parts, m.M, m.width)
        _store_columns(grads.x, place, inside, 0, acc, m.width)
        if grads.x_gate is not None:
            _store_gate(grads.x_gate, row, t.in_x, gate_acc, t, m)
    else:
        t = _tile(owned, 0, batch, items, m, ROWS, BLOCK_X)
        row = t.b + split.to(tl.int64) * batch
        place, inside = _component_places(row, t.in_b, m.query_parts, m.N, m.width)
        _store_columns(grads.q, place, inside, 0, acc, m.width)
        if grads.q_gate is not None:
            _store_gate(grads.q_gate, row, t.in_b, gate_acc, t, m)


@triton.jit(do_not_specialize=["inverse_temperature", "low_seed", "high_seed", "batch", "items"])
def backward_layers(
    o,
    drop,
    grads,
    grad_scores,
    grad_sums,
    inverse_temperature,
    low_seed,
    high_seed,
    batch,
    items,
    m: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grads[worker, ...] of the layers: a program sums a piece of the hidden layer over every so many tiles."""
    drop = _seeded(drop, low_seed, high_seed)
    ROWS: tl.constexpr = BLOCK_B if m.shared else 1
    P: tl.constexpr = m.N * m.M
    worker = tl.program_id(0)
    start = tl.program_id(1) * BLOCK_H
    grad_w1 = tl.zeros([P, BLOCK_H], tl.float32)
    grad_b1 = tl.zeros([BLOCK_H], tl.float32)
    grad_w2 = tl.zeros([BLOCK_H if o.w1 is not None else P, P], tl.float32)
    grad_b2 = tl.zeros([P], tl.float32)
    across = tl.cdiv(batch, ROWS)
    for tile in tl.range(worker, across * tl.cdiv(items, BLOCK_X), tl.num_programs(0), disable_licm=True):
        t = _tile(tile % across, tile // across, batch, items, m, ROWS, BLOCK_X)
        into, grad_g, _ = _backward(o, drop, grad_scores, grad_sums, inverse_temperature, items, t, m, BLOCK_D, BLOCK_H)
        grad_b2 += tl.sum(grad_g, axis=0)
        if o.w1 is not None:
            w1 = _load_w1(o, t, start, m, BLOCK_H)
            w2 = _load_w2(o, t, start, m, BLOCK_H)
            pre = _hidden(o, into, w1, start, m, BLOCK_H)
            hidden = pre * tl.sigmoid(pre)
            to_w2 = grad_g.to(w2.dtype)
            grad_w2 = tl.dot(tl.trans(hidden).to(w2.dtype), to_w2, grad_w2, input_precision=m.precision)
            grad_pre = _through_silu(tl.dot(to_w2, tl.trans(w2), input_precision=m.precision), pre)
            grad_w1 = tl.dot(tl.trans(into).to(w1.dtype), grad_pre.to(w1.dtype), grad_w1, input_precision=m.precision)
            grad_b1 += tl.sum(grad_pre, axis=0)
        else:
            dtype: tl.constexpr = o.w2.dtype.element_ty
            grad_w2 = tl.dot(tl.trans(into).to(dtype), grad_g.to(dtype), grad_w2, input_precision=m.precision)
    p, in_p = _lanes(m)
    h = start + tl.arange(0, BLOCK_H)
    in_h = h < m.hidden
    if o.w1 is not None:
        place = worker.to(tl.int64) * m.num_logits * m.hidden + p[:, None] * m.hidden + h[None, :]
        tl.store(grads.w1 + place, grad_w1, mask=in_p[:, None] & in_h[None, :])
        place = worker.to(tl.int64) * m.num_logits * m.hidden + h[:, None] * m.num_logits + p[None, :]
        tl.store(grads.w2 + place, grad_w2, mask=in_h[:, None] & in_p[None, :])
    else:
        place = worker.to(tl.int64) * m.num_logits * m.num_logits + p[:, None] * m.num_logits + p[None, :]
        tl.store(grads.w2 + place, grad_w2, mask=in_p[:, None] & in_p[None, :])
    if o.b1 is not None:
        tl.store(grads.b1 + worker * m.hidden + h, grad_b1, mask=in_h)
    if o.b2 is not None:
        tl.store(grads.b2 + worker * m.num_logits + p, grad_b2, mask=in_p & (tl.program_id(1) == 0))
