"""How close training comes to the best any model can do, on data whose true model is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generative_recommenders.config import load
from generative_recommenders.data import sources
from generative_recommenders.data.preprocess import prepare
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.retrieval import RetrievalExperiment

BINDINGS = [
    "train_fn.num_epochs = 8",
    "train_fn.max_sequence_length = 50",
    "train_fn.local_batch_size = 64",
    "train_fn.learning_rate = 5e-3",
    "train_fn.item_embedding_dim = 32",
    "train_fn.temperature = 0.1",
    "train_fn.dropout_rate = 0.1",
    "hstu_encoder.num_blocks = 1",
    "hstu_encoder.dqk = 32",
    "hstu_encoder.dv = 32",
    "sasrec_encoder.num_blocks = 1",
    "sasrec_encoder.ffn_dropout_rate = 0.1",
]


@pytest.mark.parametrize("encoder", ["HSTU", "SASRec"])
def test_training_comes_near_the_ceiling_and_not_above_it(tmp_path: Path, encoder: str) -> None:
    source = sources.get("synthetic").with_options(synthetic_users=1500, synthetic_items=200)
    ceiling = prepare(source, data_dir=tmp_path).metadata["best_hr_at_10"]
    config = load(["configs/base/demo.gin"], [*BINDINGS, f"train_fn.main_module = '{encoder}'"])
    run = RetrievalExperiment(config, Places(tmp_path, tmp_path / "exps"), Runtime(0, 1, torch.device("cpu")))
    evaluation, _ = run.train()
    reached = evaluation.metrics["hr@10"]
    # Above the ceiling only by chance: 1,500 users put three standard errors at 0.04. A leak would go far beyond.
    assert 0.8 * ceiling < reached < ceiling + 0.04, (reached, ceiling)
