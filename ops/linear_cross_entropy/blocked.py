"""Full softmax in blocks that fit the cache: PyTorch calls on any device, C++ for the step that pays.

Catalogues of up to 2^15 items: a block holds whole rows of logits. One product gives them, and while they are in cache
two more give the queries' gradient per unit of loss and the items' gradient for tokens of weight one. If the weights
that arrive in backward are all equal, as under a mean, both only need scaling: three products in all. If not, the
items' part is computed again. Larger catalogues: forward keeps the log-sum-exp alone, over tiles with a running
maximum; backward computes each tile again, four products, with memory that depends on neither tokens nor items. The
targets' own terms, minus one at each target, are added apart: they are large, and among the small ones would cost
precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ops.linear_cross_entropy import cpu
from ops.linear_cross_entropy.reference import checked_positions, target_positions
from ops.rows import compute_dtype, l2_normalize, l2_normalize_backward, select_rows

_WHOLE_ROWS = 1 << 15
# 2^20 float32 logits, 4 MB.
_BLOCK_LOGITS = 1 << 20
_TILE_TOKENS, _TILE_ITEMS = 1024, 2048


def _scale(x: Tensor) -> int:
    """How many times as many logits at once a device takes as a processor's cache does."""
    return 1 if x.device.type == "cpu" else 16


def _tile_shape(x: Tensor) -> tuple[int, int]:
    side = math.isqrt(_scale(x))
    return _TILE_TOKENS * side, _TILE_ITEMS * side


def refuses(*_: Any) -> str | None:
    return None


def _exponential(logits: Tensor) -> Tensor:
    """exp in place. Terms so small that no sum could notice them are raised to where their products are normal numbers:
    arithmetic on subnormal numbers is many times slower on a CPU."""
    return logits.clamp_(min=0.7 * math.log(torch.finfo(logits.dtype).tiny)).exp_()


