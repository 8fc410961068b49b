"""Sampled softmax beside the same from gathered rows, a (tokens, negatives, width) tensor, and as it was published.

python benchmarks/ops/bench_sampled_softmax.py [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import Benchmark, Sizes
from ops.sampled_softmax import sampled_softmax_loss

TEMPERATURE, EPS = 0.05, 1e-6

Inputs = dict[str, Tensor]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Normalized queries, a table as it is initialized, negatives drawn uniformly."""
    tokens, rows = sizes["tokens"], sizes["rows"]
    queries = F.normalize(torch.randn(tokens, sizes["width"], device=device), dim=1).to(dtype)
    table = (0.02 * torch.randn(rows, sizes["width"], device=device)).to(dtype)
    return {
        "queries": queries.requires_grad_(),
        "table": table.requires_grad_(),
        "positive": torch.randint(1, rows, (tokens,), device=device),
        "negative": torch.randint(1, rows, (tokens, sizes["negatives"]), device=device),
    }


def ours(inputs: Inputs, backend: str | None = None) -> Tensor:
    return sampled_softmax_loss(*inputs.values(), temperature=TEMPERATURE, l2_norm=True, eps=EPS, backend=backend)


def published(inputs: Inputs) -> Tensor:
    """Positives and negatives looked up, normalized and scored apart, as in the published code."""
    queries, table, positive, negative = inputs.values()

    def scores(ids: Tensor) -> Tensor:
        rows = F.embedding(ids, table)
        rows = rows / torch.linalg.norm(rows, dim=-1, keepdim=True).clamp(min=EPS)
        return torch.einsum("td,tsd->ts", queries, rows) / TEMPERATURE

    others = torch.where(negative == positive[:, None], -5e4, scores(negative))
    return -F.log_softmax(torch.cat([scores(positive[:, None]), others], dim=1), dim=1)[:, 0]


def moved(sizes: Sizes, dtype: torch.dtype) -> float:
    """Queries, the rows that some id names, once, ids and losses."""
    tokens, negatives = sizes["tokens"], sizes["negatives"]
    named = min(sizes["rows"], tokens * (negatives + 1))
    return (tokens + named) * sizes["width"] * dtype.itemsize + tokens * (8 * (negatives + 1) + 4)


BENCHMARK = Benchmark(
    op="sampled_softmax",
    shapes={
        "ml-1m": {"tokens": 14_000, "negatives": 128, "width": 50, "rows": 3_953},
        "ml-20m": {"tokens": 14_000, "negatives": 128, "width": 256, "rows": 131_263, "devices": ("cuda",)},
        "amzn-books": {"tokens": 6_400, "negatives": 512, "width": 64, "rows": 695_763, "devices": ("cuda",)},
    },
    make=make,
    providers={"ops": ours, "reference": partial(ours, backend="reference"), "naive": published},
    leaves=lambda inputs: [inputs["queries"], inputs["table"]],
    flops=lambda sizes: 2 * sizes["tokens"] * (sizes["negatives"] + 1) * sizes["width"],
    bytes=moved,
    # The published form rounds its logits, of about 10, to bfloat16.
    agree={"float32": 1e-3, "bfloat16": 6e-2},
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def step(dtype: torch.dtype, table_dtype: torch.dtype, width: int, full: bool, sparse_grad: bool = False) -> None:
        queries = torch.zeros(3, width, dtype=dtype, requires_grad=True)
        table = torch.zeros(9, width, dtype=table_dtype, requires_grad=True)
        ids = torch.arange(3), torch.zeros(3, 7, dtype=torch.int64)
        log_q = torch.zeros(9) if full else None
        options: dict[str, Any] = {"l2_norm": full, "item_log_q": log_q, "sparse_grad": sparse_grad}
        losses = sampled_softmax_loss(queries, table, *ids, temperature=TEMPERATURE, **options, backend="triton")
        losses.sum().backward()

    def evaluate(dtype: torch.dtype, width: int) -> None:
        ids = torch.arange(3), torch.zeros(3, 7, dtype=torch.int64)
        rows = torch.zeros(3, width, dtype=dtype), torch.zeros(9, width, dtype=dtype)
        sampled_softmax_loss(*rows, *ids, temperature=TEMPERATURE, l2_norm=True, backend="triton")

    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    for width in (50, 256, 1024):
        yield f"float32 width {width} without gradients", partial(evaluate, single, width)
    yield "float16 width 50", partial(step, half, half, 50, True)
    yield "bfloat16 and float32 width 50", partial(step, bfloat, single, 50, True)
    yield "float32 width 50 sparse", partial(step, single, single, 50, True, True)
    for dtype in (bfloat, single):
        # Aligned and odd widths of every row of the tables.
        for width in (64, 50, 128, 256, 200, 1024, 777):
            for full in (False, True):
                name = f"{dtype} width {width}".removeprefix("torch.")
                yield f"{name} {'normalized, log q' if full else 'plain'}", partial(step, dtype, dtype, width, full)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
