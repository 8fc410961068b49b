"""Mixture-of-Logits scores over blocks of pairs, in PyTorch; any device. Backward computes each block's forward again.

No tensor over pairs and logits is larger than a block. The derivative is written out, operation by operation, since an
operator's implementation runs below autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.mol_score.arguments import DIFFERENTIABLE, Operands, Settings
from ops.mol_score.reference import EPS, LAYER_NORM_EPS, OF_GATE, OF_MIXTURE, Pairs, kept, score_pairs, sums

# Pairs a block: what stays in a processor's cache, and what fills a GPU.
_CPU_PAIRS, _GPU_PAIRS = 1 << 12, 1 << 17
# Items a block at most, so that several queries share them.
_ITEMS = 1024


def refuses(*_: Any) -> str | None:
    return None


def _blocks(o: Operands) -> Iterator[tuple[slice, slice]]:
    """Rows and items of each block."""
    batch, items = o.pairs
    columns = min(items, _ITEMS)
    pairs = _CPU_PAIRS if o.q.device.type == "cpu" else _GPU_PAIRS
    lines = max(pairs // max(columns, 1), 1)
    for row in range(0, batch, lines):
        for item in range(0, items, max(columns, 1)):
            yield slice(row, min(row + lines, batch)), slice(item, min(item + columns, items))


def mol_score(o: Operands, s: Settings) -> tuple[Tensor, Tensor]:
    scores = torch.empty(o.pairs, dtype=o.q.dtype, device=o.q.device)
    return scores, score_into(scores, o, s)


def score_into(scores: Tensor, o: Operands, s: Settings) -> Tensor:
    """Writes the scores of all pairs, in whatever dtype `scores` has; returns `sums`, empty where not measured."""
    dtype = o.compute_dtype
    total = o.q.new_zeros(o.num_logits + 1 if s.measure else 0, dtype=dtype)
    for rows, items in _blocks(o):
        pairs = score_pairs(o.block(rows, items).to(dtype), s, items.start)
        scores[rows, items] = pairs.scores
        if s.measure:
            total += sums(pairs.mixture)
    return total


def backward(grad_scores: Tensor, grad_sums: Tensor, o: Operands, s: Settings, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of the differentiable operands, an empty one for each that is absent or not wanted."""
    dtype = o.compute_dtype
    # A query's own items meet no other query: their gradient is written once and needs no wider dtype to add up in.
    own = () if o.shared else (1, 3)
    grads = [
        o.q.new_empty(0) if t is None else t.new_zeros(t.shape, dtype=t.dtype if i in own else dtype)
        for i, t in enumerate(o[:DIFFERENTIABLE])
    ]
    of_operands = Operands.of([*(None if t is None else g for t, g in zip(o, grads, strict=False)), None])
    for rows, items in _blocks(o):
        block = o.block(rows, items).to(dtype)
        pairs = score_pairs(block, s, items.start)
        parts = _pair_gradients(pairs, block, s, grad_scores[rows, items].to(dtype), grad_sums, items.start)
        for total, part in zip(of_operands.block(rows, items)[:DIFFERENTIABLE], parts, strict=True):
            if total is not None and part is not None:
                total += part
    found = zip(grads, o, wanted, strict=False)
    return [g.to(t.dtype) if t is not None and w else o.q.new_empty(0) for g, t, w in found]


