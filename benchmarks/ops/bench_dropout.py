"""Dropout by counters beside PyTorch's, which reads a mask it saved.

python benchmarks/ops/bench_dropout.py [--device cuda]
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
from ops.dropout import dropout

RATE, SEED = 0.2, 12345


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(sizes["tokens"], sizes["width"], device=device, dtype=dtype, requires_grad=True)
    return {"x": x, "keys": torch.arange(sizes["tokens"], device=device)}


def ours(inputs: dict[str, Any], backend: str | None = None) -> Tensor:
    return dropout(inputs["x"], RATE, SEED, inputs["keys"], backend=backend)


BENCHMARK = Benchmark(
    op="dropout",
    shapes={
        "ml-1m step": {"tokens": 14_000, "width": 50},
        "long batch": {"tokens": 200_000, "width": 256, "devices": ("cuda",)},
    },
    make=make,
    providers={
        "ops": ours,
        "reference": partial(ours, backend="reference"),
        "torch": lambda inputs: F.dropout(inputs["x"], RATE),
    },
    leaves=lambda inputs: [inputs["x"]],
    bytes=lambda sizes, dtype: 2 * sizes["tokens"] * sizes["width"] * dtype.itemsize,
    # Its mask is another one.
    unlike=("torch",),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def step(dtype: torch.dtype) -> None:
        x, keys = torch.randn(5, 50, dtype=dtype, requires_grad=True), torch.arange(5)
        dropout(x, RATE, SEED, keys, backend="triton").sum().backward()

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield str(dtype).removeprefix("torch."), partial(step, dtype)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
