"""Trains a toy run in child processes that are killed at random moments, until one ends; run by test_resume.py.

    python tests/training/resume_driver.py FOLDER KILLS SEED

Forks after the imports, so that a child costs milliseconds. Prints the folder of the finished run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from generative_recommenders.config import load
from generative_recommenders.distributed.runtime import runtime
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.retrieval import RetrievalExperiment
from tests.toy import write_toy_dataset

BINDINGS = [
    "train_fn.dataset_name = 'toy'",
    "train_fn.main_module = 'HSTU'",
    "train_fn.sampling_strategy = 'local'",
    "train_fn.num_negatives = 8",
    "train_fn.num_epochs = 4",
    "train_fn.local_batch_size = 8",
    "train_fn.max_sequence_length = 10",
    "train_fn.item_embedding_dim = 8",
    "train_fn.eval_split = 'valid'",
    "train_fn.checkpoint_every_n_steps = 2",
    "train_fn.positional_sampling_ratio = 0.9",
    "hstu_encoder.dqk = 8",
    "hstu_encoder.dv = 8",
    "hstu_encoder.linear_dropout_rate = 0.2",
    "hstu_encoder.attn_dropout_rate = 0.1",
]


def train(folder: Path, exps: str) -> None:
    with runtime("cpu") as here:
        RetrievalExperiment(load([], BINDINGS), Places(folder / "data", folder / exps), here).train()


def child(folder: Path, exps: str) -> int:
    """Start a run in a forked process; its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            train(folder, exps)
            code = 0
        finally:
            os._exit(code)
    return pid


def finished(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main() -> int:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    write_toy_dataset(folder / "data")
    started = time.monotonic()
    if not finished(child(folder, "whole")):
        return 1
    whole_seconds = time.monotonic() - started
    chance = random.Random(seed)
    done = 0
    while done < kills:
        pid = child(folder, "killed")
        # Early enough that most of the work is still ahead, at any stage from start-up to writing a checkpoint.
        time.sleep(chance.uniform(0.0, 0.35) * whole_seconds)
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
    if done == kills and not finished(child(folder, "killed")):
        return 1
    sys.stdout.write(f"killed {done} times\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
