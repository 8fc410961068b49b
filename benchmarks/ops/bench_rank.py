"""Rank of the target: counting in blocks against the published protocol, which sorts 2,500 plus the history.

    python benchmarks/ops/bench_rank.py
    python benchmarks/ops/bench_rank.py --users 2048 --items 1000000 --width 64 --runs 1 --blocks_only

Prints median seconds, the ratio, and the memory the op took beyond its inputs.
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

from ops.rank import rank_of_target, topk


def published_rank(
    queries: torch.Tensor, table: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor, seen_BN: torch.Tensor
) -> torch.Tensor:
    """Fetch the 2,500 + N best of the full matrix, strike the seen ones by comparison, find the target."""
    kept = min(2_500, len(candidates) - seen_BN.shape[1])
    order = (queries @ table[candidates].T).topk(min(2_500 + seen_BN.shape[1], len(candidates)), dim=1).indices
    ids = candidates[order]
    # By rows of 256, as an evaluation batch would: the comparison is rows x 2,711 x 211.
    valid = torch.cat(
        [~(a[:, :, None] == b[:, None, :]).any(2) for a, b in zip(ids.split(256), seen_BN.split(256), strict=True)]
    )
    place = valid.cumsum(1)
    hit = (ids == targets[:, None]) & valid & (place <= kept)
    return torch.where(hit.any(1), (place * hit).sum(1), kept + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("users", 6_040), ("items", 3_883), ("width", 50), ("history", 211), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks_only", action="store_true", help="leave out what needs users x items of memory")
    sizes = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(sizes.users, sizes.width, generator=generator)
    table = torch.randn(sizes.items + 1, sizes.width, generator=generator)
    candidates = torch.arange(1, sizes.items + 1)
    targets = torch.randint(1, sizes.items + 1, (sizes.users,), generator=generator)
    seen_BN = torch.randint(1, sizes.items + 1, (sizes.users, sizes.history), generator=generator)
    offsets = torch.arange(sizes.users + 1) * sizes.history
    calls: dict[str, Callable[[], object]] = {
        "rank": lambda: rank_of_target(queries, table, candidates, targets, offsets, seen_BN.flatten()),
        "topk, k = 100": lambda: topk(queries, table, candidates, 100, offsets, seen_BN.flatten()),
    }
    if not sizes.blocks_only:
        calls["published"] = lambda: published_rank(queries, table, candidates, targets, seen_BN)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    after = {}
    for _ in range(sizes.runs):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
            after.setdefault(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"rank {vars(sizes)}, {torch.get_num_threads()} threads")
    rank = statistics.median(seconds["rank"])
    for name, taken in seconds.items():
        print(f"  {name}: {statistics.median(taken):.4f} s, {statistics.median(taken) / rank:.1f} of rank")
    print(f"  memory of rank beyond its inputs {(after['rank'] - before) / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
