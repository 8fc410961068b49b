"""Read-only access to raw files, whether they lie in a zip archive, in a folder, or are one file.

Nothing is ever unpacked to disk: members are read straight from the archive, so an entry that would escape its folder
cannot do harm, and is refused all the same because an archive that holds one is not the published file.
"""

import fnmatch
import hashlib
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa

from generative_recommenders.data.errors import DataError


class RawFiles:
    """The raw files of one dataset.

    Args:
        path: a zip archive, a folder that holds the extracted files (directly or one folder down), or a single file.
        sha256: expected checksums by file name; a name that is absent is read without a check.
    Raises:
        DataError: `path` is absent, is no readable archive, or holds an entry that points outside of its folder.
    """

    def __init__(self, path: Path, sha256: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._expected = dict(sha256 or {})
        self._seen: dict[str, str] = {}
        self._archive: zipfile.ZipFile | None = None
        if not self.path.exists():
            raise DataError(
                f"raw file {self.path}: no such file or folder; check --raw, or leave it out where there is a download"
            )
        if self.path.is_file() and self.path.suffix.lower() == ".zip":
            self._archive = _open_archive(self.path)

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file read so far, by file name."""
        return dict(self._seen)

    def where(self, name: str) -> str:
        """How messages name the file `name`: inside its archive or folder."""
        return str(self.path) if self.is_single_file else f"{self.path}/{name}"

    @property
    def is_single_file(self) -> bool:
        """Whether the path is itself the one raw file: no archive and no folder."""
        return self._archive is None and self.path.is_file()

    def has(self, name: str) -> bool:
        """Whether a file of this name is there."""
        return self._find(name) is not None

    def names(self, pattern: str) -> list[str]:
        """Distinct names of the files that match a shell pattern, sorted."""
        return sorted({path.name for path in self._paths() if fnmatch.fnmatchcase(path.name, pattern)})

    def folders(self, name: str) -> list[str]:
        """Folders that hold a file of this name, relative to `path`, sorted; `read` takes the file of the first."""
        return sorted(str(path.parent) for path in self._paths() if path.name == name)

    def read(self, name: str) -> pa.Buffer:
        """Whole content of the file `name`; a plain file is memory-mapped.

        Raises:
            DataError: the file is absent, empty, damaged, or differs from the expected checksum.
        """
        found = self._find(name)
        if found is None:
            raise DataError(f"{self.path}: {name} is missing; try the complete archive of the dataset")
        try:
            buffer = self._read_found(found)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
            raise DataError(f"{self.where(name)}: truncated or damaged ({error}); download it again") from error
        if buffer.size == 0:
            raise DataError(f"{self.where(name)}: got an empty file, expected events or items; get the file again")
        digest = hashlib.sha256(buffer).hexdigest()
        expected = self._expected.get(name)
        if expected is not None and digest != expected:
            raise DataError(
                f"{self.where(name)}: got SHA-256 {digest}, expected {expected}; the file is not the published one, "
                "download it again"
            )
        self._seen[name] = digest
        return buffer

    def _read_found(self, found: Path | zipfile.ZipInfo) -> pa.Buffer:
        if isinstance(found, zipfile.ZipInfo):
            assert self._archive is not None
            return pa.py_buffer(self._archive.read(found))
        # An empty file cannot be mapped.
        if found.stat().st_size == 0:
            return pa.py_buffer(b"")
        return pa.memory_map(str(found)).read_buffer()

    def _paths(self) -> list[PurePosixPath]:
        """Where files may be found, relative to `path`."""
        if self._archive is not None:
            return [PurePosixPath(info.filename) for info in self._archive.infolist() if not info.is_dir()]
        if self.is_single_file:
            return [PurePosixPath(self.path.name)]
        files = (path for pattern in ("*", "*/*") for path in self.path.glob(pattern) if path.is_file())
        return [PurePosixPath(path.relative_to(self.path).as_posix()) for path in files]

    def _find(self, name: str) -> Path | zipfile.ZipInfo | None:
        if self._archive is not None:
            entries = [info for info in self._archive.infolist() if PurePosixPath(info.filename).name == name]
            return min(entries, key=lambda info: info.filename.count("/"), default=None)
        if self.is_single_file:
            return self.path if self.path.name == name else None
        candidates = [self.path / name, *sorted(self.path.glob(f"*/{name}"))]
        return next((candidate for candidate in candidates if candidate.is_file()), None)


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{path}: truncated or not a zip archive ({error}); download it again") from error
    for info in archive.infolist():
        name = PurePosixPath(info.filename.replace("\\", "/"))
        escapes = name.is_absolute() or ".." in name.parts or bool(PureWindowsPath(info.filename).drive)
        if escapes or stat.S_ISLNK(info.external_attr >> 16):
            archive.close()
            raise DataError(f"{path}: entry {info.filename!r} points outside of its folder; use the published archive")
    return archive
