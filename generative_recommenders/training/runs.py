"""Where runs live, `<exps>/<dataset>-l<max_sequence_length>/<description>-<date>-<time>/`, and which to continue."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from generative_recommenders.data.folders import lock_file
from generative_recommenders.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    disk_error,
    write_atomically,
)
from generative_recommenders.training.reporting import METRICS_FINAL

_IDENTITY = "run.json"
_LOCK = ".lock"
# What `metrics.json` of a finished run is called once the run is extended.
_FINISHED_BEFORE = "metrics-before-resume.json"


@dataclass(frozen=True)
class Run:
    """A run's folder and, where it continues one, the checkpoint it starts from.

    `lock` is an open file that keeps other processes out of the folder for as long as this one lives.
    """

    folder: Path
    checkpoint: Checkpoint | None
    lock: int | None = None

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.folder / "checkpoints")

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.lock is not None:
            os.close(self.lock)

    def claim(self, identity: str) -> None:
        """Note whose run it is, so that `resume = "auto"` recognizes it, and that it is not finished (any more)."""
        if _identity_of(self.folder) != identity:
            write_atomically(self.folder / _IDENTITY, json.dumps({"identity": identity}) + "\n")
        if (self.folder / METRICS_FINAL).exists():
            os.replace(self.folder / METRICS_FINAL, self.folder / _FINISHED_BEFORE)


def choose_run(group: Path, description: str, identity: str, resume: str) -> Run:
    """The run to continue or a new one, by `train_fn.resume`.

    `identity` is equal for two launches of the same config on the same data; "auto" continues the newest unfinished run
    of that identity which has a checkpoint and is not being written by another process. The run returned is locked.

    Raises:
        CheckpointError: `resume` names a folder without a checkpoint or one in use, or no folder can be created.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path
        checkpoint = find_checkpoint(path, prefer_best=False)
        lock = lock_folder(folder)
        if lock is None:
            raise CheckpointError(f"train_fn.resume: run {folder} is being written by another process; wait or stop it")
        return Run(folder, checkpoint, lock)
    if resume == "auto":
        # The folder name ends with its date and time, and names of one identity share the rest.
        for folder in sorted(_unfinished(group, identity), reverse=True):
            latest = CheckpointFolder(folder / "checkpoints").latest()
            lock = lock_folder(folder) if latest is not None else None
            if lock is not None:
                # Read again: until the lock was ours, another process may have gone on.
                return Run(folder, CheckpointFolder(folder / "checkpoints").latest(), lock)
    try:
        return _new_run(group, f"{description}-{datetime.now():%Y-%m-%d-%H%M%S}")
    except OSError as error:
        raise disk_error(error, group) from error


def _new_run(group: Path, name: str) -> Run:
    """A folder that did not exist before."""
    group.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = group / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return Run(folder, None, lock_folder(folder))


def lock_folder(folder: Path) -> int | None:
    """An open file that locks `folder` until nobody has it open any more, or None where another process holds it."""
    try:
        return lock_file(folder / _LOCK)
    except OSError as error:
        raise disk_error(error, folder / _LOCK) from error


def _identity_of(folder: Path) -> str | None:
    try:
        identity: str = json.loads((folder / _IDENTITY).read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity


def _unfinished(group: Path, identity: str) -> list[Path]:
    folders = (note.parent for note in group.glob(f"*/{_IDENTITY}"))
    return [f for f in folders if _identity_of(f) == identity and not (f / METRICS_FINAL).exists()]


def newest_run(group: Path, identity: str | None = None) -> Path | None:
    """The newest run folder with a checkpoint, of one identity or of any."""
    candidates = []
    for folder in group.glob("*/"):
        if not CheckpointFolder(folder / "checkpoints").steps():
            continue
        if identity is not None and _identity_of(folder) != identity:
            continue
        candidates.append(folder)
    return max(candidates, key=lambda folder: folder.stat().st_mtime, default=None)


def newest_finished(group: Path, identity: str) -> Path | None:
    """The newest run that went to its end, of one identity but on any number of ranks."""
    computed = identity.rpartition("-w")[0]
    folders = (note.parent for note in group.glob(f"*/{_IDENTITY}"))
    finished = [
        folder
        for folder in folders
        if (_identity_of(folder) or "").rpartition("-w")[0] == computed and (folder / METRICS_FINAL).exists()
    ]
    return max(finished, key=lambda folder: (folder / METRICS_FINAL).stat().st_mtime, default=None)


def find_checkpoint(path: Path, prefer_best: bool = True) -> Checkpoint:
    """A checkpoint directory itself, or the latest of a run folder; the best of a finished run if `prefer_best`.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(
            f"checkpoint {path}: no such folder; expected a run folder or one of its checkpoints/step-*"
        )
    if (path / "state.json").exists():
        return Checkpoint.open(path)
    folder = CheckpointFolder(path / "checkpoints")
    latest = folder.latest()
    if latest is None:
        raise CheckpointError(
            f"checkpoint {path}: got a folder without checkpoints, "
            "expected a run folder or one of its checkpoints/step-*"
        )
    best = latest.progress.best_step
    if prefer_best and best is not None and (path / METRICS_FINAL).exists() and folder.path(best).exists():
        return Checkpoint.open(folder.path(best))
    return latest