def _pair_gradients(
    p: Pairs, o: Operands, s: Settings, grad_scores: Tensor, grad_sums: Tensor, first_item: int
) -> tuple[Tensor | None, ...]:
    """Gradients of a block's operands, in their order."""
    grad_logits = grad_scores[..., None] * p.mixture
    grad_mixture = grad_scores[..., None] * p.logits
    if s.measure:
        of_entropy = torch.log(p.mixture + EPS) + p.mixture / (p.mixture + EPS)
        grad_mixture = grad_mixture + grad_sums[:-1] - grad_sums[-1] * of_entropy
    grad_pi = _through_mixture_dropout(grad_mixture, p, o, s, first_item)
    grad_weights = p.pi * (grad_pi - (grad_pi * p.pi).sum(-1, keepdim=True))
    grad_g = _through_weights(grad_weights, p.g, s.combination)
    grad_q_gate, grad_x_gate = _of_sides(grad_g, o, s)
    grad_into_gate, *grad_layers = _through_layers(grad_g, p, o)
    if grad_into_gate is not None:
        if s.gate_rate > 0.0:
            grad_into_gate = grad_into_gate * _scaled_mask(o, s, s.gate_rate, OF_GATE, first_item)
        grad_logits = grad_logits + grad_into_gate
    grad_products = grad_logits.unflatten(2, (o.q.shape[1], -1)) / s.temperature
    grad_q = torch.einsum("bxnm,xmd->bnd" if o.shared else "bxnm,bxmd->bnd", grad_products, o.x)
    grad_x = torch.einsum("bxnm,bnd->xmd" if o.shared else "bxnm,bnd->bxmd", grad_products, o.q)
    return grad_q, grad_x, grad_q_gate, grad_x_gate, *grad_layers


def _scaled_mask(o: Operands, s: Settings, rate: float, which: int, first_item: int) -> Tensor:
    return kept(o, s, rate, which, first_item).to(o.q.dtype) * (1.0 / (1.0 - rate))


def _through_mixture_dropout(grad: Tensor, p: Pairs, o: Operands, s: Settings, first_item: int) -> Tensor:
    """From the mixture to pi: mixture = dropped / max(sum of dropped, eps)."""
    if s.mixture_rate == 0.0:
        return grad
    mask = _scaled_mask(o, s, s.mixture_rate, OF_MIXTURE, first_item)
    total = (p.pi * mask).sum(-1, keepdim=True)
    along = torch.where(total >= EPS, (grad * p.mixture).sum(-1, keepdim=True), 0.0)
    return (grad - along) / total.clamp_min(EPS) * mask


def _through_weights(grad: Tensor, g: Tensor, combination: str) -> Tensor:
    """From the softmax's argument to the gate."""
    if combination == "none":
        return grad
    if combination == "glu_silu":
        sigmoid = torch.sigmoid(g)
        return grad * sigmoid * (1.0 + g * (1.0 - sigmoid))
    centered = g - g.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centered.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    normed = centered * inverse
    sigmoid = torch.sigmoid(normed)
    of_normed = grad * g * sigmoid * (1.0 - sigmoid)
    along = (of_normed * normed).mean(-1, keepdim=True)
    return grad * sigmoid + inverse * (of_normed - of_normed.mean(-1, keepdim=True) - normed * along)


def _of_sides(grad_g: Tensor, o: Operands, s: Settings) -> tuple[Tensor | None, Tensor | None]:
    """Of the queries' and the items' parts of the gate."""
    of_q = of_x = grad_g
    if s.combination != "none" and o.q_gate is not None and o.x_gate is not None:
        of_q, of_x = grad_g * o.x_gate, grad_g * o.q_gate[:, None]
    return (
        None if o.q_gate is None else of_q.sum(dim=1),
        None if o.x_gate is None else of_x.sum(dim=0) if o.shared else of_x,
    )


def _through_layers(grad_g: Tensor, p: Pairs, o: Operands) -> tuple[Tensor | None, ...]:
    """From the pairs' part of the gate to the logits that entered it, w1, b1, w2 and b2."""
    if o.w2 is None:
        return (None,) * 5
    grad = grad_g.flatten(0, 1)
    into = p.into_gate.flatten(0, 1)
    grad_w1 = grad_b1 = None
    grad_b2 = None if o.b2 is None else grad.sum(dim=0)
    if o.w1 is None or p.pre is None:
        grad_w2 = into.T @ grad
        grad = grad @ o.w2.T
    else:
        pre = p.pre.flatten(0, 1)
        grad_w2 = F.silu(pre).T @ grad
        sigmoid = torch.sigmoid(pre)
        grad = grad @ o.w2.T * (sigmoid * (1.0 + pre * (1.0 - sigmoid)))
        grad_w1 = into.T @ grad
        grad_b1 = None if o.b1 is None else grad.sum(dim=0)
        grad = grad @ o.w1.T
    return grad.view_as(p.into_gate), grad_w1, grad_b1, grad_w2, grad_b2
