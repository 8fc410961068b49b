"""One level of a search over a trie: the exact k best among all legal children of all beams.

    score[b, m, c] = scores[b, m] + log p(c | beam m)      c: a child of states[b, m] that is allowed

p is the softmax over the level's whole vocabulary, the one over the legal children alone, or taken as given. Every
legal child of every beam takes part; nothing is chosen per beam beforehand, as in STATIC (arXiv 2602.22647, section 4),
which loses prefixes that belong to the k best. Also returned is the best score left out, from which a search can prove
its result.

A level of a trie is two int32 tensors: `tokens_E` are the codes of its nodes, sorted within a parent, and the children
of state s are the nodes `offsets_S[s]` to `offsets_S[s + 1]`; a node's number is the state after it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.trie_step import cpu, gpu, operator, reference

__all__ = ["NORMALIZATIONS", "TrieStep", "trie_step"]

NORMALIZATIONS = ("vocabulary", "legal", "none")

_trie_step = Op(
    "trie_step",
    reference.trie_step,
    {
        "triton": Implementation(partial(operator.trie_step, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.trie_step, triton=False), cpu.refuses),
    },
)


class TrieStep(NamedTuple):
    """The k best children of each request, best first; slots from `count_B` on hold score -inf and -1 elsewhere.

    scores_BK: float32, float64 where an input is. parents_BK: the beam a child comes from; tokens_BK: its code;
    states_BK: its node; all int64. count_B: int64. pruned_B: score of the (k + 1)-th best child, -inf if there is none.
    """

    scores_BK: Tensor
    parents_BK: Tensor
    tokens_BK: Tensor
    states_BK: Tensor
    count_B: Tensor
    pruned_B: Tensor


def trie_step(
    logits_BMC: Tensor,
    states_BM: Tensor,
    scores_BM: Tensor,
    offsets_S: Tensor,
    tokens_E: Tensor,
    k: int,
    *,
    normalization: str = "vocabulary",
    allowed: Tensor | None = None,
    most_children: int | None = None,
    backend: str | None = None,
) -> TrieStep:
    """The k best legal children of each request's M beams. No gradient, and nothing waits for a device.

    logits_BMC: floats; states_BM: int64, -1 for none; scores_BM: floats. A beam with state -1 or score -inf has no
    children. offsets_S: (states + 1,), tokens_E: codes in 0 to C - 1, both int32. allowed: bool (E,) or (B, E), nodes
    that may be chosen. normalization: see NORMALIZATIONS; "none" adds the logits as they are, which fits log
    probabilities. most_children: no state has more, by default C; a smaller number saves memory on a GPU.

    Equal scores go to the lower parent, then to the lower token. Children whose score is -inf or NaN are left out. Two
    scores that differ by less than rounding may be ordered otherwise by another back-end. k may be any number.

    Raises ValueError for shapes or dtypes that do not fit, IndexError for a state that is not there; a GPU would have
    to be waited for: there such a beam has no children.
    """
    _check(logits_BMC, states_BM, scores_BM, offsets_S, tokens_E)
    batch, _, codes = logits_BMC.shape
    if k < 1:
        raise ValueError(f"trie_step k: got {k}, expected at least 1")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"trie_step normalization: got {normalization!r}, expected one of {', '.join(NORMALIZATIONS)}")
    edges = tokens_E.shape[0]
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape not in ((edges,), (batch, edges))):
        got = f"{allowed.dtype} {tuple(allowed.shape)}"
        raise ValueError(f"trie_step allowed: got {got}, expected bool ({edges},) or ({batch}, {edges})")
    widest = codes if most_children is None else min(most_children, codes)
    with torch.no_grad():
        return TrieStep(
            *_trie_step(
                *(logits_BMC, states_BM, scores_BM, offsets_S, tokens_E, allowed, k, normalization, widest),
                backend=backend,
            )
        )


def _check(logits_BMC: Tensor, states_BM: Tensor, scores_BM: Tensor, offsets_S: Tensor, tokens_E: Tensor) -> None:
    if logits_BMC.dim() != 3 or not logits_BMC.is_floating_point():
        raise ValueError(
            f"trie_step logits: got {logits_BMC.dtype} {tuple(logits_BMC.shape)}, expected floats (B, M, C)"
        )
    beams = logits_BMC.shape[:2]
    if states_BM.shape != beams or states_BM.dtype != torch.int64:
        got = f"{states_BM.dtype} {tuple(states_BM.shape)}"
        raise ValueError(f"trie_step states: got {got}, expected int64 {tuple(beams)}")
    if scores_BM.shape != beams or not scores_BM.is_floating_point():
        got = f"{scores_BM.dtype} {tuple(scores_BM.shape)}"
        raise ValueError(f"trie_step scores: got {got}, expected floats {tuple(beams)}")
    one_level = offsets_S.dim() == tokens_E.dim() == 1 and offsets_S.shape[0] > 0
    if not one_level or offsets_S.dtype != torch.int32 or tokens_E.dtype != torch.int32:
        got = f"{offsets_S.dtype} {tuple(offsets_S.shape)} and {tokens_E.dtype} {tuple(tokens_E.shape)}"
        raise ValueError(f"trie_step offsets and tokens: got {got}, expected int32 (states + 1,) and (nodes,)")
