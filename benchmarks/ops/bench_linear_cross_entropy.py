"""Full softmax beside the same from a whole matrix of logits, and beside sampled softmax, which it stands in for.

python benchmarks/ops/bench_linear_cross_entropy.py [--device cuda] [--shape million]
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
from benchmarks.measuring import tf32
from ops.linear_cross_entropy import linear_cross_entropy
from ops.sampled_softmax import sampled_softmax_loss

TEMPERATURE, EPS, NEGATIVES = 0.05, 1e-6, 128

Inputs = dict[str, Tensor]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Normalized queries, a table as it is initialized with padding in row 0, targets drawn uniformly."""
    tokens, items = sizes["tokens"], sizes["items"]
    queries = F.normalize(torch.randn(tokens, sizes["width"], device=device), dim=1).to(dtype)
    table = (0.02 * torch.randn(items + 1, sizes["width"], device=device)).to(dtype)
    return {
        "queries": queries.requires_grad_(),
        "table": table.requires_grad_(),
        "catalogue": torch.arange(1, items + 1, device=device),
        "targets": torch.randint(1, items + 1, (tokens,), device=device),
        "negative": torch.randint(1, items + 1, (tokens, NEGATIVES), device=device),
    }


def ours(inputs: Inputs, backend: str | None = None) -> Tensor:
    arguments = (inputs[name] for name in ("queries", "table", "catalogue", "targets"))
    return linear_cross_entropy(*arguments, temperature=TEMPERATURE, l2_norm=True, eps=EPS, backend=backend)


def whole_matrix(inputs: Inputs) -> Tensor:
    items = F.normalize(inputs["table"][1:], dim=1, eps=EPS)
    logits = inputs["queries"] @ items.T / TEMPERATURE
    return F.cross_entropy(logits, inputs["targets"] - 1, reduction="none")


def sampled(inputs: Inputs) -> Tensor:
    arguments = (inputs[name] for name in ("queries", "table", "targets", "negative"))
    return sampled_softmax_loss(*arguments, temperature=TEMPERATURE, l2_norm=True, eps=EPS)


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    shapes={
        "ml-1m": {"tokens": 14_000, "items": 3_883, "width": 50},
        "million": {"tokens": 4_096, "items": 1_000_000, "width": 64},
    },
    make=make,
    providers={
        "ops": ours,
        "reference": partial(ours, backend="reference"),
        "naive": whole_matrix,
        "sampled softmax": sampled,
    },
    leaves=lambda inputs: [inputs["queries"], inputs["table"]],
    flops=lambda sizes: 2 * sizes["tokens"] * sizes["items"] * sizes["width"],
    bytes=lambda sizes, dtype: (sizes["tokens"] + sizes["items"]) * sizes["width"] * dtype.itemsize,
    # A matrix of logits has 16 GB, and there are several.
    skip=lambda provider, shape, device: shape == "million" and provider in ("reference", "naive"),
    # 128 candidates a token, its own ones.
    unlike=("sampled softmax",),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def step(dtype: torch.dtype, table_dtype: torch.dtype, width: int, full: bool, allow_tf32: bool = False) -> None:
        queries = torch.zeros(3, width, dtype=dtype, requires_grad=True)
        table = torch.zeros(9, width, dtype=table_dtype, requires_grad=True)
        # A range of ids is read in place.
        catalogue = torch.tensor([1, 2, 5]) if full else torch.arange(1, 9)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "l2_norm": full, "backend": "triton"}
        with tf32(allow_tf32):
            losses = linear_cross_entropy(queries, table, catalogue, torch.tensor([1, 2, 5]), **options)
            losses.sum().backward()

    def evaluate(dtype: torch.dtype, width: int) -> None:
        rows = torch.zeros(3, width, dtype=dtype), torch.zeros(9, width, dtype=dtype)
        ids = torch.arange(1, 9), torch.tensor([1, 2, 5])
        linear_cross_entropy(*rows, *ids, temperature=TEMPERATURE, l2_norm=True, backend="triton")

    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    for dtype in (bfloat, single):
        for width in (50, 100, 200):
            yield f"{dtype} width {width} without gradients".removeprefix("torch."), partial(evaluate, dtype, width)
    yield "bfloat16 and float32 width 50", partial(step, bfloat, single, 50, True)
    for dtype, allow_tf32 in ((half, False), (bfloat, False), (single, True), (single, False)):
        # Every row of the tables, in place and padded.
        for width, full in ((64, False), (128, False), (256, False), (50, True), (100, True), (200, True)):
            name = f"{dtype} width {width}{' tf32' if allow_tf32 else ''}".removeprefix("torch.")
            call = partial(step, dtype, dtype, width, full, allow_tf32)
            yield f"{name} {'normalized, chosen items' if full else 'plain'}", call


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
