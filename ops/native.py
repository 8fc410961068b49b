"""Compiles the C++ CPU kernels on first use and loads them with ctypes.

The sources include nothing of PyTorch: functions take raw pointers and sizes. A build therefore takes seconds, needs
only a C++17 compiler with OpenMP, and cannot break on a PyTorch ABI. The shared library is cached under a name that
holds a hash of sources, flags, compiler and processor, and is written aside and renamed, so concurrent processes do
not meet; beside it stands its own hash, without which it is built anew. Without a compiler `library()` returns None,
`reason()` says why, and every op runs its reference.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Reductions are vectorised and products contracted, but NaN and infinity keep their meaning: a diverging run must show.
_FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -fPIC -shared -fno-math-errno -fno-trapping-math "
    "-fassociative-math -fno-signed-zeros -ffp-contract=fast -fvisibility=hidden"
).split()
_state: dict[Path, tuple[ctypes.CDLL | None, str]] = {}


def cache_folder() -> Path:
    """Where compiled kernels and tuning results are kept: GR_CACHE, else the user's cache folder."""
    root = os.environ.get("GR_CACHE") or os.environ.get("XDG_CACHE_HOME") or _home_cache()
    return Path(root) / "generative_recommenders"


@functools.cache
def _home_cache() -> str:
    try:
        return str(Path.home() / ".cache")
    except RuntimeError:
        # A user without a home, as in many containers: private, and gone with the machine's temporary files.
        return tempfile.mkdtemp(prefix="cache-")


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on; a cached library must not travel to a lesser processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))


@functools.cache
def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _openmp_runtime() -> list[str]:
    """PyTorch's own OpenMP library: both then share one pool of threads instead of two that spin against each other."""
    bundled = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return [str(bundled)] if bundled.exists() else []


def _build(source: Path) -> tuple[ctypes.CDLL | None, str]:
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler found (install g++ or set CXX)"
    text = source.read_bytes() + b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.rglob("*.h")))
    digest = hashlib.sha256(text)
    for part in (*_FLAGS, compiler, _processor(), *_openmp_runtime()):
        digest.update(part.encode())
    target = cache_folder() / "native" / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:16]}.so"
    checksum = target.with_suffix(".sha256")
    if not _is_whole(target, checksum):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / "built.so"
                include = f"-I{Path(__file__).parent}"
                command = [*shlex.split(compiler), *_FLAGS, include, str(source), *_openmp_runtime(), "-o", str(built)]
                logger.info("compiling %s of %s (once)", source.name, source.parent.name)
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if done.returncode != 0:
                    first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr[:200]).strip()
                    why = first or f"exit status {done.returncode}"
                    return None, f"{compiler} failed on {source.name} of {source.parent.name}: {why}"
                noted = Path(folder) / "noted"
                noted.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
                os.replace(built, target)
                os.replace(noted, checksum)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return None, f"could not compile {source.name} of {source.parent.name}: {error}"
    try:
        return ctypes.CDLL(str(target)), ""
    except OSError as error:
        return None, f"could not load {target.name}: {error}"


def _is_whole(target: Path, checksum: Path) -> bool:
    """Whether the library is the one that was built: half a library does not fail to load, it kills the process."""
    try:
        return hashlib.sha256(target.read_bytes()).hexdigest() == checksum.read_text()
    except OSError:
        return False


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled form of one .cpp file, built at most once a process, or None where it cannot be built."""
    if source not in _state:
        library, why = _build(source)
        if library is None:
            logger.warning("%s; the slower PyTorch reference runs instead", why)
        _state[source] = (library, why)
    return _state[source][0]


def require(source: Path) -> ctypes.CDLL:
    """`library(source)`; RuntimeError where it cannot be built, as for a model exported on a machine that could."""
    found = library(source)
    if found is None:
        raise RuntimeError(f"{source.parent.name}: {_state[source][1]}")
    return found


@torch.compiler.assume_constant_result
def reason(source: Path) -> str | None:
    """Why `library(source)` is None, or None where it is usable."""
    return None if library(source) is not None else _state[source][1]


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next tensor instead of giving it back to the system.

    A training step or an evaluation batch frees and takes the same few hundred megabytes again; by default each of them
    is mapped, zeroed page by page and unmapped every time, a third of the time of an evaluation of MovieLens-1M. Does
    nothing where the C library has no `mallopt`.
    """
    trim_threshold, mmap_threshold, limit = -1, -3, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(trim_threshold, 2 * limit - 1)
    mallopt(mmap_threshold, limit)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous CPU tensor (null for None); the caller keeps the tensor alive during the call."""
    if tensor is None:
        return ctypes.c_void_p(0)
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())
