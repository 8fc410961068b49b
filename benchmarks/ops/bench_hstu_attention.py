"""Time and peak memory of hstu_attention, forward and backward with bias, against the padded eager PyTorch step.

python benchmarks/ops/bench_hstu_attention.py [--repeats 5] [--csv FILE]

The shapes are those of ML-1M training: 128 rows with the dataset's lengths, padded to 211 in the naive step, 1 x 50 and
2 x 25 heads. Providers take turns within a repeat, so that a busy machine slows both; memory is the growth of the peak
resident set of a fresh process over one step, results included (Linux).
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ops.hstu_attention import hstu_attention

PADDED, BATCH, BUCKETS = 211, 128, 128
SHAPES = ((1, 50), (2, 25))
# Quantiles 0/32 .. 32/32 of the training lengths in ML-1M, min(events - 2, 200) over its 6,040 users; mean 108.
LENGTH_QUANTILES = (
    *(18, 20, 22, 25, 28, 31, 34, 38, 42, 46, 51, 57, 62, 69, 76, 84, 94, 101, 112, 122, 135, 149, 164, 185),
    *([200] * 9),
)


def make_inputs(heads: int, dim: int, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    places = torch.rand(BATCH, generator=g) * (len(LENGTH_QUANTILES) - 1)
    table = torch.tensor(LENGTH_QUANTILES, dtype=torch.float32)
    low = places.long()
    lengths = (table[low] + (places - low) * (table[low + 1] - table[low])).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    # Like the data: a third of the events share a second with the one before, sessions are minutes, pauses are months.
    kind, gap = torch.rand(total, generator=g), torch.empty(total).exponential_(generator=g)
    gaps = torch.where(kind < 0.35, 0.0, torch.where(kind < 0.98, 40.0 * gap, 3e6 * gap)).long()

    def leaf(*shape: int, size: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * size).requires_grad_()

    return {
        "q": leaf(total, heads, dim, size=0.3),
        "k": leaf(total, heads, dim, size=0.3),
        "v": leaf(total, heads, dim, size=0.3),
        "position_weights": leaf(2 * PADDED - 1, size=0.02),
        "time_weights": leaf(BUCKETS + 1, size=0.02),
        "times": gaps.cumsum(0),
        "offsets": offsets,
        "grad": torch.randn(total, heads, dim, generator=g),
    }


def fused(x: dict[str, Any]) -> Tensor:
    return hstu_attention(
        *(x["q"], x["k"], x["v"], x["offsets"]),
        max_seq_len=PADDED,
        position_weights=x["position_weights"],
        time_weights=x["time_weights"],
        query_times=x["times"],
        key_times=x["times"],
    )


def naive(x: dict[str, Any]) -> Tensor:
    """The step as usually written: pad, materialize bias and scores for N x N, mask, and take the rows back."""
    lengths, steps = x["offsets"].diff(), torch.arange(PADDED)
    inside_BN = steps < lengths[:, None]

    def pad(values: Tensor) -> Tensor:
        return values.new_zeros(BATCH, PADDED, *values.shape[1:]).masked_scatter(
            inside_BN.view(BATCH, PADDED, *[1] * (values.dim() - 1)), values
        )

    times_BN = pad(x["times"])
    gaps_BNN = (times_BN[:, :, None] - times_BN[:, None, :]).abs().clamp(min=1)
    buckets_BNN = (torch.log(gaps_BNN) / 0.301).long().clamp(0, BUCKETS)
    time_BNN = x["time_weights"].index_select(0, buckets_BNN.view(-1)).view(BATCH, PADDED, PADDED)
    positions_NN = PADDED - 1 + steps[None, :] - steps[:, None]
    position_NN = x["position_weights"].index_select(0, positions_NN.view(-1)).view(PADDED, PADDED)
    scores_BHNN = torch.einsum("bnhd,bmhd->bhnm", pad(x["q"]), pad(x["k"])) + (position_NN + time_BNN)[:, None]
    weights_BHNN = F.silu(scores_BHNN) / PADDED * torch.ones(PADDED, PADDED).tril()
    return torch.einsum("bhnm,bmhd->bnhd", weights_BHNN, pad(x["v"]))[inside_BN]


PROVIDERS: dict[str, Callable[[dict[str, Any]], Tensor]] = {"hstu_attention": fused, "naive padded": naive}


def step(provider: str, x: dict[str, Any]) -> tuple[float, float, list[Tensor]]:
    """Seconds of forward and backward, and every result."""
    leaves = [x[name] for name in ("q", "k", "v", "position_weights", "time_weights")]
    start = time.perf_counter()
    out = PROVIDERS[provider](x)
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, leaves, x["grad"])
    return middle - start, time.perf_counter() - middle, [out.detach(), *grads]


def peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def peak_megabytes(provider: str, heads: int, dim: int) -> float:
    """Growth of this process's peak resident set over one step."""
    tiny = make_inputs(heads, dim, seed=2)
    x = make_inputs(heads, dim)
    # Loads what the step needs once (library, autograd threads) without allocating much.
    hstu_attention(tiny["q"][:4], tiny["k"][:4], tiny["v"][:4], torch.tensor([0, 4]), max_seq_len=4).sum().backward()
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    # Resets the peak, which a new process inherits from its parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kilobytes()
    step(provider, x)
    return (peak_kilobytes() - before) / 1024


def check(x: dict[str, Any]) -> None:
    """A kernel that is wrong is not worth timing. The naive logarithm misplaces a few gaps, hence the tolerance."""
    for actual, expected in zip(step("hstu_attention", x)[2], step("naive padded", x)[2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    for heads, dim in SHAPES:
        x = make_inputs(heads, dim)
        check(x)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in PROVIDERS}
        for _ in range(arguments.repeats):
            for name in PROVIDERS:
                seconds[name].append(step(name, x)[:2])
        for name in PROVIDERS:
            with spawn.Pool(1) as pool:
                memory = pool.apply(peak_megabytes, (name, heads, dim))
            forward, backward = (statistics.median(part) * 1e3 for part in zip(*seconds[name], strict=True))
            both = statistics.median(sum(pair) for pair in seconds[name]) * 1e3
            row = {"provider": name, "heads": heads, "dim": dim, "tokens": x["grad"].shape[0]}
            row |= {"forward_ms": round(forward, 2), "backward_ms": round(backward, 2), "step_ms": round(both, 2)}
            row |= {"peak_mb": round(memory, 1), "threads": torch.get_num_threads(), "torch": torch.__version__}
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()))
        ours, theirs = rows[-2], rows[-1]
        faster, smaller = theirs["step_ms"] / ours["step_ms"], theirs["peak_mb"] / max(ours["peak_mb"], 0.1)
        print(f"{heads} x {dim}: {faster:.1f} times faster, 1/{smaller:.1f} of the memory")
    if arguments.csv is not None:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
