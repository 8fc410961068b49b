"""Mixture-of-Logits scores beside plain PyTorch, which holds all (B, X, P) logits and (B, X, H) hidden values.

python benchmarks/ops/bench_mol_score.py [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import Benchmark, Sizes
from benchmarks.measuring import tf32
from ops.mol_score import MoLDropout, MoLGate, MoLItems, MoLQueries, mol_score, mol_score_with_mixture

TEMPERATURE = 0.05

Inputs = dict[str, Any]


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Components of unit norm and layers as at construction. own: items of each query instead of shared ones."""
    batch, items, n, m, width, hidden = (sizes[x] for x in ("batch", "items", "n", "m", "width", "hidden"))
    lead = (batch, items) if sizes["own"] else (items,)
    logits = n * m

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(dtype).requires_grad_()

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, device=device), dim=-1).to(dtype).requires_grad_()

    return {
        "queries": MoLQueries(unit(batch, n, width), draw(batch, logits)),
        "items": MoLItems(unit(*lead, m, width), draw(*lead, logits)),
        "gate": MoLGate(
            *(draw(logits, hidden, scale=(2 / (logits + hidden)) ** 0.5), draw(hidden, scale=0.1)),
            *(draw(hidden, logits, scale=(2 / (logits + hidden)) ** 0.5), draw(logits, scale=0.1)),
        ),
    }


def leaves(inputs: Inputs) -> list[Tensor]:
    q, x, g = inputs["queries"], inputs["items"], inputs["gate"]
    return [q.components, q.gate, x.components, x.gate, g.w1, g.b1, g.w2, g.b2]


def ours(inputs: Inputs, backend: str | None = None) -> Tensor:
    return mol_score(**inputs, temperature=TEMPERATURE, backend=backend)


def plain(inputs: Inputs) -> Tensor:
    q, q_gate, x, x_gate, w1, b1, w2, b2 = leaves(inputs)
    products = torch.einsum("bnd,xmd->bxnm" if x.dim() == 3 else "bnd,bxmd->bxnm", q, x)
    logits = products.flatten(2) / TEMPERATURE
    g = q_gate[:, None] * x_gate + F.silu(logits @ w1 + b1) @ w2 + b2
    return (torch.softmax(g * torch.sigmoid(g), dim=-1) * logits).sum(-1)


PUBLISHED = {"n": 8, "m": 4, "width": 64, "hidden": 128}
BENCHMARK = Benchmark(
    op="mol_score",
    shapes={
        "ml-1m catalogue": {"batch": 128, "items": 3_883, **PUBLISHED, "own": False},
        "ml-1m negatives": {"batch": 1_024, "items": 128, **PUBLISHED, "own": True},
        "ml-20m catalogue": {
            "batch": 512,
            "items": 26_744,
            **PUBLISHED,
            "width": 128,
            "own": False,
            "devices": ("cuda",),
        },
        "books negatives": {
            "batch": 8_192,
            "items": 128,
            **PUBLISHED,
            "m": 8,
            "width": 32,
            "own": True,
            "devices": ("cuda",),
        },
    },
    make=make,
    providers={"ops": ours, "reference": partial(ours, backend="reference"), "torch": plain},
    leaves=leaves,
    flops=lambda sizes: (
        2 * sizes["batch"] * sizes["items"] * sizes["n"] * sizes["m"] * (sizes["width"] + 2 * sizes["hidden"])
    ),
    # Plain PyTorch rounds at every step, and its gate after logits 20 times a cosine.
    agree={"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05},
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def step(dtype: torch.dtype, sizes: dict[str, int], gate: dict[str, Any], drops: bool, allow_tf32: bool) -> None:
        with tf32(allow_tf32):
            inputs = make({"batch": 2, "items": 3, "hidden": 128, **sizes}, torch.device("cpu"), dtype)
            inputs["gate"] = replace(inputs["gate"], **gate)
            options = {"temperature": TEMPERATURE, "backend": "triton"}
            if drops:
                outputs = mol_score_with_mixture(**inputs, dropout=MoLDropout(1, 0.1, 0.2), **options)
            else:
                outputs = (mol_score(**inputs, **options),)
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    parts = {"8x4x64": (8, 4, 64), "8x4x128": (8, 4, 128), "8x8x32": (8, 8, 32), "16x8x128": (16, 8, 128)}
    for dtype in (torch.float32, torch.bfloat16):
        for allow_tf32 in (False, True) if dtype == torch.float32 else (False,):
            for own, drops in ((False, False), (False, True), (True, True)):
                for part, (n, m, width) in parts.items():
                    sizes = {"n": n, "m": m, "width": width, "own": own}
                    words = (str(dtype).removeprefix("torch."), "tf32" if allow_tf32 else "ieee", part)
                    name = " ".join((*words, "own" if own else "shared", *["dropout"] * drops))
                    yield name, partial(step, dtype, sizes, {}, drops, allow_tf32)
    square = {"w1": None, "b1": None, "w2": torch.zeros(6, 6), "combination": "glu_silu_ln"}
    odd = {"n": 2, "m": 3, "width": 25, "own": False}
    yield "float32 ieee 2x3x25 shared, no hidden layer", partial(step, torch.float32, odd, square, True, False)
    yield (
        "float16 ieee 8x4x64 shared dropout",
        partial(step, torch.float16, {**PUBLISHED, "own": False}, {}, True, False),
    )


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
