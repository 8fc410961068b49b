"""Full softmax forward and backward: full logits against blocks, and its cost beside sampled softmax.

    python benchmarks/ops/bench_linear_cross_entropy.py
    python benchmarks/ops/bench_linear_cross_entropy.py --tokens 4096 --width 64 --items 1000000 --runs 1 --blocks_only

Prints median seconds, ratios and the peak memory of the process; the runs alternate, so that a busy machine slows all.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ops.linear_cross_entropy import linear_cross_entropy
from ops.sampled_softmax import sampled_softmax_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 14_000), ("width", 50), ("items", 3_883), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks_only", action="store_true", help="leave out what needs tokens x items of memory")
    sizes = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(sizes.tokens, sizes.width, generator=generator), dim=1)
    queries.requires_grad_()
    table = (0.02 * torch.randn(sizes.items + 1, sizes.width, generator=generator)).requires_grad_()
    catalogue = torch.arange(1, sizes.items + 1)
    targets = torch.randint(1, sizes.items + 1, (sizes.tokens,), generator=generator)
    negative = torch.randint(1, sizes.items + 1, (sizes.tokens, 128), generator=generator)

    def full(backend: str) -> torch.Tensor:
        return linear_cross_entropy(queries, table, catalogue, targets, temperature=0.05, l2_norm=True, backend=backend)

    losses: dict[str, Callable[[], torch.Tensor]] = {"blocks": lambda: full("auto")}
    if not sizes.blocks_only:
        losses["full logits"] = lambda: full("reference")
        losses["sampled softmax, 128 negatives"] = lambda: sampled_softmax_loss(
            queries, table, targets, negative, temperature=0.05, l2_norm=True
        )
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    # The first run builds kernels and touches memory; it counts only where nothing follows it.
    for run in range(sizes.runs + (sizes.runs > 1)):
        for name, loss in losses.items():
            started = time.perf_counter()
            torch.autograd.grad(loss().mean(), (queries, table))
            if run > 0 or sizes.runs == 1:
                seconds[name].append(time.perf_counter() - started)
    print(f"linear_cross_entropy {vars(sizes)}, {torch.get_num_threads()} threads")
    blocks = statistics.median(seconds["blocks"])
    for name, taken in seconds.items():
        print(f"  {name}: {statistics.median(taken):.4f} s, {statistics.median(taken) / blocks:.2f} of blocks")
    print(f"  peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
