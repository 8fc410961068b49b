"""Download of large public files: progress, resume, retries; the target is whole or absent."""

import http.client
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import write_failure

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18
_RETRIED_STATUSES = (408, 416, 429, 500, 502, 503, 504)


class _RefusedError(Exception):
    """The server's answer will not change: another attempt is pointless."""


def download(
    urls: Sequence[str],
    target: Path,
    *,
    attempts: int = 4,
    timeout: float = 20.0,
    pause: float = 1.0,
    progress: bool = True,
    remedy: str = "name it with --raw=FILE",
) -> None:
    """Fetch the first of `urls` that answers into `target`.

    Bytes go to `<target>.part`, which a later call continues (HTTP Range) and which is renamed only when the announced
    length has arrived.

    Args:
        attempts: tries for each url; each continues where the one before stopped.
        timeout: seconds without a byte before a try is given up.
        pause: seconds before the second try, doubled for each further one.
        remedy: what the error tells the user to do with a file fetched by other means.
    Raises:
        DataError: no url delivered the whole file, or it cannot be written.
    """
    part = target.with_name(target.name + ".part")
    failures: list[str] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(write_failure(target.parent, error)) from error
    for url in urls:
        for attempt in range(attempts):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            try:
                _continue(url, part, timeout, progress)
                part.replace(target)
                return
            except _RefusedError as error:
                failures.append(f"{url}: {error}")
                break
            except (OSError, http.client.HTTPException) as error:
                logger.info("download of %s, attempt %d of %d: %s", url, attempt + 1, attempts, error)
                if attempt == attempts - 1:
                    failures.append(f"{url}: {error} after {attempts} attempts")
    raise DataError(f"download failed: {'; '.join(failures)}; fetch the file by other means and {remedy}")


def _continue(url: str, part: Path, timeout: float, progress: bool) -> None:
    """One try: append what is missing to `part`, or start over where the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # The part is as long as the file or longer; only the next try, from zero, can tell which.
            part.unlink()
        if error.code not in _RETRIED_STATUSES:
            raise _RefusedError(f"HTTP status {error.code} {error.reason}") from error
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            raise _RefusedError(f"host not found ({error.reason})") from error
        raise
    with response:
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        # Here, so that reading local files needs no package for progress bars.
        from tqdm import tqdm

        # None hides the bar where stderr is no terminal.
        disable = None if progress else True
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=disable) as bar:
            _append(part, iter(lambda: response.read(_CHUNK_BYTES), b""), bar, fresh=not have)
    received = part.stat().st_size
    if total is not None and received != total:
        raise ConnectionError(f"connection closed after {received} of {total} bytes")


def _append(part: Path, chunks: Iterator[bytes], bar: "tqdm", *, fresh: bool) -> None:
    """Write `chunks` to `part`; a failing disk is the user's to mend, a failing network is left to the next try."""
    try:
        file = part.open("wb" if fresh else "ab")
    except OSError as error:
        raise DataError(write_failure(part, error)) from error
    with file:
        for chunk in chunks:
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise DataError(write_failure(part, error)) from error
            bar.update(len(chunk))
