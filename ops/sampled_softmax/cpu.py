"""C++ sampled softmax (cpu.cpp); float32 and float64, lower precisions run in float32.

While the rows it gathered are in cache, forward also computes each query's gradient per unit of loss; backward then
only scatters into the table.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.row_sums import cpu as row_sums
from ops.rows import compute_dtype, l2_normalize_backward

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            return "tensors are not on the CPU"
    return native.reason(_SOURCE) or row_sums.refuses()


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
    """Losses (T,), gradients of the queries at weight one (T, D), and the negatives' probabilities (T, R).

    A negative equal to the positive has probability 0: its logit is a constant.
    """
    dtype = _dtype(queries_TD, table_VD)
    queries_TD, table_VD = queries_TD.to(dtype).contiguous(), table_VD.to(dtype).contiguous()
    positive_ids_T, negative_ids_TR = positive_ids_T.contiguous(), negative_ids_TR.contiguous()
    item_log_q = None if item_log_q is None else item_log_q.contiguous()
    _check_ids("positive", positive_ids_T, table_VD.shape[0])
    _check_ids("negative", negative_ids_TR, table_VD.shape[0])
    kept = queries_TD.shape[0] if needs_grad else 0
    losses_T = queries_TD.new_empty(queries_TD.shape[0])
    slopes_TD = queries_TD.new_empty(kept, queries_TD.shape[1])
    probabilities_TR = queries_TD.new_empty(kept, negative_ids_TR.shape[1])
    _function("forward", dtype)(
        *map(native.pointer, (queries_TD, table_VD, positive_ids_T, negative_ids_TR, item_log_q)),
        *_problem(queries_TD, table_VD, negative_ids_TR, (temperature, l2_norm, eps)),
        native.pointer(losses_T),
        *(native.pointer(x if needs_grad else None) for x in (slopes_TD, probabilities_TR)),
    )
    return losses_T, slopes_TD, probabilities_TR


def probabilities(losses_T: Tensor, probabilities_TR: Tensor) -> Tensor:
    """What forward kept is what this is asked for; the Triton form keeps logits."""
    return probabilities_TR


def table_grad(
    grad_T: Tensor,
    losses_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    positive_ids_T: Tensor,
    negative_ids_TR: Tensor,
    probabilities_TR: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
) -> Tensor:
    dtype = losses_T.dtype
    # Bound to names so that copies made here live until the call returns.
    inputs = [x.contiguous() for x in (queries_TD.to(dtype), table_VD.to(dtype), positive_ids_T, negative_ids_TR)]
    grad_T = grad_T.contiguous()
    out_VD = torch.empty_like(inputs[1])
    _function("backward", dtype)(
        *map(native.pointer, inputs),
        *_problem(queries_TD, table_VD, negative_ids_TR, (temperature, l2_norm, eps)),
        *map(native.pointer, (grad_T, losses_T, probabilities_TR, out_VD)),
    )
    return out_VD.to(table_VD.dtype)


def finish_rows(grad_UD: Tensor, rows_UD: Tensor, l2_norm: bool, eps: float) -> Tensor:
    """The gradient of table rows from that of their normalized form."""
    if l2_norm:
        grad_UD = l2_normalize_backward(grad_UD, rows_UD, eps)
    return grad_UD.to(rows_UD.dtype)


row_sums_sparse = row_sums.row_sums_sparse


def _dtype(queries_TD: Tensor, table_VD: Tensor) -> torch.dtype:
    return compute_dtype(queries_TD, table_VD)


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(native.require(_SOURCE), f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def _check_ids(what: str, ids: Tensor, rows: int) -> None:
    library = native.require(_SOURCE)
    library.ids_outside.restype = ctypes.c_int64
    bad = library.ids_outside(native.pointer(ids), ctypes.c_int64(ids.numel()), ctypes.c_int64(rows))
    if bad >= 0:
        raise IndexError(f"sampled_softmax: got {what} id {int(ids.view(-1)[bad])}, expected 0 to {rows - 1}")


def _problem(
    queries_TD: Tensor, table_VD: Tensor, negative_ids_TR: Tensor, scalars: tuple[float, bool, float]
) -> list[Any]:
    sizes = (*negative_ids_TR.shape, queries_TD.shape[1], table_VD.shape[0])
    temperature, l2_norm, eps = scalars
    return [*map(ctypes.c_int64, sizes), ctypes.c_double(temperature), ctypes.c_double(eps), ctypes.c_int(l2_norm)]
