"""Files that replace those of the same name in a folder whose other files stay.

All are written into a folder beside them first (`folders.whole_folder`), then take their places by one rename each. One
file, named `last`, vouches for the others: the old one goes before anything is replaced, and the new one comes when all
the rest is in place. A process killed in between leaves a folder without it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder, write_failure

_STAGE = ".staged"


@contextmanager
def staged_files(folder: Path, *, last: str | None = None, obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder to write into; when the block ends well its files move to `folder`.

    Args:
        last: the file that makes the others valid.
        obsolete: names that are removed from `folder` before the new files come.
    Raises:
        DataError: the disk is full or the place cannot be written; the message names path and free space.
    """
    stage = folder / _STAGE
    with whole_folder(stage) as partial:
        yield partial
    try:
        for name in (*([last] if last else []), *obsolete):
            (folder / name).unlink(missing_ok=True)
        for file in sorted(stage.iterdir(), key=lambda path: (path.name == last, path.name)):
            os.replace(file, folder / file.name)
        stage.rmdir()
    except OSError as error:
        raise DataError(write_failure(folder, error)) from error
