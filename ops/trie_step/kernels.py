"""Scores of legal children in Triton: a program a beam, which normalizes its row of logits and writes its children."""

import triton
import triton.language as tl

from ops.rank.kernels import packed


@triton.jit
def add_exponentials(largest, total, values):
    """Per slot: the largest value so far and the sum of exponentials relative to it. -inf adds nothing."""
    larger = tl.maximum(largest, values)
    # A slot that has seen nothing but -inf has no value to be relative to.
    base = tl.where(larger > float("-inf"), larger, 0.0)
    return larger, total * tl.exp(largest - base) + tl.exp(values - base)


@triton.jit
def children(tokens, allowed, row, first, count, j):
    """Logits of the children j of a beam, in float32, and whether each of them is legal."""
    legal = j < count
    if allowed is not None:
        legal = legal & (tl.load(allowed + first + j, mask=legal, other=0) != 0)
    token = tl.load(tokens + first + j, mask=legal, other=0)
    return tl.load(row + token, mask=legal, other=float("-inf")).to(tl.float32), legal


@triton.jit(do_not_specialize=["beams", "codes", "states_count", "most_children"])
def child_keys(
    logits,
    states,
    scores,
    offsets,
    tokens,
    allowed,
    keys,
    request_stride,
    beam_stride,
    allowed_stride,
    beams,
    codes,
    states_count,
    most_children,
    NORMALIZATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys[b, m, j]: child j of the beam as a packed key of its score and its place m * most_children + j."""
    place = tl.program_id(0).to(tl.int64)
    b = place // beams
    m = place % beams
    slot = tl.arange(0, BLOCK)
    state = tl.load(states + place)
    score = tl.load(scores + place).to(tl.float32)
    alive = (state >= 0) & (state < states_count) & (score > float("-inf"))
    first = tl.load(offsets + state, mask=alive, other=0)
    count = tl.load(offsets + state + 1, mask=alive, other=0) - first
    row = logits + b * request_stride + m * beam_stride
    if allowed is not None:
        allowed += b * allowed_stride

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if NORMALIZATION == "vocabulary":
        for start in range(0, codes, BLOCK):
            c = start + slot
            values = tl.load(row + c, mask=c < codes, other=float("-inf")).to(tl.float32)
            largest, total = add_exponentials(largest, total, values)
    if NORMALIZATION == "legal":
        for start in range(0, count, BLOCK):
            values, legal = children(tokens, allowed, row, first, count, start + slot)
            largest, total = add_exponentials(largest, total, values)
    base = 0.0
    rest = 0.0
    if NORMALIZATION != "none":
        top = tl.max(largest, 0)
        base = tl.where(top > float("-inf"), top, 0.0)
        whole = tl.sum(total * tl.exp(largest - base), 0)
        rest = tl.where(top > float("-inf"), tl.log(tl.where(top > float("-inf"), whole, 1.0)), 0.0)

    for start in range(0, most_children, BLOCK):
        j = start + slot
        values, legal = children(tokens, allowed, row, first, count, j)
        key = packed((values - base) - rest + score, m * most_children + j, legal)
        tl.store(keys + place * most_children + j, key, mask=j < most_children)
