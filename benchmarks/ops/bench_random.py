"""Uniform integers by counters beside PyTorch's generator, at the negatives of a training step.

python benchmarks/ops/bench_random.py [--device cuda]
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
from ops.random import MAX_HIGH, uniform_ints

SEED = 12345


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {"keys": torch.arange(sizes["tokens"], device=device), "count": sizes["count"], "high": sizes["high"]}


def ours(inputs: dict[str, Any], backend: str | None = None) -> Tensor:
    return uniform_ints(SEED, inputs["keys"], inputs["count"], inputs["high"], backend=backend)


def torch_randint(inputs: dict[str, Any]) -> Tensor:
    keys = inputs["keys"]
    return torch.randint(inputs["high"], (len(keys), inputs["count"]), device=keys.device)


BENCHMARK = Benchmark(
    op="random",
    shapes={
        "ml-1m step": {"tokens": 14_000, "count": 128, "high": 3_883, "dtypes": ("int64",)},
        "large catalogue": {"tokens": 14_000, "count": 128, "high": 400_000_000, "dtypes": ("int64",)},
    },
    make=make,
    providers={"ops": ours, "reference": partial(ours, backend="reference"), "torch": torch_randint},
    bytes=lambda sizes, dtype: 8 * sizes["tokens"] * (sizes["count"] + 1),
    # Its generator is another one.
    unlike=("torch",),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, high in (("one lane", 1_000), ("two lanes", MAX_HIGH)):
        yield name, partial(uniform_ints, SEED, torch.arange(5), 3, high, backend="triton")


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
