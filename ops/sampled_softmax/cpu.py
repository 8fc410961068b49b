"""C++ sampled softmax (cpu.cpp) as a custom op with autograd; float32 and float64, lower precisions run in float32.

Forward keeps for backward the probabilities (T, R) and each query's gradient per unit of loss (T, D), which costs
little while the gathered rows are in cache; backward then only scatters into the table.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from ops import native

_SOURCE = Path(__file__).with_name("cpu.cpp")


def refuses(*args: Any, **_: Any) -> str | None:
    for tensor in args:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            return "tensors are not on the CPU"
    return native.reason(_SOURCE)


def _function(name: str, dtype: torch.dtype) -> Any:
    library = native.library(_SOURCE)
    assert library is not None
    return getattr(library, f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def _check_ids(what: str, ids: torch.Tensor, rows: int) -> None:
    library = native.library(_SOURCE)
    assert library is not None
    library.ids_outside.restype = ctypes.c_int64
    bad = library.ids_outside(native.pointer(ids), ctypes.c_int64(ids.numel()), ctypes.c_int64(rows))
    if bad >= 0:
        raise IndexError(f"sampled_softmax: got {what} id {int(ids.view(-1)[bad])}, expected 0 to {rows - 1}")


def _problem(
    queries_TD: torch.Tensor, table_VD: torch.Tensor, negative_ids_TR: torch.Tensor, scalars: tuple[float, float, bool]
) -> list[Any]:
    sizes = (*negative_ids_TR.shape, queries_TD.shape[1], table_VD.shape[0])
    temperature, eps, l2_norm = scalars
    return [*map(ctypes.c_int64, sizes), ctypes.c_double(temperature), ctypes.c_double(eps), ctypes.c_int(l2_norm)]


@torch.library.custom_op("gr::sampled_softmax_cpu", mutates_args=())
def _forward(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    item_log_q: torch.Tensor | None,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    queries_TD, table_VD = queries_TD.contiguous(), table_VD.contiguous()
    positive_ids_T, negative_ids_TR = positive_ids_T.contiguous(), negative_ids_TR.contiguous()
    item_log_q = None if item_log_q is None else item_log_q.contiguous()
    _check_ids("positive", positive_ids_T, table_VD.shape[0])
    _check_ids("negative", negative_ids_TR, table_VD.shape[0])
    losses_T = queries_TD.new_empty(queries_TD.shape[0])
    kept = queries_TD.shape[0] if needs_grad else 0
    slopes_TD = queries_TD.new_empty(kept, queries_TD.shape[1])
    probabilities_TR = queries_TD.new_empty(kept, negative_ids_TR.shape[1])
    positive_probabilities_T = queries_TD.new_empty(kept)
    saved = (slopes_TD, probabilities_TR, positive_probabilities_T)
    _function("forward", queries_TD.dtype)(
        *map(native.pointer, (queries_TD, table_VD, positive_ids_T, negative_ids_TR, item_log_q)),
        *_problem(queries_TD, table_VD, negative_ids_TR, (temperature, eps, l2_norm)),
        native.pointer(losses_T),
        *(native.pointer(tensor if needs_grad else None) for tensor in saved),
    )
    return losses_T, slopes_TD, probabilities_TR, positive_probabilities_T


@_forward.register_fake
def _(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    item_log_q: torch.Tensor | None,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = queries_TD.shape[0] if needs_grad else 0
    return (
        queries_TD.new_empty(queries_TD.shape[0]),
        queries_TD.new_empty(kept, queries_TD.shape[1]),
        queries_TD.new_empty(kept, negative_ids_TR.shape[1]),
        queries_TD.new_empty(kept),
    )


@torch.library.custom_op("gr::sampled_softmax_table_grad_cpu", mutates_args=())
def _table_grad(
    grad_T: torch.Tensor,
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    probabilities_TR: torch.Tensor,
    positive_probabilities_T: torch.Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
) -> torch.Tensor:
    # Bound to names so that copies made here live until the call returns.
    inputs = [x.contiguous() for x in (queries_TD, table_VD, positive_ids_T, negative_ids_TR)]
    grad_T = grad_T.contiguous()
    out_VD = torch.empty_like(inputs[1])
    _function("backward", queries_TD.dtype)(
        *map(native.pointer, inputs),
        *_problem(queries_TD, table_VD, negative_ids_TR, (temperature, eps, l2_norm)),
        *map(native.pointer, (grad_T, probabilities_TR, positive_probabilities_T, out_VD)),
    )
    return out_VD


@_table_grad.register_fake
def _(grad_T: torch.Tensor, queries_TD: torch.Tensor, table_VD: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(table_VD, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    queries_TD, table_VD, positive_ids_T, negative_ids_TR, _, *ctx.scalars, _ = inputs
    ctx.save_for_backward(queries_TD, table_VD, positive_ids_T, negative_ids_TR, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_T: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_T is None:
        return (None,) * 9
    queries_TD, table_VD, positive_ids_T, negative_ids_TR, slopes_TD, probabilities_TR, positive_T = ctx.saved_tensors
    grad_queries_TD = grad_T[:, None] * slopes_TD if ctx.needs_input_grad[0] else None
    grad_table_VD = None
    if ctx.needs_input_grad[1]:
        grad_table_VD = _table_grad(
            grad_T, queries_TD, table_VD, positive_ids_T, negative_ids_TR, probabilities_TR, positive_T, *ctx.scalars
        )
    return grad_queries_TD, grad_table_VD, *(None,) * 7


_forward.register_autograd(_backward, setup_context=_setup_context)


def sampled_softmax_loss(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    item_log_q: torch.Tensor | None,
) -> torch.Tensor:
    dtype = torch.promote_types(torch.promote_types(queries_TD.dtype, table_VD.dtype), torch.float32)
    needs_grad = torch.is_grad_enabled() and (queries_TD.requires_grad or table_VD.requires_grad)
    losses_T: torch.Tensor = _forward(
        queries_TD.to(dtype),
        table_VD.to(dtype),
        positive_ids_T,
        negative_ids_TR,
        None if item_log_q is None else item_log_q.detach().to(dtype),
        temperature,
        l2_norm,
        eps,
        needs_grad,
    )[0]
    return losses_T
