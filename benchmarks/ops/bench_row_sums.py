"""Sums of rows by id, in a fixed order, beside `index_add` of gathered rows, whose order on a GPU is anyone's.

python benchmarks/ops/bench_row_sums.py [--device cuda]

Forward alone: it is what backward does to a table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import Benchmark, Sizes
from ops.row_sums import row_sums, row_sums_sparse

Inputs = dict[str, Any]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """ids = rows * u^skew: 1 is uniform, 4 gives the most frequent of a million ids a thirtieth of all.

    sources 0: every entry has a source row of its own and no weight.
    """
    entries, sources = sizes["entries"], sizes["sources"]
    ids = (sizes["rows"] * torch.rand(entries, device=device, dtype=torch.float64) ** sizes["skew"]).long()
    source = torch.randn(sources or entries, sizes["width"], device=device, dtype=dtype)
    inputs: Inputs = {"ids": ids, "source": source, "num_rows": sizes["rows"], "rows": None, "weights": None}
    if sources:
        inputs |= {"rows": torch.arange(entries, device=device) % sources}
        inputs |= {"weights": torch.rand(entries, device=device)}
    return inputs


def ours(inputs: Inputs, backend: str | None = None) -> Tensor:
    ids, source, num_rows, rows, weights = inputs.values()
    return row_sums(ids, source, num_rows=num_rows, rows_N=rows, weights_N=weights, backend=backend)


def index_add(inputs: Inputs) -> Tensor:
    ids, source, num_rows, rows, weights = inputs.values()
    added = source if rows is None else source[rows]
    added = added.float() if weights is None else added * weights[:, None]
    return added.new_zeros(num_rows, source.shape[1]).index_add_(0, ids, added)


def moved(sizes: Sizes, dtype: torch.dtype) -> float:
    """Ids, rows and weights, the source once, and the sums."""
    sources, width = sizes["sources"] or sizes["entries"], sizes["width"]
    return sizes["entries"] * (20 if sizes["sources"] else 8) + (sources * dtype.itemsize + sizes["rows"] * 4) * width


BENCHMARK = Benchmark(
    op="row_sums",
    shapes={
        "position table": {"entries": 14_000, "sources": 0, "rows": 201, "width": 50, "skew": 1},
        # The table's gradient under sampled softmax: every token's query goes to its positive and 128 negatives.
        "ml-1m step": {"entries": 14_000 * 129, "sources": 14_000, "rows": 3_953, "width": 50, "skew": 1},
        "amzn-books step": {
            "entries": 6_400 * 513,
            "sources": 6_400,
            "rows": 695_763,
            "width": 64,
            "skew": 1,
            "devices": ("cuda",),
        },
        "popular ids": {
            "entries": 2_000_000,
            "sources": 0,
            "rows": 1_000_000,
            "width": 128,
            "skew": 4,
            "devices": ("cuda",),
        },
    },
    make=make,
    providers={"ops": ours, "reference": partial(ours, backend="reference"), "torch": index_add},
    flops=lambda sizes: 2 * sizes["entries"] * sizes["width"],
    bytes=moved,
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def call(dtype: torch.dtype, width: int, entries_a_row: int, weighted: bool) -> None:
        entries = 3 * entries_a_row
        ids, source = torch.arange(entries) % 3, torch.zeros(5 if weighted else entries, width, dtype=dtype)
        options = {"rows_N": ids, "weights_N": torch.zeros(entries, dtype=dtype)} if weighted else {}
        row_sums(ids, source, num_rows=3, backend="triton", **options)

    def sparse(num_rows: int) -> None:
        row_sums_sparse(torch.arange(4), torch.zeros(4, 50), num_rows=num_rows, backend="triton")

    yield "float32 sparse", partial(sparse, 1 << 40)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for entries_a_row in (2, 20, 200):
            # Aligned and odd widths on both sides of the tables' bound.
            for width in (64, 256, 50, 100) if dtype != torch.float16 else (50, 100):
                for weighted in (False, True):
                    name = f"{dtype} width {width} entries {entries_a_row}".removeprefix("torch.")
                    yield (
                        f"{name}{' weighted' if weighted else ''}",
                        partial(call, dtype, width, entries_a_row, weighted),
                    )


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
