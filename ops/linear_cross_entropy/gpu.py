"""Triton form of the full softmax: logits exist a tile at a time, in registers.

Nothing waits for the device, but for what `ops.rows.extent` reads of a new catalogue.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops import triton_runtime
from ops.linear_cross_entropy.reference import target_positions
from ops.row_sums import gpu as row_sums
from ops.rows import extent
from ops.tuning import Table

_TABLE = Table("linear_cross_entropy")
_MAX_WIDTH = 256
# Programs that keep a device busy, of about 64 tokens or items each, and the least a program should walk over.
_PROGRAMS, _BLOCK, _MIN_WALK = 512, 64, 512
# A multiple of every block size.
_WALK_STEP = 128


def refuses(*args: Any, **kwargs: Any) -> str | None:
    if args and args[0].shape[1] > _MAX_WIDTH:
        return f"rows of {args[0].shape[1]} columns, expected at most {_MAX_WIDTH}"
    return triton_runtime.refuses(*args, **kwargs)


class _Problem(NamedTuple):
    """What both passes multiply: padded queries and items, and the items' inverse norms if they are normalized."""

    queries: Tensor
    items: Tensor
    norms_X: Tensor | None

    @property
    def launch(self) -> dict[str, Any]:
        block_d = self.items.shape[1]
        return {"table": _TABLE, "key": {"width": block_d, "bytes": self.items.element_size()}, "BLOCK_D": block_d}


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
    """Losses and, for backward, the tokens' statistics (3, T) and the queries' gradient at weight one.

    The last has no rows.
    """
    from ops.linear_cross_entropy import kernels

    (tokens, width), candidates = queries_TD.shape, catalogue_ids_X.shape[0]
    problem = _problem(queries_TD, table_VD, catalogue_ids_X, l2_norm, eps)
    positions_T = target_positions(catalogue_ids_X, target_ids_T, table_VD.shape[0])
    walk, splits = _splits(tokens, candidates)
    kept = tokens if needs_grad else 0
    sums_S2T, means_STD = _floats(table_VD, splits, 2, tokens), _floats(table_VD, splits, kept, problem.items.shape[1])
    shapes = (tokens,), (tokens,), (3, tokens), (kept, width)
    targets_T, losses_T, stats_3T, slopes_TD = (_floats(table_VD, *shape) for shape in shapes)
    triton_runtime.launch(
        kernels.softmax_splits,
        lambda config: (-(-tokens // config["BLOCK_T"]), splits),
        *(*problem, positions_T, targets_T, sums_S2T, means_STD),
        *(tokens, candidates, walk, 1.0 / temperature),
        KEEP=needs_grad,
        PRECISION=triton_runtime.precision(),
        **problem.launch,
    )
    triton_runtime.launch(
        kernels.finish_tokens,
        lambda config: (-(-tokens // config["BLOCK_T"]),),
        *(*problem[1:], positions_T, targets_T, sums_S2T, means_STD, losses_T, stats_3T, slopes_TD),
        *(tokens, candidates, splits, width, 1.0 / temperature),
        KEEP=needs_grad,
        **problem.launch,
    )
    return losses_T, stats_3T, slopes_TD, _floats(table_VD, 0, width)


def backward(
    grad_T: Tensor,
    queries_TD: Tensor,
    table_VD: Tensor,
    catalogue_ids_X: Tensor,
    target_ids_T: Tensor,
    stats_3T: Tensor,
    slopes_TD: Tensor,
    _: Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    needs_table_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and table; that of the table is zero where it is not needed."""
    from ops.linear_cross_entropy import kernels

    grad_queries_TD = (grad_T[:, None] * slopes_TD).to(queries_TD.dtype)
    grad_table_VD = torch.zeros_like(table_VD, memory_format=torch.contiguous_format)
    if not needs_table_grad:
        return grad_queries_TD, grad_table_VD
    (tokens, width), candidates = queries_TD.shape, catalogue_ids_X.shape[0]
    problem = _problem(queries_TD, table_VD, catalogue_ids_X, l2_norm, eps)
    positions_T = target_positions(catalogue_ids_X, target_ids_T, table_VD.shape[0])
    weights_T = grad_T / temperature
    lacking_T = weights_T * stats_3T[2]
    walk, splits = _splits(candidates, tokens)
    sums_SXD = _floats(table_VD, splits, candidates, problem.items.shape[1])
    triton_runtime.launch(
        kernels.item_splits,
        lambda config: (-(-candidates // config["BLOCK_X"]), splits),
        *(*problem, positions_T, stats_3T, weights_T, sums_SXD),
        *(tokens, candidates, walk, 1.0 / temperature),
        PRECISION=triton_runtime.precision(),
        **problem.launch,
    )
    targets_XD = row_sums.row_sums(positions_T, queries_TD, candidates, None, -lacking_T)
    triton_runtime.launch(
        kernels.finish_items,
        lambda config: (-(-candidates // config["BLOCK_X"]),),
        *(problem.items, catalogue_ids_X.contiguous(), sums_SXD, targets_XD, grad_table_VD),
        *(candidates, splits, width, eps),
        L2_NORM=l2_norm,
        **problem.launch,
    )
    return grad_queries_TD, grad_table_VD


def _problem(queries_TD: Tensor, table_VD: Tensor, catalogue_ids_X: Tensor, l2_norm: bool, eps: float) -> _Problem:
    dtype = torch.promote_types(queries_TD.dtype, table_VD.dtype)
    queries, _ = _padded(queries_TD, None, dtype)
    found = extent(catalogue_ids_X)
    if found.is_range:
        table_VD = table_VD[found.smallest : found.largest + 1]
    ids_X = None if found.is_range else catalogue_ids_X.contiguous()
    return _Problem(queries, *_padded(table_VD, ids_X, dtype, eps if l2_norm else None))


def _padded(
    rows: Tensor, ids_X: Tensor | None, dtype: torch.dtype, eps: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """The rows, or those of the ids, contiguous in the dtype and padded with zero columns: themselves where they are.

    Followed by their inverse norms for an eps.
    """
    from ops.linear_cross_entropy import kernels

    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count, width = rows.shape[0] if ids_X is None else ids_X.shape[0], rows.shape[1]
    block_d = triton_runtime.power_of_two(width, at_least=16)
    as_they_are = ids_X is None and rows.dtype == dtype and width == block_d and rows.is_contiguous()
    out = None if as_they_are else torch.empty(count, block_d, dtype=dtype, device=rows.device)
    norms_X = None if eps is None else _floats(rows, count)
    if out is not None or norms_X is not None:
        triton_runtime.launch(
            kernels.prepare_rows,
            lambda config: (-(-count // config["BLOCK_X"]),),
            *(rows, ids_X, out, norms_X, count, width, rows.stride(0), eps or 0.0),
            NORMALIZE=eps is not None,
            table=_TABLE,
            key={"width": block_d, "bytes": rows.element_size()},
            BLOCK_D=block_d,
        )
    return rows if out is None else out, norms_X


def _splits(own: int, others: int) -> tuple[int, int]:
    """How many of the others a program walks over, and how many programs so share one block of its own."""
    wanted = max(1, min(_PROGRAMS * _BLOCK // max(own, 1), others // _MIN_WALK))
    walk = max(-(-others // (wanted * _WALK_STEP)), 1) * _WALK_STEP
    return walk, max(-(-others // walk), 1)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
