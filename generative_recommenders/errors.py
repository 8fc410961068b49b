"""Mistakes a user can correct, and how a command line reports them.

A `UserError` carries one line: `what: got X, expected Y; try Z`. A command prints that line and exits with status 2;
any other exception is a defect of this project and keeps its traceback.
"""

import functools
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, ParamSpec

P = ParamSpec("P")

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake in the user's files, bindings or flags; the message is one line that says what to change."""


def one_line(error: BaseException) -> str:
    """Message of `error` with all white space, line breaks included, folded into single spaces."""
    return " ".join(str(error).split())


def exit_on_user_error(main: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command's `main` so that a `UserError` becomes one line on stderr and exit status 2.

    Status 130 is returned on Ctrl-C. Every other exception passes through with its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.stderr.write(f"error: {one_line(error)}\n")
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130

    return wrapped


def stop_on_sigterm() -> None:
    """Let SIGTERM unwind the process (status 143), so that it removes what it has begun to write."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def run_cli(main: Callable[[], int]) -> NoReturn:
    """Run `main` and leave the process with its status; see `exit_on_user_error` for what a `UserError` does."""
    sys.exit(exit_on_user_error(main)())
