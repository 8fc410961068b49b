"""What a run's process prints: `output.txt` and `stderr.txt` of its folder, read for its last line and error."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 64_000


class Output:
    """The output of one start; what earlier starts have printed stays in front of it in the same files."""

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "output.txt", folder / "stderr.txt"
        self._seen, self._err_from = _size(self._out), _size(self._err)
        self._last = ""

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Both files, to be handed to the process."""
        with self._out.open("ab") as out, self._err.open("ab") as err:
            yield out, err

    def last_line(self) -> str:
        """The newest line that says how far the run is: an epoch's or the final one, or else any."""
        size = _size(self._out)
        if size > self._seen:
            lines = [line for line in _read(self._out, self._seen).splitlines() if line.strip()]
            telling = [line for line in lines if line.startswith(("epoch ", "TEST eval", "continuing "))]
            if telling or not self._last.startswith("epoch "):
                self._last = (telling or lines or [self._last])[-1].strip()
            self._seen = size
        return self._last

    def error(self, status: int) -> str:
        """Why the process left with `status`: its last `error:` line, its signal, or its last line on stderr."""
        lines = [line.strip() for line in _read(self._err, self._err_from).splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("error: ")]
        if own:
            return own[-1].removeprefix("error: ")
        if status < 0:
            return f"killed by {_signal_name(-status)}"
        return lines[-1] if lines else f"exit status {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, start: int) -> str:
    """Text from byte `start`, of a long one the end."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, _size(path) - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
