"""Runs a grid's runs, one process each, and keeps the records true whatever happens to them or to the grid.

Runs are sessions of their own, so that a Ctrl-C reaches the grid alone, which sends them SIGTERM: the train loop then
saves a checkpoint and leaves with status 0 and without `metrics.json`. That is an interrupted run, and the next grid in
the same folder continues it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from generative_recommenders.config import REPOSITORY_ROOT
from generative_recommenders.grid import store as s
from generative_recommenders.grid.output import Output
from generative_recommenders.grid.plan import GridRun
from generative_recommenders.grid.store import Store

_CHILD = Path(__file__).with_name("child.py")
_POLL_SECONDS = 0.1
_SAME_SIGNAL_SECONDS = 0.3
# What a run leaves with after a SIGTERM or SIGINT of ours, a kill included.
_STOPPED = (0, 130, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)


@dataclass(frozen=True)
class Options:
    """How runs are run: `gpus` are values of CUDA_VISIBLE_DEVICES, one taken by each of `jobs` places in turn.

    With a `checkpoint` it is evaluated under the config of each run, instead of a training.
    """

    data_dir: Path
    jobs: int = 1
    gpus: Sequence[str] = ()
    retry_failed: bool = False
    timeout_minutes: float | None = None
    checkpoint: Path | None = None
    # How long a run may take to save its checkpoint once it is asked to stop.
    grace_seconds: float = 30.0


@dataclass
class State:
    """A run on the screen."""

    run: GridRun
    status: str
    error: str = ""
    line: str = ""
    began: float | None = None
    ended: float | None = None

    def elapsed(self) -> float | None:
        """Seconds since this grid started the run, None where it did not."""
        return None if self.began is None else (self.ended or time.monotonic()) - self.began


class Display(Protocol):
    """Shows the states; called several times a second."""

    def show(self, states: Sequence[State]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass
class _Process:
    state: State
    process: subprocess.Popen[bytes]
    output: Output
    place: int
    deadline: float | None
    timed_out: bool = False


class Grid:
    """The runs of one grid in one locked store."""

    def __init__(
        self,
        runs: Sequence[GridRun],
        store: Store,
        options: Options,
        display: Display,
        command: Sequence[str] = (sys.executable, "main.py"),
    ) -> None:
        self.store = store
        self.options = options
        self.display = display
        self.command = list(command)
        self.states = [State(run, store.status(run), store.error(run)) for run in runs]
        self._processes: list[_Process] = []
        self._stopping = False
        self._signals = 0
        self._last_signal = -_SAME_SIGNAL_SECONDS

    @property
    def stopped(self) -> bool:
        """Whether a signal asked the grid to end."""
        return self._signals > 0

    def run(self, ended: Callable[[State], None] = lambda state: None) -> None:
        """Run what is left to run, calling `ended` after each; a signal ends it early, see `stopped`."""
        for state in self.states:
            again = state.status == s.FAILED and self.options.retry_failed and not state.run.broken
            if state.status == s.INTERRUPTED or again:
                state.status = s.WAITING
        with self._listening():
            try:
                while not self.stopped:
                    for state in (*self._collect(), *self._start()):
                        ended(state)
                    self.display.show(self.states)
                    if not self._processes and all(state.status != s.WAITING for state in self.states):
                        return
                    time.sleep(_POLL_SECONDS)
            finally:
                if self._processes:
                    self._stop()
                self.display.show(self.states)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            # Some senders reach the process and then its group: two at once are one.
            if time.monotonic() > self._last_signal + _SAME_SIGNAL_SECONDS:
                self._signals += 1
                self._last_signal = time.monotonic()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # nohup has SIGHUP ignored, a shell without job control SIGINT of its background commands, and so it stays.
        replaced = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)

    def _start(self) -> list[State]:
        """Fill the free places; returns the runs that turn out to be finished."""
        finished: list[State] = []
        taken = {process.place for process in self._processes}
        free = [place for place in range(self.options.jobs) if place not in taken]
        for state in self.states:
            if not free or self.stopped:
                break
            if state.status != s.WAITING:
                continue
            lock = self.store.run_lock(state.run)
            if lock is None:
                state.line = "a process of an earlier grid is still running it; waiting for its end"
                continue
            try:
                if self._was_running(state) and self.store.new_metrics(state.run):
                    # It went on to its end after its grid was killed.
                    self._end(state, s.FINISHED)
                    finished.append(state)
                else:
                    self._spawn(state, free.pop(0), lock)
            finally:
                os.close(lock)
        return finished

    def _was_running(self, state: State) -> bool:
        record = self.store.records.get(state.run.fingerprint)
        return record is not None and record.status == s.RUNNING

    def _spawn(self, state: State, place: int, lock: int) -> None:
        run = state.run
        exps_dir = self.store.exps_dir(run)
        record = self.store.records.get(run.fingerprint)
        self.store.change(
            run,
            config=run.config,
            bindings=list(run.bindings),
            status=s.RUNNING,
            error="",
            folder="",
            before=self.store.with_metrics(run),
            starts=1 + (record.starts if record else 0),
        )
        arguments = [
            f"--gin_config_file={run.config}",
            *(f"--gin_bindings={binding}" for binding in run.bindings),
            f"--data_dir={self.options.data_dir}",
            f"--exps_dir={exps_dir}",
        ]
        if self.options.checkpoint is not None:
            folder = exps_dir / "evaluations" / run.id
            arguments += ["--mode=evaluate", f"--checkpoint={self.options.checkpoint}", f"--record={folder}"]
        output = Output(exps_dir)
        with output.open() as (out, err):
            process = subprocess.Popen(
                [sys.executable, "-I", os.fspath(_CHILD), str(os.getpid()), *self.command, *arguments],
                cwd=REPOSITORY_ROOT,
                env=environment(os.environ, self.options, place),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                pass_fds=(lock,),
            )
        state.status, state.error, state.line = s.RUNNING, "", ""
        state.began, state.ended = time.monotonic(), None
        minutes = self.options.timeout_minutes
        deadline = None if minutes is None else state.began + 60 * minutes
        self._processes.append(_Process(state, process, output, place, deadline))

    def _collect(self) -> list[State]:
        """Look at the processes; returns the runs that have ended."""
        ended: list[State] = []
        for running in list(self._processes):
            status = running.process.poll()
            running.state.line = running.output.last_line() or running.state.line
            if status is not None:
                self._processes.remove(running)
                self._ended(running, status)
                ended.append(running.state)
            elif running.deadline is not None and time.monotonic() > running.deadline:
                if running.timed_out:
                    _kill_group(running.process)
                else:
                    running.process.terminate()
                    running.timed_out = True
                running.deadline = time.monotonic() + self.options.grace_seconds
        return ended

    def _ended(self, running: _Process, status: int) -> None:
        state = running.state
        if status == 0 and self.store.new_metrics(state.run):
            self._end(state, s.FINISHED)
        elif running.timed_out and status in _STOPPED:
            minutes = self.options.timeout_minutes
            self._end(state, s.FAILED, f"took more than --timeout_minutes={minutes:g}; --retry_failed continues it")
        elif status == 0 or (self._stopping and status in _STOPPED):
            self._end(state, s.INTERRUPTED)
        else:
            self._end(state, s.FAILED, running.output.error(status))

    def _end(self, state: State, status: str, error: str = "") -> None:
        state.status, state.error, state.ended = status, error, time.monotonic()
        folder = self.store.new_metrics(state.run) if status == s.FINISHED else ""
        self.store.change(state.run, status=status, error=error, folder=folder)

    def _stop(self) -> None:
        """Ask all runs to save and leave; kill those that do not, or all at a second signal."""
        self._stopping = True
        self.display.say(f"stopping: {len(self._processes)} runs save their checkpoints; once more kills them")
        for running in self._processes:
            running.process.terminate()
        deadline = time.monotonic() + self.options.grace_seconds
        try:
            while self._processes and time.monotonic() < deadline and self._signals < 2:
                self._collect()
                self.display.show(self.states)
                time.sleep(_POLL_SECONDS)
        finally:
            for running in self._processes:
                _kill_group(running.process)
            for running in self._processes:
                self._ended(running, running.process.wait())
            self._processes.clear()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment(inherited: Mapping[str, str], options: Options, place: int) -> dict[str, str]:
    """Environment of a run in one of the places: its GPU, or its share of the cores."""
    result = {**inherited, "PYTHONUNBUFFERED": "1"}
    if options.gpus:
        result["CUDA_VISIBLE_DEVICES"] = options.gpus[place % len(options.gpus)]
    elif options.jobs > 1:
        result.setdefault("OMP_NUM_THREADS", str(max(1, cores() // options.jobs)))
    return result


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
