"""Where runs live, `<exps>/<dataset>-l<max_sequence_length>/<description>-<date>-<time>/`, and which to continue."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from generative_recommenders.training.checkpoint import Checkpoint, CheckpointError, CheckpointFolder
from generative_recommenders.training.reporting import METRICS_FINAL

_IDENTITY = "run.json"


@dataclass(frozen=True)
class Run:
    """A run's folder and, where it continues one, the checkpoint it starts from."""

    folder: Path
    checkpoint: Checkpoint | None

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.folder / "checkpoints")

    def claim(self, identity: str) -> None:
        """Create the folder and note whose run it is, so that `resume = "auto"` recognizes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _IDENTITY).write_text(json.dumps({"identity": identity}) + "\n")


def choose_run(group: Path, description: str, identity: str, resume: str) -> Run:
    """The run to continue or a new one, by `train_fn.resume`.

    `identity` is equal for two launches of the same config on the same data; "auto" continues the newest unfinished run
    of that identity which has a checkpoint.

    Raises:
        CheckpointError: `resume` names a folder without a checkpoint.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path
        return Run(folder, find_checkpoint(path, prefer_best=False))
    if resume == "auto":
        for folder in sorted(_unfinished(group, identity), reverse=True):
            checkpoint = CheckpointFolder(folder / "checkpoints").latest()
            if checkpoint is not None:
                return Run(folder, checkpoint)
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = group / f"{description}-{stamp}"
    number = 1
    while folder.exists():
        number += 1
        folder = group / f"{description}-{stamp}-{number}"
    return Run(folder, None)


def _unfinished(group: Path, identity: str) -> list[Path]:
    found = []
    for note in group.glob(f"*/{_IDENTITY}"):
        try:
            same = json.loads(note.read_text())["identity"] == identity
        except (ValueError, KeyError, TypeError):
            continue
        if same and not (note.parent / METRICS_FINAL).exists():
            found.append(note.parent)
    # Newest last: the folder name ends with its date and time, and names of one identity share the rest.
    return sorted(found)


def newest_run(group: Path, identity: str | None = None) -> Path | None:
    """The newest run folder with a checkpoint, of one identity or of any."""
    candidates = []
    for folder in group.glob("*/"):
        if not CheckpointFolder(folder / "checkpoints").steps():
            continue
        note = folder / _IDENTITY
        if identity is not None and not (note.exists() and json.loads(note.read_text()).get("identity") == identity):
            continue
        candidates.append(folder)
    return max(candidates, key=lambda folder: folder.stat().st_mtime, default=None)


def find_checkpoint(path: Path, prefer_best: bool = True) -> Checkpoint:
    """A checkpoint directory itself, or the latest of a run folder; the best of a finished run if `prefer_best`.

    Raises:
        CheckpointError: there is none.
    """
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