def _forward_whole_rows(queries_TD: Tensor, items_XD: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, items = len(queries_TD), len(items_XD)
    step = max(_BLOCK_LOGITS * _scale(queries_TD) // items, 32)
    buffer = queries_TD.new_empty(min(step, tokens), items)
    lse_T = queries_TD.new_empty(tokens)
    # What an operator returns must be no part of what it was given.
    means_TD = torch.empty_like(queries_TD) if needs_grad else queries_TD.new_empty(0, queries_TD.shape[1])
    mass_XD = torch.zeros_like(items_XD) if needs_grad else items_XD.new_empty(0, items_XD.shape[1])
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        block_tD = queries_TD[rows]
        logits_tX = torch.mm(block_tD, items_XD.T, out=buffer[: len(block_tD)])
        largest_t1 = logits_tX.amax(dim=1, keepdim=True)
        total_t1 = _exponential(logits_tX.sub_(largest_t1)).sum(dim=1, keepdim=True)
        torch.add(largest_t1[:, 0], total_t1[:, 0].log(), out=lse_T[rows])
        if needs_grad:
            # Dividing the narrow factors by the sum instead of the block saves a pass over it.
            torch.mm(logits_tX, items_XD, out=means_TD[rows]).div_(total_t1)
            mass_XD.addmm_(logits_tX.T, block_tD / total_t1)
    return lse_T, means_TD, mass_XD


def _forward_tiles(queries_TD: Tensor, items_XD: Tensor) -> Tensor:
    tokens, items = len(queries_TD), len(items_XD)
    tile_tokens, tile_items = _tile_shape(queries_TD)
    buffer = queries_TD.new_empty(tile_tokens * tile_items)
    largest_T1 = queries_TD.new_full((tokens, 1), float("-inf"))
    total_T1 = queries_TD.new_zeros(tokens, 1)
    for first in range(0, items, tile_items):
        items_xD = items_XD[first : first + tile_items]
        for start in range(0, tokens, tile_tokens):
            rows = slice(start, min(start + tile_tokens, tokens))
            logits_tx = _tile(buffer, queries_TD[rows], items_xD)
            largest_t1 = torch.maximum(largest_T1[rows], logits_tx.amax(dim=1, keepdim=True))
            total_T1[rows] *= (largest_T1[rows] - largest_t1).exp()
            total_T1[rows] += _exponential(logits_tx.sub_(largest_t1)).sum(dim=1, keepdim=True)
            largest_T1[rows] = largest_t1
    return (largest_T1 + total_T1.log())[:, 0]


def _tile(buffer: Tensor, queries_tD: Tensor, items_xD: Tensor) -> Tensor:
    shape = (len(queries_tD), len(items_xD))
    return torch.mm(queries_tD, items_xD.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _gradients_by_tiles(
    weights_T: Tensor,
    queries_TD: Tensor,
    items_XD: Tensor,
    lse_T: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """sum_x p[t, x] items[x] and sum_t weights[t] p[t, x] queries[t], each zero where it is not wanted."""
    weighted_TD = weights_T[:, None] * queries_TD
    means_TD, mass_XD = torch.zeros_like(queries_TD), torch.zeros_like(items_XD)
    with_means, with_mass = wanted
    if not any(wanted):
        return means_TD, mass_XD
    tile_tokens, tile_items = _tile_shape(queries_TD)
    buffer = queries_TD.new_empty(tile_tokens * tile_items)
    for first in range(0, len(items_XD), tile_items):
        items_xD = items_XD[first : first + tile_items]
        for start in range(0, len(queries_TD), tile_tokens):
            rows = slice(start, min(start + tile_tokens, len(queries_TD)))
            probabilities_tx = _exponential(_tile(buffer, queries_TD[rows], items_xD).sub_(lse_T[rows, None]))
            if with_means:
                means_TD[rows].addmm_(probabilities_tx, items_xD)
            if with_mass:
                mass_XD[first : first + tile_items].addmm_(probabilities_tx.T, weighted_TD[rows])
    return means_TD, mass_XD


def keeps_gradients(items: int, needs_grad: bool, device: torch.device) -> bool:
    """Whether forward computes what only backward needs. Whether that serves can be seen without waiting on a CPU."""
    return needs_grad and items <= _WHOLE_ROWS and device.type == "cpu"


def _problem(
    queries_TD: Tensor, table_VD: Tensor, catalogue_ids_X: Tensor, temperature: float, l2_norm: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries over the temperature, (T, D) work that saves (T, X), and the candidates' rows as they are scored."""
    dtype = compute_dtype(queries_TD, table_VD)
    items_XD = select_rows(table_VD, catalogue_ids_X).to(dtype)
    items_XD = l2_normalize(items_XD, eps) if l2_norm else items_XD
    return (queries_TD.to(dtype) / temperature).contiguous(), items_XD.contiguous()


def forward(
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and, for backward, the log-sum-exp and its gradients at weight one: means (T, D) and mass (X, D).

    The gradients have no rows for large catalogues, or where none is needed.
    """
    positions_T = checked_positions(catalogue_ids_X, target_ids_T, table_VD.shape[0])
    queries_TD, items_XD = _problem(queries_TD, table_VD, catalogue_ids_X, temperature, l2_norm, eps)
    keeps = keeps_gradients(len(items_XD), needs_grad, queries_TD.device)
    if keeps and cpu.usable(queries_TD):
        lse_T, means_TD, mass_XD = cpu.forward_whole_rows(queries_TD, items_XD)
    elif len(items_XD) <= _WHOLE_ROWS:
        lse_T, means_TD, mass_XD = _forward_whole_rows(queries_TD, items_XD, keeps)
    else:
        lse_T = _forward_tiles(queries_TD, items_XD)
        means_TD, mass_XD = torch.empty_like(queries_TD[:0]), torch.empty_like(items_XD[:0])
    target_T = (queries_TD * items_XD.index_select(0, positions_T)).sum(dim=1)
    return lse_T - target_T, lse_T, means_TD, mass_XD


def backward(
    grad_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    lse_T: Tensor,
    means_TD: Tensor,
    mass_XD: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_table_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and table; that of the table is zero where it is not needed."""
    positions_T = target_positions(catalogue_ids_X, target_ids_T, table_VD.shape[0])
    scaled_TD, items_XD = _problem(queries_TD, table_VD, catalogue_ids_X, temperature, l2_norm, eps)
    kept = len(mass_XD) > 0
    if kept and len(grad_T) and bool((grad_T == grad_T[0]).all()):
        grad_items_XD = grad_T[0] * mass_XD
    else:
        wanted = not kept, needs_table_grad
        computed_TD, grad_items_XD = _gradients_by_tiles(grad_T, scaled_TD, items_XD, lse_T, wanted)
        means_TD = means_TD if kept else computed_TD
    grad_queries_TD = grad_T[:, None] * (means_TD - items_XD.index_select(0, positions_T)) / temperature
    grad_table_VD = torch.zeros_like(table_VD, memory_format=torch.contiguous_format)
    if needs_table_grad:
        grad_items_XD.index_add_(0, positions_T, grad_T[:, None] * scaled_TD, alpha=-1)
        if l2_norm:
            grad_items_XD = l2_normalize_backward(grad_items_XD, select_rows(table_VD, catalogue_ids_X), eps)
        grad_table_VD.index_copy_(0, catalogue_ids_X, grad_items_XD.to(table_VD.dtype))
    return grad_queries_TD.to(queries_TD.dtype), grad_table_VD
