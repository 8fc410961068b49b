"""Norm, gate and dropout in one pass beside the separate PyTorch calls, one by one and compiled by Inductor.

python benchmarks/ops/bench_norm_mul_dropout.py [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import Benchmark, Sizes
from ops.norm_mul_dropout import norm_mul_dropout
from ops.norm_mul_dropout.form import SEGMENTS

RATE, SEED, EPS = 0.2, 12345, 1e-6
DLRM_V3 = {"tokens": 100_000, "width": 512, "affine": True, "output": "concat_raw", "devices": ("cuda",)}


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """y alone and u a slice of the layer's projection [u, v, q, k], as in HSTU."""
    tokens, width = sizes["tokens"], sizes["width"]
    projection = torch.randn(tokens, 4 * width, device=device, dtype=dtype, requires_grad=True)
    inputs = {"y": torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True), "projection": projection}
    if sizes["affine"]:
        inputs |= {"weight": torch.ones(width, device=device, requires_grad=True)}
        inputs |= {"bias": torch.zeros(width, device=device, requires_grad=True)}
    return {**inputs, "keys": torch.arange(tokens, device=device), "output": sizes["output"], "groups": sizes["groups"]}


def ours(inputs: dict[str, Any], backend: str | None = None) -> Tensor:
    y = inputs["y"]
    return norm_mul_dropout(
        y,
        inputs["projection"][:, : y.shape[1]],
        weight=inputs.get("weight"),
        bias=inputs.get("bias"),
        eps=EPS,
        num_groups=inputs["groups"],
        output=inputs["output"],
        dropout_rate=RATE,
        dropout_seed=SEED,
        keys_T=inputs["keys"],
        backend=backend,
    )


def separate_steps(inputs: dict[str, Any]) -> Tensor:
    y, weight, bias = inputs["y"], inputs.get("weight"), inputs.get("bias")
    u = inputs["projection"][:, : y.shape[1]]
    weight, bias = (None if x is None else x.to(y.dtype) for x in (weight, bias))
    if inputs["groups"] == 1:
        normed = F.layer_norm(y, y.shape[1:], weight, bias, EPS)
    else:
        normed = F.group_norm(y, inputs["groups"], weight, bias, EPS)
    if inputs["output"] == "product":
        return F.dropout(u * normed, RATE)
    return F.dropout(torch.cat([u, normed if inputs["output"] == "concat_normed" else y, u * normed], dim=1), RATE)


@cache
def compiled_steps() -> Callable[[dict[str, Any]], Tensor]:
    return torch.compile(separate_steps)


BENCHMARK = Benchmark(
    op="norm_mul_dropout",
    shapes={
        "ml-1m step": {"tokens": 14_000, "width": 50, "groups": 1, "affine": False, "output": "product"},
        "ml-20m step": {"tokens": 14_000, "width": 256, "groups": 1, "affine": False, "output": "product"},
        "ml-20m concat": {"tokens": 14_000, "width": 256, "groups": 1, "affine": False, "output": "concat_normed"},
        "dlrm-v3 layer": {"groups": 1, **DLRM_V3},
        "dlrm-v3 heads": {"groups": 4, **DLRM_V3},
    },
    make=make,
    providers={
        "ops": ours,
        "reference": partial(ours, backend="reference"),
        "torch": separate_steps,
        "torch.compile": lambda inputs: compiled_steps()(inputs),
    },
    leaves=lambda inputs: [inputs[name] for name in ("y", "projection", "weight", "bias") if name in inputs],
    bytes=lambda sizes, dtype: (2 + SEGMENTS[sizes["output"]]) * sizes["tokens"] * sizes["width"] * dtype.itemsize,
    skip=lambda provider, shape, device: provider == "torch.compile" and device == "cpu",
    # Their masks are others.
    unlike=("torch", "torch.compile"),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def step(dtype: torch.dtype, width: int, affine: bool, **options: Any) -> None:
        wide = torch.randn(40, 3 * width, dtype=dtype, requires_grad=True)
        weight, bias = (torch.ones(width, requires_grad=True) if affine else None for _ in range(2))
        y, u = wide[:, :width], wide[:, width : 2 * width]
        norm_mul_dropout(y, u, weight=weight, bias=bias, **options, backend="triton").sum().backward()

    dropped = {"dropout_rate": 0.2, "dropout_seed": SEED}
    for dtype in (torch.float32, torch.bfloat16):
        # Even and odd widths of every row of the table.
        for width in (25, 50, 64, 100, 200, 256, 512, 777, 1024, 2000):
            name = f"{str(dtype).removeprefix('torch.')} width {width}"
            options = {"output": "concat_raw", "u_activation": "silu", **dropped}
            yield f"{name} concat_raw silu", partial(step, dtype, width, True, **options)
    yield "float16 heads", partial(step, torch.float16, 128, True, num_groups=2, output="concat_normed", **dropped)
    for width in (50, 256):
        yield f"bfloat16 width {width} product", partial(step, torch.bfloat16, width, False, **dropped)
        yield f"bfloat16 width {width} plain", partial(step, torch.bfloat16, width, False, u_activation="sigmoid")
    yield "float32 width 50 concat_normed", partial(step, torch.float32, 50, False, output="concat_normed", **dropped)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
