"""Full softmax over the item catalogue: cross-entropy of linear logits that never exist as a whole.

With o a query, C the catalogue, E the item table, n(v) = v / max(|v|, eps) if `l2_norm` else v, tau the temperature:

    loss = logsumexp_{x in C} <o, n(E[x])> / tau  -  <o, n(E[y])> / tau

Logits exist a block at a time, in backward too: memory does not grow with tokens x items. There is no label smoothing.
Only ids of the catalogue are candidates; the published code scores every row from 0, padding and unused ids included,
and leaves `l2_norm` out. After cut cross-entropy (Wijmans et al. 2024) and Liger's fused linear loss; on a GPU a
query's gradient comes out of forward, as the output of attention does.
"""

from __future__ import annotations

from functools import partial

import torch

from ops.dispatch import Implementation, Op
from ops.linear_cross_entropy import blocked, gpu, operator, reference

__all__ = ["linear_cross_entropy"]

_linear_cross_entropy = Op(
    "linear_cross_entropy",
    reference.linear_cross_entropy,
    {
        "triton": Implementation(partial(operator.linear_cross_entropy, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.linear_cross_entropy, triton=False), blocked.refuses),
    },
)


def linear_cross_entropy(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    catalogue_ids_X: torch.Tensor,
    target_ids_T: torch.Tensor,
    *,
    temperature: float,
    l2_norm: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Loss of each token, (T,), unreduced; float32, or float64 where an input is. Dense gradients to queries and table.

    queries_TD and table_VD: any float dtype; on a GPU halves are multiplied as they are, in float32 sums.
    catalogue_ids_X: int64, unique, any order, at least one; target_ids_T: int64 ids of the catalogue.
    Fastest on a CPU when all tokens weigh the same in what follows (their mean or sum): drop tokens of weight zero
    beforehand.
    Raises ValueError for a temperature that is not positive, shapes or ids that do not fit, a catalogue outside the
    table and a target outside the catalogue. The Triton form does not wait to see the last: such losses are NaN.
    """
    if not temperature > 0:
        raise ValueError(f"linear_cross_entropy temperature: got {temperature}, expected a positive number; try 0.05")
    fits = queries_TD.dim() == 2 and table_VD.dim() == 2 and queries_TD.shape[1] == table_VD.shape[1]
    if not fits or target_ids_T.shape != queries_TD.shape[:1]:
        shapes = [tuple(x.shape) for x in (queries_TD, table_VD, target_ids_T)]
        raise ValueError(f"linear_cross_entropy shapes: got {shapes}, expected (T, D), (V, D), (T,)")
    if not (queries_TD.is_floating_point() and table_VD.is_floating_point() and queries_TD.shape[1] > 0):
        got = f"{queries_TD.dtype} {tuple(queries_TD.shape)} and {table_VD.dtype} {tuple(table_VD.shape)}"
        raise ValueError(f"linear_cross_entropy queries and table: got {got}, expected floats of at least one column")
    if catalogue_ids_X.dtype != torch.int64 or target_ids_T.dtype != torch.int64 or catalogue_ids_X.dim() != 1:
        got = f"{catalogue_ids_X.dtype} {tuple(catalogue_ids_X.shape)} and {target_ids_T.dtype}"
        raise ValueError(f"linear_cross_entropy ids: got {got}, expected int64 (X,) and int64 (T,)")
    if catalogue_ids_X.numel() == 0:
        raise ValueError("linear_cross_entropy catalogue: got no ids, expected at least one")
    losses_T: torch.Tensor = _linear_cross_entropy(
        queries_TD,
        table_VD,
        catalogue_ids_X,
        target_ids_T,
        float(temperature),
        l2_norm,
        float(eps),
        backend=backend,
    )
    return losses_T
