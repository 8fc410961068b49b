"""Folders and files that appear complete or not at all, and the lock that keeps other processes out.

Content is written into `<folder>.partial-<pid>`, which then takes the folder's name by one rename. Where an older
folder is in the way Linux exchanges the two names in one step, so that a process killed at any moment leaves one.
What a killed process leaves beside it is cleared away by the next one that writes the same folder.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from generative_recommenders.data.errors import DataError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `folder` when the block ends well, and goes away otherwise.

    Raises:
        DataError: the disk is full or the place cannot be written; the message names path and free space.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
        partial.mkdir()
        yield partial
        for file in (path for path in partial.rglob("*") if path.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        replace_folder(partial, folder)
    except OSError as error:
        raise DataError(write_failure(partial, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes the place of `path` when the block ends well.

    Raises:
        DataError: the disk is full or the place cannot be written; the message names path and free space.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise DataError(write_failure(path, error, otherwise="choose another path")) from error
    finally:
        partial.unlink(missing_ok=True)


def lock_file(path: Path, *, wait: bool = False) -> int | None:
    """An open file that locks `path` until nobody has it open any more.

    None where another process holds it or the file system has no locks, unless told to wait. The file stays.

    Raises:
        OSError: it cannot be created, or locked when told to wait.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError) and not wait:
            return None
        raise
    return handle


def write_failure(path: Path, error: OSError, otherwise: str = "choose another --data_dir") -> str:
    """One line for an `OSError` on writing `path`: reason, free space, what to do, or else what."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free / 1e6
    advice = "free some space" if error.errno == errno.ENOSPC else "check that the folder may be written"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{path}: cannot write ({reason}), {free:,.0f} MB free; {advice} or {otherwise}"


def replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; what was there ends up at `new`."""
    if not target.exists():
        new.rename(target)
        return
    if sys.platform == "linux" and _exchange(new, target):
        return
    # Two renames, the first undone if the second fails or a signal arrives between them.
    old = new.with_name(f"{new.name}-old")
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    old.rename(new)


def _clear_leftovers(folder: Path) -> None:
    """Remove what processes that are gone have left of their attempts to write `folder`."""
    for path in list(folder.parent.iterdir()):
        found = re.fullmatch(rf"{re.escape(folder.name)}\.partial-([0-9]{{1,9}})(-old)?", path.name)
        if found is None or is_running(int(found[1])):
            continue
        if found[2] and not folder.exists():
            # Killed between the two renames: this is the only complete folder.
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether another process has this number; what is left under one's own number is an earlier process's."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(first: Path, second: Path) -> bool:
    at_cwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0)
