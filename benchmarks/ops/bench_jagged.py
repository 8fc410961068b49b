"""Padding, joining, cutting and multiplying jagged rows beside index arithmetic in PyTorch and FBGEMM's operators.

python benchmarks/ops/bench_jagged.py [--device cuda]
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
from ops.jagged import (
    concat_jagged,
    fbgemm,
    jagged_dense_bmm,
    jagged_to_padded,
    last_n,
    lengths_to_offsets,
    padded_to_jagged,
    positions,
    rows,
    split_jagged,
)

TARGETS, OUTER = 20, 256
# What FBGEMM has an operator for.
FBGEMM = ("offsets", "positions", "pad", "unpad")

Inputs = dict[str, Any]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Rows of uniformly drawn lengths up to `longest`."""
    batch, longest, width = sizes["rows"], sizes["longest"], sizes["width"]
    lengths = torch.randint(0, longest + 1, (batch,), generator=torch.Generator().manual_seed(0))
    total = int(lengths.sum())
    draw = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    inputs: Inputs = {"call": sizes["call"], "lengths": lengths.to(device), "longest": longest}
    inputs |= {"offsets": lengths_to_offsets(lengths).to(device), "total": total}
    inputs["kept"] = int(lengths.clamp(max=TARGETS).sum())
    if width:
        inputs["values"] = draw(batch, longest, width) if sizes["call"] == "unpad" else draw(total, width)
    if sizes["call"] == "bmm":
        inputs |= {"weight": draw(batch, width, OUTER), "bias": draw(batch, OUTER)}
    if sizes["call"] in ("concat", "split"):
        inputs["targets"] = draw(batch, TARGETS, width)
        inputs["joint"], inputs["joint_offsets"] = concat_jagged(
            inputs["values"].detach(), inputs["targets"].detach(), left_offsets=inputs["offsets"]
        )
        inputs["joint"].requires_grad_()
    return inputs


CALLS: dict[str, Callable[..., Any]] = {
    "offsets": lambda x, **b: lengths_to_offsets(x["lengths"], **b),
    "rows": lambda x, **b: rows(x["offsets"], x["total"], **b),
    "positions": lambda x, **b: positions(x["offsets"], x["total"], **b),
    "pad": lambda x, **b: jagged_to_padded(x["values"], x["offsets"], x["longest"], **b),
    "unpad": lambda x, **b: padded_to_jagged(x["values"], x["offsets"], x["total"], **b),
    "concat": lambda x, **b: concat_jagged(x["values"], x["targets"], left_offsets=x["offsets"], **b)[0],
    "split": lambda x, **b: split_jagged(x["joint"], x["joint_offsets"], right_len=TARGETS, **b)[:2],
    "last": lambda x, **b: last_n(x["values"], x["offsets"], TARGETS, total=x["kept"], **b)[0],
    "bmm": lambda x, **b: jagged_dense_bmm(x["values"], x["offsets"], x["weight"], x["bias"], **b),
}


def run(inputs: Inputs, backend: str | None = None) -> Any:
    """By default the form of this project for the device, which is not always what "auto" takes."""
    own = "triton" if inputs["offsets"].is_cuda else "cpu"
    wanted = backend or (None if inputs["call"] in ("offsets", "rows", "positions") and own == "cpu" else own)
    return CALLS[inputs["call"]](inputs, backend=wanted)


def leaves(inputs: Inputs) -> list[Tensor]:
    names = {"concat": ("values", "targets"), "split": ("joint",), "bmm": ("values", "weight", "bias")}
    return [inputs[name] for name in names.get(inputs["call"], ("values",)) if name in inputs]


def skip(provider: str, shape: str, device: str) -> bool:
    if provider != "fbgemm":
        return False
    # Asking about the machine imports it, which asking about a CPU tensor does not.
    return (
        SHAPES[shape]["call"] not in FBGEMM
        or (fbgemm.refuses() or fbgemm.refuses(torch.empty(0, device=device))) is not None
    )


def shapes() -> dict[str, Sizes]:
    small = {"rows": 128, "longest": 200, "width": 64}
    large = {"rows": 512, "longest": 2048, "width": 256, "devices": ("cuda",)}
    found: dict[str, Sizes] = {}
    for call in CALLS:
        for name, sizes in (("ml-1m", small), ("long", large)):
            width = 0 if call in ("offsets", "rows", "positions") else sizes["width"]
            found[f"{call} {name}"] = {"call": call, **sizes, "width": width}
    return found


SHAPES = shapes()
BENCHMARK = Benchmark(
    op="jagged",
    shapes=SHAPES,
    make=make,
    providers={"ops": run, "reference": partial(run, backend="reference"), "fbgemm": partial(run, backend="fbgemm")},
    leaves=leaves,
    skip=skip,
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    offsets = torch.tensor([0, 3, 3, 8])

    def indices() -> None:
        lengths_to_offsets(torch.tensor([3, 0, 5]), backend="triton")
        rows(offsets, 8, backend="triton")
        positions(offsets, 8, backend="triton")

    def moves(dtype: torch.dtype, *shape: int) -> None:
        values, dense = torch.zeros(8, *shape, dtype=dtype), torch.zeros(3, 5, *shape, dtype=dtype)
        jagged_to_padded(values, offsets, 5, backend="triton")
        padded_to_jagged(dense, offsets, 8, backend="triton")
        concat_jagged(values, dense, left_offsets=offsets, backend="triton")
        last_n(values, offsets, 2, total=4, backend="triton")

    def products(dtype: torch.dtype, inner: int, outer: int) -> None:
        shapes = ((8, inner), (3, inner, outer), (3, outer))
        values, weight, bias = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        jagged_dense_bmm(values, offsets, weight, bias, backend="triton").sum().backward()

    yield "indices", indices
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for shape in ((), (25,), (64,), (50,)):
            yield f"{str(dtype).removeprefix('torch.')} {shape}", partial(moves, dtype, *shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for inner, outer in ((25, 17), (64, 64), (256, 256)):
            name = f"{str(dtype).removeprefix('torch.')} {inner} x {outer}"
            yield name, partial(products, dtype, inner, outer)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
