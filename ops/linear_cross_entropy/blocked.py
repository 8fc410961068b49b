"""Full softmax in blocks that fit the cache, as a custom op; PyTorch calls on any device, C++ for the step that pays.

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

from ops.linear_cross_entropy import cpu

_WHOLE_ROWS = 1 << 15
# 2^20 float32 logits, 4 MB.
_BLOCK_LOGITS = 1 << 20
_TILE_TOKENS, _TILE_ITEMS = 1024, 2048


def refuses(*_: Any) -> str | None:
    return None


def _exponential(logits: torch.Tensor) -> torch.Tensor:
    """exp in place. Terms so small that no sum could notice them are raised to where their products are normal numbers:
    arithmetic on subnormal numbers is many times slower on a CPU."""
    return logits.clamp_(min=0.7 * math.log(torch.finfo(logits.dtype).tiny)).exp_()


def _forward_whole_rows(
    queries_TD: torch.Tensor, items_XD: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, items = len(queries_TD), len(items_XD)
    step = max(_BLOCK_LOGITS // items, 32)
    buffer = queries_TD.new_empty(min(step, tokens), items)
    lse_T = queries_TD.new_empty(tokens)
    means_TD = torch.empty_like(queries_TD) if needs_grad else queries_TD.new_empty(0)
    mass_XD = torch.zeros_like(items_XD) if needs_grad else items_XD.new_empty(0)
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


def _forward_tiles(queries_TD: torch.Tensor, items_XD: torch.Tensor) -> torch.Tensor:
    tokens, items = len(queries_TD), len(items_XD)
    buffer = queries_TD.new_empty(_TILE_TOKENS * _TILE_ITEMS)
    largest_T1 = queries_TD.new_full((tokens, 1), float("-inf"))
    total_T1 = queries_TD.new_zeros(tokens, 1)
    for first in range(0, items, _TILE_ITEMS):
        items_xD = items_XD[first : first + _TILE_ITEMS]
        for start in range(0, tokens, _TILE_TOKENS):
            rows = slice(start, min(start + _TILE_TOKENS, tokens))
            logits_tx = _tile(buffer, queries_TD[rows], items_xD)
            largest_t1 = torch.maximum(largest_T1[rows], logits_tx.amax(dim=1, keepdim=True))
            total_T1[rows] *= (largest_T1[rows] - largest_t1).exp()
            total_T1[rows] += _exponential(logits_tx.sub_(largest_t1)).sum(dim=1, keepdim=True)
            largest_T1[rows] = largest_t1
    return (largest_T1 + total_T1.log())[:, 0]


def _tile(buffer: torch.Tensor, queries_tD: torch.Tensor, items_xD: torch.Tensor) -> torch.Tensor:
    shape = (len(queries_tD), len(items_xD))
    return torch.mm(queries_tD, items_xD.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _gradients_by_tiles(
    weights_T: torch.Tensor, queries_TD: torch.Tensor, items_XD: torch.Tensor, lse_T: torch.Tensor, with_means: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_x p[t, x] items[x] (empty unless asked for) and sum_t weights[t] p[t, x] queries[t]."""
    weighted_TD = weights_T[:, None] * queries_TD
    means_TD = torch.zeros_like(queries_TD) if with_means else queries_TD.new_empty(0)
    mass_XD = torch.zeros_like(items_XD)
    buffer = queries_TD.new_empty(_TILE_TOKENS * _TILE_ITEMS)
    for first in range(0, len(items_XD), _TILE_ITEMS):
        items_xD = items_XD[first : first + _TILE_ITEMS]
        for start in range(0, len(queries_TD), _TILE_TOKENS):
            rows = slice(start, min(start + _TILE_TOKENS, len(queries_TD)))
            probabilities_tx = _exponential(_tile(buffer, queries_TD[rows], items_xD).sub_(lse_T[rows, None]))
            if with_means:
                means_TD[rows].addmm_(probabilities_tx, items_xD)
            mass_XD[first : first + _TILE_ITEMS].addmm_(probabilities_tx.T, weighted_TD[rows])
    return means_TD, mass_XD


@torch.library.custom_op("gr::linear_cross_entropy_blocked", mutates_args=())
def _forward(
    queries_TD: torch.Tensor, items_XD: torch.Tensor, positions_T: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and, for backward, the log-sum-exp and its two gradients at weight one (empty for large catalogues)."""
    if len(items_XD) <= _WHOLE_ROWS and needs_grad and cpu.usable(queries_TD):
        lse_T, means_TD, mass_XD = cpu.forward_whole_rows(queries_TD, items_XD)
    elif len(items_XD) <= _WHOLE_ROWS:
        lse_T, means_TD, mass_XD = _forward_whole_rows(queries_TD, items_XD, needs_grad)
    else:
        lse_T = _forward_tiles(queries_TD, items_XD)
        means_TD, mass_XD = queries_TD.new_empty(0), items_XD.new_empty(0)
    target_T = (queries_TD * items_XD.index_select(0, positions_T)).sum(dim=1)
    return lse_T - target_T, lse_T, means_TD, mass_XD


@_forward.register_fake
def _(
    queries_TD: torch.Tensor, items_XD: torch.Tensor, positions_T: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = queries_TD.shape[0]
    whole_rows = needs_grad and items_XD.shape[0] <= _WHOLE_ROWS
    means_TD = torch.empty_like(queries_TD) if whole_rows else queries_TD.new_empty(0)
    mass_XD = torch.empty_like(items_XD) if whole_rows else items_XD.new_empty(0)
    return queries_TD.new_empty(tokens), queries_TD.new_empty(tokens), means_TD, mass_XD


@torch.library.custom_op("gr::linear_cross_entropy_blocked_backward", mutates_args=())
def _gradients(
    grad_T: torch.Tensor,
    queries_TD: torch.Tensor,
    items_XD: torch.Tensor,
    positions_T: torch.Tensor,
    lse_T: torch.Tensor,
    means_TD: torch.Tensor,
    mass_XD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    saved = means_TD.dim() == 2
    if saved and len(grad_T) and bool((grad_T == grad_T[0]).all()):
        grad_items_XD = grad_T[0] * mass_XD
    else:
        computed_TD, grad_items_XD = _gradients_by_tiles(grad_T, queries_TD, items_XD, lse_T, with_means=not saved)
        means_TD = means_TD if saved else computed_TD
    grad_items_XD.index_add_(0, positions_T, grad_T[:, None] * queries_TD, alpha=-1)
    return grad_T[:, None] * (means_TD - items_XD.index_select(0, positions_T)), grad_items_XD


@_gradients.register_fake
def _(
    grad_T: torch.Tensor, queries_TD: torch.Tensor, items_XD: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(queries_TD), torch.empty_like(items_XD)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_T: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_T is None:
        return None, None, None, None
    return *_gradients(grad_T, *ctx.saved_tensors), None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(queries_TD: torch.Tensor, items_XD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    needs_grad = torch.is_grad_enabled() and (queries_TD.requires_grad or items_XD.requires_grad)
    losses_T: torch.Tensor = _forward(queries_TD.contiguous(), items_XD.contiguous(), positions_T, needs_grad)[0]
    return losses_T
