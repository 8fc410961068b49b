"""Residual quantization beside the usual loop over levels, which holds a (T, C) matrix of distances.

python benchmarks/ops/bench_residual_quantize.py [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import Benchmark, Sizes
from benchmarks.measuring import tf32
from ops.residual_quantize import residual_quantize


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Small integers: every way to compute the distances is exact, so that all have to find the same codes."""

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, device=device).to(dtype)

    return {
        "x": integers(sizes["tokens"], sizes["width"]),
        "codebooks": integers(sizes["levels"], sizes["codes"], sizes["width"]),
    }


def ours(inputs: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, Tensor]:
    return residual_quantize(inputs["x"], inputs["codebooks"], backend=backend)


def loop_over_levels(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    residual, codes = inputs["x"].float(), []
    for codebook in inputs["codebooks"].float():
        distances = residual.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * residual @ codebook.T
        codes.append(distances.argmin(dim=1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=1), residual.to(inputs["x"].dtype)


BENCHMARK = Benchmark(
    op="residual_quantize",
    shapes={
        "rq-vae step": {"tokens": 2048, "width": 32, "levels": 3, "codes": 256},
        "small catalogue": {"tokens": 20_000, "width": 768, "levels": 3, "codes": 256},
        "catalogue": {"tokens": 1_000_000, "width": 768, "levels": 4, "codes": 256, "devices": ("cuda",)},
        "many codes": {"tokens": 1_000_000, "width": 64, "levels": 8, "codes": 2048, "devices": ("cuda",)},
    },
    make=make,
    providers={"ops": ours, "reference": partial(ours, backend="reference"), "torch": loop_over_levels},
    flops=lambda sizes: 2 * sizes["tokens"] * sizes["levels"] * sizes["codes"] * sizes["width"],
    bytes=lambda sizes, dtype: sizes["tokens"] * (2 * sizes["width"] * dtype.itemsize + 8 * sizes["levels"]),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def call(dtype: torch.dtype, tokens: int, width: int, allow_tf32: bool) -> None:
        with tf32(allow_tf32):
            x, codebooks = torch.zeros(tokens, width, dtype=dtype), torch.zeros(2, 256, width, dtype=dtype)
            residual_quantize(x, codebooks, backend="triton")

    for dtype in (torch.float32, torch.bfloat16):
        for allow_tf32 in (False, True):
            # A batch and a catalogue, aligned and odd widths.
            for tokens, width in ((64, 32), (64, 50), (9000, 768), (9000, 50)):
                name = f"{str(dtype).removeprefix('torch.')} {tokens} x {width} {'tf32' if allow_tf32 else 'ieee'}"
                yield name, partial(call, dtype, tokens, width, allow_tf32)
    yield "float16 9000 x 768 ieee", partial(call, torch.float16, 9000, 768, False)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
