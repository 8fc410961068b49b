"""HSTU attention on jagged rows, with and without bias, beside the padded eager step that builds N x N scores.

python benchmarks/ops/bench_hstu_attention.py [--device cuda]

The shapes called ml-1m are those of a training step: 128 rows with the dataset's lengths, padded to 211 in the naive
step. The others have heads of 128 as in HSTU-large at industrial sizes, lengths uniform up to the longest.
"""

from __future__ import annotations

import itertools
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
from ops.hstu_attention import hstu_attention, hstu_attention_cached

BUCKETS = 128
# Quantiles 0/32 .. 32/32 of the training lengths in ML-1M, min(events - 2, 200) over its 6,040 users; mean 108.
LENGTH_QUANTILES = (
    *(18, 20, 22, 25, 28, 31, 34, 38, 42, 46, 51, 57, 62, 69, 76, 84, 94, 101, 112, 122, 135, 149, 164, 185),
    *([200] * 9),
)


def ml_1m_lengths(batch: int, g: torch.Generator) -> Tensor:
    places = torch.rand(batch, generator=g) * (len(LENGTH_QUANTILES) - 1)
    table = torch.tensor(LENGTH_QUANTILES, dtype=torch.float32)
    low = places.long()
    return (table[low] + (places - low) * (table[low + 1] - table[low])).long()


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    batch, n, heads, dim = (sizes[name] for name in ("batch", "padded", "heads", "dim"))
    lengths = ml_1m_lengths(batch, g) if n == 211 else torch.randint(n // 2, n + 1, (batch,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    # Like the data: a third of the events share a second with the one before, sessions are minutes, pauses are months.
    kind, gap = torch.rand(total, generator=g), torch.empty(total).exponential_(generator=g)
    gaps = torch.where(kind < 0.35, 0.0, torch.where(kind < 0.98, 40.0 * gap, 3e6 * gap)).long()

    def leaf(*shape: int, size: float, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) * size).to(device, kind).requires_grad_()

    inputs: dict[str, Any] = {
        **{name: leaf(total, heads, dim, size=0.3) for name in "qkv"},
        "offsets": offsets.to(device),
        "times": gaps.cumsum(0).to(device),
        "n": n,
        "batch": batch,
    }
    if sizes["bias"]:
        inputs["position_weights"] = leaf(2 * n - 1, size=0.02, kind=torch.float32)
        inputs["time_weights"] = leaf(BUCKETS + 1, size=0.02, kind=torch.float32)
    return inputs


def leaves(x: dict[str, Any]) -> list[Tensor]:
    return [x[name] for name in ("q", "k", "v", "position_weights", "time_weights") if name in x]


def fused(x: dict[str, Any]) -> Tensor:
    return hstu_attention(
        *(x["q"], x["k"], x["v"], x["offsets"]),
        max_seq_len=x["n"],
        position_weights=x.get("position_weights"),
        time_weights=x.get("time_weights"),
        query_times=x["times"],
        key_times=x["times"],
    )


def naive(x: dict[str, Any]) -> Tensor:
    """The step as usually written: pad, materialize bias and scores for N x N, mask, and take the rows back."""
    batch, n, device = x["batch"], x["n"], x["q"].device
    lengths, steps = x["offsets"].diff(), torch.arange(n, device=device)
    inside_BN = steps < lengths[:, None]

    def pad(values: Tensor) -> Tensor:
        return values.new_zeros(batch, n, *values.shape[1:]).masked_scatter(
            inside_BN.view(batch, n, *[1] * (values.dim() - 1)), values
        )

    scores_BHNN = torch.einsum("bnhd,bmhd->bhnm", pad(x["q"]), pad(x["k"]))
    if "time_weights" in x:
        times_BN = pad(x["times"])
        gaps_BNN = (times_BN[:, :, None] - times_BN[:, None, :]).abs().clamp(min=1)
        buckets_BNN = (torch.log(gaps_BNN) / 0.301).long().clamp(0, BUCKETS)
        time_BNN = x["time_weights"].index_select(0, buckets_BNN.view(-1)).view(batch, n, n)
        positions_NN = n - 1 + steps[None, :] - steps[:, None]
        position_NN = x["position_weights"].index_select(0, positions_NN.view(-1)).view(n, n)
        scores_BHNN = scores_BHNN + (position_NN + time_BNN)[:, None].to(scores_BHNN.dtype)
    causal_NN = torch.ones(n, n, device=device, dtype=scores_BHNN.dtype).tril()
    weights_BHNN = F.silu(scores_BHNN) / n * causal_NN
    return torch.einsum("bhnm,bmhd->bnhd", weights_BHNN, pad(x["v"]))[inside_BN]


