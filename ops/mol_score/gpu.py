"""Triton form of Mixture-of-Logits scores: allocates and launches.

Components and weights of half precision go to the tensor cores as they are, and so do the logits and the hidden layer,
rounded, where they meet such weights; sums are float32. float32 follows `torch.backends.cuda.matmul.allow_tf32`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops import triton_runtime
from ops.mol_score.arguments import DIFFERENTIABLE, Drop, Operands, Settings
from ops.random import drop_threshold
from ops.random.reference import seed_halves
from ops.rank.gpu import MAX_K
from ops.tuning import Table

_TABLE = Table("mol_score")
_MAX_LOGITS = 128
# In backward: of components, and where float32 takes more registers than there are.
_MAX_WIDTH = 128
_MAX_OWN_LOGITS = 64
# Blocks that CUDA takes on the second axis of a grid.
_MAX_SECOND_AXIS = 65_535
# The shortest side of a matrix product.
_MIN_SIDE = 16
# Programs that fill a GPU, blocks that one should at least walk, and partial sums of the layers' gradients at most.
_PROGRAMS = 1024
_MIN_BLOCKS = 8
_WORKERS = 256


class Grads(NamedTuple):
    """Where kernels write gradients, with one part a program or split in front, None for what they leave alone."""

    q: Tensor | None = None
    q_gate: Tensor | None = None
    x: Tensor | None = None
    x_gate: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None


class Model(NamedTuple):
    """Constants of a kernel. N, M, W: components of a query, of an item, and their width, padded to powers of two."""

    shared: bool
    combination: str
    query_parts: int
    item_parts: int
    num_logits: int
    width: int
    hidden: int
    N: int
    M: int
    W: int
    precision: str


def refuses(o: Operands | None = None, *_: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None; without arguments, about this machine."""
    reason = triton_runtime.refuses(*(o or ()))
    if reason is None and o is not None and _padded_logits(o) > _MAX_LOGITS:
        return f"{o.num_logits} logits, expected at most {_MAX_LOGITS} where components are padded to powers of two"
    if reason is None and o is not None and (blocks := _grid(o, _key(o))[1]) > _MAX_SECOND_AXIS:
        return f"{o.pairs} pairs in {blocks} blocks along the shorter side, expected at most {_MAX_SECOND_AXIS}"
    return reason


def backward_refuses(o: Operands) -> str | None:
    reason = refuses(o)
    if reason is None and o.q.shape[2] > _MAX_WIDTH:
        return f"components {o.q.shape[2]} wide, expected at most {_MAX_WIDTH}"
    if reason is None and not o.shared and _ieee(o) and _padded_logits(o) > _MAX_OWN_LOGITS:
        return f"{o.num_logits} logits of float32 with items of a query's own, expected at most {_MAX_OWN_LOGITS}"
    return reason


def topk_refuses(*args: Any) -> str | None:
    if len(args) > 3 and args[3] > MAX_K:
        return f"k = {args[3]}, expected at most {MAX_K}"
    return refuses(*args)


