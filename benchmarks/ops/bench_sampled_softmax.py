"""Sampled softmax forward and backward at the shape of an ML-1M step: the gathering reference against the default.

    python benchmarks/ops/bench_sampled_softmax.py [--tokens 14000] [--negatives 128] [--width 50] [--rows 3953]

Prints the median seconds of both and their ratio; the runs alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ops.sampled_softmax import sampled_softmax_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 14_000), ("negatives", 128), ("width", 50), ("rows", 3_953), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(sizes.tokens, sizes.width, generator=generator), dim=1)
    queries.requires_grad_()
    table = (0.02 * torch.randn(sizes.rows, sizes.width, generator=generator)).requires_grad_()
    positive = torch.randint(1, sizes.rows, (sizes.tokens,), generator=generator)
    negative = torch.randint(1, sizes.rows, (sizes.tokens, sizes.negatives), generator=generator)

    def step(backend: str) -> float:
        started = time.perf_counter()
        losses = sampled_softmax_loss(
            queries, table, positive, negative, temperature=0.05, l2_norm=True, backend=backend
        )
        torch.autograd.grad(losses.mean(), (queries, table))
        return time.perf_counter() - started

    for backend in ("auto", "reference"):
        step(backend)
    seconds: dict[str, list[float]] = {"auto": [], "reference": []}
    for _ in range(sizes.runs):
        for backend, taken in seconds.items():
            taken.append(step(backend))
    median = {backend: statistics.median(taken) for backend, taken in seconds.items()}
    print(f"sampled_softmax {vars(sizes)}, {torch.get_num_threads()} threads")
    print(f"  reference {median['reference']:.4f} s, default {median['auto']:.4f} s")
    print(f"  {median['reference'] / median['auto']:.1f} times as fast")


if __name__ == "__main__":
    main()
