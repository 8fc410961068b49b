"""The loop on a toy dataset: determinism, divergence, early stopping, warm-up, clipping and partial evaluations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from generative_recommenders.config import load
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.training.loop import Diverged
from generative_recommenders.training.optim import warmed_up
from generative_recommenders.training.retrieval import Places, RetrievalExperiment
from tests.toy import write_toy_dataset

HERE = Runtime(0, 1, torch.device("cpu"))
BASE = {
    "dataset_name": "'toy'",
    "main_module": "'HSTU'",
    "sampling_strategy": "'local'",
    "num_negatives": "8",
    "num_epochs": "3",
    "local_batch_size": "8",
    "max_sequence_length": "10",
    "item_embedding_dim": "8",
}
ENCODER = ["hstu_encoder.dqk = 8", "hstu_encoder.dv = 8", "hstu_encoder.linear_dropout_rate = 0.2"]


def experiment(tmp_path: Path, exps: str = "exps", **bindings: str) -> RetrievalExperiment:
    if not (tmp_path / "toy").exists():
        write_toy_dataset(tmp_path)
    texts = [f"train_fn.{k} = {v}" for k, v in (BASE | bindings).items()]
    loader = ["create_data_loader.num_workers = 2"] if exps == "threads" else []
    return RetrievalExperiment(load([], texts + ENCODER + loader), Places(tmp_path, tmp_path / exps), HERE)


def evaluations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every training loss, in order."""
    seen: list[float] = []
    forward = RetrievalModel.forward

    def recording(self: RetrievalModel, batch: object, seed: int) -> object:
        result = forward(self, batch, seed)  # type: ignore[arg-type]
        seen.append(float(result[0].detach()))
        return result

    monkeypatch.setattr(RetrievalModel, "forward", recording)
    return seen


def test_same_seed_same_losses(tmp_path: Path, losses: list[float]) -> None:
    runs = []
    for exps, seed in (("a", "5"), ("threads", "5"), ("c", "6")):
        losses.clear()
        experiment(tmp_path, exps, random_seed=seed, positional_sampling_ratio="0.8").train()
        runs.append(list(losses))
    assert len(runs[0]) >= 20
    assert runs[0] == runs[1], "loader threads change nothing"
    assert runs[0][0] != runs[2][0]


def test_training_learns(tmp_path: Path) -> None:
    run = experiment(tmp_path, num_epochs="30", learning_rate="1e-2", dropout_rate="0.0")
    evaluation, folder = run.train()
    lines = evaluations(folder)
    assert lines[-1]["train"]["loss"] < 0.6 * lines[0]["train"]["loss"]
    # The walk around the ring continues with the next item in about 85 of 100 steps; chance is 10 of 40 minus the seen.
    assert evaluation.metrics["hr@10"] > 0.7


def test_divergence_stops_with_step_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        Diverged, match=r"not finite at step \d+ \(epoch 0\); no checkpoint was written yet; try a lower"
    ):
        experiment(tmp_path, learning_rate="1e38").train()
    run = experiment(tmp_path, "later")
    _, folder = run.train()
    (folder / "metrics.json").unlink()
    with torch.no_grad():
        poisoned = run.model()
    forward = poisoned.forward
    steps = len(evaluations(folder))

    def failing(batch: object, seed: int) -> object:
        loss, scalars = forward(batch, seed)  # type: ignore[arg-type]
        return loss * math.nan, scalars | {"ar_loss": scalars["ar_loss"] * math.nan}

    poisoned.forward = failing  # type: ignore[method-assign,assignment]
    again = experiment(tmp_path, "later", num_epochs="4", resume=f"'{folder}'")
    again.model = lambda: poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"\(epoch 3\); the last checkpoint is .*step-"):
        again.train()
    assert len(evaluations(folder)) == steps


def test_early_stopping_reports_the_best_epoch_on_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = experiment(
        tmp_path,
        num_epochs="20",
        eval_split="'valid'",
        early_stopping_patience="3",
        early_stopping_metric="'hr@10'",
        learning_rate="3e-2",
    )
    evaluation, folder = run.train()
    lines = evaluations(folder)
    values = [line["metrics"]["hr@10"] for line in lines]
    best = max(range(len(values)), key=lambda i: (values[i], -i))
    assert len(values) == min(20, best + 4)
    assert all(line["split"] == "valid" for line in lines)
    final = json.loads((folder / "metrics.json").read_text())
    assert (final["split"], final["best_epoch"], final["protocol"]) == ("test", best, "selected on valid")
    again = run.evaluate_checkpoint(folder, "test")
    assert again.metrics == evaluation.metrics == final["metrics"]
    assert run.evaluate_checkpoint(folder, "valid").metrics["hr@10"] == values[best]


def test_published_protocol_reports_the_last_epoch_and_trains_on_the_validation_event(tmp_path: Path) -> None:
    published, honest = experiment(tmp_path), experiment(tmp_path, eval_split="'valid'")
    events = [
        int(e.splits.train.batch(m := torch.arange(len(e.splits.train)), m).offsets[-1]) for e in (published, honest)
    ]
    assert events[0] > events[1]
    evaluation, folder = published.train()
    lines = evaluations(folder)
    assert [line["split"] for line in lines] == ["test"] * 3
    assert lines[-1]["metrics"] == evaluation.metrics


def test_partial_evaluations_and_what_is_kept(tmp_path: Path) -> None:
    run = experiment(
        tmp_path,
        num_epochs="6",
        full_eval_every_n="4",
        partial_eval_num_iters="2",
        eval_batch_size="10",
        save_ckpt_every_n="2",
    )
    _, folder = run.train()
    lines = evaluations(folder)
    assert [(x["complete"], x["users"]) for x in lines] == [
        (i in (0, 4, 5), 60 if i in (0, 4, 5) else 20) for i in range(6)
    ]
    # Epochs 2 and 4 are kept, the last one always.
    steps = [x["step"] for x in lines]
    kept = sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
    assert kept == [steps[2], steps[4], steps[5]]


def test_warm_up() -> None:
    assert [warmed_up(1.0, s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmed_up(0.3, 0, 0) == 0.3


def test_clipping_bounds_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def recording(self: torch.optim.AdamW, *a: object, **k: object) -> object:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    experiment(tmp_path, num_epochs="1").train()
    free = max(norms)
    norms.clear()
    experiment(tmp_path, "clipped", num_epochs="1", gradient_clip_norm="0.01").train()
    assert max(norms) <= 0.0101 < free


@pytest.mark.parametrize("binding", ["main_module_bf16 = True", "loss_activation_checkpoint = True"])
def test_options_that_must_not_change_what_is_learned(tmp_path: Path, losses: list[float], binding: str) -> None:
    experiment(tmp_path, "plain", num_epochs="1").train()
    plain = list(losses)
    losses.clear()
    name, value = binding.split(" = ")
    experiment(tmp_path, "option", num_epochs="1", **{name: value}).train()
    tolerance = 2e-2 if "bf16" in binding else 1e-5
    assert losses == pytest.approx(plain, rel=tolerance) and len(losses) == 8
    assert ("bf16" in binding) == (losses != plain)