def _padded_parts(o: Operands) -> tuple[int, int]:
    """Components of a query and of an item, padded: two an item at least, which makes eight items 16 deep."""
    item_parts = max(triton_runtime.power_of_two(o.x.shape[-2]), 2)
    return max(triton_runtime.power_of_two(o.q.shape[1]), _MIN_SIDE // item_parts), item_parts


def _padded_logits(o: Operands) -> int:
    return math.prod(_padded_parts(o))


def _drop(o: Operands, s: Settings) -> Drop:
    def threshold(rate: float) -> int | None:
        return drop_threshold(rate) if rate > 0.0 else None

    rates = (s.gate_rate, s.mixture_rate)
    of_gate, of_mixture = ((threshold(rate), 1.0 / (1.0 - rate)) for rate in rates)
    return Drop(o.row_keys if any(rates) else None, *of_gate, *of_mixture)


def _model(o: Operands, s: Settings) -> Model:
    query_parts, item_parts = _padded_parts(o)
    return Model(
        shared=o.shared,
        combination=s.combination,
        query_parts=o.q.shape[1],
        item_parts=o.x.shape[-2],
        num_logits=o.num_logits,
        width=o.q.shape[2],
        hidden=0 if o.w1 is None else o.w1.shape[1],
        N=query_parts,
        M=item_parts,
        W=max(triton_runtime.power_of_two(o.q.shape[2]), _MIN_SIDE),
        precision=triton_runtime.precision(),
    )


def _half(o: Operands) -> bool:
    """One float32 operand makes products of float32."""
    return all(t is None or t.dtype != torch.float32 for t in o[:DIFFERENTIABLE])


def _ieee(o: Operands) -> bool:
    return not (_half(o) or torch.backends.cuda.matmul.allow_tf32)


def _key(o: Operands) -> dict[str, int]:
    """What selects a row of the tuning table."""
    size = 2 if _half(o) else 4
    return {"shared": int(o.shared), "ieee": int(_ieee(o)), "bytes": size, "logits": _padded_logits(o)}


def mol_score(o: Operands, s: Settings) -> tuple[Tensor, Tensor]:
    scores = torch.empty(o.pairs, dtype=o.q.dtype, device=o.q.device)
    return scores, score_into(scores, o, s)


def score_into(scores: Tensor, o: Operands, s: Settings) -> Tensor:
    """Writes the scores of all pairs, in whatever dtype `scores` has; returns `sums`, empty where not measured."""
    from ops.mol_score import kernels

    o = Operands.of(None if t is None else t.contiguous() for t in o)
    m = _model(o, s)
    key = _key(o)
    blocks = _grid(o, key)
    sums = scores.new_empty(math.prod(blocks), o.num_logits + 1, dtype=torch.float32) if s.measure else None
    triton_runtime.launch(
        kernels.mol_score,
        lambda config: blocks,
        *(o, _drop(o, s), scores, sums, 1.0 / s.temperature, *seed_halves(s.seed), *o.pairs),
        table=_TABLE,
        key=key,
        m=m,
    )
    return scores.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(dim=0)


def _grid(o: Operands, key: dict[str, int]) -> tuple[int, int]:
    """Blocks of the forward kernel on the two axes: the second is short on CUDA, so the longer side goes first."""
    of_queries, of_items = _blocks(o, "mol_score", key)
    return (of_items, of_queries) if o.shared else (of_queries, of_items)


def _blocks(o: Operands, kernel: str, key: dict[str, int]) -> tuple[int, int]:
    """Blocks of queries and of items."""
    rows = _TABLE.constant(kernel, key, "BLOCK_B") if o.shared else 1
    batch, items = o.pairs
    return -(-batch // rows), -(-items // _TABLE.constant(kernel, key, "BLOCK_X"))


def backward(grad_scores: Tensor, grad_sums: Tensor, o: Operands, s: Settings, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of the differentiable operands, an empty one for each that is absent or not wanted."""
    o = Operands.of(None if t is None else t.contiguous() for t in o)
    of_scores, of_sums = grad_scores.contiguous(), grad_sums.contiguous() if s.measure else None
    scale = _scale(o, of_scores, of_sums)
    if scale is not None:
        of_scores = of_scores.float() / scale
        of_sums = None if of_sums is None else of_sums / scale
    upstream = (of_scores, of_sums)
    q, x, q_gate, x_gate, *layers = wanted
    grads: dict[str, Tensor] = {}
    if q or q_gate or (not o.shared and (x or x_gate)):
        grads |= _of_side(o, s, *upstream, of_items=False)
    if o.shared and (x or x_gate):
        grads |= _of_side(o, s, *upstream, of_items=True)
    if any(layers):
        grads |= _of_layers(o, s, *upstream)
    if scale is not None:
        grads = {name: grad * scale for name, grad in grads.items()}
    found = zip(Operands._fields, o, wanted, strict=False)
    return [grads[name].to(t.dtype) if t is not None and w else o.q.new_empty(0) for name, t, w in found]


def _scale(o: Operands, grad_scores: Tensor, grad_sums: Tensor | None) -> Tensor | None:
    """What upstream gradients are divided by, and theirs multiplied with, where operands are float16.

    A mean over many pairs gives each a gradient below the numbers of float16, in which it meets the operands.
    """
    if all(t is None or t.dtype != torch.float16 for t in o[:DIFFERENTIABLE]) or grad_scores.numel() == 0:
        return None
    largest = grad_scores.abs().amax().float()
    if grad_sums is not None:
        largest = torch.maximum(largest, grad_sums.abs().amax().float())
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


def _parts(o: Operands, names: tuple[str, ...], parts: int) -> dict[str, Tensor]:
    """Buffers of `parts` partial sums of the gradients of those of the operands that there are."""
    found = {name: getattr(o, name) for name in names}
    return {name: t.new_empty(parts, *t.shape, dtype=torch.float32) for name, t in found.items() if t is not None}


def _summed(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[0] if len(t) == 1 else t.sum(dim=0) for name, t in parts.items()}


def _of_side(
    o: Operands, s: Settings, grad_scores: Tensor, grad_sums: Tensor | None, *, of_items: bool
) -> dict[str, Tensor]:
    """Gradients of the queries' operands, with those of items that are their own, or of the items'."""
    from ops.mol_score import kernels

    m = _model(o, s)
    key = _key(o) | {"width": m.W, "drop": int(o.row_keys is not None)}
    owned, others = _blocks(o, "backward", key)[:: -1 if of_items else 1]
    splits = min(-(-_PROGRAMS // max(owned, 1)), -(-others // _MIN_BLOCKS)) if o.shared else 1
    walk = -(-others // max(splits, 1))
    splits = -(-others // walk) if walk else 1
    parts = _parts(o, ("x", "x_gate") if of_items else ("q", "q_gate"), splits)
    own = {} if o.shared else {n: torch.empty_like(t) for n, t in (("x", o.x), ("x_gate", o.x_gate)) if t is not None}
    triton_runtime.launch(
        kernels.backward,
        lambda config: (owned, splits),
        *(
            o,
            _drop(o, s),
            Grads(**parts, **own),
            grad_scores,
            grad_sums,
            1.0 / s.temperature,
            *seed_halves(s.seed),
            *o.pairs,
            walk,
        ),
        table=_TABLE,
        key=key,
        m=m,
        OF_ITEMS=of_items,
    )
    return _summed(parts) | own


def _of_layers(o: Operands, s: Settings, grad_scores: Tensor, grad_sums: Tensor | None) -> dict[str, Tensor]:
    from ops.mol_score import kernels

    if o.w2 is None:
        return {}
    m = _model(o, s)
    key = _key(o)
    workers = max(min(math.prod(_blocks(o, "backward_layers", key)), _WORKERS), 1)
    parts = _parts(o, ("w1", "b1", "w2", "b2"), workers)
    triton_runtime.launch(
        kernels.backward_layers,
        lambda config: (workers, max(-(-m.hidden // config["BLOCK_H"]), 1)),
        *(o, _drop(o, s), Grads(**parts), grad_scores, grad_sums, 1.0 / s.temperature, *seed_halves(s.seed), *o.pairs),
        table=_TABLE,
        key=key,
        m=m,
    )
    return _summed(parts)
