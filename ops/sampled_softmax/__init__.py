"""Sampled softmax: cross-entropy of a positive item against R sampled negatives a token.

With o a query, E the item table, n(v) = v / max(|v|, eps) if `l2_norm` else v, and tau the temperature:

    s+ = <o, n(E[y])> / tau - log q(y)        s-_r = <o, n(E[neg_r])> / tau - log q(neg_r)
    s-_r := -5e4 where neg_r == y             loss = logsumexp(s+, s-_1 .. s-_R) - s+

The log q terms are absent without `item_log_q`; with the log of the sampling probabilities they make the sampled loss
an estimate of the full softmax (Bengio & Senecal 2008; Yi et al., RecSys 2019). The mask comes after the temperature,
as in the published HSTU code; unlike there, ids never pass through a float.
"""

from __future__ import annotations

from functools import partial

import torch

from ops.dispatch import Implementation, Op
from ops.rows import compute_dtype
from ops.sampled_softmax import cpu, gpu, operator, reference

__all__ = ["sampled_softmax_loss"]

_sampled_softmax = Op(
    "sampled_softmax",
    reference.sampled_softmax_loss,
    {
        "triton": Implementation(partial(operator.sampled_softmax_loss, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.sampled_softmax_loss, triton=False), cpu.refuses),
    },
)


def sampled_softmax_loss(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    *,
    temperature: float,
    l2_norm: bool = False,
    eps: float = 1e-6,
    item_log_q: torch.Tensor | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Loss of each token, (T,), unreduced; float32, or float64 where queries or table are. No (T, R, D) tensor exists.

    queries_TD and table_VD: any float dtype. positive_ids_T, negative_ids_TR: int64 in [0, V); R may be 0. item_log_q:
    (V,) natural-log probabilities, a constant. Gradients go to queries and table and depend on no scheduling. The
    table's is dense or, with `sparse_grad`, a coalesced `torch.sparse_coo_tensor` of the rows that the batch names, as
    `torch.optim.SparseAdam` wants it; on a GPU backward then waits for the number of these rows. The dense form waits
    for nothing.
    Raises ValueError for a temperature that is not positive or shapes that do not fit and, on a CPU, IndexError for ids
    outside the table; on a GPU the losses of their tokens are NaN.
    """
    _check(queries_TD, table_VD, positive_ids_T, negative_ids_TR, temperature, item_log_q)
    if item_log_q is not None:
        dtype = compute_dtype(queries_TD, table_VD)
        item_log_q = item_log_q.detach().to(dtype)
    losses_T: torch.Tensor = _sampled_softmax(
        queries_TD,
        table_VD,
        positive_ids_T,
        negative_ids_TR,
        float(temperature),
        l2_norm,
        float(eps),
        item_log_q,
        sparse_grad,
        backend=backend,
    )
    return losses_T


def _check(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    temperature: float,
    item_log_q: torch.Tensor | None,
) -> None:
    if not temperature > 0:
        raise ValueError(f"sampled_softmax temperature: got {temperature}, expected a positive number; try 0.05")
    shapes = [tuple(x.shape) for x in (queries_TD, table_VD, positive_ids_T, negative_ids_TR)]
    fits = queries_TD.dim() == 2 and table_VD.dim() == 2 and negative_ids_TR.dim() == 2
    if not fits or shapes[0][1] != shapes[1][1] or not shapes[0][:1] == shapes[2] == shapes[3][:1]:
        raise ValueError(f"sampled_softmax shapes: got {shapes}, expected (T, D), (V, D), (T,), (T, R)")
    if not (queries_TD.is_floating_point() and table_VD.is_floating_point() and queries_TD.shape[1] > 0):
        got = f"{queries_TD.dtype} {shapes[0]} and {table_VD.dtype} {shapes[1]}"
        raise ValueError(f"sampled_softmax queries and table: got {got}, expected floats of at least one column")
    if positive_ids_T.dtype != torch.int64 or negative_ids_TR.dtype != torch.int64:
        raise ValueError(f"sampled_softmax ids: got {positive_ids_T.dtype}, {negative_ids_TR.dtype}, expected int64")
    if item_log_q is not None and item_log_q.shape != table_VD.shape[:1]:
        raise ValueError(f"sampled_softmax item_log_q: got {tuple(item_log_q.shape)}, expected ({table_VD.shape[0]},)")
