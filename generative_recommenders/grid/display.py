"""A grid while it runs: a table drawn again in place on a terminal, elsewhere one line for each change of status."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from generative_recommenders.grid import store as s
from generative_recommenders.grid.schedule import Display, State

_REDRAW_SECONDS = 0.5
# What a screen too small for all runs shows first.
_URGENCY = (s.RUNNING, s.FAILED, s.INTERRUPTED, s.WAITING, s.FINISHED)


def display(stream: TextIO) -> Display:
    """The display that suits the stream."""
    return Table(stream) if stream.isatty() else Lines(stream)


class Lines:
    """One line a change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: dict[str, str] = {}

    def show(self, states: Sequence[State]) -> None:
        for number, state in enumerate(states, start=1):
            before = self._shown.get(state.run.id)
            self._shown[state.run.id] = state.status
            if state.status == before or (before is None and state.status == s.WAITING):
                continue
            self.say(f"[{number}/{len(states)}] {' '.join(describe(state).split())}")

    def say(self, text: str) -> None:
        self._stream.write(printable(text, self._stream) + "\n")
        self._stream.flush()


class Table:
    """Drawn over itself with the terminal's cursor movements."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._height = 0
        self._drawn = -_REDRAW_SECONDS
        self._statuses: list[str] = []

    def show(self, states: Sequence[State]) -> None:
        statuses = [state.status for state in states]
        if statuses == self._statuses and time.monotonic() < self._drawn + _REDRAW_SECONDS:
            return
        width, height = shutil.get_terminal_size()
        lines = table_lines(states, max(20, width - 1), max(4, height - 2))
        up = f"\x1b[{self._height}F" if self._height else ""
        body = "".join(f"\x1b[2K{printable(line, self._stream)}\n" for line in lines)
        self._stream.write(f"{up}{body}\x1b[J")
        self._stream.flush()
        self._height, self._drawn, self._statuses = len(lines), time.monotonic(), statuses

    def say(self, text: str) -> None:
        self._stream.write(printable(text, self._stream) + "\n")
        self._stream.flush()
        # The table goes on below.
        self._height = 0


def table_lines(states: Sequence[State], width: int, height: int) -> list[str]:
    """At most `height` lines of `width` characters: the runs, the most urgent ones where not all fit, and a count."""
    counts = Counter(state.status for state in states)
    summary = ", ".join(f"{counts[status]} {status}" for status in _URGENCY if counts[status])
    shown = list(states)
    if len(shown) > height - 1:
        chosen = sorted(range(len(shown)), key=lambda place: _URGENCY.index(shown[place].status))[: height - 1]
        shown = [states[place] for place in sorted(chosen)]
        summary += f" ({len(shown)} of {len(states)} shown)"
    longest = max((len(state.run.title) for state in shown), default=0)
    title_width = max(10, min(longest, width // 2))
    return [*(describe(state, title_width)[:width] for state in shown), summary[:width]]


def describe(state: State, title_width: int = 0) -> str:
    """Status, seconds, title and the last line or the error of one run."""
    seconds = state.elapsed()
    elapsed = "" if seconds is None else clock(seconds)
    title = state.run.title
    if title_width and len(title) > title_width:
        # Both ends tell: the config and what varies.
        front = title_width // 2 - 1
        title = f"{title[:front]}..{title[front + 2 - title_width :]}"
    told = state.error if state.status == s.FAILED else state.line
    return f"{state.status:<11} {elapsed:>8}  {title:<{title_width}}  {told}".rstrip()


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str, stream: TextIO) -> str:
    """`text` without control characters and, where the stream cannot write a character, with `?` in its place."""
    plain = "".join(character if character.isprintable() or character == "\n" else " " for character in text)
    encoding = stream.encoding or "utf-8"
    return plain.encode(encoding, errors="replace").decode(encoding)
