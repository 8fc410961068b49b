"""Ranks of targets by counting, beside the published protocol, which sorts 2,500 plus the history; and the k best.

python benchmarks/ops/bench_rank.py [--device cuda] [--shape million]
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
from ops.rank import gpu, rank_of_target, topk

PUBLISHED_K, K = 2_500, 100

Inputs = dict[str, Tensor]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    users, items, history = sizes["users"], sizes["items"], sizes["history"]
    seen = torch.randint(1, items + 1, (users, history), device=device)
    return {
        "queries": torch.randn(users, sizes["width"], device=device, dtype=dtype),
        "table": torch.randn(items + 1, sizes["width"], device=device, dtype=dtype),
        "candidates": torch.arange(1, items + 1, device=device),
        "targets": torch.randint(1, items + 1, (users,), device=device),
        "seen": seen,
        "offsets": torch.arange(users + 1, device=device) * history,
    }


def published_k(inputs: Inputs) -> int:
    """Ranks beyond are not told apart by the protocol."""
    return min(PUBLISHED_K, len(inputs["candidates"]) - inputs["seen"].shape[1])


def ours(inputs: Inputs, backend: str | None = None) -> Tensor:
    ranks = rank_of_target(
        *(inputs[name] for name in ("queries", "table", "candidates", "targets", "offsets")),
        inputs["seen"].flatten(),
        backend=backend,
    )
    limit = published_k(inputs)
    return torch.where((ranks == 0) | (ranks > limit), limit + 1, ranks)


def published(inputs: Inputs) -> Tensor:
    """Fetch the 2,500 + N best of the full matrix, strike the seen ones by comparison, find the target."""
    candidates, seen, limit = inputs["candidates"], inputs["seen"], published_k(inputs)
    scores = inputs["queries"].float() @ inputs["table"][candidates].float().T
    ids = candidates[scores.topk(min(PUBLISHED_K + seen.shape[1], len(candidates)), dim=1).indices]
    # By rows of 256, as an evaluation batch would: the comparison is rows x 2,711 x 211.
    valid = torch.cat(
        [~(a[:, :, None] == b[:, None, :]).any(2) for a, b in zip(ids.split(256), seen.split(256), strict=True)]
    )
    place = valid.cumsum(1)
    hit = (ids == inputs["targets"][:, None]) & valid & (place <= limit)
    return torch.where(hit.any(1), (place * hit).sum(1), limit + 1)


def best(inputs: Inputs) -> tuple[Tensor, ...]:
    arguments = (inputs[name] for name in ("queries", "table", "candidates"))
    return topk(*arguments, K, inputs["offsets"], inputs["seen"].flatten())


def torch_best(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same, by a mask over the full matrix."""
    scores = inputs["queries"].float() @ inputs["table"][inputs["candidates"]].float().T
    scores.scatter_(1, inputs["seen"] - 1, float("-inf"))
    values, places = scores.topk(K, dim=1)
    return values, inputs["candidates"][places]


BENCHMARK = Benchmark(
    op="rank",
    shapes={
        "ml-100k": {"users": 943, "items": 1_682, "width": 50, "history": 105},
        "ml-1m": {"users": 6_040, "items": 3_883, "width": 50, "history": 211},
        "million": {"users": 2_048, "items": 1_000_000, "width": 64, "history": 211},
    },
    make=make,
    providers={
        "ops": ours,
        "reference": partial(ours, backend="reference"),
        "published": published,
        "ops topk": best,
        "torch topk": torch_best,
    },
    flops=lambda sizes: 2 * sizes["users"] * sizes["items"] * sizes["width"],
    bytes=lambda sizes, dtype: (sizes["users"] + sizes["items"]) * sizes["width"] * dtype.itemsize,
    # Whole matrices of scores, sorted: 8 GB and several times that.
    skip=lambda provider, shape, device: shape == "million" and provider in ("reference", "published", "torch topk"),
    unlike=("ops topk", "torch topk"),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def call(
        dtype: torch.dtype, width: int, k: int, seen: bool, allow_tf32: bool, table_dtype: torch.dtype | None = None
    ) -> None:
        with tf32(allow_tf32):
            arguments = (
                torch.zeros(3, width, dtype=dtype),
                torch.zeros(9, width, dtype=table_dtype or dtype),
                torch.arange(9),
            )
            rest = (torch.tensor([0, 1, 1, 2]), torch.tensor([3, 4]))
            options = {"filter_history": seen, "backend": "triton"}
            rank_of_target(*arguments, torch.arange(3), *rest, **options)
            topk(*arguments, k, *rest, **options)

    def in_blocks(k: int) -> None:
        candidates, seen = torch.arange(9), (torch.tensor([0, 1, 1, 2]), torch.tensor([3, 4]))
        block = (slice(0, 3), gpu.given(torch.zeros(3, 9)))
        gpu.rank_in_blocks([block], candidates, torch.arange(3), seen)
        gpu.topk_in_blocks([block], candidates, k, seen, 3)

    for k in (10, 200):
        yield f"given k {k} seen", partial(in_blocks, k)
    for dtype in (torch.float32, torch.bfloat16):
        for allow_tf32 in (False, True) if dtype == torch.float32 else (False,):
            # One piece and several, aligned and odd widths; every size of the k best.
            for width, k, seen in ((64, 10, False), (50, 50, True), (240, 100, True), (64, 200, True)):
                words = (str(dtype).removeprefix("torch."), width, "tf32" if allow_tf32 else "ieee", "k", k)
                name = " ".join(map(str, (*words, "seen" if seen else "unseen")))
                yield name, partial(call, dtype, width, k, seen, allow_tf32)
    for allow_tf32 in (False, True):
        name = f"bfloat16 and float32 50 {'tf32' if allow_tf32 else 'ieee'} k 100 seen"
        yield name, partial(call, torch.bfloat16, 50, 100, True, allow_tf32, torch.float32)
    yield "float16 64 ieee k 10 seen", partial(call, torch.float16, 64, 10, True, False)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
