"""Checkpoints: round trip, what is kept, what is refused, and a disk that fills up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from generative_recommenders.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    Progress,
    write_atomically,
)
from generative_recommenders.training.optim import adamw
from generative_recommenders.training.runs import Run, choose_run, find_checkpoint, newest_run

ROOT = Path(__file__).resolve().parents[2]


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    optimizer = adamw(model, 1e-2, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path, **progress: object) -> Path:
    return CheckpointFolder(folder).save(
        *trained(), Progress(**progress), "train_fn.num_epochs = 3\n", {"dataset": "d:1"}
    )  # type: ignore[arg-type]


def test_round_trip_continues_identically(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = CheckpointFolder(tmp_path).save(model, optimizer, Progress(epoch=2, step=7), "", {"dataset": "d:1"})
    other, other_optimizer = trained(seed=1)
    checkpoint = Checkpoint.open(path)
    checkpoint.load_model(other)
    checkpoint.load_optimizer(other_optimizer)
    assert checkpoint.progress == Progress(epoch=2, step=7) and checkpoint.facts["dataset"] == "d:1"
    for m, o in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(9)
        o.zero_grad()
        m(torch.randn(6, 5)).square().mean().backward()
        o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_latest_best_and_kept_remain(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step=step, best_step=min(step, 3), kept_steps=[2] if step >= 2 else [])
    assert CheckpointFolder(tmp_path).steps() == [2, 3, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{s}" for s in (2, 3, 7)]


def test_a_step_that_is_reached_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, step=4, epoch=0)
    save(tmp_path, step=4, epoch=1)
    latest = CheckpointFolder(tmp_path).latest()
    assert latest is not None and latest.progress.epoch == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "state.json").write_text("{"), "cannot read state.json"),
        (lambda p: (p / "state.json").write_text('{"progress": {}, "format": 99}'), "got format 99, expected 1"),
        (lambda p: (p / "model.safetensors").write_bytes(b"12345678abc"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = save(tmp_path, step=1)
    damage(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path).load_model(trained()[0])


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, step=1))
    with pytest.raises(CheckpointError, match=r"0.bias has shape \(4,\), expected \(3,\)"):
        checkpoint.load_model(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)))
    with pytest.raises(CheckpointError, match=r"2.bias is missing"):
        checkpoint.load_model(nn.Sequential(*trained()[0], nn.Linear(1, 1)))


def test_choosing_a_run(tmp_path: Path) -> None:
    first = choose_run(tmp_path, "model", "identity", "auto")
    assert first.checkpoint is None
    first.claim("identity")
    again = choose_run(tmp_path, "model", "identity", "auto")
    assert again.folder != first.folder, "a run without a checkpoint has nothing to continue"
    save(first.folder / "checkpoints", step=5)
    assert choose_run(tmp_path, "model", "identity", "auto").checkpoint is None, "the folder is in use"
    os.close(first.lock or -1)
    found = choose_run(tmp_path, "model", "identity", "auto")
    assert found.folder == first.folder and found.checkpoint is not None and found.checkpoint.progress.step == 5
    os.close(found.lock or -1)
    assert choose_run(tmp_path, "model", "other", "auto").checkpoint is None
    assert choose_run(tmp_path, "model", "identity", "never").checkpoint is None
    write_atomically(first.folder / "metrics.json", "{}")
    assert choose_run(tmp_path, "model", "identity", "auto").checkpoint is None
    by_name = choose_run(tmp_path, "model", "other", str(first.folder))
    assert by_name.folder == first.folder and by_name.checkpoint is not None
    os.close(by_name.lock or -1)
    by_checkpoint = choose_run(tmp_path, "model", "other", str(first.folder / "checkpoints" / "step-00000005"))
    assert (by_checkpoint.folder, by_checkpoint.checkpoint) == (by_name.folder, by_name.checkpoint)
    with pytest.raises(CheckpointError, match="no such folder"):
        choose_run(tmp_path, "model", "identity", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="without checkpoints"):
        choose_run(tmp_path, "model", "identity", str(tmp_path / "empty"))
    assert newest_run(tmp_path, "identity") == first.folder and newest_run(tmp_path, "other") is None


def test_a_finished_runs_best_checkpoint_is_the_one_to_use(tmp_path: Path) -> None:
    run = Run(tmp_path, None)
    save(tmp_path / "checkpoints", step=3, best_step=3)
    save(tmp_path / "checkpoints", step=9, best_step=3)
    assert find_checkpoint(tmp_path).progress.step == 9
    write_atomically(run.folder / "metrics.json", "{}")
    assert find_checkpoint(tmp_path).progress.step == 3
    assert find_checkpoint(tmp_path, prefer_best=False).progress.step == 9


def test_items_are_copied_once_and_linked(tmp_path: Path) -> None:
    source = tmp_path / "items.parquet"
    source.write_bytes(b"items")
    folder = CheckpointFolder(tmp_path / "checkpoints")
    paths = [folder.save(*trained(), Progress(step=s, kept_steps=[1]), "", {}, [source]) for s in (1, 2)]
    assert [(p / "items.parquet").read_bytes() for p in paths] == [b"items"] * 2
    assert (paths[0] / "items.parquet").stat().st_ino == (paths[1] / "items.parquet").stat().st_ino
    assert folder.steps() == [1, 2]


def test_a_run_that_goes_on_with_other_files_has_them_in_its_checkpoints(tmp_path: Path) -> None:
    items, places = tmp_path / "items.parquet", []
    for step, content in enumerate((b"one", b"two", b"two")):
        items.write_bytes(content)
        progress = Progress(step=step, kept_steps=[0, 1, 2])
        places.append(CheckpointFolder(tmp_path / "run").save(*trained(), progress, "", {}, [items]))
    assert [(place / items.name).read_bytes() for place in places] == [b"one", b"two", b"two"]


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=1)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("generative_recommenders.training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000002: No space left on device \(\d+ MB free\); earlier files"):
        save(tmp_path, step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_run_on_a_full_disk_ends_with_one_line(tmp_path: Path) -> None:
    """The system itself refuses to write more than 20 kB to a file, at whatever layer that happens."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from tests.toy import write_toy_dataset
write_toy_dataset(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = ["main.py", "--device=cpu", {f"--data_dir={tmp_path}"!r}, {f"--exps_dir={tmp_path / 'exps'}"!r}]
for binding in ("dataset_name = 'toy'", "main_module = 'SASRec'", "num_epochs = 2", "max_sequence_length = 12",
                "item_embedding_dim = 64"):
    sys.argv.append(f"--gin_bindings=train_fn.{{binding}}")
import main
from generative_recommenders.errors import run_cli
run_cli(main.main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert "cannot write" in line and "step-" in line
    (folder,) = tmp_path.glob("exps/*/*/checkpoints")
    assert not [p for p in folder.iterdir() if p.is_dir()]


def test_metrics_lines_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    from generative_recommenders.training.reporting import Reporter

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"epoch": e}) + "\n" for e in (0, 1, 2)) + '{"epoch": 1, "cut sh')
    Reporter(tmp_path, first_step=4, first_epoch=2).close()
    assert [json.loads(x)["epoch"] for x in path.read_text().splitlines()] == [0, 1]