def flops(sizes: Sizes) -> float:
    """Two products over the visible pairs of rows of the mean length, and of its square."""
    n = sizes["padded"]
    square = 15_900.0 if n == 211 else n * n * 7 / 12
    return 4.0 * sizes["batch"] * sizes["heads"] * sizes["dim"] * square / 2


def shape(batch: int, padded: int, heads: int, dim: int, bias: int, *devices: str) -> dict[str, Any]:
    sizes = {"batch": batch, "padded": padded, "heads": heads, "dim": dim, "bias": bias}
    half_only = {"dtypes": ("bfloat16",)} if padded != 211 else {}
    return {**sizes, "devices": devices or ("cpu", "cuda"), **half_only}


BENCHMARK = Benchmark(
    op="hstu_attention",
    shapes={
        "ml-1m 1x50": shape(128, 211, 1, 50, 1),
        "ml-1m 2x25": shape(128, 211, 2, 25, 1),
        **{
            f"{padded} 4x128{' bias' if bias else ''}": shape(batch, padded, 4, 128, bias, "cuda")
            for (padded, batch), bias in itertools.product(((1_024, 64), (2_048, 32), (4_096, 16)), (0, 1))
        },
    },
    make=make,
    providers={"ops": fused, "naive padded": naive},
    leaves=leaves,
    flops=flops,
    backward_flops=2.5,
    skip=lambda provider, name, device: provider != "ops" and name.startswith("4096"),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every width class in every arithmetic, with the bias and without, causal and with all options at once."""
    offsets, times = torch.tensor([0, 5, 12]), torch.zeros(12, dtype=torch.int64)
    every: dict[str, Any] = {"num_targets": torch.tensor([1, 2]), "max_attn_len": 9}
    every |= {"contextual_seq_len": 3, "min_full_attn_seq_len": 4}
    dropout: dict[str, Any] = {"dropout_rate": 0.2, "dropout_seed": 7, "row_keys": times}

    def call(dim: int, kind: str, bias: bool, options: dict[str, Any], cached: bool) -> None:
        dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
        q, k, v = (torch.zeros(12, 2, dim, dtype=dtype, requires_grad=not cached) for _ in range(3))
        common: dict[str, Any] = {"max_seq_len": 256, "backend": "triton", **options}
        if bias:
            for name, width in (("position_weights", 511), ("time_weights", BUCKETS + 1)):
                common[name] = torch.zeros(2, width, requires_grad=not cached)
            common |= {"query_times": times, "key_times": times}
        with tf32(kind == "tf32"):
            if cached:
                new = {"k_QHK": k, "v_QHV": v, "cache_times": times}
                hstu_attention_cached(q, offsets, k, v, offsets, **common, **new)
            else:
                hstu_attention(q, k, v, offsets, **common).sum().backward()

    for kind, dim, bias in itertools.product(("bfloat16", "tf32", "float32"), (50, 128, 256), (False, True)):
        name = f"{dim} {kind}{' bias' if bias else ''}"
        yield name, partial(call, dim, kind, bias, {}, False)
        yield f"{name}, every option", partial(call, dim, kind, bias, every | dropout, False)
        yield f"{name}, cached", partial(call, dim, kind, bias, every, True)
    yield "64 float16 bias", partial(call, 64, "float16", True, {}, False)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
