"""Mixture-of-Logits scores of query and item pairs, and ranks and the k best by them, never all logits at once.

A query has P_Q components, an item P_X, and a pair P = P_Q * P_X logits, mixed by weights that depend on both:

    l[b, x, n * P_X + m] = <q[b, n], e[x, m]> / temperature
    g                    = g_q[b] * g_x[x] + g_qx          g_qx = SiLU(l w1 + b1) w2 + b2, or l w2 + b2 without w1
    w                    = g * sigmoid(g)                  "glu_silu"
                           g * sigmoid(layer_norm(g))      "glu_silu_ln"
                           g, with g_q + g_x + g_qx        "none"
    pi                   = softmax(w) over P               score[b, x] = sum over p of pi[p] * l[p]

from "Revisiting Neural Retrieval on Accelerators" (arXiv 2306.04039), section 4, and "Retrieval with Learned
Similarities" (arXiv 2407.15462), as the latter's public code computes it. A part of the gate that is absent is left
out. What depends on one side alone is the caller's to compute, once an item.

Kernels in Triton, blocks of PyTorch elsewhere, forward and back. Backward computes the forward again: once in PyTorch,
and once for each owner of gradients (queries, items, weights) in Triton, as each sums over another set of pairs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.mol_score import blocked, gpu, operator, reference
from ops.mol_score.arguments import COMBINATIONS, MoLDropout, MoLGate, MoLItems, MoLQueries, Operands, Settings
from ops.rank.checks import check_candidates, check_k, check_seen, check_targets

__all__ = [
    "MoLDropout",
    "MoLGate",
    "MoLItems",
    "MoLQueries",
    "mol_rank_of_target",
    "mol_score",
    "mol_score_with_mixture",
    "mol_topk",
]

_mol_score = Op(
    "mol_score",
    reference.mol_score,
    {
        "triton": Implementation(partial(operator.mol_score, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.mol_score, triton=False), blocked.refuses),
    },
)
_mol_rank_of_target = Op(
    "mol_rank_of_target",
    reference.mol_rank_of_target,
    {
        "triton": Implementation(partial(operator.mol_rank_of_target, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.mol_rank_of_target, triton=False), blocked.refuses),
    },
)
_mol_topk = Op(
    "mol_topk",
    reference.mol_topk,
    {
        "triton": Implementation(partial(operator.mol_topk, triton=True), gpu.topk_refuses),
        "cpu": Implementation(partial(operator.mol_topk, triton=False), blocked.refuses),
    },
)


def mol_score(
    queries: MoLQueries,
    items: MoLItems,
    gate: MoLGate,
    *,
    temperature: float,
    dropout: MoLDropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores (B, X) of every query with every item, or (B, R) with each query's own items, in the queries' dtype.

    Half precisions are computed in float32 and rounded once; on a GPU the logits and the hidden layer are rounded also
    where they enter a product with weights of half precision, and gradients where they enter one with operands of half
    precision. Every floating tensor gets its gradient. Beyond what they return both passes use memory for one block of
    pairs or, in Triton, for partial sums: in backward 256 of the gate's layers and 1,024 blocks of a side at most.
    Raises ValueError for shapes that do not fit, a temperature that is not positive, and a gate without any part.
    """
    o, s = _prepared(queries, items, gate, temperature, dropout, measure=False)
    scores: Tensor = _mol_score(o, s, backend=backend)[0]
    return scores


