"""Full softmax: a MovieLens-1M step against sampled softmax, and the memory of a step over a million items.

    python benchmarks/e2e/full_softmax.py

The first part times whole training steps of the published HSTU with 128 sampled negatives (our fused op, and the
gathered form the public code uses) and with full softmax over the 3,883 items, on the same batches. The second trains
4,096 tokens x 64 dims against 1,000,000 items with AdamW in a process of its own and prints its peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ops
from benchmarks.e2e.train_throughput import train_step
from benchmarks.harness import RESULTS
from benchmarks.measuring import append, elapsed, provenance
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.losses.full_softmax import FullSoftmaxLoss
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.retrieval.assemble import Plan, Splits, build_model, training_counts, training_loader
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.similarity.dot import DotProduct
from generative_recommenders.training.optim import adamw

CONFIG = "configs/ml-1m/hstu-sampled-softmax-n128-final.gin"


def loss_of(model: RetrievalModel, batch: SequenceBatch, number: int) -> Tensor:
    return model(batch, number)[0]


def gathered_loss_of(model: RetrievalModel, batch: SequenceBatch, number: int) -> Tensor:
    """The same loss with the (tokens, R, D) tensor of negatives in memory."""
    draws = Draws.of(batch, number)
    queries = model.queries(batch, draws)
    with ops.backend("reference"):
        arguments = ((queries,), batch.next_item_ids_T, model.items.table, model.similarity, draws)
        return model.objective(*arguments).losses_T.mean()


VARIANTS = {
    "sampled_gathered": ([], gathered_loss_of),
    "sampled_fused": ([], loss_of),
    "full": (["train_fn.loss_module = 'FullSoftmaxLoss'"], loss_of),
}


def movielens_steps(data_dir: str, steps: int) -> dict[str, float]:
    """Median milliseconds of a training step by variant; the variants take turns on every batch."""
    dataset = PreparedDataset.load(data_dir, "ml-1m")
    models, milliseconds, batches = {}, {name: [] for name in VARIANTS}, []
    for name, (bindings, _) in VARIANTS.items():
        plan = Plan.of(load([CONFIG], bindings))
        splits = Splits.of(plan.experiment, dataset)
        model = build_model(plan, dataset.catalog.item_ids, training_counts(dataset, 1))
        models[name] = (model, adamw(model, 1e-3, 0.0))
        batches = list(itertools.islice(training_loader(plan, splits.train, 0, 1).epoch(0), steps))
    for number, batch in enumerate(batches):
        for name, (_, loss) in VARIANTS.items():
            model, optimizer = models[name]
            step = partial(train_step, partial(loss, model, batch, number), optimizer)
            milliseconds[name] += elapsed([step], torch.device("cpu"))
    return {f"{name}_ms": statistics.median(values[2:]) for name, values in milliseconds.items()}


def million_items() -> None:
    """Two AdamW steps; prints the loss and the process's peak memory."""
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(1_000_001, 64) * 0.02)
    queries = torch.nn.Parameter(torch.randn(4_096, 64))
    catalog = torch.arange(1, 1_000_001)
    positives = torch.randint(1, 1_000_001, (4_096,))
    objective = FullSoftmaxLoss(catalog, 0.05, True, 1e-6)
    optimizer = torch.optim.AdamW([table, queries], fused=True)
    draws = Draws(0, torch.arange(4_096))
    for _ in range(2):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = objective((queries,), positives, table, DotProduct(), draws).losses_T.mean()
        loss.backward()
        optimizer.step()
        took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"{peak:.0f} {took:.2f} {loss.item():.4f}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", default="tmp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--million_items", action="store_true", help="only the second part, in this process")
    arguments = parser.parse_args()
    if arguments.million_items:
        million_items()
        return 0
    row: dict[str, object] = dict(movielens_steps(arguments.data_dir, arguments.steps))
    done = subprocess.run([sys.executable, __file__, "--million_items"], capture_output=True, text=True, check=True)
    peak, seconds, _ = done.stdout.split()
    row |= {"million_items_peak_mb": float(peak), "million_items_step_s": float(seconds)}
    row |= provenance(torch.device("cpu"))
    for name, value in row.items():
        sys.stdout.write(f"{name:22} {value}\n")
    append(RESULTS / "full_softmax.csv", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
