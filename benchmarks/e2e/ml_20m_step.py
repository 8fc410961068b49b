"""One training step in the shape of MovieLens-20M: what share of the device's bf16 matrix products it reaches.

    python benchmarks/e2e/ml_20m_step.py [--gin_bindings='train_fn.main_module_bf16 = True'] [--profile FILE]

Rows are as long as that dataset's (20,000,263 ratings of 138,493 users, median 68, 20 at least, cut at the window), ids
and times are random. The step's arithmetic is counted, not measured: products of the layers and of attention over the
causal pairs, two operations a product, three times for forward and both gradients; recomputation adds nothing. The peak
is that of a square matrix product in the same run. Appends a row to benchmarks/results/ml_20m_step.csv; `--profile`
writes where the time goes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.e2e.train_throughput import train_step
from benchmarks.harness import RESULTS
from benchmarks.measuring import append, elapsed, provenance
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.distributed.runtime import runtime
from generative_recommenders.encoders.hstu import HSTUConfig
from generative_recommenders.retrieval.assemble import Plan, build_model
from generative_recommenders.training.environment import peak_memory_mb
from generative_recommenders.training.optim import adamw

CONFIG = "configs/ml-20m/hstu-sampled-softmax-n128-large-final.gin"
ITEMS, MEDIAN, MEAN, SHORTEST = 26_744, 68, 144.4, 20
WARM_UP = 3


def row_lengths(rows: int, longest: int, generator: torch.Generator) -> Tensor:
    """Log-normal with the dataset's median and mean."""
    spread = math.sqrt(2 * math.log(MEAN / MEDIAN))
    drawn = MEDIAN * torch.exp(spread * torch.randn(rows, generator=generator))
    return drawn.long().clamp(SHORTEST, longest)


def random_batch(lengths_B: Tensor, generator: torch.Generator) -> SequenceBatch:
    rows, tokens = len(lengths_B), int(lengths_B.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
    ids = torch.randint(1, ITEMS + 1, (tokens + 1,), generator=generator)
    times = 1_000_000_000 + torch.randint(1, 3_600, (tokens + 1,), generator=generator).cumsum(0)
    last = offsets[1:]
    return SequenceBatch(
        item_ids_T=ids[:-1],
        ratings_T=torch.ones(tokens),
        timestamps_T=times[:-1],
        next_item_ids_T=ids[1:],
        next_timestamps_T=times[1:],
        offsets=offsets,
        user_ids_B=torch.arange(rows),
        target_ids_B=ids[last],
        target_ratings_B=torch.ones(rows),
        target_timestamps_B=times[last],
        row_numbers_B=torch.arange(rows),
    )


def step_flops(plan: Plan, lengths_B: Tensor) -> float:
    """Operations of one training step of an HSTU with sampled softmax."""
    assert isinstance(plan.encoder, HSTUConfig)
    encoder, width = plan.encoder, plan.experiment.item_embedding_dim
    lengths = lengths_B.double()
    tokens, pairs = float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
    query, value = encoder.num_heads * encoder.dqk, encoder.num_heads * encoder.dv
    projections = tokens * width * (2 * query + 2 * value + value * (3 if encoder.concat_ua else 1))
    attention = pairs * (query + value)
    softmax = tokens * (plan.experiment.num_negatives + 1) * width
    return 3 * 2 * (encoder.num_blocks * (projections + attention) + softmax)


def matmul_tflops(device: torch.device) -> float:
    """bf16 square product, the best of several runs."""
    size, runs = (8192, 20) if device.type == "cuda" else (1024, 4)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = elapsed([lambda: a @ b] * runs, device)
    return float(2 * size**3 / min(taken) / 1e9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_config_file", default=CONFIG)
    parser.add_argument("--gin_bindings", action="append", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", type=Path, help="file for the profiler's table of three further steps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    arguments = parser.parse_args()
    plan = Plan.of(load([arguments.gin_config_file], arguments.gin_bindings))
    if plan.experiment.main_module != "HSTU" or plan.experiment.loss_module != "SampledSoftmaxLoss":
        parser.error(f"{arguments.gin_config_file}: the operations of HSTU with SampledSoftmaxLoss are counted only")
    torch.backends.cuda.matmul.allow_tf32 = plan.experiment.enable_tf32
    generator = torch.Generator().manual_seed(plan.experiment.random_seed)
    catalog_X = torch.arange(1, ITEMS + 1)
    with runtime() as here:
        model = build_model(plan, catalog_X, torch.ones_like(catalog_X)).to(here.device)
        optimizer = adamw(model, plan.experiment.learning_rate, plan.experiment.weight_decay)
        lengths = [
            row_lengths(plan.experiment.local_batch_size, plan.experiment.max_sequence_length, generator)
            for _ in range(arguments.steps + WARM_UP)
        ]
        batches = [random_batch(x, generator).to(here.device) for x in lengths]

        def step(number: int) -> None:
            train_step(lambda: model(batches[number], number)[0], optimizer)

        numbers = range(len(batches))
        taken = elapsed([lambda number=number: step(number) for number in numbers], here.device)[WARM_UP:]
        rates = [step_flops(plan, x) / ms / 1e9 for x, ms in zip(lengths[WARM_UP:], taken, strict=True)]
        peak = matmul_tflops(here.device)
        row: dict[str, Any] = {
            "config": arguments.gin_config_file,
            "bindings": " ".join(arguments.gin_bindings),
            "batch": plan.experiment.local_batch_size,
            "tokens": statistics.median(int(x.sum()) for x in lengths),
            "step_ms": statistics.median(taken),
            "tflops": statistics.median(rates),
            "matmul_bf16_tflops": peak,
            "share": statistics.median(rates) / peak,
            "peak_mb": peak_memory_mb(here.device),
        }
        if arguments.profile is not None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if here.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profile:
                for number in numbers[-3:]:
                    step(number)
            order = "self_cuda_time_total" if here.device.type == "cuda" else "self_cpu_time_total"
            text = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
            arguments.profile.write_text(text)
        row |= provenance(here.device)
    for name, value in row.items():
        sys.stdout.write(f"{name:18} {value:.3f}\n" if isinstance(value, float) else f"{name:18} {value}\n")
    append(arguments.results / "ml_20m_step.csv", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
