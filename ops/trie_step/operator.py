"""A level of the search as one operator for both devices, which `torch.compile` and `torch.export` see through."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rows import compute_dtype
from ops.tracing import tracing
from ops.trie_step import cpu, gpu
from ops.triton_runtime import on_gpu

Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("gr::trie_step", mutates_args=())
def _apply(
    logits_BMC: Tensor,
    states_BM: Tensor,
    scores_BM: Tensor,
    offsets_S: Tensor,
    tokens_E: Tensor,
    allowed: Tensor | None,
    k: int,
    normalization: str,
    most_children: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (gpu if on_gpu(logits_BMC, triton) else cpu).trie_step(
        logits_BMC, states_BM, scores_BM, offsets_S, tokens_E, allowed, k, normalization, most_children
    )


@_apply.register_fake
def _(
    logits_BMC: Tensor,
    states_BM: Tensor,
    scores_BM: Tensor,
    offsets_S: Tensor,
    tokens_E: Tensor,
    allowed: Tensor | None,
    k: int,
    normalization: str,
    most_children: int,
    triton: bool,
) -> Step:
    batch, dtype = logits_BMC.shape[0], compute_dtype(logits_BMC, scores_BM)
    parents_BK, tokens_BK, states_BK = (states_BM.new_empty(batch, k) for _ in range(3))
    scores_BK, pruned_B = (scores_BM.new_empty(shape, dtype=dtype) for shape in ((batch, k), (batch,)))
    return scores_BK, parents_BK, tokens_BK, states_BK, states_BM.new_empty(batch), pruned_B


def trie_step(
    logits_BMC: Tensor,
    states_BM: Tensor,
    scores_BM: Tensor,
    offsets_S: Tensor,
    tokens_E: Tensor,
    allowed: Tensor | None,
    k: int,
    normalization: str,
    most_children: int,
    *,
    triton: bool,
) -> Step:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    arguments = (logits_BMC, states_BM, scores_BM, offsets_S, tokens_E, allowed, k, normalization, most_children)
    if not tracing() and not on_gpu(logits_BMC, triton):
        # A step takes less time than calling an operator.
        return cpu.trie_step(*arguments)
    found: Step = _apply(*arguments, triton)
    return found
