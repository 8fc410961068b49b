"""What a grid remembers: `<out>/grid.json`, one record a run by fingerprint, and the locks that keep others out.

`<out>/runs/<run id>/` is the `--exps_dir` of one run; `.lock` in it is held by the run's process itself, so that one
which outlives a killed grid is waited for instead of being started a second time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from generative_recommenders.errors import one_line
from generative_recommenders.grid.plan import GridRun
from generative_recommenders.grid.sweep import GridError
from generative_recommenders.training.checkpoint import disk_error, write_atomically
from generative_recommenders.training.reporting import METRICS_FINAL, METRICS_LINES
from generative_recommenders.training.runs import lock_folder

FORMAT = 1
WAITING, RUNNING, FINISHED, FAILED, INTERRUPTED = "waiting", "running", "finished", "failed", "interrupted"
_STATUSES = (WAITING, RUNNING, FINISHED, FAILED, INTERRUPTED)


@dataclass
class Record:
    """A run that was started.

    `folder` is that of its `metrics.json`, relative to `<out>`; `before` are the folders that had one, of a failed
    attempt, when it was started last; `starts` counts its starts.
    """

    id: str
    config: str
    bindings: list[str]
    seed: int | None
    status: str = WAITING
    error: str = ""
    folder: str = ""
    before: list[str] = field(default_factory=list)
    starts: int = 0


class Store:
    """The records of one `--out`; every change is on disk before the next step is taken."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "grid.json"
        self.records = self._read()

    def _read(self) -> dict[str, Record]:
        known = {item.name for item in fields(Record)}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise GridError(f"{self.path}: got format {content['format']}, expected {FORMAT}; try another --out")
            records = {key: Record(**value) for key, value in content["runs"].items() if value.keys() <= known}
            if len(records) < len(content["runs"]) or any(r.status not in _STATUSES for r in records.values()):
                raise ValueError("an entry is not a run's")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, GridError):
                raise
            raise GridError(
                f"{self.path}: cannot be read: {one_line(error)}; move it away or try another --out"
            ) from error
        return records

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other grids out of the folder.

        Raises:
            GridError: another one is there.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise disk_error(error, self.out) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
                raise GridError(
                    f"--out {self.out}: another grid (process {holder or 'unknown'}) is running there; "
                    "wait for it or choose another --out"
                ) from error
            os.truncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            # Another grid may have gone on between the first look and the lock.
            self.records = self._read()
            yield
        finally:
            os.close(handle)

    def exps_dir(self, run: GridRun) -> Path:
        record = self.records.get(run.fingerprint)
        return self.out / "runs" / (record.id if record else run.id)

    def status(self, run: GridRun) -> str:
        """What is left to do: a run that was running when its grid was killed is an interrupted one."""
        if run.broken:
            return FAILED
        record = self.records.get(run.fingerprint)
        if record is None:
            return WAITING
        if record.status == FINISHED and final_metrics(self.out / record.folder) is None:
            # Somebody removed it: what is left continues.
            return WAITING
        return INTERRUPTED if record.status == RUNNING else record.status

    def error(self, run: GridRun) -> str:
        record = self.records.get(run.fingerprint)
        return run.broken or (record.error if record else "")

    def change(self, run: GridRun, **changes: Any) -> Record:
        """Note `changes` of fields of the run's record, which is made where there is none."""
        record = self.records.setdefault(run.fingerprint, Record(run.id, run.config, list(run.bindings), run.seed))
        for name, value in changes.items():
            setattr(record, name, value)
        content = {"format": FORMAT, "runs": {key: asdict(value) for key, value in self.records.items()}}
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        return record

    def run_lock(self, run: GridRun) -> int | None:
        """An open file that locks the run's folder for whoever inherits it; None where a process holds it."""
        folder = self.exps_dir(run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        return lock_folder(folder)

    def with_metrics(self, run: GridRun) -> list[str]:
        """Folders of the run with final metrics, relative to `<out>`, oldest first."""
        found = self.exps_dir(run).glob(f"*/*/{METRICS_FINAL}")
        in_order = sorted(found, key=lambda path: path.stat().st_mtime)
        return [path.parent.relative_to(self.out).as_posix() for path in in_order if final_metrics(path.parent)]

    def new_metrics(self, run: GridRun) -> str:
        """The folder with final metrics that the last start of the run made, "" where there is none."""
        record = self.records.get(run.fingerprint)
        made = [] if record is None else [name for name in self.with_metrics(run) if name not in record.before]
        return made[-1] if made else ""

    def folder(self, run: GridRun) -> Path | None:
        """Where the run's curves are: the finished folder, or the newest one there is."""
        record = self.records.get(run.fingerprint)
        if record is not None and record.folder:
            return self.out / record.folder
        found = self.exps_dir(run).glob(f"*/*/{METRICS_LINES}")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        return newest.parent if newest else None


def final_metrics(folder: Path) -> Mapping[str, Any] | None:
    """Content of `metrics.json`, None where it cannot be read."""
    try:
        content = json.loads((folder / METRICS_FINAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("metrics"), dict) else None
