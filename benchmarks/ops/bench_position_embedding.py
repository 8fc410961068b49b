"""Position and time embeddings in one pass beside the separate PyTorch calls.

python benchmarks/ops/bench_position_embedding.py [--device cuda]
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
from ops.jagged import lengths_to_offsets
from ops.position_embedding import position_embedding

Inputs = dict[str, Any]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Rows of uniformly drawn lengths; buckets 0: positions alone, counted from the oldest."""
    batch, longest, width = sizes["rows"], sizes["longest"], sizes["width"]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
    total = int(lengths.sum())
    x = torch.randn(total, width, device=device, dtype=dtype, requires_grad=True)
    draw = partial(torch.randn, device=device, requires_grad=True)
    inputs: Inputs = {"x": x, "offsets": lengths_to_offsets(lengths).to(device), "positions": draw(longest + 1, width)}
    if sizes["buckets"]:
        times = torch.randint(0, 100_000, (total,), generator=generator).cumsum(0).to(device)
        targets = torch.minimum(torch.tensor(20), lengths).to(device)
        inputs |= {"table": draw(sizes["buckets"] + 1, width), "times": times, "targets": targets}
    return inputs


def ours(inputs: Inputs, backend: str | None = None) -> Tensor:
    x, width = inputs["x"], inputs["x"].shape[1]
    options: dict[str, Any] = {"count_from": "oldest"}
    if "table" in inputs:
        options = {"time_table": inputs["table"], "timestamps": inputs["times"], "num_targets": inputs["targets"]}
    return position_embedding(x, inputs["offsets"], inputs["positions"], alpha=width**0.5, **options, backend=backend)


def separate_steps(inputs: Inputs) -> Tensor:
    """The published formula, buckets in float32."""
    x, offsets = inputs["x"], inputs["offsets"]
    lengths = offsets.diff()
    rows = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths, output_size=x.shape[0])
    index = torch.arange(x.shape[0], device=x.device) - offsets[rows]
    if "table" in inputs:
        highest = (lengths - inputs["targets"])[rows]
        index = highest - torch.minimum(index, highest)
    y = x * x.shape[1] ** 0.5 + F.embedding(index, inputs["positions"])
    if "table" in inputs:
        elapsed = (inputs["times"][offsets[1:][rows] - 1] - inputs["times"]).clamp(min=1e-6) / 60
        bucket = elapsed.sqrt().clamp(0, inputs["table"].shape[0] - 1).long()
        y = y + F.embedding(bucket, inputs["table"])
    return y.to(x.dtype)


BENCHMARK = Benchmark(
    op="position_embedding",
    shapes={
        "ml-1m step": {"rows": 128, "longest": 200, "width": 50, "buckets": 0},
        "times": {"rows": 128, "longest": 200, "width": 64, "buckets": 2048},
        "long rows": {"rows": 512, "longest": 2048, "width": 512, "buckets": 2048, "devices": ("cuda",)},
    },
    make=make,
    providers={"ops": ours, "reference": partial(ours, backend="reference"), "torch": separate_steps},
    leaves=lambda inputs: [inputs[name] for name in ("x", "positions", "table") if name in inputs],
    # Beside a bucket's edge float32 takes the other bucket.
    unlike=("torch",),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    offsets = torch.tensor([0, 3, 3, 8])

    def step(dtype: torch.dtype, table_dtype: torch.dtype, width: int, newest: bool, timed: bool) -> None:
        x = torch.zeros(8, width, dtype=dtype, requires_grad=True)
        positions, times = (torch.zeros(n, width, dtype=table_dtype, requires_grad=True) for n in (5, 9))
        options: dict[str, Any] = {"count_from": "oldest"}
        if newest:
            options = {"num_targets": torch.tensor([1, 0, 2]), "contextual_seq_len": 2, "interleaved_targets": timed}
        if timed:
            options |= {"time_table": times, "timestamps": torch.arange(8)}
        position_embedding(x, offsets, positions, **options, backend="triton").sum().backward()

    for dtype, table_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        for width in (50, 256):
            for newest, timed in ((False, False), (True, True)):
                name = f"{dtype} and {table_dtype} width {width}".replace("torch.", "")
                call = partial(step, dtype, table_dtype, width, newest, timed)
                yield f"{name} {'newest' if newest else 'oldest'}{' timed' if timed else ''}", call


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
