"""Full softmax over the item catalogue: cross-entropy of linear logits that never exist as a whole.

With o a query, C the catalogue, E the item table, n(v) = v / max(|v|, eps) if `l2_norm` else v, tau the temperature:

    loss = logsumexp_{x in C} <o, n(E[x])> / tau  -  <o, n(E[y])> / tau

Only ids of the catalogue are candidates; the published code scores every row from 0, padding and unused ids included,
and leaves `l2_norm` out. The blocked form follows cut cross-entropy (Wijmans et al. 2024) and Liger's fused linear
loss.
"""

from __future__ import annotations

import torch

from ops.dispatch import Implementation, Op
from ops.linear_cross_entropy import blocked, reference
from ops.rows import select_rows

__all__ = ["linear_cross_entropy"]

_linear_cross_entropy = Op(
    "linear_cross_entropy",
    reference.linear_cross_entropy,
    {"cpu": Implementation(blocked.linear_cross_entropy, blocked.refuses)},
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

    catalogue_ids_X: int64, unique, any order, at least one; target_ids_T: int64 ids of the catalogue.
    Fastest when all tokens weigh the same in what follows (their mean or sum): drop tokens of weight zero beforehand.
    Raises ValueError for a target outside the catalogue, a temperature that is not positive, or shapes that do not fit.
    """
    if not temperature > 0:
        raise ValueError(f"linear_cross_entropy temperature: got {temperature}, expected a positive number; try 0.05")
    fits = queries_TD.dim() == 2 and table_VD.dim() == 2 and queries_TD.shape[1] == table_VD.shape[1]
    if not fits or target_ids_T.shape != queries_TD.shape[:1]:
        shapes = [tuple(x.shape) for x in (queries_TD, table_VD, target_ids_T)]
        raise ValueError(f"linear_cross_entropy shapes: got {shapes}, expected (T, D), (V, D), (T,)")
    positions_T = _positions(catalogue_ids_X, target_ids_T, table_VD.shape[0])
    dtype = torch.promote_types(torch.promote_types(queries_TD.dtype, table_VD.dtype), torch.float32)
    items_XD = select_rows(table_VD, catalogue_ids_X).to(dtype)
    if l2_norm:
        items_XD = items_XD / torch.linalg.vector_norm(items_XD, dim=1, keepdim=True).clamp_min(eps)
    # Scaling the queries instead of the logits is (T, D) work for (T, X).
    queries_TD = queries_TD.to(dtype) / temperature
    losses_T: torch.Tensor = _linear_cross_entropy(queries_TD, items_XD, positions_T, backend=backend)
    return losses_T


def _positions(catalogue_ids_X: torch.Tensor, target_ids_T: torch.Tensor, rows: int) -> torch.Tensor:
    """Index of each target in the catalogue."""
    if catalogue_ids_X.numel() == 0:
        raise ValueError("linear_cross_entropy catalogue: got no ids, expected at least one")
    if int(catalogue_ids_X.min()) < 0 or int(catalogue_ids_X.max()) >= rows:
        raise ValueError(f"linear_cross_entropy catalogue: got ids outside the table, expected 0 to {rows - 1}")
    position_of_V = torch.full((rows,), -1, dtype=torch.int64, device=catalogue_ids_X.device)
    position_of_V[catalogue_ids_X] = torch.arange(catalogue_ids_X.numel(), device=catalogue_ids_X.device)
    outside_T = (target_ids_T < 0) | (target_ids_T >= rows)
    positions_T = torch.where(outside_T, -1, position_of_V[target_ids_T.clamp(0, rows - 1)])
    missing = torch.nonzero(positions_T < 0)
    if len(missing):
        target = int(target_ids_T[missing[0, 0]])
        raise ValueError(f"linear_cross_entropy target: got id {target}, expected one of the catalogue")
    return positions_T
