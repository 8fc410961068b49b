"""Mixture-of-Logits scores in plain PyTorch, all (B, X, P) logits at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.mol_score.arguments import Operands, Settings
from ops.random import drop_threshold, lane_bits, token_hash
from ops.rank import reference as rank
from ops.rank.checks import check_scores

# Of the sum by which dropped mixture weights are divided, and of the logarithm in their entropy (RAILS).
EPS = 1e-6
LAYER_NORM_EPS = 1e-5
# Which of a pair's two draws a dropout takes.
OF_GATE, OF_MIXTURE = 0, 1


class Pairs(NamedTuple):
    """What scoring computes for every pair, (B, X, P) but for hidden (B, X, H) and scores (B, X).

    into_gate is what of the logits enters the gate, pre the hidden layer before its SiLU, g the gate, pi the
    mixture weights, and mixture those after dropout.
    """

    logits: Tensor
    into_gate: Tensor
    pre: Tensor | None
    g: Tensor
    pi: Tensor
    mixture: Tensor
    scores: Tensor


def kept(o: Operands, s: Settings, rate: float, which: int, first_item: int) -> Tensor:
    """Whether each logit of each pair survives dropout: (B, X, P)."""
    assert o.row_keys is not None
    item_X = torch.arange(first_item, first_item + o.pairs[1], device=o.q.device)
    lanes_XP = (2 * item_X[:, None] + which) * o.num_logits + torch.arange(o.num_logits, device=o.q.device)
    return lane_bits(token_hash(s.seed, o.row_keys)[:, None, None], lanes_XP) >= drop_threshold(rate)


def _dropout(values: Tensor, o: Operands, s: Settings, rate: float, which: int, first_item: int) -> Tensor:
    if rate == 0.0:
        return values
    return torch.where(kept(o, s, rate, which, first_item), values * (1.0 / (1.0 - rate)), 0.0)


def gate(o: Operands, s: Settings, into_gate: Tensor) -> tuple[Tensor | None, Tensor]:
    """The hidden layer before its SiLU, None without one, and g."""
    parts = []
    pre = None
    if o.w2 is not None:
        hidden = into_gate
        if o.w1 is not None:
            pre = hidden @ o.w1 if o.b1 is None else hidden @ o.w1 + o.b1
            hidden = F.silu(pre)
        parts.append(hidden @ o.w2 if o.b2 is None else hidden @ o.w2 + o.b2)
    sides = [side for side in (None if o.q_gate is None else o.q_gate[:, None], o.x_gate) if side is not None]
    if s.combination != "none" and len(sides) == 2:
        sides = [sides[0] * sides[1]]
    g = sum(sides + parts)
    assert isinstance(g, Tensor)
    return pre, g.expand(into_gate.shape)


def weights(g: Tensor, combination: str) -> Tensor:
    """What the softmax is taken of."""
    if combination == "none":
        return g
    return g * torch.sigmoid(F.layer_norm(g, g.shape[-1:], eps=LAYER_NORM_EPS) if combination == "glu_silu_ln" else g)


def score_pairs(o: Operands, s: Settings, first_item: int = 0) -> Pairs:
    """Operands of one dtype; first_item: the place of the block's first item among all, for dropout."""
    products = torch.einsum("bnd,xmd->bxnm" if o.shared else "bnd,bxmd->bxnm", o.q, o.x)
    logits = products.flatten(2) / s.temperature
    into_gate = _dropout(logits, o, s, s.gate_rate, OF_GATE, first_item)
    pre, g = gate(o, s, into_gate)
    pi = torch.softmax(weights(g, s.combination), dim=-1)
    mixture = pi
    if s.mixture_rate > 0.0:
        mixture = _dropout(pi, o, s, s.mixture_rate, OF_MIXTURE, first_item)
        mixture = mixture / mixture.sum(-1, keepdim=True).clamp_min(EPS)
    return Pairs(logits, into_gate, pre, g, pi, mixture, (mixture * logits).sum(-1))


def sums(mixture: Tensor) -> Tensor:
    """(P + 1,): over all pairs, the sum of each mixture weight and that of the entropies."""
    entropy = -(mixture * torch.log(mixture + EPS)).sum()
    return torch.cat([mixture.sum(dim=(0, 1)), entropy[None]])


def mol_score(o: Operands, s: Settings, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scores in the queries' dtype and `sums`, empty where not measured. dtype: of every step, else `compute_dtype`."""
    pairs = score_pairs(o.to(dtype or o.compute_dtype), s)
    measured = sums(pairs.mixture) if s.measure else pairs.mixture.new_empty(0)
    return pairs.scores.to(o.q.dtype), measured


def mol_rank_of_target(
    o: Operands, s: Settings, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: rank.Seen
) -> Tensor:
    scores_BX = score_pairs(o.to(o.compute_dtype), s).scores
    check_scores(scores_BX)
    return rank.rank_by_scores(scores_BX, candidate_ids_X, target_ids_B, seen)


def mol_topk(
    o: Operands, s: Settings, candidate_ids_X: Tensor, k: int, seen: rank.Seen
) -> tuple[Tensor, Tensor, Tensor]:
    scores_BX = score_pairs(o.to(o.compute_dtype), s).scores
    check_scores(scores_BX)
    return rank.topk_by_scores(scores_BX, candidate_ids_X, k, seen)
