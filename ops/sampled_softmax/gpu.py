"""Triton form of sampled softmax; the table's gradient goes through `row_sums`, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import triton_runtime
from ops.row_sums import gpu as row_sums
from ops.sampled_softmax.pairs import pairs
from ops.sampled_softmax.reference import SAME_AS_POSITIVE
from ops.tuning import Table

_TABLE = Table("sampled_softmax")
_MAX_WIDTH = 1024


def refuses(*args: Any, **kwargs: Any) -> str | None:
    if args and args[0].shape[1] > _MAX_WIDTH:
        return f"rows of {args[0].shape[1]} columns, expected at most {_MAX_WIDTH}"
    return triton_runtime.refuses(*args, **kwargs)


def forward(
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    item_log_q: Tensor | None,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (T,), gradients of the queries at weight one (T, D), and the negatives' logits (T, R).

    Logits are less the positive's; that of a negative equal to the positive, a constant, is kept as -inf.
    """
    from ops.sampled_softmax import kernels

    (tokens, negatives), (num_rows, width) = negative_ids_TR.shape, table_VD.shape
    queries_TD, table_VD = (x if x.stride(1) == 1 else x.contiguous() for x in (queries_TD, table_VD))
    kept = tokens if needs_grad else 0
    shapes = (tokens,), (kept, width), (kept, negatives)
    losses_T, slopes_TD, logits_TR = (
        torch.empty(shape, dtype=torch.float32, device=queries_TD.device) for shape in shapes
    )
    block_d = triton_runtime.power_of_two(width, at_least=16)
    triton_runtime.launch(
        kernels.sampled_softmax,
        lambda config: (tokens,),
        *(queries_TD, table_VD, positive_ids_T.contiguous(), negative_ids_TR.contiguous()),
        *(None if item_log_q is None else item_log_q.contiguous(), losses_T, slopes_TD, logits_TR),
        *(queries_TD.stride(0), table_VD.stride(0), negatives, width, num_rows),
        *(1.0 / temperature, eps, SAME_AS_POSITIVE),
        table=_TABLE,
        key={"width": block_d},
        L2_NORM=l2_norm,
        KEEP=needs_grad,
        BLOCK_D=block_d,
    )
    return losses_T, slopes_TD, logits_TR


def probabilities(losses_T: Tensor, logits_TR: Tensor) -> Tensor:
    return torch.sub(logits_TR, losses_T[:, None]).exp_()


def table_grad(
    grad_T: Tensor,
    losses_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    logits_TR: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
) -> Tensor:
    ids_N, tokens_N, weights_N = pairs(
        grad_T / temperature, losses_T, positive_ids_T, negative_ids_TR, probabilities(losses_T, logits_TR)
    )
    grad_VD = row_sums.row_sums(ids_N, queries_TD, table_VD.shape[0], tokens_N, weights_N)
    return finish_rows(grad_VD, table_VD, l2_norm, eps)


def finish_rows(grad_UD: Tensor, rows_UD: Tensor, l2_norm: bool, eps: float) -> Tensor:
    """The gradient of table rows from that of their normalized form."""
    from ops.sampled_softmax import kernels

    if not l2_norm:
        return grad_UD.to(rows_UD.dtype)
    num_rows, width = rows_UD.shape
    rows_UD = rows_UD if rows_UD.stride(1) == 1 else rows_UD.contiguous()
    out_UD = torch.empty(num_rows, width, dtype=rows_UD.dtype, device=rows_UD.device)
    block_d = triton_runtime.power_of_two(width, at_least=16)
    triton_runtime.launch(
        kernels.finish_rows,
        lambda config: (-(-num_rows // config["BLOCK_V"]),),
        *(grad_UD, rows_UD, out_UD, rows_UD.stride(0), num_rows, width, eps),
        table=_TABLE,
        key={"width": block_d},
        BLOCK_D=block_d,
    )
    return out_UD


row_sums_sparse = row_sums.row_sums_sparse
