"""The loop on a toy dataset: determinism, divergence, early stopping, warm-up, clipping and partial evaluations."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.training.checkpoint import CheckpointError, CheckpointFolder
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.loop import Diverged
from generative_recommenders.training.optim import learning_rate_at
from generative_recommenders.training.retrieval import RetrievalExperiment
from tests.batches import batch
from tests.toy import write_toy_dataset

ROOT = Path(__file__).resolve().parents[2]
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
    message = r"not finite at step \d+ \(epoch 0\); no checkpoint was written yet; try a lower"
    for number, bindings in enumerate(({}, {"eval_interval": "1"}, {"local_batch_size": "64"})):
        # The loss of the first step is finite; the weights it leaves show up in a loss, a probe or an evaluation.
        with pytest.raises(Diverged, match=message):
            experiment(tmp_path, f"diverging{number}", learning_rate="1e38", **bindings).train()
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
    *lines, last = evaluations(folder)
    loss = {"loss": evaluation.metrics["loss"]}
    assert (last["split"], last["metrics"] | loss) == ("test", evaluation.metrics)
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
    assert lines[-1]["metrics"] | {"loss": evaluation.metrics["loss"]} == evaluation.metrics


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
    assert [learning_rate_at(1.0, s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_at(0.3, 0, 0) == 0.3


def test_schedules_start_at_the_end_of_the_warm_up() -> None:
    rates = [learning_rate_at(1.0, s, 4, "inverse_sqrt") for s in (3, 4, 15, 63)]
    assert rates == pytest.approx([1.0, math.sqrt(4 / 5), 0.5, 0.25])
    assert learning_rate_at(1.0, 0, 0, "inverse_sqrt") == 1.0
    rates = [learning_rate_at(1.0, s, 2, "cosine", 12) for s in (1, 2, 7, 12, 99)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


def test_a_batch_in_parts_is_the_batch() -> None:
    whole = batch([3, 0, 2, 5, 1, 4, 2])
    for count in (1, 2, 3, 7, 20):
        parts = whole.split(count)
        assert len(parts) == count and max(p.size for p in parts) - min(p.size for p in parts) <= 1
        assert torch.equal(torch.cat([part.item_ids_T for part in parts]), whole.item_ids_T)
        assert torch.equal(torch.cat([part.target_ids_B for part in parts]), whole.target_ids_B)
        assert torch.equal(torch.cat([part.lengths_B for part in parts]), whole.lengths_B)


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


def test_two_launches_of_one_config_do_not_meet(tmp_path: Path) -> None:
    """The second finds the first's folder in use and starts its own."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.training.test_loop import experiment
from generative_recommenders.training import loop
save = loop.Trainer._save
def slow(self):
    save(self)
    time.sleep(0.5)
loop.Trainer._save = slow
print(experiment(Path({str(tmp_path)!r}), num_epochs="6").train()[1])
"""
    write_toy_dataset(tmp_path)
    command = [sys.executable, "-c", script]
    launches = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [launch.communicate(timeout=200)[0].splitlines()[-1] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0]
    assert folders[0] != folders[1]
    for folder in folders:
        assert [line["epoch"] for line in evaluations(Path(folder))] == list(range(6))


def test_a_run_in_use_is_not_resumed(tmp_path: Path) -> None:
    _, folder = experiment(tmp_path).train()
    handle = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="being written by another process"):
        experiment(tmp_path, resume=f"'{folder}'", num_epochs="4").train()
    os.close(handle)


def test_a_refused_resume_leaves_the_run_alone(tmp_path: Path) -> None:
    _, folder = experiment(tmp_path).train()

    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = content()
    for bindings in ({"main_module": "'SASRec'"}, {"item_l2_norm": "True"}, {"item_embedding_dim": "16"}):
        with pytest.raises(CheckpointError, match="was trained with"):
            experiment(tmp_path, resume=f"'{folder}'", **bindings).train()
    assert content() == before


def test_an_extended_run_is_unfinished_until_it_ends_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = experiment(tmp_path).train()
    longer = {"num_epochs": "6", "resume": f"'{folder}'"}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("generative_recommenders.training.loop.Trainer._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            experiment(tmp_path, **longer).train()
    assert not (folder / "metrics.json").exists()
    _, again = experiment(tmp_path, num_epochs="6").train()
    assert again == folder
    assert json.loads((folder / "metrics.json").read_text())["epochs"] == 6
    assert [line["epoch"] for line in evaluations(folder)] == list(range(6))


def test_a_checkpoint_is_only_evaluated_as_what_it_is(tmp_path: Path) -> None:
    _, folder = experiment(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"was trained with train_fn.item_l2_norm = False, got True"):
        experiment(tmp_path, item_l2_norm="True").evaluate_checkpoint(folder, "test")
    with pytest.raises(ConfigError, match="--split=valid: this model was trained on the validation events"):
        experiment(tmp_path).evaluate_checkpoint(folder, "valid")


def test_no_whole_batch_is_refused(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path)
    texts = [f"train_fn.{k} = {v}" for k, v in (BASE | {"local_batch_size": "128"}).items()]
    config = load([], [*texts, *ENCODER, "create_data_loader.drop_last = True"])
    with pytest.raises(DataError, match="60 users give no whole batch of 128"):
        RetrievalExperiment(config, Places(tmp_path, tmp_path / "exps"), HERE).train()


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["train_fn.main_module = 'SASRec'", "sasrec_encoder.num_heads = 3"], "sasrec_encoder.num_heads: got 3"),
        (["train_fn.loss_weights = {'mi_loss': 0.001}"], "train_fn.loss_weights: got"),
        (["train_fn.logq_correction = True"], "train_fn.logq_correction: got True"),
        (["train_fn.temperature = 1e999"], "expected float, got float inf"),
        (["train_fn.random_seed = 99999999999999999999999"], "train_fn.random_seed: got"),
        (
            ["train_fn.interaction_module_type = 'MoL'", "train_fn.top_k_method = 'MoLBruteForceTopK'"],
            "create_mol_interaction_module.dot_product_dimension: not set",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_data_is_read(tmp_path: Path, bindings: list[str], message: str) -> None:
    texts = [f"train_fn.{k} = {v}" for k, v in BASE.items()]
    with pytest.raises(ConfigError, match=message):
        RetrievalExperiment(load([], [*texts, *ENCODER, *bindings]), Places(tmp_path, tmp_path / "exps"), HERE)
    assert not list(tmp_path.iterdir())


def test_the_last_step_of_an_epoch_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its evaluation, even where it is a multiple of checkpoint_every_n_steps."""
    saved = []
    save = CheckpointFolder.save

    def noting(self: CheckpointFolder, *a: object, **k: object) -> Path:
        saved.append(save(self, *a, **k))  # type: ignore[arg-type]
        return saved[-1]

    monkeypatch.setattr(CheckpointFolder, "save", noting)
    experiment(tmp_path, num_epochs="2", checkpoint_every_n_steps="4").train()
    assert [int(path.name.removeprefix("step-")) for path in saved] == [4, 8, 12, 16]
