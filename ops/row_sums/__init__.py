"""Sums of weighted source rows by id: the scatter behind the gradient of every table, without atomics.

    out[v] = sum over n with ids[n] == v of  weights[n] * source[rows[n]]        rows[n] = n, weights[n] = 1 by default

Each output row is summed in an order that depends on the arguments alone, so results repeat bit for bit: on a GPU the
ids are sorted once, stably, and a program owns its output rows; on the CPU threads own columns. The (N, D) tensor of
weighted rows never exists. Entries whose id is outside [0, num_rows) are left out, wherever they come from: -1 is a
way to say "nowhere".
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ops.dispatch import Implementation, Op
from ops.row_sums import cpu, gpu, operator, reference

__all__ = ["row_sums", "row_sums_sparse"]

_row_sums = Op(
    "row_sums",
    reference.row_sums,
    {
        "triton": Implementation(partial(operator.row_sums, triton=True), gpu.refuses),
        "cpu": Implementation(partial(operator.row_sums, triton=False), cpu.refuses),
    },
)
_row_sums_sparse = Op(
    "row_sums_sparse",
    reference.row_sums_sparse,
    {
        "triton": Implementation(gpu.row_sums_sparse, gpu.refuses),
        "cpu": Implementation(cpu.row_sums_sparse, cpu.refuses),
    },
)


def row_sums(
    ids_N: Tensor,
    source_SD: Tensor,
    *,
    num_rows: int,
    rows_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """(num_rows, D) in float32, or float64 for a float64 source; zeros for a row that no id names.

    ids_N: int64. source_SD: any float dtype; without `rows_N`, S = N. rows_N: int64 in [0, S). weights_N: any float
    dtype. Gradients go to the source (this same op with ids and rows exchanged) and to the weights (through two (N, D)
    tensors). Nothing waits for the GPU.
    Raises ValueError for shapes or dtypes that do not fit and, on the CPU, IndexError for rows outside the source; on a
    GPU such an entry makes its output row NaN.
    """
    _check(ids_N, source_SD, num_rows, rows_N, weights_N)
    result: Tensor = _row_sums(ids_N, source_SD, num_rows, rows_N, weights_N, backend=backend)
    return result


def row_sums_sparse(
    ids_N: Tensor,
    source_SD: Tensor,
    *,
    num_rows: int,
    rows_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of `row_sums` that some id names: their ids, int64 (U,) ascending and unique, and the sums (U, D).

    How many there are is known only once the ids are sorted: a call waits for the GPU. Memory does not depend on
    `num_rows`. Arguments and errors as for `row_sums`; no gradients.
    """
    _check(ids_N, source_SD, num_rows, rows_N, weights_N)
    with torch.no_grad():
        unique_ids_U, sums_UD = _row_sums_sparse(ids_N, source_SD, num_rows, rows_N, weights_N, backend=backend)
    return unique_ids_U, sums_UD


def _check(ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None) -> None:
    if num_rows < 0:
        raise ValueError(f"row_sums num_rows: got {num_rows}, expected 0 or more")
    if source_SD.dim() != 2 or not source_SD.is_floating_point():
        got = f"{source_SD.dtype} {tuple(source_SD.shape)}"
        raise ValueError(f"row_sums source: got {got}, expected floats (S, D)")
    entries = (source_SD if rows_N is None else rows_N).shape[:1]
    for name, x in (("ids", ids_N), ("rows", rows_N)):
        if x is not None and (x.dtype != torch.int64 or x.shape != entries):
            raise ValueError(f"row_sums {name}: got {x.dtype} {tuple(x.shape)}, expected int64 {tuple(entries)}")
    if weights_N is not None and (not weights_N.is_floating_point() or weights_N.shape != entries):
        got = f"{weights_N.dtype} {tuple(weights_N.shape)}"
        raise ValueError(f"row_sums weights: got {got}, expected floats {tuple(entries)}")
