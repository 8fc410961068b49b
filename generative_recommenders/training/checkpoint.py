"""Checkpoints: one directory each, whole or absent, with everything needed to go on or to rebuild the model.

`step-00000480/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` (progress, seeds, versions, dataset)
and `config.gin` (operative), and `items.parquet`, the map from item ids to raw ids. It is written under another name
and renamed, so a process killed at any moment leaves the earlier ones untouched. Nothing is pickled. All randomness
of a step derives from (seed, step), so progress is the generator state.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from generative_recommenders.data.folders import replace_folder
from generative_recommenders.errors import UserError

FORMAT_VERSION = 1
_PREFIX = "step-"
_FILES = ("model.safetensors", "state.json", "config.gin")
# Absent from an exported model, which nothing resumes.
_OPTIMIZER = "optimizer.safetensors"


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or used here."""


@dataclass
class Progress:
    """Where a run stands: `batch` batches of `epoch` are done, `step` in all; an epoch ends with its evaluation."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_epoch: int | None = None
    stale_evaluations: int = 0
    kept_steps: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A directory on disk and its parsed `state.json`."""

    path: Path
    progress: Progress
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises CheckpointError where a file is missing or `state.json` is not ours."""
        for name in _FILES:
            if not (path / name).exists():
                raise CheckpointError(
                    f"checkpoint {path}: {name} is missing; expected a directory written by this project"
                )
        try:
            state = json.loads((path / "state.json").read_text())
            progress = Progress(**state["progress"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path}: cannot read state.json ({error})") from error
        if state.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {path}: got format {state.get('format')}, expected {FORMAT_VERSION}; "
                "try the version of this project that wrote it"
            )
        return cls(path, progress, state)

    def load_model(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        """Raises CheckpointError where names or shapes differ from the model's."""
        tensors = _read(self.path / "model.safetensors", device)
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        flexible: frozenset[str] = getattr(model, "flexible_buffers", frozenset())
        for name, value in tensors.items():
            if own.get(name) != tuple(value.shape) and name not in flexible:
                raise CheckpointError(
                    f"checkpoint {self.path}: {name} has shape {tuple(value.shape)}, expected {own.get(name)}; "
                    "was it trained with another config or dataset?"
                )
        missing = sorted(own.keys() - tensors.keys())
        if missing:
            raise CheckpointError(
                f"checkpoint {self.path}: {missing[0]} is missing; was it trained with another config?"
            )
        model.load_state_dict(tensors)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, device: torch.device | str = "cpu") -> None:
        tensors = _read(self.path / _OPTIMIZER, device)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _read(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint file {path}: cannot be read ({error})") from error


class CheckpointFolder:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Names of shared copies that are those of this process's files.
        self._compared: set[str] = set()

    def path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = (p.name for p in self.folder.iterdir() if p.is_dir())
        return sorted(
            int(n.removeprefix(_PREFIX)) for n in names if n.startswith(_PREFIX) and n[len(_PREFIX) :].isdigit()
        )

    def latest(self) -> Checkpoint | None:
        steps = self.steps()
        return Checkpoint.open(self.path(steps[-1])) if steps else None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        config: str,
        facts: dict[str, Any],
        extra_files: Sequence[Path] = (),
    ) -> Path:
        """Write a checkpoint of `progress.step`, then drop those that are neither latest, best nor kept."""
        target = self.path(progress.step)
        aside = self.folder / f".{target.name}.{os.getpid()}"
        try:
            self._discard_leftovers()
            aside.mkdir(parents=True)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, aside / "model.safetensors")
            save_file(_optimizer_tensors(optimizer), aside / _OPTIMIZER)
            (aside / "config.gin").write_text(config)
            for source in extra_files:
                self._copy_all(source, aside / source.name)
            state = {"format": FORMAT_VERSION, "progress": asdict(progress), **facts}
            (aside / "state.json").write_text(json.dumps(state, indent=1))
            _sync(aside)
            # A step can be saved twice: within its epoch and, with the evaluation's outcome, at the end of it.
            replace_folder(aside, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise disk_error(error, target) from error
        self._prune(progress)
        return target

    def _copy_all(self, source: Path, target: Path) -> None:
        """A file, or a folder of files."""
        if not source.is_dir():
            self._copy(source, target, source.name)
            return
        target.mkdir()
        for file in sorted(source.iterdir()):
            self._copy(file, target / file.name, f"{source.name}-{file.name}")

    def _copy(self, source: Path, target: Path, name: str) -> None:
        """Copied once a run; further checkpoints link to the first copy, so a large item map costs nothing.

        A run that goes on may do so with other files; those of the checkpoints before stay as they are.
        """
        shared = self.folder / name
        known = shared.exists() and (name in self._compared or filecmp.cmp(source, shared, shallow=False))
        self._compared.add(name)
        if not known:
            aside = self.folder / f".{name}.{os.getpid()}"
            shutil.copyfile(source, aside)
            os.replace(aside, shared)
        try:
            os.link(shared, target)
        except OSError:
            shutil.copyfile(shared, target)

    def _discard_leftovers(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.glob(".*step-*"):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, progress: Progress) -> None:
        wanted = {progress.step, progress.best_step, *progress.kept_steps}
        for step in self.steps():
            if step not in wanted:
                # Hidden first: a half-deleted directory must not look like a checkpoint.
                hidden = self.folder / f".removed-{_PREFIX}{step:08d}"
                os.rename(self.path(step), hidden)
                shutil.rmtree(hidden, ignore_errors=True)
        self._discard_leftovers()


def disk_error(error: OSError | SafetensorError, target: Path) -> CheckpointError:
    """A one-line account of a failed write."""
    folder = next((p for p in (target, *target.parents) if p.exists()), Path("."))
    free = shutil.disk_usage(folder).free
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error)
    full = number == errno.ENOSPC or "os error 28" in reason
    hint = (
        "free some space and start the same command again" if full else "check the folder, then start the same command"
    )
    return CheckpointError(
        f"cannot write {target}: {reason} ({free / 1e6:.0f} MB free); earlier files are intact; {hint}"
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value.contiguous() for index, entry in state.items() for key, value in entry.items()}


def _sync(folder: Path) -> None:
    """Force the files to disk: a power cut after the rename must not leave them empty."""
    for path in (file for file in folder.rglob("*") if file.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file as a whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, path) from error