def mol_score_with_mixture(
    queries: MoLQueries,
    items: MoLItems,
    gate: MoLGate,
    *,
    temperature: float,
    dropout: MoLDropout | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores as `mol_score` gives them; the mean of pi over all pairs, (P,); and the mean of its entropy, ().

    pi is that after dropout, and an entropy -sum of pi * log(pi + 1e-6). A load-balancing loss is the mean entropy less
    the entropy of the mean. Both are float32 at least, and have gradients; they are 0 where there are no pairs. Triton
    keeps P + 1 partial sums for each of its tiles of 16 pairs or more.
    """
    o, s = _prepared(queries, items, gate, temperature, dropout, measure=True)
    scores, sums = _mol_score(o, s, backend=backend)
    means = sums / max(scores.numel(), 1)
    return scores, means[:-1], means[-1]


def mol_rank_of_target(
    queries: MoLQueries,
    items: MoLItems,
    gate: MoLGate,
    candidate_ids_X: Tensor,
    target_ids_B: Tensor,
    seen_offsets: Tensor,
    seen_ids_S: Tensor,
    *,
    temperature: float,
    filter_history: bool = True,
    backend: str | None = None,
) -> Tensor:
    """1-based rank of each query's target among the items, int64 (B,); 0 marks a miss. See `ops.rank.rank_of_target`.

    items: one a candidate, in the order of `candidate_ids_X`, which name them: int64, ascending, unique. No gradient.
    Raises ValueError as `mol_score` and `ops.rank` do.
    """
    o, s = _prepared(queries, items, gate, temperature, None, measure=False)
    _check_catalogue(o, candidate_ids_X, seen_offsets, seen_ids_S)
    check_targets(target_ids_B, len(o.q))
    seen = (seen_offsets, seen_ids_S) if filter_history else None
    with torch.no_grad():
        ranks_B: Tensor = _mol_rank_of_target(o, s, candidate_ids_X, target_ids_B, seen, backend=backend)
    return ranks_B


def mol_topk(
    queries: MoLQueries,
    items: MoLItems,
    gate: MoLGate,
    candidate_ids_X: Tensor,
    k: int,
    seen_offsets: Tensor,
    seen_ids_S: Tensor,
    *,
    temperature: float,
    filter_history: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, k), ids (B, k) and valid_count (B,) of the k best unseen items of each query. See `ops.rank.topk`.

    Arguments and errors as in `mol_rank_of_target`; k >= 1. Scores are float32 at least. No gradient.
    """
    o, s = _prepared(queries, items, gate, temperature, None, measure=False)
    _check_catalogue(o, candidate_ids_X, seen_offsets, seen_ids_S)
    check_k(k)
    seen = (seen_offsets, seen_ids_S) if filter_history else None
    with torch.no_grad():
        scores_BK, ids_BK, valid_B = _mol_topk(o, s, candidate_ids_X, k, seen, backend=backend)
    return scores_BK, ids_BK, valid_B


def _check_catalogue(o: Operands, candidate_ids_X: Tensor, seen_offsets: Tensor, seen_ids_S: Tensor) -> None:
    if not o.shared or candidate_ids_X.shape != (o.pairs[1],):
        got = f"{tuple(o.x.shape)} for candidate_ids {tuple(candidate_ids_X.shape)}"
        raise ValueError(f"mol items: got {got}, expected (X, P_X, D_P) and (X,)")
    check_candidates(candidate_ids_X)
    check_seen(seen_offsets, seen_ids_S, len(o.q))


def _prepared(
    queries: MoLQueries,
    items: MoLItems,
    gate: MoLGate,
    temperature: float,
    dropout: MoLDropout | None,
    *,
    measure: bool,
) -> tuple[Operands, Settings]:
    """What the implementations take, checked."""
    q, x = queries.components, items.components
    if q.dim() != 3 or x.dim() not in (3, 4) or x.shape[-1] != q.shape[2] or (x.dim() == 4 and x.shape[0] != len(q)):
        got = f"{tuple(q.shape)} and {tuple(x.shape)}"
        raise ValueError(f"mol components: got {got}, expected (B, P_Q, D_P) and (X, P_X, D_P) or (B, R, P_X, D_P)")
    if not (q.is_floating_point() and x.is_floating_point()):
        raise ValueError(f"mol components: got {q.dtype} and {x.dtype}, expected floating ones")
    if not temperature > 0.0:
        raise ValueError(f"mol temperature: got {temperature}, expected above 0")
    if gate.combination not in COMBINATIONS:
        raise ValueError(f"mol combination: got {gate.combination!r}, expected one of {', '.join(COMBINATIONS)}")
    o = Operands(q, x, queries.gate, items.gate, gate.w1, gate.b1, gate.w2, gate.b2, None)
    _check_gate(o)
    s = Settings(gate.combination, measure, temperature=temperature)
    if dropout is None or dropout.gate_rate == dropout.mixture_rate == 0.0:
        return o, s
    for name, rate in (("gate_rate", dropout.gate_rate), ("mixture_rate", dropout.mixture_rate)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"mol dropout {name}: got {rate}, expected 0 <= rate < 1")
    keys = torch.arange(len(q), device=q.device) if dropout.row_keys is None else dropout.row_keys
    if keys.dtype != torch.int64 or keys.shape != (len(q),):
        raise ValueError(f"mol dropout row_keys: got {keys.dtype} {tuple(keys.shape)}, expected int64 ({len(q)},)")
    s = s._replace(seed=dropout.seed, gate_rate=dropout.gate_rate, mixture_rate=dropout.mixture_rate)
    return o._replace(row_keys=keys), s


def _check_gate(o: Operands) -> None:
    width = o.num_logits
    if o.q_gate is None and o.x_gate is None and o.w2 is None:
        raise ValueError("mol gate: got no part, expected a gate of the queries, the items or the pairs")
    if o.w2 is None and (o.w1 is not None or o.b1 is not None or o.b2 is not None):
        raise ValueError("mol gate w2: got None beside other weights, expected (H, P) or, without w1, (P, P)")
    if o.w1 is None and o.b1 is not None:
        raise ValueError("mol gate w1: got None beside b1, expected (P, H)")
    hidden = width if o.w1 is None or o.w1.dim() != 2 else o.w1.shape[1]
    wanted = {
        "gate of the queries": (o.q_gate, (len(o.q), width)),
        "gate of the items": (o.x_gate, (*o.x.shape[:-2], width)),
        "gate w1": (o.w1, (width, hidden)),
        "gate b1": (o.b1, (hidden,)),
        "gate w2": (o.w2, (hidden, width)),
        "gate b2": (o.b2, (width,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ValueError(f"mol {name}: got {tensor.dtype} {tuple(tensor.shape)}, expected a floating {shape}")
