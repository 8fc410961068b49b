"""Triton form of `row_sums`: the ids are sorted once, and programs own output rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import triton_runtime
from ops.tuning import Table

_TABLE = Table("row_sums")
# Places of the sorted order that are summed together where they all belong to one output row.
CHUNK = 512
_MAX_BLOCK_D = 128

refuses = triton_runtime.refuses


def row_sums(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None
) -> Tensor:
    sorted_N, order_N = _sort(ids_N, num_rows)
    starts = torch.searchsorted(sorted_N, torch.arange(num_rows + 1, dtype=sorted_N.dtype, device=ids_N.device))
    return _sum_sorted(sorted_N, order_N, starts, source_SD, rows_N, weights_N)


def row_sums_sparse(
    ids_N: Tensor, source_SD: Tensor, num_rows: int, rows_N: Tensor | None, weights_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    sorted_N, order_N = _sort(ids_N, num_rows)
    unique_ids_U, counts_U = sorted_N.unique_consecutive(return_counts=True)
    # Entries to be left out come last.
    known = int((unique_ids_U < num_rows).sum())
    starts = torch.nn.functional.pad(counts_U[:known].cumsum(0), (1, 0))
    return unique_ids_U[:known].long(), _sum_sorted(sorted_N, order_N, starts, source_SD, rows_N, weights_N)


def _sort(ids_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Ascending keys and the entries in their order: the ids, and num_rows for those to be left out.

    Half the key's bits are half the passes of a radix sort.
    """
    keys_N = torch.where((ids_N >= 0) & (ids_N < num_rows), ids_N, num_rows)
    if num_rows <= torch.iinfo(torch.int32).max:
        keys_N = keys_N.to(torch.int32)
    sorted_N, order_N = keys_N.sort(stable=True)
    return sorted_N, order_N


def _sum_sorted(
    sorted_N: Tensor,
    order_N: Tensor,
    starts: Tensor,
    source_SD: Tensor,
    rows_N: Tensor | None,
    weights_N: Tensor | None,
) -> Tensor:
    """Row v of the result sums the entries order[starts[v]:starts[v + 1]]."""
    from ops.row_sums import kernels

    num_rows, entries, width = starts.shape[0] - 1, sorted_N.shape[0], source_SD.shape[1]
    if source_SD.stride(1) != 1:
        source_SD = source_SD.contiguous()
    rows_N = None if rows_N is None else rows_N.contiguous()
    weights_N = None if weights_N is None else weights_N.contiguous()
    chunks = entries // CHUNK
    chunks_CD = torch.empty(chunks, width, dtype=torch.float32, device=source_SD.device)
    sums_VD = torch.empty(num_rows, width, dtype=torch.float32, device=source_SD.device)
    block_d = min(triton_runtime.power_of_two(width, at_least=16), _MAX_BLOCK_D)
    lanes = -(-width // block_d)
    key = {"entries_a_row": 1 << (entries // max(num_rows, 1)).bit_length(), "width": block_d}
    triton_runtime.launch(
        kernels.chunk_sums,
        lambda config: (chunks, lanes),
        *(sorted_N, order_N, rows_N, weights_N, source_SD, chunks_CD),
        *(source_SD.shape[0], source_SD.stride(0), width),
        table=_TABLE,
        key={"width": block_d},
        CHUNK=CHUNK,
        BLOCK_D=block_d,
    )
    triton_runtime.launch(
        kernels.row_sums,
        lambda config: (-(-num_rows // config["BLOCK_V"]), lanes),
        *(starts, order_N, rows_N, weights_N, source_SD, chunks_CD, sums_VD),
        *(num_rows, source_SD.shape[0], source_SD.stride(0), width),
        table=_TABLE,
        key=key,
        CHUNK=CHUNK,
        BLOCK_D=block_d,
    )
    return sums_VD
