"""Sampled softmax in plain PyTorch: gathers the negatives' rows, a (T, R, D) tensor, and lets autograd do the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.rows import compute_dtype, l2_normalize

SAME_AS_POSITIVE = -5e4


class _SparseRows(torch.autograd.Function):
    """Conversion of a table's dtype whose gradient, a sparse one, names every row once."""

    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = table_VD.dtype
        return table_VD.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor) -> tuple[Tensor, None]:
        return grad_VD.coalesce().to(ctx.dtype), None


def sampled_softmax_loss(
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    item_log_q: Tensor | None,
    sparse_grad: bool,
) -> Tensor:
    dtype = compute_dtype(queries_TD, table_VD)
    queries_TD = queries_TD.to(dtype)
    table_VD = _SparseRows.apply(table_VD, dtype) if sparse_grad else table_VD.to(dtype)
    # The positive first.
    ids_TS = torch.cat([positive_ids_T[:, None], negative_ids_TR], dim=1)
    rows_TSD = F.embedding(ids_TS, table_VD, sparse=sparse_grad)
    if l2_norm:
        rows_TSD = l2_normalize(rows_TSD, eps)
    logits_TS = torch.einsum("td,tsd->ts", queries_TD, rows_TSD) / temperature
    if item_log_q is not None:
        logits_TS = logits_TS - item_log_q[ids_TS]
    same_TS = ids_TS == positive_ids_T[:, None]
    same_TS[:, 0] = False
    return logits_TS.masked_fill(same_TS, SAME_AS_POSITIVE).logsumexp(dim=1) - logits_TS[:, 0]
