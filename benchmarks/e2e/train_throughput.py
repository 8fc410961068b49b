"""Training and evaluation speed on one dataset and config, ours against a naive padded step, in one run.

    python benchmarks/e2e/train_throughput.py --gin_config_file=configs/ml-1m/hstu-sampled-softmax-n128-final.gin

Prints the median step of both on the same batches, seconds an epoch, seconds an evaluation of all users, and the
ratios; appends a row to benchmarks/results/train_throughput.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.e2e.naive_padded import NaivePadded
from benchmarks.harness import RESULTS
from benchmarks.measuring import append, elapsed, provenance
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.distributed.runtime import runtime
from generative_recommenders.evaluation.retrieval import evaluate
from generative_recommenders.retrieval.assemble import (
    Plan,
    Splits,
    build_model,
    evaluation_loader,
    training_counts,
    training_loader,
)
from generative_recommenders.training.environment import peak_memory_mb
from generative_recommenders.training.optim import adamw


def train_step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    optimizer.step()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gin_config_file", default="configs/ml-1m/hstu-sampled-softmax-n128-final.gin")
    parser.add_argument("--gin_bindings", action="append", default=[])
    parser.add_argument("--data_dir", default="tmp")
    parser.add_argument("--steps", type=int, default=48, help="our steps; the naive version runs a sixth of them")
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    arguments = parser.parse_args()
    plan = Plan.of(load([arguments.gin_config_file], arguments.gin_bindings))
    dataset = PreparedDataset.load(arguments.data_dir, plan.experiment.dataset_name)
    splits = Splits.of(plan.experiment, dataset)
    torch.backends.cuda.matmul.allow_tf32 = plan.experiment.enable_tf32
    with runtime() as here:
        counts = training_counts(dataset, splits.train.ignore_last_n)
        model = build_model(plan, dataset.catalog.item_ids, counts).to(here.device)
        optimizer = adamw(model, plan.experiment.learning_rate, plan.experiment.weight_decay)
        loader = training_loader(plan, splits.train, 0, 1)
        batches = [b.to(here.device) for b in itertools.islice(loader.epoch(0), arguments.steps)]
        steps_an_epoch = len(loader)

        def ours(batch: SequenceBatch, number: int) -> Callable[[], None]:
            return lambda: train_step(lambda: model(batch, number)[0], optimizer)

        row: dict[str, Any] = {"config": arguments.gin_config_file, "dataset": plan.experiment.dataset_name}
        row["batch"] = plan.experiment.local_batch_size
        step = statistics.median(elapsed([ours(b, i) for i, b in enumerate(batches)], here.device)[2:])
        row["peak_mb"] = peak_memory_mb(here.device)
        passes = [lambda: list(itertools.islice(loader.epoch(0), arguments.steps))] * 4
        collate = statistics.median(elapsed(passes, torch.device("cpu"))[1:]) / len(batches)
        row |= {"step_ms": step, "collate_ms": collate, "epoch_s": (step + collate) * steps_an_epoch / 1e3}

        def evaluation() -> float:
            batches = evaluation_loader(plan, splits.test, 0, 1).epoch(0)
            return evaluate(model, batches, here).seconds

        row["eval_s"] = statistics.median([evaluation() for _ in range(4)][1:])
        if arguments.naive and plan.experiment.main_module == "HSTU":
            naive = NaivePadded(model, plan.experiment)
            few = batches[: max(4, arguments.steps // 6)]
            steps = [lambda b=b: train_step(lambda: naive.loss(b), optimizer) for b in few]
            row["naive_step_ms"] = statistics.median(elapsed(steps, here.device)[1:])
            held_out = evaluation_loader(plan, splits.test, 0, 1)
            users = list(itertools.islice(held_out.epoch(0), 5))
            model.eval()
            users = [b.to(here.device) for b in users]
            batch_ms = statistics.median(elapsed([lambda b=b: naive.ranks(b) for b in users], here.device)[1:])
            row["naive_eval_s"] = batch_ms / 1e3 * len(splits.test) / users[0].size
            row["train_ratio"] = row["naive_step_ms"] / row["step_ms"]
            row["eval_ratio"] = row["naive_eval_s"] / row["eval_s"]
        row |= provenance(here.device)
    for name, value in row.items():
        sys.stdout.write(f"{name:16} {value:.3f}\n" if isinstance(value, float) else f"{name:16} {value}\n")
    append(arguments.results / "train_throughput.csv", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
