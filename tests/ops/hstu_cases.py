"""Cases of HSTU attention, and running them: what its test files share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.hstu_attention import cpu, hstu_attention, reference
from ops.hstu_attention.arguments import Inputs, Settings
from ops.testing import Place, places

PLACES = places(cpu.refuses)
KERNELS = places(cpu.refuses, reference=False)
needs_compiler = pytest.mark.skipif(cpu.refuses() is not None, reason="no C++ compiler")
BUCKETS = 128
NAMES = ("out", "q", "k", "v", "position_weights", "time_weights")


def make_case(
    lengths: list[int],
    heads: int = 2,
    key_dim: int = 5,
    value_dim: int = 3,
    *,
    n: int | None = None,
    dtype: torch.dtype = torch.float64,
    position: str | None = "shared",
    time: str | None = "shared",
    seed: int = 0,
    time_range: int = 10**6,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """(q, k, v, offsets), keyword arguments, and a gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    n = n or max([*lengths, 1])
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = normal(total, heads, key_dim), normal(total, heads, key_dim), normal(total, heads, value_dim)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    kwargs: dict[str, Any] = {"max_seq_len": n, **options}
    if position is not None:
        kwargs["position_weights"] = normal(*([heads] if position == "per_head" else []), 2 * n - 1)
    if time is not None:
        kwargs["time_weights"] = normal(*([heads] if time == "per_head" else []), BUCKETS + 1)
        kwargs["key_times"] = torch.randint(-time_range, time_range, (total,), generator=g)
        kwargs["query_times"] = kwargs["key_times"] + torch.randint(-50, 50, (total,), generator=g)
    return [q, k, v, offsets], kwargs, normal(total, heads, value_dim)


def run(
    inputs: list[Tensor],
    kwargs: dict[str, Any],
    grad: Tensor,
    backend: str | Place,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output and every gradient by name, computed in `dtype`; the reference throughout in `compute_dtype`."""
    place = backend if isinstance(backend, Place) else Place(backend)
    inputs, kwargs, grad = place.put((inputs, kwargs, grad))
    tables = {name: kwargs[name] for name in NAMES[4:] if kwargs.get(name) is not None}
    leaves = {**dict(zip("qkv", inputs[:3], strict=True)), **tables}
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    others = {**kwargs, **{name: leaves[name] for name in tables}}
    if isinstance(kwargs.get("scale"), Tensor) and dtype is not None:
        others["scale"] = kwargs["scale"].to(dtype)
    arguments = (leaves["q"], leaves["k"], leaves["v"], inputs[3])
    if compute_dtype is None:
        out = hstu_attention(*arguments, **others, backend=place.backend)
    else:
        out = in_one_dtype(*arguments, others, compute_dtype)
    grads = torch.autograd.grad(out, tuple(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def in_one_dtype(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, options: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    """What ordinary PyTorch makes of the formula in this type."""
    fields = {**options, "scales": options.get("scale")}
    settings = {name: options[name] for name in Settings._fields if name in options and name != "scale"}
    x = Inputs(q, k, v, *(fields.get(name) for name in Inputs._fields[3:]))._replace(offsets=offsets)
    return reference.hstu_attention(x, Settings(**settings, scale=1 / options["max_seq_len"]), dtype)
