"""Whether an op may be timed: its tests must be green on the device, and are run once for the same code.

    python benchmarks/verification.py [--device cuda] [--op NAME] [--jobs 2]

tests every op, or those named, several at a time, prints what is red with its log, and exits with 1 where anything is.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ops.native import cache_folder

ROOT = Path(__file__).resolve().parents[1]
_LOG_LINES = 80


def _test_files(op: str) -> list[Path]:
    """test_<op>.py, and what is set apart from it as test_<op>_<part>.py."""
    folder = ROOT / "tests" / "ops"
    return [folder / f"test_{op}.py", *sorted(folder.glob(f"test_{op}_*.py"))]


def _folder() -> Path:
    return cache_folder() / "tested"


def stamp(op: str, device: str) -> Path:
    """The file whose presence says that this very code passed the op's tests on this device."""
    own = [ROOT / "tests" / "conftest.py", *sorted((ROOT / "tests" / "ops").glob("[!t]*.py")), *_test_files(op)]
    code = [path for path in (ROOT / "ops").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    digest = hashlib.sha256(f"{name} {torch.__version__} {sys.version}\n".encode())
    for path in sorted(code) + [path for path in own if path.exists()]:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return _folder() / f"{op}-{device}-{digest.hexdigest()[:16]}"


def verify(op: str, device: str) -> str | None:
    """Run the op's tests on the device unless this code passed them before; why the op cannot be timed, or None."""
    green = stamp(op, device)
    if green.exists():
        return None
    if importlib.util.find_spec("pytest") is None:
        return f"{op}: its tests cannot run, pytest is not installed; try pip install -r requirements-dev.txt"
    # The options of the project name plugins that may be absent here.
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts=--import-mode=importlib -rfE"]
    command = [sys.executable, "-m", "pytest", *options, "-m", "gpu" if device == "cuda" else "not gpu"]
    done = subprocess.run([*command, *map(str, _test_files(op))], cwd=ROOT, capture_output=True, text=True)
    _folder().mkdir(parents=True, exist_ok=True)
    if done.returncode == 0:
        green.touch()
        return None
    log = _log(op, device)
    log.write_text(done.stdout + done.stderr)
    lines = log.read_text().splitlines()
    red = [line for line in lines if line.startswith(("FAILED ", "ERROR "))] or lines[-1:]
    return "\n  ".join([f"{op}: its tests are red on {device}, status {done.returncode}, all of it in {log}", *red])


def _log(op: str, device: str) -> Path:
    return _folder() / f"{op}-{device}.log"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="ops tested at a time, default: %(default)s")
    parser.add_argument("--op", action="append", help="default: every op")
    arguments = parser.parse_args()
    ops = arguments.op or sorted(path.parent.name for path in (ROOT / "ops").glob("*/__init__.py"))
    count = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for op, red in zip(ops, pool.map(functools.partial(verify, device=arguments.device), ops), strict=True):
            print(f"{op}: green on {arguments.device}" if red is None else red, flush=True)
            if red is not None:
                count += 1
                log = _log(op, arguments.device)
                print("\n".join(log.read_text().splitlines()[-_LOG_LINES:]) if log.exists() else "", flush=True)
    print(f"{len(ops) - count} ops green, {count} red")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
